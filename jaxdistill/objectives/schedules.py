# SPDX-License-Identifier: Apache-2.0
"""Weights and hyperparameters as functions of the step, that print as written.

    combine({"soft": (warm_up(1.0, steps=2000), soft_targets(temperature=4.0))})

Any `step -> number` will do, all of optax's schedules among them.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class _Line:
    start: float
    stop: float
    steps: int

    def __call__(self, step: Any) -> Any:
        done = jnp.minimum(step / self.steps, 1.0)
        return self.start + (self.stop - self.start) * done

    def __repr__(self) -> str:
        return f"anneal({self.start!r}, {self.stop!r}, steps={self.steps})"


def anneal(start: float, stop: float, *, steps: int):
    """From `start` to `stop` in a straight line over `steps` steps, then constant.

    A temperature may fall towards 1 so that the targets sharpen, or a weight fade.

    Raises:
      ValueError: `steps` is not above 0.

    >>> temperature = anneal(8.0, 1.0, steps=100)
    >>> temperature
    anneal(8.0, 1.0, steps=100)
    >>> print(temperature(50), temperature(200))
    4.5 1.0

    References:
      Jafari et al. 2021, Annealing Knowledge Distillation, section 3, for the idea: the
      teacher's logits are scaled there, under a squared error.
    """
    if not steps > 0:
        raise ValueError(f"a schedule needs at least 1 step, got {steps}")
    return _Line(start, stop, steps)


def warm_up(value: float, *, steps: int):
    """From 0 to `value` in a straight line over `steps` steps, then constant.

    Raises:
      ValueError: `steps` is not above 0.

    >>> print(warm_up(8.0, steps=100)(25))
    2.0

    References:
      Zhao et al. 2022, Decoupled Knowledge Distillation, section 4 (20 epochs of
      linear warm-up).
    """
    return anneal(0.0, value, steps=steps)
