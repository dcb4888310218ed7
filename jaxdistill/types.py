# SPDX-License-Identifier: Apache-2.0
"""What flows through the house: batches, model outputs and the training state."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

Batch = Mapping[str, Any]
"""A mapping of arrays whose first axis is the example.

`inputs`    an array, or a mapping of arrays for a model with several inputs
`labels`    `[B]` or `[B, L]` integers in `[0, C)`, also in padded rows
`mask`      `[B]` float, 1 for a real example, 0 for padding (a repeated valid row)
`index`     `[B]` integers, optional: the example's position in the data set
`labelled`  `[B]` float, optional: 0 where the label must not be used
`token_mask` `[B, L]` float, optional: 0 for tokens that do not count, beside those that
            are padding by the `attention_mask` `[B, L]` of the inputs
`teacher`   optional: a teacher's stored outputs for these examples (`store.read`)
`partner`   `[B]` integers and `share` `[B]` float, optional: the other label of a mixed
            image, and how much the first one weighs (`augment.mixup`)
"""

Array = jax.Array
Metrics = dict[str, tuple[Any, Any]]
"""`{name: (sum, count)}`: adds up over batches and devices before any division."""


class TopK(NamedTuple):
    """The K largest of V probabilities, as a store keeps them: free of temperature.

    Attributes:
      ids: `[..., K]` integers in `[0, V)`, all different.
      log_probs: `[..., K]`, log-softmax of the logits at temperature 1, over all V.
      logsumexp: `[...]`, what to add to get the logits back.
    """

    ids: Any
    log_probs: Any
    logsumexp: Any


@struct.dataclass
class Factored:
    """Logits not multiplied out: over a large vocabulary they need not all exist.

    Attributes:
      hidden: `[..., D]`, what the last layer gets.
      kernel: `[V, D]`, its matrix, a row for each class.
      bias: `[V]`, or None.
    """

    hidden: Any
    kernel: Any
    bias: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., V]`, of the logits."""
        return (*self.hidden.shape[:-1], self.kernel.shape[0])

    @property
    def ndim(self) -> int:
        """Axes of the logits."""
        return self.hidden.ndim

    def multiply(self) -> Array:
        """The logits `[..., V]`, at least float32."""
        dtype = jnp.promote_types(self.hidden.dtype, jnp.float32)
        logits = jnp.einsum(
            "...d,vd->...v", self.hidden, self.kernel, preferred_element_type=dtype
        )
        if self.bias is None:
            return logits
        return logits + jnp.broadcast_to(self.bias, logits.shape)


def whole_logits(logits: Any) -> Any:
    """The logits `[..., V]`: `Factored` ones multiplied out, others as they are."""
    return logits.multiply() if isinstance(logits, Factored) else logits


@struct.dataclass
class Outputs:
    """What every model returns.

    Attributes:
      logits: `[..., C]`, unnormalised, or `Factored`. An ensemble puts its members
        first, `[M, ..., C]`.
      hidden_states: hidden states by layer, a tuple of `[B, ..., D]`; of a stored
        teacher a mapping, of the layers that are stored.
      attentions: attention probabilities by layer, a tuple of `[B, H, L, S]`.
      projected: a student's hidden states at the teacher's width, by layer, None where
        there is no projection (see `models.with_projector`).
      extras: what else a model has, by name: a distillation token's logits, a text
        model's embeddings, queries, keys and values by layer.
    """

    logits: Any
    hidden_states: Any = ()
    attentions: Any = ()
    projected: Any = ()
    extras: Any = struct.field(default_factory=dict)


@struct.dataclass
class TrainState:
    """Everything that changes while a student trains. Arrays only.

    Attributes:
      step: `[]` int32, optimizer steps taken.
      params: the student's parameters.
      model_state: its other collections (BatchNorm's running statistics), or `{}`.
      opt_state: the optax state.
      rng: a typed key that never moves; steps fold their number into it.
    """

    step: Any
    params: Any
    model_state: Any
    opt_state: Any
    rng: Any


class Student(NamedTuple):
    """A model as the training step sees it: two pure functions.

    Attributes:
      init: `(rng, batch) -> (params, model_state)`.
      apply: `(params, model_state, batch, rng) -> (Outputs, model_state)`, in training
        mode.
    """

    init: Callable[[Array, Batch], tuple[Any, Any]]
    apply: Callable[[Any, Any, Batch, Array], tuple[Outputs, Any]]


Teacher = Callable[[Batch], Outputs]
"""A pytree that maps a batch to outputs in evaluation mode (see `teachers`)."""

Term = Callable[[Outputs, Outputs | None, Batch, Any], tuple[Array, Array]]
"""`(student, teacher, batch, step) -> (values, mask)`, two arrays of one shape."""

Objective = Callable[
    [Outputs, Outputs | None, Batch, Any], dict[str, tuple[Any, Array, Array]]
]
"""`(student, teacher, batch, step) -> {name: (weight, values, mask)}`."""


class Replica(NamedTuple):
    """What a step must know of the devices it runs on; only pmap needs other than this.

    Attributes:
      sum: adds a tree of arrays over the devices.
      key: a key of this device's own.
      devices: how many, each of which sees its own part of the batch.
    """

    sum: Callable[[Any], Any] = lambda tree: tree
    key: Callable[[Array], Array] = lambda rng: rng
    devices: int = 1


WHOLE = Replica()
"""The step sees the whole batch: jit on one device, or a mesh."""


def padding_mask(batch: Batch, shape: tuple[int, ...]) -> Array:
    """The mask of values of `shape`, `[B]` or `[B, L]`: real tokens of real examples.

    A text model's inputs say which tokens are padding in their `attention_mask`.
    """
    mask = broadcast_mask(truth(batch["mask"]), shape)
    inputs = batch.get("inputs")
    if len(shape) > 1 and isinstance(inputs, Mapping) and "attention_mask" in inputs:
        return mask * truth(inputs["attention_mask"])
    return mask


def token_mask(batch: Batch, shape: tuple[int, ...]) -> Array:
    """The mask of a term whose values have `shape`: `[B]`, or `[B, L]` for tokens.

    Of the real tokens (`padding_mask`) those that a batch's own `token_mask` counts.
    """
    mask = padding_mask(batch, shape)
    if len(shape) > 1 and "token_mask" in batch:
        return mask * truth(batch["token_mask"])
    return mask


def truth(mask: Array) -> Array:
    """A mask as 0 and 1, float32: it says what counts, and never how much."""
    return (mask > 0).astype(jnp.float32)


def broadcast_mask(mask: Array, shape: tuple[int, ...]) -> Array:
    """A `[B]` mask over values of `shape`, `[B, ...]`."""
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - 1)), shape)


def is_concrete(value) -> bool:
    """Whether a hyperparameter is a number now, not a value being traced."""
    return not isinstance(value, jax.core.Tracer)
