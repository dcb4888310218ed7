# SPDX-License-Identifier: Apache-2.0
"""Masked tokens, drawn anew in each step: a `prepare` as those of `augment`.

`mask_tokens` is BERT's task, `hide_tokens` leaves the task as it is.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.data.augment import Prepare
from jaxdistill.types import Array, Batch, token_mask


def mask_tokens(
    mask_id: int, vocab: int, special: Sequence[int], *, share: float = 0.15
) -> Prepare:
    """Hides some tokens, which the student is to tell from the others.

    Of the chosen tokens 80% become the mask, 10% a random word, 10% stay. The batch
    gains `labels`, the tokens as they were, and `token_mask`, 1 where one was chosen.
    Each token is chosen alone, where the paper's code takes a fixed number of each
    sentence: a batch may have none, and its term then counts 0. Padding, special tokens
    and what a `token_mask` of the batch leaves out are never chosen.

    Args:
      mask_id: of [MASK].
      vocab: V; a random word is any of `[0, V)`.
      special: ids that are no words, such as those of [CLS], [SEP] and [PAD].
      share: of the tokens, to be chosen.

    Raises:
      ValueError: an id outside the vocabulary, or a share outside 0 to 1.

    References:
      Devlin et al. 2019, BERT, section 3.1 (task 1) and appendix A.1.
    """
    special = tuple(int(i) for i in special)
    for i in (mask_id, *special):
        if not 0 <= i < vocab:
            raise ValueError(f"mask_tokens: id {i} is not in a vocabulary of {vocab}")
    _check(share, "mask_tokens")

    def prepare(batch: Batch, rng: Array) -> Batch:
        ids = batch["inputs"]["input_ids"]
        choice, way, other = jax.random.split(rng, 3)
        chosen = _some_words(batch, (mask_id, *special), share, choice)
        at = jax.random.uniform(way, ids.shape)
        random = jax.random.randint(other, ids.shape, 0, vocab, ids.dtype)
        hidden = jnp.where(at < 0.8, mask_id, jnp.where(at < 0.9, random, ids))
        hidden = jnp.where(chosen, hidden, ids).astype(ids.dtype)
        inputs = {**batch["inputs"], "input_ids": hidden}
        chosen = chosen.astype(jnp.float32)
        return {**batch, "inputs": inputs, "labels": ids, "token_mask": chosen}

    return prepare


def hide_tokens(mask_id: int, special: Sequence[int], *, share: float = 0.1) -> Prepare:
    """Puts the mask in place of some tokens; labels and all else stay as they are.

    A text of which a word is missing is another one, and a teacher says what it now
    means where its label may no longer be true. The paper hides whole words, and then
    cuts out pieces of the texts too.

    Args:
      mask_id: of [MASK].
      special: ids that are no words, such as those of [CLS], [SEP] and [PAD].
      share: of the tokens, to be hidden.

    Raises:
      ValueError: a share outside 0 to 1.

    References:
      Tang et al. 2019, Distilling Task-Specific Knowledge from BERT into Simple Neural
      Networks, section 3.3 (masking).
    """
    special = tuple(int(i) for i in special)
    _check(share, "hide_tokens")

    def prepare(batch: Batch, rng: Array) -> Batch:
        ids = batch["inputs"]["input_ids"]
        chosen = _some_words(batch, (mask_id, *special), share, rng)
        hidden = jnp.where(chosen, mask_id, ids).astype(ids.dtype)
        return {**batch, "inputs": {**batch["inputs"], "input_ids": hidden}}

    return prepare


def _some_words(batch: Batch, never: Sequence[int], share: float, rng: Array) -> Array:
    """`[B, L]`, where a token is chosen: each alone, of real ones that may be."""
    ids = batch["inputs"]["input_ids"]
    real = token_mask(batch, ids.shape) > 0
    word = jnp.isin(ids, jnp.array(never), invert=True)
    return real & word & jax.random.bernoulli(rng, share, ids.shape)


def _check(share: float, name: str) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} needs a share from 0 to 1, got {share}")
