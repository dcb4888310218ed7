# SPDX-License-Identifier: Apache-2.0
"""GPT-2: a decoder of tokens, each predicted from those before it, or of classes."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.config import TransformerConfig, readable
from jaxdistill.models.transformer import (
    NORMAL,
    Blocks,
    KeyValues,
    embedding_dropout,
    layer_norm,
    outputs_of,
)
from jaxdistill.types import Array, Factored, Outputs


def gpt_config(
    vocab: int, width: int, depth: int, heads: int, **numbers
) -> TransformerConfig:
    """A size with GPT-2's other numbers: 1,024 positions, no token types, tanh GELU."""
    usual = {"positions": 1024, "types": 0, "epsilon": 1e-5, "activation": "gelu_new"}
    return TransformerConfig(vocab, width, depth, heads, **{**usual, **numbers})


GPT2 = gpt_config(50_257, 768, 12, 12)
"""The smallest published size: 124,439,808 parameters."""
DISTILGPT2 = replace(GPT2, depth=6)
"""Half its layers: 81,912,576 parameters."""


class Cache(NamedTuple):
    """The keys and values of the tokens so far, for generation.

    Attributes:
      layers: `KeyValues`, keys and values a tuple by layer of `[B, H, S, D / H]`.
      mask: `[B, S]`, 1 where a position holds a real token.
    """

    layers: KeyValues
    mask: Array


class GPT(nn.Module):
    """A decoder with causal attention.

    Attributes:
      size: the model's numbers.
      scan: see `transformer.Blocks`.
      remat: likewise.
      maps: likewise.
      factored: whether logits are `types.Factored`, for losses a part of the vocabulary
        at a time.

    References:
      Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section
      2.3.
    """

    size: TransformerConfig
    scan: bool = False
    remat: bool = False
    maps: bool = True
    factored: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Mapping[str, Array],
        mask=None,
        train: bool = False,
        cache: Cache | None = None,
    ) -> Outputs:
        """Logits `[B, L, V]`, those at position l predicting token l + 1.

        Args:
          inputs: `input_ids` `[B, L]`; `attention_mask` `[B, L]`, 0 for padding,
            `position_ids`, `[B, L]` or `[1, L]`, and `token_type_ids` `[B, L]`, tokens
            whose embeddings are added, may be missing.
          mask: the batch's; no layer here looks across examples.
          train: whether dropout is on.
          cache: the tokens before these; `extras["cache"]` then has these too. Of
            more than it has room for all logits are NaN.

        Returns:
          `hidden_states` after each layer, the last one after the last norm, as
          transformers returns it; `attentions`, and in `extras` `embeddings`,
          `queries`, `keys`, `values`, each a tuple by layer.

        Raises:
          ValueError: a sequence is longer than the positions, tokens are not `[B, L]`,
            or a mask, types or positions have another shape.
        """
        del mask
        size = self.size
        inputs = readable(inputs, size, size.vocab)
        ids = inputs["input_ids"]
        start = 0 if cache is None else cache.layers.length
        at = start + jnp.arange(ids.shape[1])
        places = inputs.get("position_ids", at[None])

        def table(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, size.width, embedding_init=NORMAL, name=name)

        words = table(size.vocab, "words")
        x = words(ids) + table(size.positions, "places")(places)
        if cache is not None:
            # dynamic_update_slice would move what does not fit back over earlier
            # tokens.
            x = jnp.where(at[-1] < cache.mask.shape[1], x, jnp.nan)
        if "token_type_ids" in inputs:
            x = x + words(inputs["token_type_ids"])
        embeddings = x = embedding_dropout(size)(x, train)
        real = inputs.get("attention_mask", jnp.ones(ids.shape, jnp.int32))
        if cache is not None:
            zero = jnp.zeros_like(start)
            new = real.astype(cache.mask.dtype)
            real = jax.lax.dynamic_update_slice(cache.mask, new, (zero, start))
        causal = jnp.arange(real.shape[1])[None] <= at[:, None]
        keep = causal[None, None] & (real[:, None, None] > 0)
        blocks = Blocks(size, True, self.scan, self.remat, self.maps, name="blocks")
        before = None if cache is None else cache.layers
        hidden_states, layers, after = blocks(x, keep, train, before)
        last = layer_norm(size, "norm")(hidden_states[-1])
        hidden_states = (
            hidden_states.at[-1].set(last) if self.scan else (*hidden_states[:-1], last)
        )
        outputs = outputs_of(embeddings, hidden_states, layers)
        end = words if size.tied else table(size.vocab, "end")
        logits = Factored(last, end.embedding) if self.factored else end.attend(last)
        outputs = outputs.replace(logits=logits)
        if cache is None:
            return outputs
        return outputs.replace(extras={**outputs.extras, "cache": Cache(after, real)})


class GPTClassifier(nn.Module):
    """A class for each sequence, from its last token.

    Attributes:
      decoder: see `GPT`. Its logits are no part of what is returned, and under `jit`
        not computed.
      num_classes: C.

    References:
      Radford et al. 2018, Improving Language Understanding by Generative Pre-Training,
      section 3.2.
    """

    decoder: GPT
    num_classes: int

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]`, of the last token that is no padding; else as `GPT`.

        Padding is what `attention_mask` says, as everywhere here, and without one there
        is none; transformers' own model takes every `pad_token_id` for padding.

        Raises:
          ValueError: the decoder has a last matrix of its own, for which there is no
            use; or see `GPT`.
        """
        del mask  # no layer here looks across examples
        if not self.decoder.size.tied:
            raise ValueError(
                "a classifier's decoder has no last matrix: Size(tied=True)"
            )
        outputs: Any = self.decoder(inputs, train=train)
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", jnp.ones(ids.shape, jnp.int32)) > 0
        last = jnp.argmax(jnp.where(real, jnp.arange(ids.shape[1])[None], 0), -1)
        at_last = jnp.take_along_axis(
            outputs.hidden_states[-1], last[:, None, None], 1
        )[:, 0]
        score = nn.Dense(
            self.num_classes, use_bias=False, kernel_init=NORMAL, name="score"
        )
        return outputs.replace(logits=score(at_last))


def empty_cache(
    size: TransformerConfig, batch: int, length: int, dtype=jnp.float32
) -> Cache:
    """A cache for so many sequences of at most so many tokens.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    if length > size.positions:
        raise ValueError(
            f"a cache of {length} tokens is longer than the model's {size.positions} "
            "positions"
        )
    # Heads before tokens: in the other order XLA copies all of it for every token.
    shape = (batch, size.heads, length, size.width // size.heads)
    keys, values = (
        tuple(jnp.zeros(shape, dtype) for _ in range(size.depth)) for _ in range(2)
    )
    layers = KeyValues(keys, values, jnp.zeros((), jnp.int32))
    return Cache(layers, jnp.zeros((batch, length), jnp.int32))
