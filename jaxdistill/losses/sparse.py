# SPDX-License-Identifier: Apache-2.0
"""Soft targets from a teacher of whom only the largest probabilities were kept."""

import jax
import jax.numpy as jnp

from jaxdistill.losses.logits import Logits, Values, check_temperature
from jaxdistill.losses.numerics import (
    divergence,
    fixed,
    log_normalize,
    log_sum,
    promote,
)
from jaxdistill.types import TopK, is_concrete


def sparse_forward_kl(
    student: Logits, teacher: TopK, *, temperature=1.0, tail=True
) -> Values:
    """Temperature-scaled KL to a teacher given by its K largest probabilities.

    Both distributions become one over K + 1 outcomes, the K classes and anything else;
    its log-probabilities are divided by `T` and renormalised, and the value is
    `T^2 KL(teacher || student)`. At `T = 1` it is the part of the forward KL that the
    kept classes decide, never more than the whole; above 1 anything else weighs less
    than its classes would apart, and the value can be many times the whole. With
    `K = V` it is the forward KL at any temperature. Without the tail a student is not
    told how much to put on the K classes together: one with 96% of its mass elsewhere
    may score 0.

    Args:
      student: `[..., V]` logits of any float type.
      teacher: its K classes, all different, with log-probabilities at temperature 1
        (`types.TopK`); no gradient flows into it.
      temperature: `T > 0`, applied to both sides; may be traced.
      tail: whether everything else counts, as one outcome.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes do not fit, a class is kept that the student has not, or the
        temperature is not above 0. Ids that are traced cannot be looked at: there a
        class beyond the student's makes the value NaN.

    >>> import jax.numpy as jnp
    >>> log_probs = jnp.log(jnp.array([0.5]))
    >>> teacher = TopK(jnp.array([2]), log_probs, jnp.array(0.0))
    >>> value = sparse_forward_kl(jnp.zeros(4), teacher)
    >>> print(f"{value:.4f}")  # 1/2 log 2/3 + 1/2 log 2
    0.1438

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      section 2, for the dense form; the tail as one outcome is ours.
    """
    check_temperature(temperature)
    kept = teacher.ids.shape
    if kept[:-1] != student.shape[:-1] or kept != teacher.log_probs.shape:
        raise ValueError(
            f"sparse_forward_kl: ids of shape {kept} and log_probs of shape "
            f"{teacher.log_probs.shape} do not fit logits of shape {student.shape}"
        )
    if kept[-1] > student.shape[-1]:
        raise ValueError(
            f"sparse_forward_kl: the teacher keeps {kept[-1]} classes, the student has "
            f"only {student.shape[-1]}"
        )
    check_ids("sparse_forward_kl", student.shape[-1], teacher)
    log_p, log_q = fixed(teacher.log_probs), jax.nn.log_softmax(promote(student))
    head = jnp.take_along_axis(log_q, teacher.ids, axis=-1)
    if tail and kept[-1] < student.shape[-1]:
        others = jnp.put_along_axis(
            jnp.ones(student.shape, bool), teacher.ids, False, axis=-1, inplace=False
        )
        # Not 1 minus the head's mass: a small tail would be lost to rounding.
        head = jnp.concatenate([head, log_sum(log_q, others)[..., None]], -1)
        log_p = jnp.concatenate([log_p, _log_rest(log_p)[..., None]], -1)
    every = jnp.ones(log_p.shape, bool)
    log_p, log_q = (log_normalize(side / temperature, every) for side in (log_p, head))
    return divergence(log_p, log_q) * temperature**2


def check_ids(name: str, classes: int, teacher: TopK) -> None:
    """Raise ValueError at a kept class that the student has not.

    Under jit ids are traced, and nothing can be said.
    """
    if is_concrete(teacher.ids) and (largest := int(teacher.ids.max())) >= classes:
        raise ValueError(
            f"{name}: the teacher keeps class {largest}, the student has only "
            f"{classes} classes (parts.first_classes cuts whole logits, not ids)"
        )


def _log_rest(log_probs):
    """`log(1 - sum exp)`; -inf where the rest cannot be told from rounding."""
    rest = -jnp.expm1(jax.nn.logsumexp(log_probs, axis=-1))
    some = rest > 4 * jnp.finfo(rest.dtype).eps
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1)), -jnp.inf)
