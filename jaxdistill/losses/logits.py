# SPDX-License-Identifier: Apache-2.0
"""Losses on logits: labels, soft targets, divergences, and the logits themselves.

A class whose logit is -inf on both sides (a masked vocabulary) does not exist: values
and gradients are those of the classes that are left.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from jaxdistill.losses.numerics import (
    check_numbers,
    divergence,
    divide,
    fixed,
    promote,
)
from jaxdistill.types import Array, Factored, is_concrete, whole_logits

Logits = Float[Array, "*b c"]
Values = Float[Array, "*b"]


def cross_entropy(
    student: Logits, labels: Int[Array, "*b"], *, label_smoothing=0.0
) -> Values:
    """Cross-entropy with integer labels, optionally smoothed.

    `-(1 - e) log q[y] - e mean_c log q[c]` with `q = softmax(student)`, zero when the
    student puts all mass on the label and `e` is 0. Classes whose logit is -inf (a
    masked vocabulary) take no part in the mean.

    Args:
      student: `[..., C]` logits of any float type.
      labels: `[...]` integers in `[0, C)`; the value of any other, such as the -100
        with which some mark tokens that do not count, is NaN: a mask leaves it out.
      label_smoothing: `e` in `[0, 1]`; may be traced.

    Returns:
      `[...]` values in nats, at least float32.

    Raises:
      ValueError: the labels' shape is not the logits' without its last axis, there is
        one class, or `label_smoothing` is not one number in `[0, 1]`.

    >>> import jax.numpy as jnp
    >>> print(cross_entropy(jnp.array([0.0, 0.0]), jnp.array(1)))  # log 2
    0.6931472

    References:
      Szegedy et al. 2016, Rethinking the Inception Architecture, section 7 (smoothing).
    """
    check_labels("cross_entropy", student, labels)
    check_numbers("cross_entropy", label_smoothing=label_smoothing)
    student = promote(student)
    # optax is right here at -inf logits and for any finite offset: logsumexp - z[y].
    hard = optax.losses.softmax_cross_entropy_with_integer_labels(student, labels)
    hard = of_classes(hard, labels, student)
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


def forward_kl(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
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
      ValueError: shapes differ, there is one class, or the temperature is not one
        number above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(forward_kl(student, teacher).round(4))  # 3/4 log 3/2 + 1/4 log 1/2
    0.1308

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      section 2 (soft targets, and why the factor T^2).
    """
    log_q, log_p = tempered("forward_kl", student, teacher, temperature)
    return divergence(log_p, log_q) * temperature**2


def soft_cross_entropy(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
    """Cross-entropy with the teacher's tempered distribution, times `T^2`.

    `-T^2 sum_c p[c] log q[c]`, the forward KL plus `T^2` times the teacher's entropy:
    the same gradient, but no zero at a perfect match.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, there is one class, or the temperature is not one
        number above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(soft_cross_entropy(student, teacher))  # log 2, whatever the teacher says
    0.6931472

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      section 2 and equation 1.
    """
    log_q, log_p = tempered("soft_cross_entropy", student, teacher, temperature)
    p = jnp.exp(log_p)
    return -(p * jnp.where(p > 0, log_q, 0)).sum(-1) * temperature**2


def logit_mse(student: Logits, teacher: Logits) -> Values:
    """Mean over the classes of the squared difference of the logits.

    `mean_c (z[c] - v[c])^2`, zero exactly when the logits are equal: unlike a
    divergence it also sees a constant added to all of them. Infinite, with its
    gradient, where one side alone is -inf.

    Args:
      student: `[..., C]` logits `z` of any float type.
      teacher: `[..., C]` logits `v`; no gradient flows into them.

    Returns:
      `[...]` values in squared logits, at least float32.

    Raises:
      ValueError: shapes differ.

    >>> import jax.numpy as jnp
    >>> print(logit_mse(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))  # (1 + 4) / 2
    2.5

    References:
      Ba, Caruana 2014, Do Deep Nets Really Need to be Deep?, equation 1; Tang et al.
      2019, Distilling Task-Specific Knowledge from BERT, section 3.2 (sums over the
      classes there; here their mean).
    """
    check_pair("logit_mse", student, teacher)
    student, teacher = promote(student), fixed(teacher)
    exists = (student > -jnp.inf) | (teacher > -jnp.inf)
    gap = jnp.where(exists, student, 0) - jnp.where(exists, teacher, 0)
    return divide((gap**2).sum(-1), exists.sum(-1))


def check_softmax(name: str, logits: Any) -> None:
    """Raise ValueError at logits of one class, over which a softmax is always 1."""
    if logits.shape[-1] < 2:
        raise ValueError(
            f"{name}: the softmax over one class is always 1, and nothing would be "
            f"learned, got logits of shape {logits.shape}; for a yes-or-no task give "
            "two logits, [0, z], or take optax.losses.sigmoid_binary_cross_entropy in "
            "a term of your own, and logit_mse for a number"
        )


def check_temperature(temperature, name: str = "temperature") -> None:
    """Raise ValueError unless a temperature is one number, above 0 and finite."""
    check_numbers(name, temperature=temperature)
    if is_concrete(temperature) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if is_concrete(temperature) and not temperature < math.inf:
        raise ValueError(f"temperature must be finite, got {temperature}")


def check_labels(name: str, student: Array | Factored, labels: Array) -> None:
    """Raise ValueError unless there is one label for each row of logits."""
    check_softmax(name, student)
    if labels.shape != student.shape[:-1]:
        hint = ""
        if labels.shape == student.shape:
            hint = ": of one-hot labels take labels.argmax(-1)"
        raise ValueError(
            f"{name}: labels of shape {labels.shape} do not fit logits of shape "
            f"{student.shape}; expected {student.shape[:-1]}{hint}"
        )


def of_classes(values: Array, labels: Array, student: Array | Factored) -> Array:
    """The values where a label is a class; others are NaN, not those of some class."""
    # Of a narrow type: the number of classes would wrap into it.
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return jnp.where((labels >= 0) & (labels < student.shape[-1]), values, jnp.nan)


def check_classes(name: str, student: Any, teacher: Any) -> None:
    """Raise ValueError unless both sides' logits have as many classes."""
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"{name}: the student has {student.shape[-1]} classes, the teacher "
            f"{teacher.shape[-1]}; both must score the same classes in the same order "
            "(of a padded vocabulary objectives.first_classes takes those, and "
            "teachers.with_classes those of a teacher of more, in any order)"
        )


def check_pair(name: str, student: Array | Factored, teacher: Array | Factored) -> None:
    """Raise ValueError unless both sides' logits have one shape."""
    check_classes(name, student, teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: student logits of shape {student.shape} and teacher logits of "
            f"shape {teacher.shape} differ"
        )


def tempered(
    name: str, student: Array, teacher: Array, temperature
) -> tuple[Array, Array]:
    """Log-probabilities of student and teacher at the temperature, checked."""
    check_pair(name, student, teacher)
    check_softmax(name, student)
    check_temperature(temperature, name)
    return (
        jax.nn.log_softmax(promote(student) / temperature),
        jax.nn.log_softmax(fixed(teacher) / temperature),
    )


def mean_log_probs(logits: Array | Factored, ndim: int) -> Array:
    """Log-probabilities; over an ensemble's leading axis, of the mean probability.

    Args:
      logits: `[..., C]`, or `[M, ..., C]` with one axis more than `ndim`; `Factored`
        ones are multiplied out.
      ndim: how many axes a single model's logits have.
    """
    log_probs = jax.nn.log_softmax(promote(whole_logits(logits)))
    if logits.ndim == ndim:
        return log_probs
    return jax.nn.logsumexp(log_probs, axis=0) - math.log(logits.shape[0])


def reverse_kl(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
    """Temperature-scaled Kullback-Leibler divergence from student to teacher.

    `T^2 sum_c q[c] (log q[c] - log p[c])`, zero exactly when the two distributions are
    equal. It prefers one of the teacher's modes to covering them all. Student mass on a
    class that the teacher excludes (-inf) gives the true value, +inf; the gradient is
    then that of the other classes.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, there is one class, or the temperature is not one
        number above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(f"{reverse_kl(student, teacher):.4f}")  # 1/2 log 2/3 + 1/2 log 2
    0.1438

    References:
      Gu et al. 2024, MiniLLM: Knowledge Distillation of Large Language Models,
      section 2.1.
    """
    log_q, log_p = tempered("reverse_kl", student, teacher, temperature)
    lost = (log_q > -jnp.inf) & (log_p == -jnp.inf)
    values = divergence(log_q, jnp.where(lost, log_q, log_p))
    # Added: a choice between the two would cut the gradient.
    return (values + jnp.where(lost.any(-1), jnp.inf, 0)) * temperature**2


def generalized_jsd(
    student: Logits, teacher: Logits, *, beta=0.5, temperature=1.0
) -> Values:
    """Generalized Jensen-Shannon divergence between teacher and student.

    `T^2 (beta KL(p || m) + (1 - beta) KL(q || m))` with `m = beta p + (1 - beta) q`:
    zero exactly when the two distributions are equal, never above `T^2 log 2`. Over
    `beta` it tends to the forward KL as `beta -> 0`, over `1 - beta` to the reverse KL
    as `beta -> 1`; the divergence itself tends to 0 at both ends.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      beta: the teacher's share of the mixture, `0 < beta < 1`; may be traced.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, there is one class, the temperature is not one number
        above 0, or `beta` is not one between 0 and 1.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([9.0, -jnp.inf]), jnp.array([-jnp.inf, 9.0])
    >>> print(generalized_jsd(student, teacher))  # nothing in common: log 2
    0.6931472

    References:
      Agarwal et al. 2024, On-Policy Distillation of Language Models (GKD), equation 1.
    """
    check_numbers("generalized_jsd", beta=beta)
    if is_concrete(beta) and not 0 < beta < 1:
        raise ValueError(
            f"generalized_jsd: beta must lie between 0 and 1, got {beta}; at the ends "
            "use forward_kl or reverse_kl"
        )
    log_q, log_p = tempered("generalized_jsd", student, teacher, temperature)
    some = (log_p > -jnp.inf) | (log_q > -jnp.inf)
    log_m = jnp.where(
        some,
        jnp.logaddexp(
            jnp.log(beta) + jnp.where(some, log_p, 0),
            jnp.log1p(-beta) + jnp.where(some, log_q, 0),
        ),
        -jnp.inf,
    )
    mixed = beta * divergence(log_p, log_m) + (1 - beta) * divergence(log_q, log_m)
    return mixed * temperature**2


def total_variation(student: Logits, teacher: Logits, *, temperature=1.0) -> Values:
    """Total variation distance between the tempered distributions, times `T^2`.

    `T^2 / 2 sum_c |p[c] - q[c]|`: zero exactly when the two distributions are equal,
    `T^2` when they have no class in common.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      temperature: `T > 0`, applied to both sides; may be traced.

    Returns:
      `[...]` values, a probability times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, there is one class, or the temperature is not one
        number above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([0.0, 0.0]), jnp.array([jnp.log(3.0), 0.0])
    >>> print(total_variation(student, teacher).round(4))  # 3/4 - 1/2
    0.25

    References:
      Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge
      Distillation, section 3 (TVD).
    """
    log_q, log_p = tempered("total_variation", student, teacher, temperature)
    return jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)).sum(-1) / 2 * temperature**2
