# SPDX-License-Identifier: Apache-2.0
"""Teachers: pytrees that map a batch to `Outputs`, always in evaluation mode.

Their variables are an argument of the step, never part of the gradient, the optimizer
or the donated state. A finished student in evaluation mode is the same thing. Anything
callable that is registered as a pytree will do: an NNX or Equinox model too.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from jaxdistill.data import check_examples
from jaxdistill.models.apply import BoundModule
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.programs import of_teacher
from jaxdistill.teachers.views import StoredOutputs
from jaxdistill.types import Batch, Outputs, whole_logits


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


@struct.dataclass
class WithClasses:
    """A teacher of some of its classes, in the student's order; logits, nothing else.

    `Factored` logits are multiplied out.
    """

    teacher: Any
    classes: tuple[int, ...] = struct.field(pytree_node=False)

    def __call__(self, batch: Batch) -> Outputs:
        logits = whole_logits(self.teacher(batch).logits)
        if max(self.classes) >= logits.shape[-1]:
            raise ValueError(
                f"the teacher has {logits.shape[-1]} classes, and class "
                f"{max(self.classes)} was chosen"
            )
        return Outputs(logits[..., jnp.array(self.classes)])


def with_classes(teacher: Any, classes: Sequence[int]) -> WithClasses:
    """A teacher for a student whose classes are some of its own, or in another order.

    Args:
      teacher: see `teachers`.
      classes: which of the teacher's classes is each of the student's, in its order.

    Raises:
      ValueError: fewer than two, one twice, or one below 0; when it is called, one
        that the teacher has not.
    """
    chosen = tuple(int(c) for c in classes)
    if len(chosen) < 2 or len({*chosen}) < len(chosen) or min(chosen) < 0:
        raise ValueError(
            f"a student's classes are two or more different ones of its teacher's, got "
            f"{chosen}"
        )
    return WithClasses(teacher, chosen)


def _some(members: Sequence[Any]) -> tuple[Any, ...]:
    if not members:
        raise ValueError("an ensemble needs at least one teacher, got none")
    return tuple(members)


def with_logits(teacher: Any, examples: Mapping[str, Any]) -> dict[str, Any]:
    """Examples with a teacher's logits beside them, as `StoredTeacher` takes them.

    Of one forward pass over all, on the device where both are.

    Raises:
      DataError: as `data.check_examples`.
    """
    size = check_examples(examples, check_finite=False)
    batch = {**examples, "mask": np.ones(size, np.float32)}
    logits = jax.jit(lambda teacher, batch: teacher(batch).logits)(teacher, batch)
    model, program = fingerprints.of_model(teacher), of_teacher(teacher, examples)
    known = json.dumps({"model": model, "program": program})
    outputs = StoredOutputs({"logits": logits[:, None]}, teacher=known)
    return {**examples, "teacher": outputs}


def live(module: nn.Module, variables: Any) -> BoundModule:
    """A teacher that runs its forward pass in the student's step.

    Args:
      module: called as `module(inputs, mask=None, train=False) -> Outputs`.
      variables: `{"params": ..., "batch_stats": ...}`.
    """
    return BoundModule(variables, module)
