# SPDX-License-Identifier: Apache-2.0
"""What a step is made of, kept with it: a compiled step cannot be looked into."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import optax

from jaxdistill.types import Array, Batch, Objective, Student, TrainState


class Recipe(NamedTuple):
    """What a step is made of: `make_train_step`'s arguments, kept with the step.

    A checkpoint must not be resumed by another step (`train.identity`), and a compiled
    one cannot be looked into. Of a sweep it is the first trial's, with all `trials`.
    """

    student: Student
    objective: Objective
    optimizer: optax.GradientTransformation
    augment: Callable[[Batch, Array], Batch] | None = None
    rollout: Callable[[TrainState, Batch, Array], Batch] | None = None
    micro_batches: int = 1
    bucket_lengths: tuple[int, ...] = ()
    dtype: Any = None
    trials: Mapping[str, Any] | None = None


def recipe_of(step: Any) -> Recipe | None:
    """The recipe of a step, scanned and compiled perhaps; None of a step of one's own.

    What `jax.jit`, `functools.partial` and `functools.wraps` make is looked through.
    """
    while step is not None:
        if (found := getattr(step, "recipe", None)) is not None:
            return found
        step = getattr(step, "__wrapped__", None) or getattr(step, "func", None)
    return None
