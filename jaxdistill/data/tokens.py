# SPDX-License-Identifier: Apache-2.0
"""Tokens of a batch on the device: masked anew in each step, cut behind the longest.

`mask_tokens` is BERT's task, `hide_tokens` leaves the task as it is. Padding of a whole
batch costs nothing where it is cut: that pays where a batch's texts are of like length,
see `data.Batches`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data.augment import Augment
from jaxdistill.types import Array, Batch, token_mask


def bucketed(function: Callable[[Batch], Any], to: Sequence[int]) -> Callable:
    """The function, of its batch cut to the shortest length that holds all its texts.

    Each length is compiled, and one of them runs. Over a vmapped batch all would.

    Args:
      function: its result's shapes are the same at each length, and padding does not
        matter to it, but for the draws of dropout.
      to: lengths in tokens, from 1 up; beside them there is always the whole. Without
        any the function is returned as it is.

    Returns:
      `batch -> result`; `batch["inputs"]` has `attention_mask` `[B, L]`.

    Raises:
      ValueError: a length below 1, or inputs without such a mask.
    """
    if not to:
        return function
    if min(to) < 1:
        raise ValueError(f"lengths to cut batches to start at 1, got {min(to)}")

    def call(batch: Batch) -> Any:
        mask = attention_mask_of(batch["inputs"])
        whole = mask.shape[1]
        sizes = [*sorted(size for size in set(to) if size < whole), whole]
        which = jnp.searchsorted(jnp.array(sizes), real_lengths(mask).max())
        branches = [
            lambda batch, size=size: function(cut_to(batch, size)) for size in sizes
        ]
        return jax.lax.switch(which, branches, batch)

    return call


def attention_mask_of(inputs: Any) -> Any:
    """The inputs' `attention_mask` `[B, L]`.

    Raises:
      ValueError: they have none.
    """
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        raise ValueError("bucket_lengths needs inputs with an attention_mask")
    return inputs["attention_mask"]


def real_lengths(mask: Any) -> Any:
    """Tokens of each text up to its last one, `[B]`, of a mask `[B, L]`.

    >>> real_lengths(np.array([[1, 0, 0, 0], [0, 1, 0, 0]]))
    array([1, 2])
    """
    return ((mask > 0) * np.arange(1, mask.shape[1] + 1)[None]).max(1)


def shortest_first(inputs: Any) -> np.ndarray:
    """The order of texts by their length; those of equal length stay as they are.

    Raises:
      ValueError: see `attention_mask_of`.
    """
    return np.argsort(
        real_lengths(np.asarray(attention_mask_of(inputs))), kind="stable"
    )


def cut_to(batch: Batch, length: int) -> Batch:
    """A batch's first tokens, of whatever it has by token.

    These are inputs `[B, L, ...]`, labels and masks `[B, L]`, and what is stored of a
    teacher's outputs on tokens, `[B, views, L, ...]`.
    """
    whole = attention_mask_of(batch["inputs"]).shape[1]

    def first(x: Array, axis: int) -> Array:
        by_token = x.ndim > axis and x.shape[axis] == whole
        return jax.lax.slice_in_dim(x, 0, length, axis=axis) if by_token else x

    parts = dict(batch)
    for name in {"inputs", "labels", "token_mask"} & set(batch):
        parts[name] = jax.tree.map(lambda x: first(x, 1), batch[name])
    stored = batch.get("teacher", {})
    # [B, views, C] of a text is one axis less than [B, views, L, C] of its tokens.
    if any(x.ndim > 3 for x in stored.values()):
        parts["teacher"] = {name: first(x, 2) for name, x in stored.items()}
    return parts


def mask_tokens(
    mask_id: int, vocab: int, special: Sequence[int], *, share: float = 0.15
) -> Augment:
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

    def augment(batch: Batch, rng: Array) -> Batch:
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

    return augment


def hide_tokens(mask_id: int, special: Sequence[int], *, share: float = 0.1) -> Augment:
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

    def augment(batch: Batch, rng: Array) -> Batch:
        ids = batch["inputs"]["input_ids"]
        chosen = _some_words(batch, (mask_id, *special), share, rng)
        hidden = jnp.where(chosen, mask_id, ids).astype(ids.dtype)
        return {**batch, "inputs": {**batch["inputs"], "input_ids": hidden}}

    return augment


def _some_words(batch: Batch, never: Sequence[int], share: float, rng: Array) -> Array:
    """`[B, L]`, where a token is chosen: each alone, of real ones that may be."""
    ids = batch["inputs"]["input_ids"]
    real = token_mask(batch, ids.shape) > 0
    word = jnp.isin(ids, jnp.array(never), invert=True)
    return real & word & jax.random.bernoulli(rng, share, ids.shape)


def _check(share: float, name: str) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} needs a share from 0 to 1, got {share}")
