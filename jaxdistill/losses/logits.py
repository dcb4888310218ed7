# SPDX-License-Identifier: Apache-2.0
"""Losses on logits: labels, soft targets and their relatives."""

import jax
import jax.numpy as jnp
import optax

from jaxdistill.types import Array


def cross_entropy(student: Array, labels: Array, *, label_smoothing=0.0) -> Array:
    """Cross-entropy with integer labels, optionally smoothed.

    `-(1 - e) log q[y] - e mean_c log q[c]` with `q = softmax(student)`, zero when the
    student puts all mass on the label and `e` is 0. Classes whose logit is -inf (a
    masked vocabulary) take no part in the mean.

    Args:
      student: `[..., C]` logits of any float type.
      labels: `[...]` integers in `[0, C)`.
      label_smoothing: `e` in `[0, 1]`; may be traced.

    Returns:
      `[...]` values in nats, at least float32.

    Raises:
      ValueError: the labels' shape is not the logits' without its last axis, or
        `label_smoothing` is outside `[0, 1]`.

    >>> import jax.numpy as jnp
    >>> print(cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1)))  # log 2
    0.6931472

    References:
      Szegedy et al. 2016, Rethinking the Inception Architecture, section 7 (smoothing).
    """
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"cross_entropy: labels of shape {labels.shape} do not fit logits of shape "
            f"{student.shape}; expected {student.shape[:-1]}"
        )
    student = _promote(student)
    # optax is right here at -inf logits and for any finite offset: logsumexp - z[y].
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels)
    if is_concrete(label_smoothing):
        if not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"label_smoothing must lie in [0, 1], got {label_smoothing}"
            )
        if label_smoothing == 0:
            return hard
    # optax's own smoothing multiplies -inf by a positive target, so the mean over the
    # classes that exist is taken here.
    log_q = jax.nn.log_softmax(student)
    exists = jnp.isfinite(log_q)
    spread = -jnp.where(exists, log_q, 0).sum(-1) / exists.sum(-1)
    return (1 - label_smoothing) * hard + label_smoothing * spread


def forward_kl(student: Array, teacher: Array, *, temperature=1.0) -> Array:
    """Temperature-scaled Kullback-Leibler divergence from teacher to student.

    `T^2 sum_c p[c] (log p[c] - log q[c])` with `p = softmax(teacher / T)` and
    `q = softmax(student / T)`: zero exactly when the two distributions are equal. Its
    gradient in the student's logits is `T (q - p)`. A class whose teacher probability
    is 0 adds 0, whatever the student's logit; a class with teacher mass that the
    student excludes (-inf) gives the true value, +inf, with a finite gradient.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, or the temperature is not above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(forward_kl(student, teacher).round(4))  # 3/4 log 3/2 + 1/4 log 1/2
    0.1308

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      section 2 (soft targets, and why the factor T^2).
    """
    _check_pair("forward_kl", student, teacher)
    check_temperature(temperature)
    teacher = jax.lax.stop_gradient(_promote(teacher))
    log_p = jax.nn.log_softmax(teacher / temperature)
    log_q = jax.nn.log_softmax(_promote(student) / temperature)
    # optax.kl_divergence is NaN at -inf student log-probabilities, its log-target form
    # at -inf teacher logits: both compute 0 * inf. The same classes are cut out of both
    # sides before the product, so that neither value nor gradient meets an infinity.
    p = jnp.exp(log_p)
    seen = p > 0
    gap = jnp.where(seen, log_p, 0) - jnp.where(seen, log_q, 0)
    return (p * gap).sum(-1) * temperature**2


def _promote(logits: Array) -> Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def is_concrete(value) -> bool:
    """Whether a hyperparameter is a number now, not a value being traced."""
    return not isinstance(value, jax.core.Tracer)


def check_temperature(temperature) -> None:
    """Raise ValueError unless a concrete temperature is above 0."""
    if is_concrete(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")


def _check_pair(name: str, student: Array, teacher: Array) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{name}: the student has {student.shape[-1]} classes, the teacher "
            f"{teacher.shape[-1]}; both must score the same classes in the same order"
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: student logits of shape {student.shape} and teacher logits of "
            f"shape {teacher.shape} differ"
        )
