# SPDX-License-Identifier: Apache-2.0
"""The numbers of a BERT or GPT-2, and inputs that fit them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_python": partial(nn.gelu, approximate=False),
    "gelu_10": lambda x: jnp.clip(nn.gelu(x, approximate=False), -10, 10),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_accurate": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "gelu_python_tanh": partial(nn.gelu, approximate=True),
    "gelu_fast": lambda x: x / 2 * (1 + jnp.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "hardswish": nn.hard_swish,
    "laplace": lambda x: (1 + jax.lax.erf((x - 0.707107) / (0.282095 * 2**0.5))) / 2,
    "leaky_relu": nn.leaky_relu,
    "linear": lambda x: x,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "relu": nn.relu,
    "relu2": lambda x: nn.relu(x) ** 2,
    "relu6": nn.relu6,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(nn.softplus(x)),
    "swish": nn.silu,
    "tanh": nn.tanh,
}
"""By the names that a Hugging Face configuration gives them."""


@dataclass(frozen=True)
class TransformerConfig:
    """The numbers of a text model.

    Attributes:
      vocab: V.
      width: D, of the hidden states.
      depth: layers.
      heads: H, a divisor of D.
      inner: width of the feed-forward networks, None for 4 D.
      positions: the longest sequence.
      types: token types (segments), 0 for none.
      epsilon: of the layer norms.
      activation: a name in `ACTIVATIONS`.
      dropout: rate after attention and feed-forward networks, and after embeddings.
      attention_dropout: rate on attention probabilities.
      embedding_dropout: rate after embeddings, None for `dropout`.
      scaled: whether attention scores are divided by the square root of D / H.
      scaled_by_layer: whether those of layer i, counted from 1, are also divided by i.
      tied: whether a language model's last matrix is that of the embeddings.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    inner: int | None = None
    positions: int = 512
    types: int = 2
    epsilon: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    embedding_dropout: float | None = None
    scaled: bool = True
    scaled_by_layer: bool = False
    tied: bool = True

    def __post_init__(self):
        for name in ("vocab", "width", "depth", "heads", "positions", "inner"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is at least 1, got {number}")
        if self.types < 0:
            raise ValueError(f"types is at least 0, got {self.types}")
        for name in ("dropout", "attention_dropout", "embedding_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate <= 1:
                raise ValueError(f"{name} lies in [0, 1], got {rate}")
        if self.width % self.heads:
            raise ValueError(
                f"{self.heads} heads do not divide a width of {self.width}"
            )
        activation(self.activation)


def activation(name: str) -> Callable[[Array], Array]:
    """The function of `ACTIVATIONS`.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def readable(
    inputs: Mapping[str, Array], size: TransformerConfig, types: int
) -> Mapping[str, Array]:
    """A text model's inputs, whose padding has rows in its tables, whatever it holds.

    A row that is not there is NaN, and would reach the real tokens as 0 times NaN. Real
    tokens stay as they are, but for numbers below 0: they are NaN too, and no row from
    the table's end.

    Args:
      inputs: see `bert.Encoder`.
      size: the model's numbers.
      types: rows of the token types' table.

    Raises:
      ValueError: a sequence is longer than the positions, tokens are not `[B, L]`, or
        a mask, types or positions have another shape.
    """
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise ValueError(f"input_ids are [B, L], got the shape {ids.shape}")
    if ids.shape[-1] > size.positions:
        raise ValueError(
            f"a sequence of {ids.shape[-1]} tokens is longer than the model's "
            f"{size.positions} positions"
        )
    for name in ("attention_mask", "token_type_ids", "position_ids"):
        shared = (1, ids.shape[1]) if name == "position_ids" else ids.shape
        if name in inputs and inputs[name].shape not in (ids.shape, shared):
            raise ValueError(
                f"{name} has the shape {inputs[name].shape}, and input_ids {ids.shape}"
            )
    rows = {
        "input_ids": size.vocab,
        "token_type_ids": types,
        "position_ids": size.positions,
    }
    known = dict(inputs)
    for name, count in rows.items():
        if name not in inputs:
            continue
        known[name] = numbers = rows_of(inputs[name], count)
        if "attention_mask" in inputs:
            padding = inputs["attention_mask"] == 0
            known[name] = jnp.where(padding, jnp.minimum(numbers, count - 1), numbers)
    return known


def rows_of(numbers: Array, count: int) -> Array:
    """Numbers of a table's rows; those below 0 are `count`, which is none.

    A table would take them for rows from its end.
    """
    numbers = jnp.asarray(numbers)
    # No narrow type, into which the count would wrap.
    numbers = numbers.astype(jnp.promote_types(numbers.dtype, jnp.int32))
    return jnp.where(numbers < 0, count, numbers)
