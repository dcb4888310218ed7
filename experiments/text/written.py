# SPDX-License-Identifier: Apache-2.0
"""What models write behind prompts, and how far from a teacher that is."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill import losses, models
from jaxdistill.types import Array, whole_logits


def continued(
    model: models.BoundModule, ids: Any, steps: int, rng: Array, size: int = 512
):
    """`[N, L + steps]` integers: prompts `[N, L]`, and what a model writes behind them.

    Raises:
      ValueError: the model's logits are not finite.
    """
    parts = []
    for i, (part, real) in enumerate(_in_parts(ids, size)):
        drawn = models.generate(
            model, {"input_ids": part}, jax.random.fold_in(rng, i), steps=steps
        )
        parts.append(np.asarray(drawn["input_ids"])[:real])
    written = np.concatenate(parts)
    if (written < 0).any():
        raise ValueError("the model cannot write: its logits are not finite")
    return written


def own_kl(
    student: models.BoundModule,
    teacher: models.BoundModule,
    prompts: Any,
    steps: int,
    rng: Array,
    size: int = 64,
) -> float:
    """KL from student to teacher by token, of what the student writes behind prompts.

    The mean over prompts and drawn tokens of `sum_c q[c] (log q[c] - log p[c])`, both
    distributions being those behind the same tokens. Over the student's draws it
    expects the divergence of the two distributions over continuations, divided by their
    tokens: what reverse KL on a student's own text lowers.

    Args:
      student: a live `models.GPT`, at temperature 1.
      teacher: of the same tokens.
      prompts: `[N, L]` integers.
      steps: tokens the student writes behind each.
      rng: a typed key; the same for all models that are compared.
      size: sequences whose logits exist at once.

    Returns:
      Nats.

    Raises:
      ValueError: the student's logits are not finite.
    """
    ids = continued(student, prompts, steps, rng)
    total = 0.0
    for part, real in _in_parts(ids, size):
        values = np.asarray(_reverse_kl(student, teacher, part[:, :-1]), np.float64)
        total += values[:real, -steps:].sum()
    return float(total / (len(ids) * steps))


@jax.jit
def _reverse_kl(student: Any, teacher: Any, ids: Array) -> Array:
    batch = {"inputs": {"input_ids": ids}, "mask": jnp.ones(len(ids))}
    logits = (whole_logits(model(batch).logits) for model in (student, teacher))
    return losses.reverse_kl(*logits)


def _in_parts(ids: Any, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows in parts of one shape, the last filled up with its own; its real rows."""
    for i in range(0, len(ids), size):
        part = ids[i : i + size]
        yield np.resize(part, (min(size, len(ids)), ids.shape[1])), len(part)
