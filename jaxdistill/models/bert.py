# SPDX-License-Identifier: Apache-2.0
"""BERT and DistilBERT: an encoder, with a head for classes or for masked tokens."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.config import TransformerConfig, activation, readable
from jaxdistill.models.layers import Dropout
from jaxdistill.models.transformer import (
    NORMAL,
    Blocks,
    dense,
    embedding_dropout,
    layer_norm,
    outputs_of,
)
from jaxdistill.types import Array, Factored, Outputs

BERT_TINY, BERT_MINI, BERT_SMALL, BERT_MEDIUM, BERT_BASE = (
    TransformerConfig(30_522, width, depth, heads=width // 64)
    for depth, width in ((2, 128), (4, 256), (4, 512), (8, 512), (12, 768))
)
"""Published sizes of the uncased models: 4,385,920 to 109,482,240 parameters with the
pooler, without a head (Turc et al. 2019, Well-Read Students Learn Better, table 1)."""


class Encoder(nn.Module):
    """Embeddings and bidirectional layers, normalised after each sum.

    Attributes:
      size: the model's numbers.
      scan: see `transformer.Blocks`.
      remat: likewise.
      maps: likewise.

    References:
      Devlin et al. 2019, BERT, section 3.
    """

    size: TransformerConfig
    scan: bool = False
    remat: bool = False
    maps: bool = True

    def setup(self):
        size = self.size

        def table(rows: int) -> nn.Embed:
            return nn.Embed(rows, size.width, embedding_init=NORMAL)

        self.words, self.places = table(size.vocab), table(size.positions)
        if size.types:
            self.segments = table(size.types)
        self.norm = layer_norm(size)
        self.drop = embedding_dropout(size)
        self.blocks = Blocks(size, False, self.scan, self.remat, self.maps)

    def __call__(
        self, inputs: Mapping[str, Array], mask=None, train: bool = False
    ) -> Outputs:
        """Hidden states of tokens; there are no logits.

        Args:
          inputs: `input_ids` `[B, L]`; `attention_mask` `[B, L]`, 0 for padding,
            `token_type_ids` `[B, L]` and `position_ids`, `[B, L]` or `[1, L]`, may be
            missing.
          mask: the batch's; no layer here looks across examples.
          train: whether dropout is on.

        Returns:
          `hidden_states` after each layer, `attentions`, and in `extras` `embeddings`,
          `queries`, `keys`, `values`, each a tuple by layer.

        Raises:
          ValueError: a sequence is longer than the positions, tokens are not `[B, L]`,
            or a mask, types or positions have another shape.
        """
        del mask
        inputs = readable(inputs, self.size, self.size.types)
        ids = inputs["input_ids"]
        places = inputs.get("position_ids", jnp.arange(ids.shape[1])[None])
        x = self.words(ids) + self.places(places)
        if self.size.types:
            types = inputs.get("token_type_ids", jnp.zeros_like(ids))
            x = x + self.segments(types)
        x = self.drop(self.norm(x), train)
        keep = inputs.get("attention_mask")
        keep = None if keep is None else keep[:, None, None] > 0
        return outputs_of(x, *self.blocks(x, keep, train)[:2])


class BertClassifier(nn.Module):
    """A class for each sequence, from its first token.

    Attributes:
      encoder: see `Encoder`.
      num_classes: C.
      pool: between the two dense layers: tanh in BERT, ReLU in DistilBERT.
      dropout: rate before the second, None for that of the encoder.
    """

    encoder: Encoder
    num_classes: int
    pool: str = "tanh"
    dropout: float | None = None

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]`, and what `Encoder` returns."""
        del mask  # no layer here looks across examples
        outputs: Any = self.encoder(inputs, train=train)
        size = self.encoder.size
        pool = activation(self.pool)
        first = pool(dense(size.width, "pooler")(outputs.hidden_states[-1][:, 0]))
        rate = size.dropout if self.dropout is None else self.dropout
        first = Dropout(rate)(first, train)
        return outputs.replace(logits=dense(self.num_classes, "classifier")(first))


class BertMaskedLM(nn.Module):
    """A token for each position.

    Attributes:
      encoder: see `Encoder`.
      factored: see `gpt.GPT`.
    """

    encoder: Encoder
    factored: bool = False

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, L, V]`, and what `Encoder` returns."""
        del mask
        outputs: Any = self.encoder(inputs, train=train)
        size = self.encoder.size
        x = dense(size.width, "transform")(outputs.hidden_states[-1])
        x = layer_norm(size, "transform_norm")(activation(size.activation)(x))
        bias = self.param("bias", nn.initializers.zeros, (size.vocab,), jnp.float32)
        end = self.encoder.words
        if not size.tied:
            end = nn.Embed(size.vocab, size.width, embedding_init=NORMAL, name="end")
        if self.factored:
            return outputs.replace(logits=Factored(x, end.embedding, bias))
        return outputs.replace(logits=end.attend(x) + bias[None, None])
