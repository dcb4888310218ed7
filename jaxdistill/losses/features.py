# SPDX-License-Identifier: Apache-2.0
"""Losses between hidden states, `[..., D]`, and feature maps, `[B, H, W, C]`."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxdistill.losses.numerics import check_numbers, fixed, normalize, promote
from jaxdistill.types import Array

States = Float[Array, "*b d"]
StudentMap = Float[Array, "b h w c"]
TeacherMap = Float[Array, "b h2 w2 c2"]


def hint_mse(student: States, teacher: States) -> Float[Array, "*b"]:
    """Mean squared difference of two hidden states of one width.

    `mean_d (s[d] - t[d])^2`, zero exactly when they are equal. Where the widths differ
    the student's goes through a learned projection first (`models.with_projector`).

    Args:
      student: `[..., D]` hidden states or feature maps of any float type.
      teacher: `[..., D]`; no gradient flows into it.

    Returns:
      `[...]` values in squared units of the states, at least float32.

    Raises:
      ValueError: shapes differ.

    >>> import jax.numpy as jnp
    >>> print(hint_mse(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))  # (1 + 4) / 2
    2.5

    References:
      Romero et al. 2015, FitNets: Hints for Thin Deep Nets, equation 3 (there half the
      sum over d).
    """
    check_states("hint_mse", student, teacher)
    return ((promote(student) - fixed(teacher)) ** 2).mean(-1)


def cosine_distance(student: States, teacher: States) -> Float[Array, "*b"]:
    """One minus the cosine of the angle between two hidden states.

    `1 - s.t / (|s| |t|)` in `[0, 2]`, zero when they point the same way. A zero vector
    has cosine 0 with everything, and gradient 0.

    Args:
      student: `[..., D]` hidden states of any float type.
      teacher: `[..., D]`; no gradient flows into it.

    Returns:
      `[...]` values without unit, at least float32.

    Raises:
      ValueError: shapes differ.

    >>> import jax.numpy as jnp
    >>> print(cosine_distance(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0])))
    1.0

    References:
      Sanh et al. 2019, DistilBERT, section 2 (cosine embedding loss).
    """
    check_states("cosine_distance", student, teacher)
    return 1 - (normalize(promote(student)) * normalize(fixed(teacher))).sum(-1)


def patient_mse(student: States, teacher: States) -> Float[Array, "*b"]:
    """Patient knowledge distillation (PKD): squared difference of the directions.

    `mean_d (s[d] / |s| - t[d] / |t|)^2`, zero when they point the same way. The mean
    over the width as in the authors' code; the paper's formula is `D` times this.

    Args:
      student: `[..., D]` hidden states of any float type, in the paper of the [CLS]
        token in some layers.
      teacher: `[..., D]`; no gradient flows into it.

    Returns:
      `[...]` values without unit, at least float32.

    Raises:
      ValueError: shapes differ.

    >>> import jax.numpy as jnp
    >>> print(patient_mse(jnp.array([3.0, 0.0]), jnp.array([0.0, 2.0])))  # (1 + 1) / 2
    1.0

    References:
      Sun et al. 2019, Patient Knowledge Distillation for BERT Model Compression,
      equation 7.
    """
    check_states("patient_mse", student, teacher)
    gap = normalize(promote(student)) - normalize(fixed(teacher))
    return (gap**2).mean(-1)


def attention_transfer(
    student: StudentMap, teacher: TeacherMap, *, power=2.0
) -> Float[Array, " b"]:
    """Activation-based attention transfer (AT): where two maps are active.

    `mean_p (a_s[p] / |a_s| - a_t[p] / |a_t|)^2` over positions p, with
    `a[p] = mean_c |A[p, c]|^power`: zero when the two maps spread their activity alike.
    Channel counts may differ; of two sizes the larger is average-pooled to the smaller
    first, as RepDistiller does. The mean of squares as in the authors' code, where the
    paper has the norm.

    Args:
      student: `[B, H, W, C]` feature map of any float type.
      teacher: `[B, H', W', C']`; no gradient flows into it.
      power: exponent of the activations, at least 1, 2 in the paper's experiments; may
        be traced.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: no two maps of one batch, or one position, of which all maps are
        alike.

    >>> import jax.numpy as jnp
    >>> left = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    >>> print(attention_transfer(left, left[:, :, ::-1]))  # (1 + 1) / 2
    [1.]

    References:
      Zagoruyko, Komodakis 2017, Paying More Attention to Attention, section 3.1,
      equation 2.
    """
    check_numbers("attention_transfer", power=power)
    student, teacher = _pooled("attention_transfer", student, teacher)

    def attention(x):
        return normalize((jnp.abs(x) ** power).mean(-1).reshape(len(x), -1))

    return ((attention(student) - attention(teacher)) ** 2).mean(-1)


def neuron_selectivity(student: StudentMap, teacher: TeacherMap) -> Float[Array, " b"]:
    """Neuron selectivity transfer (NST): which patterns the channels respond to.

    The squared maximum mean discrepancy between the channels' l2-normalised activation
    patterns under the polynomial kernel `k(x, y) = (x.y)^2`:
    `mean k(s, s') + mean k(t, t') - 2 mean k(s, t)` over pairs of channels. Zero when
    student and teacher have the same patterns, in any order. Channel counts may differ;
    of two sizes the larger is average-pooled to the smaller first.

    Args:
      student: `[B, H, W, C]` feature map of any float type.
      teacher: `[B, H', W', C']`; no gradient flows into it.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: no two maps of one batch, or one position, of which all maps are
        alike.

    >>> import jax.numpy as jnp
    >>> left = jnp.array([1.0, 0.0]).reshape(1, 1, 2, 1)
    >>> print(neuron_selectivity(left, left[:, :, ::-1]))  # 1 + 1 - 2 * 0
    [2.]

    References:
      Huang, Wang 2017, Like What You Like: Knowledge Distill via Neuron Selectivity
      Transfer, equation 6 with the kernel of section 4.2 (d = 2, c = 0).
    """
    student, teacher = _pooled("neuron_selectivity", student, teacher)
    s, t = (
        normalize(x.reshape(len(x), -1, x.shape[-1]), axis=1)
        for x in (student, teacher)
    )

    def similarity(x, y):
        return (jnp.einsum("bpi,bpj->bij", x, y) ** 2).mean((1, 2))

    return similarity(s, s) + similarity(t, t) - 2 * similarity(s, t)


def check_states(name: str, student: Array, teacher: Array, what="states") -> None:
    """Raise ValueError unless both sides have one shape."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: student {what} of shape {student.shape} and teacher {what} of "
            f"shape {teacher.shape} differ; project the student's (models.adapters)"
        )


def _pooled(name: str, student: Array, teacher: Array) -> tuple[Array, Array]:
    """Both maps, promoted, at the smaller of their sizes."""
    if student.ndim != 4 or teacher.ndim != 4 or len(student) != len(teacher):
        raise ValueError(
            f"{name} takes feature maps [B, H, W, C] of one batch, got shapes "
            f"{student.shape} and {teacher.shape}"
        )
    height, width = map(min, student.shape[1:3], teacher.shape[1:3])
    if height * width < 2:
        raise ValueError(
            f"{name} compares where maps are active, and one of {student.shape} and "
            f"{teacher.shape} has one position: take an earlier layer, or hint_mse"
        )
    student, teacher = promote(student), fixed(teacher)
    return _pool(student, height, width), _pool(teacher, height, width)


def _pool(x: Array, height: int, width: int) -> Array:
    """Average pooling to a given size, in windows as PyTorch's adaptive pooling."""
    if x.shape[1:3] == (height, width):
        return x
    sizes = ((x.shape[1], height), (x.shape[2], width))
    rows, columns = (jnp.asarray(_windows(*size), x.dtype) for size in sizes)
    return jnp.einsum("bhwc,ih,jw->bijc", x, rows, columns)


def _windows(size: int, parts: int) -> np.ndarray:
    """`[parts, size]` averaging weights; windows overlap where sizes do not divide."""
    weights = np.zeros((parts, size))
    for i in range(parts):
        low, high = i * size // parts, math.ceil((i + 1) * size / parts)
        weights[i, low:high] = 1 / (high - low)
    return weights
