# SPDX-License-Identifier: Apache-2.0
"""Small models: an MLP, a ConvNet, a bag of embeddings and a BiLSTM.

In a text model what lies in the padding changes nothing: it is read as token 0, and
never counted.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.config import rows_of
from jaxdistill.models.convolution import convolve
from jaxdistill.models.layers import Norm, halve, normalise, with_channels
from jaxdistill.models.transformer import NORMAL
from jaxdistill.types import Array, Outputs


class ConvNet(nn.Module):
    """3x3 convolution, ReLU and 2x2 max pooling per stage, then one hidden layer.

    Attributes:
      features: the channels of each stage.
      hidden: the width of the dense hidden layer.
      num_classes: C.
      norm: "batch" or "group" between convolution and ReLU, or None.
      dropout: dropout rate on the dense hidden layer.
      axis_name: the pmap axis that BatchNorm sums over, or None.
    """

    features: tuple[int, ...] = (32, 64)
    hidden: int = 128
    num_classes: int = 10
    norm: Norm | None = None
    dropout: float = 0.0
    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` from images `[B, H, W]` or `[B, H, W, channels]`.

        Hidden states: each stage's map after pooling, `[B, H / 2, W / 2, features[0]]`
        and so on (an odd last row or column is dropped), then the dense layer `[B,
        hidden]` after ReLU.
        """
        x = with_channels(inputs)
        hidden_states = []
        for width in self.features:
            # The norm's own bias follows: a second one would have no gradient.
            x = nn.Conv(
                width,
                (3, 3),
                padding=1,
                use_bias=self.norm is None,
                conv_general_dilated=convolve,
            )(x)
            if self.norm is not None:
                x = normalise(x, mask, train, self.norm, self.axis_name)
            x = halve(nn.relu(x))
            hidden_states.append(x)
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        hidden_states.append(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes)(x), tuple(hidden_states))


class MLP(nn.Module):
    """Dense layers with ReLU between them; `MLP((512, 256, 10))` has two hidden layers.

    Attributes:
      features: widths of all layers but the input, a tuple whose last is the classes.
      input_dropout: dropout rate on the flattened input.
      dropout: dropout rate on each hidden layer.
    """

    features: tuple[int, ...]
    input_dropout: float = 0.0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]` and the hidden layers after ReLU, from inputs `[B, ...]`."""
        del mask  # no layer here looks across examples
        x = inputs.reshape(inputs.shape[0], -1)
        x = nn.Dropout(self.input_dropout, deterministic=not train)(x)
        hidden_states = []
        for width in self.features[:-1]:
            x = nn.relu(nn.Dense(width)(x))
            hidden_states.append(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.features[-1])(x), tuple(hidden_states))


class BagOfEmbeddings(nn.Module):
    """The mean of a text's embeddings, then dense layers with ReLU between them.

    Without `hidden` it is fastText's linear classifier, but for its n-grams; with it a
    deep averaging network, but dropout is on numbers, not on whole words.

    Attributes:
      vocab: V.
      width: W, of the embeddings.
      num_classes: C.
      hidden: widths of the dense layers before the last.
      dropout: rate on the mean and on each hidden layer.

    References:
      Joulin et al. 2017, Bag of Tricks for Efficient Text Classification, section 2;
      Iyyer et al. 2015, Deep Unordered Composition Rivals Syntactic Methods, section 3.
    """

    vocab: int
    width: int
    num_classes: int
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]`; hidden states are the mean `[B, W]` and the dense layers.

        Args:
          inputs: `input_ids` `[B, L]`; `attention_mask` `[B, L]`, 0 for padding, may be
            missing.
          mask: not used.
          train: whether dropout is on.
        """
        del mask  # no layer here looks across examples
        ids, keep = _tokens(inputs, self.vocab)
        x = nn.Embed(self.vocab, self.width, embedding_init=NORMAL, name="words")(ids)
        weights = (keep / jnp.maximum(keep.sum(1, keepdims=True), 1)).astype(x.dtype)
        x = jnp.einsum("bl,blw->bw", weights, x)
        hidden_states = [x]
        for width in self.hidden:
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(nn.Dense(width)(x))
            hidden_states.append(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes)(x), tuple(hidden_states))


class BiLSTM(nn.Module):
    """A bidirectional LSTM, whose last states go through a dense layer with ReLU.

    Padding must be behind the text. The paper starts its embeddings from word2vec's;
    these start at random.

    Attributes:
      vocab: V.
      width: W, of the embeddings.
      hidden: H, of each direction.
      num_classes: C.
      dropout: rate on embeddings and on the dense layer.
      inner: D, width of the dense layer, None for H.

    References:
      Tang et al. 2019, Distilling Task-Specific Knowledge from BERT into Simple Neural
      Networks, section 3.1.
    """

    vocab: int
    width: int
    hidden: int
    num_classes: int
    dropout: float = 0.0
    inner: int | None = None

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[B, C]`; hidden states of tokens `[B, L, 2 H]`, of the text `[B, D]`.

        Args:
          inputs: `input_ids` `[B, L]`; `attention_mask` `[B, L]`, 0 for padding, which
            is behind the text, may be missing.
          mask: not used.
          train: whether dropout is on.

        Returns:
          The tokens' states are zero in the padding.
        """
        del mask
        ids, keep = _tokens(inputs, self.vocab)
        x = nn.Embed(self.vocab, self.width, embedding_init=NORMAL, name="words")(ids)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        forward, backward = (
            nn.RNN(nn.OptimizedLSTMCell(self.hidden, name=name))
            for name in ("forward", "backward")
        )
        both = nn.Bidirectional(forward, backward, return_carry=True)
        lengths = jnp.maximum(keep.sum(1), 1)
        # Of its own a cell starts in float32, and stays there.
        zeros = jnp.zeros((x.shape[0], self.hidden), x.dtype)
        start = ((zeros, zeros), (zeros, zeros))
        last, tokens = both(x, seq_lengths=lengths, initial_carry=start)
        tokens = jnp.where(keep[..., None], tokens, 0)
        # Each carry is a cell's memory and its output.
        x = jnp.concatenate([output for _, output in last], axis=-1)
        x = nn.relu(nn.Dense(self.inner or self.hidden, name="inner")(x))
        hidden_states = (tokens, x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return Outputs(nn.Dense(self.num_classes, name="classifier")(x), hidden_states)


def _tokens(inputs: Mapping[str, Array], vocab: int) -> tuple[Array, Array]:
    """Ids `[B, L]`, 0 in the padding, and which are the text's, boolean `[B, L]`."""
    ids = rows_of(inputs["input_ids"], vocab)
    keep = inputs.get("attention_mask", jnp.ones_like(ids)) > 0
    return jnp.where(keep, ids, 0), keep
