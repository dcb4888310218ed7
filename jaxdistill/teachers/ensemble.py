# SPDX-License-Identifier: Apache-2.0
"""Teachers: pytrees that map a batch to `Outputs`, always in evaluation mode.

Their variables are an argument of the step, never part of the gradient, the optimizer
or the donated state. A finished student in evaluation mode is the same thing. Anything
callable that is registered as a pytree will do: an NNX or Equinox model too.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct

from jaxdistill.types import (
    Batch,
    Outputs,
    TopK,
    whole_logits,
)


@struct.dataclass
class Ensemble:
    """Several teachers at once: logits with a leading member axis, nothing else.

    `Factored` logits are multiplied out.
    """

    members: tuple[Any, ...]

    def __call__(self, batch: Batch) -> Outputs:
        logits = [whole_logits(member(batch).logits) for member in self.members]
        return Outputs(jnp.stack(logits))


@struct.dataclass
class MeanLogits:
    """Several teachers as one: the mean of their logits, nothing else.

    `Factored` logits are multiplied out.
    """

    members: tuple[Any, ...]

    def __call__(self, batch: Batch) -> Outputs:
        total = sum(whole_logits(member(batch).logits) for member in self.members)
        return Outputs(total / len(self.members))


@struct.dataclass
class Stored:
    """Outputs that were computed before: the batch brings them (see `cache`).

    `batch["teacher"]` holds `[B, views, ...]` arrays; of several views a `prepare`
    (`views.replay`) has chosen one. Hidden states are a mapping by layer, counted from
    0: how many the teacher has is not known, and no layer is the last.
    """

    def __call__(self, batch: Batch) -> Outputs:
        taught = {name: array[:, 0] for name, array in batch["teacher"].items()}
        if "logits" in taught:
            logits = taught["logits"]
        else:
            logits = TopK(taught["ids"], taught["log_probs"], taught["logsumexp"])
        names = [name for name in taught if name.startswith("hidden_")]
        return Outputs(logits, {int(name[7:]): taught[name] for name in names})


def ensemble(members: Sequence[Any]) -> Ensemble:
    """Several teachers of the same classes, their tempered probabilities averaged.

    Raises:
      ValueError: no members.
    """
    return Ensemble(_some(members))


def mean_logits(members: Sequence[Any]) -> MeanLogits:
    """Several teachers of the same classes, their logits averaged.

    Raises:
      ValueError: no members.
    """
    return MeanLogits(_some(members))


def _some(members: Sequence[Any]) -> tuple[Any, ...]:
    if not members:
        raise ValueError("an ensemble needs at least one teacher, got none")
    return tuple(members)
