# SPDX-License-Identifier: Apache-2.0
"""Losses on parts of the logits, or on their structure: DKD, DIST, standardization."""

import jax
import jax.numpy as jnp
from jaxtyping import Int, Real

from jaxdistill.losses.logits import (
    Logits,
    Values,
    check_labels,
    check_softmax,
    of_classes,
    tempered,
)
from jaxdistill.losses.numerics import (
    centre,
    check_numbers,
    divergence,
    divide,
    log_normalize,
    log_sum,
    normalize,
    promote,
    root,
)
from jaxdistill.types import Array


def decoupled_kl(
    student: Logits,
    teacher: Logits,
    labels: Int[Array, "*b"],
    *,
    target_weight=1.0,
    nontarget_weight=8.0,
    temperature=1.0,
) -> Values:
    """Decoupled knowledge distillation (DKD): target and non-target parts, weighted.

    `T^2 (alpha TCKD + beta NCKD)`: TCKD is the KL between the two-class distributions
    (label, anything else), NCKD that between the distributions over the other classes
    alone. Zero exactly when the two tempered distributions are equal. The forward KL is
    `TCKD + (1 - p[label]) NCKD`.

    Args:
      student: `[..., C]` logits of any float type.
      teacher: `[..., C]` logits; no gradient flows into them.
      labels: `[...]` integers in `[0, C)`; the value of any other is NaN.
      target_weight: alpha.
      nontarget_weight: beta.
      temperature: `T > 0`, applied to both sides; may be traced, as may the weights.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: fewer than 3 classes (there is no non-target part), shapes differ, or
        the temperature is not above 0.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.zeros(3), jnp.log(jnp.array([2.0, 1.0, 1.0]))
    >>> value = decoupled_kl(student, teacher, jnp.array(0))
    >>> print(value.round(4))  # 1/2 log 3/2 + 1/2 log 3/4; the other classes agree
    0.0589

    References:
      Zhao et al. 2022, Decoupled Knowledge Distillation, equations 6 and 7.
    """
    if student.shape[-1] < 3:
        raise ValueError(
            f"decoupled_kl needs at least 3 classes, got {student.shape[-1]}: with one "
            "class beside the label there is no non-target part; use forward_kl"
        )
    check_labels("decoupled_kl", student, labels)
    weights = {"target_weight": target_weight, "nontarget_weight": nontarget_weight}
    check_numbers("decoupled_kl", **weights)
    log_q, log_p = tempered("decoupled_kl", student, teacher, temperature)
    target = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)

    def two_classes(log_probs):
        sides = (log_sum(log_probs, target), log_sum(log_probs, ~target))
        return jnp.stack(sides, -1)

    tckd = divergence(two_classes(log_p), two_classes(log_q))
    nckd = divergence(log_normalize(log_p, ~target), log_normalize(log_q, ~target))
    value = (target_weight * tckd + nontarget_weight * nckd) * temperature**2
    return of_classes(value, labels, student)


def dist(
    student: Logits,
    teacher: Logits,
    mask: Real[Array, "*b"] | None = None,
    *,
    inter_weight=1.0,
    intra_weight=1.0,
    temperature=1.0,
) -> Values:
    """DIST: correlation with the teacher's probabilities instead of their equality.

    `T^2 (beta (1 - r_i) + gamma mean_c (1 - r_c))`: `r_i` is Pearson's correlation over
    the classes of example i (inter-class), `r_c` that over the examples of class c
    (intra-class). Zero when student and teacher are equal; invariant to a scale and a
    shift of the probabilities. Without any spread a correlation counts as 0: that is
    `r_c` of a single example. Of two classes `r_i` is 1 or -1. The authors add 1e-8 to
    its denominator, which damps rare classes; nothing is here.

    Args:
      student: `[..., C]` logits of any float type; all leading axes are examples.
      teacher: `[..., C]` logits; no gradient flows into them.
      mask: `[...]`, 0 for a row that is no example, or None.
      inter_weight: beta.
      intra_weight: gamma.
      temperature: `T > 0`, applied to both sides; may be traced, as may the weights.

    Returns:
      `[...]` values without unit times `T^2`, at least float32, 0 at masked rows. The
      intra-class part couples the batch: it is the same at every row, and the batch is
      the global one under jit and a mesh, a device's own under pmap, and a
      micro-batch under accumulation.

    Raises:
      ValueError: shapes differ, there is one class, or a setting is not one number,
        the temperature above 0.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[4.0, 0.0], [0.0, 4.0]])
    >>> print(dist(student, -student).round(4))  # correlations of -1: 2 + 2
    [4. 4.]

    References:
      Huang et al. 2022, Knowledge Distillation from A Stronger Teacher, equations
      7 to 10.
    """
    check_numbers("dist", inter_weight=inter_weight, intra_weight=intra_weight)
    log_q, log_p = tempered("dist", student, teacher, temperature)
    real = jnp.ones(student.shape[:-1], bool) if mask is None else mask > 0
    exists = ((log_q > -jnp.inf) | (log_p > -jnp.inf)) & real[..., None]
    exists = exists.reshape(-1, student.shape[-1])
    q, p = (jnp.exp(side).reshape(exists.shape) for side in (log_q, log_p))
    inter = 1 - _pearson(q, p, exists, axis=1)
    classes = exists.any(0)
    apart = jnp.where(classes, 1 - _pearson(q, p, exists, axis=0), 0)
    intra = divide(apart.sum(), classes.sum())
    values = (inter_weight * inter + intra_weight * intra) * temperature**2
    return jnp.where(real, values.reshape(real.shape), 0)


def standardize(logits: Logits) -> Logits:
    """Each example's logits less their mean, over their sample deviation.

    `(z - mean z) / s` with `s^2 = sum (z - mean z)^2 / (C - 1)`: a distillation loss
    between standardized logits asks for the teacher's relations, not its scale. Equal
    logits give zeros. The authors add 1e-7 to `s`; nothing is added here.

    Args:
      logits: `[..., C]` of any float type. Gradients flow.

    Returns:
      `[..., C]` in deviations, at least float32.

    Raises:
      ValueError: there is one class, which has no deviation.

    >>> import jax.numpy as jnp
    >>> print(standardize(jnp.array([1.0, 2.0, 3.0])))
    [-1.  0.  1.]

    References:
      Sun et al. 2024, Logit Standardization in Knowledge Distillation, algorithm 1.
    """
    check_softmax("standardize", logits)
    logits = promote(logits)
    exists = logits > -jnp.inf
    gap = centre(logits, exists, -1)
    count = exists.sum(-1, keepdims=True)
    deviation = root(divide((gap**2).sum(-1, keepdims=True), count - 1))
    return jnp.where(exists, divide(gap, deviation), -jnp.inf)


def _pearson(a: Array, b: Array, keep: Array, axis: int) -> Array:
    """Correlation along `axis` of the entries that `keep` marks; 0 without spread."""
    a, b = (normalize(centre(x, keep, axis), axis) for x in (a, b))
    return (a * b).sum(axis)
