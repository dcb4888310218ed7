# SPDX-License-Identifier: Apache-2.0
"""Losses on the geometry between the examples of a batch.

One value per anchor, 0 at masked ones; the mean over the anchors is the batch's loss. A
mask takes out anchors and pairs, and the count of pairs is that of the rest. The pairs
are those of the batch the loss is given: the global one under jit and on a mesh, the
device's own under pmap, the micro-batch's under accumulation.

All axes but the first are one vector; widths of student and teacher may differ.
"""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, Real

from jaxdistill.losses.features import check_states
from jaxdistill.losses.logits import check_temperature
from jaxdistill.losses.numerics import (
    centre,
    check_numbers,
    divergence,
    divide,
    fixed,
    normalize,
    promote,
    root,
)
from jaxdistill.types import Array

Student = Float[Array, "b *s"]
Teacher = Float[Array, "b *t"]
Mask = Real[Array, " b"] | None
Anchors = Float[Array, " b"]


def relational_distance(
    student: Student, teacher: Teacher, mask: Mask = None
) -> Anchors:
    """Relational distillation of distances (RKD-D).

    `mean_{j != i} huber(psi_s(i, j) - psi_t(i, j))`, `psi(i, j) = |x_i - x_j| / mu`,
    `mu` the mean distance over all pairs, and Huber's loss with delta 1. Zero when the
    two geometries are equal up to scale, rotation and shift. (The authors' code divides
    by B^2, the pairs i = j included: `(B - 1) / B` of this.)

    Args:
      student: `[B, ...]` embeddings of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: the batches differ, or have fewer than 3 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0], [1.0], [2.0]])
    >>> print(relational_distance(student, 3 * student + 1))
    [0. 0. 0.]

    References:
      Park et al. 2019, Relational Knowledge Distillation, equations 6 to 8.
    """
    student, teacher, keep = _rows("relational_distance", student, teacher, mask, 3)
    pairs = _pairs(keep)

    def distances(x):
        apart = root(((x[:, None] - x[None]) ** 2).sum(-1)) * pairs
        return divide(apart, divide(apart.sum(), pairs.sum()))

    gap = optax.losses.huber_loss(distances(student), distances(teacher))
    return divide((pairs * gap).sum(1), pairs.sum(1))


def relational_angle(student: Student, teacher: Teacher, mask: Mask = None) -> Anchors:
    """Relational distillation of angles (RKD-A).

    For the anchor j, the mean over pairs of other examples i != k of
    `huber(cos_s(i, j, k) - cos_t(i, j, k))`, the cosine of the angle at j. Zero when
    the two geometries are similar. Needs memory for B^2 vectors and B^3 cosines. (The
    authors' code divides by B^3: `(B - 1)(B - 2) / B^2` of this.)

    Args:
      student: `[B, ...]` embeddings of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: the batches differ, or have fewer than 3 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> print(relational_angle(student, 3 * student + 1).round(4))
    [0. 0. 0.]

    References:
      Park et al. 2019, Relational Knowledge Distillation, equations 9 and 10.
    """
    student, teacher, keep = _rows("relational_angle", student, teacher, mask, 3)
    pairs = _pairs(keep)
    triples = pairs[:, :, None] * pairs[:, None, :] * _pairs(keep)[None]

    def cosines(x):
        towards = normalize(x[None] - x[:, None])
        return jnp.einsum("jid,jkd->jik", towards, towards)

    gap = optax.losses.huber_loss(cosines(student), cosines(teacher))
    return divide((triples * gap).sum((1, 2)), triples.sum((1, 2)))


def similarity_preserving(
    student: Student, teacher: Teacher, mask: Mask = None
) -> Anchors:
    """Similarity-preserving distillation (SP).

    `mean_j (G_s[i, j] - G_t[i, j])^2`, `G` the matrix of inner products `x_i . x_j`,
    its rows scaled to length 1. Zero when student and teacher rank and weigh the batch
    alike around every example; invariant to rotation and scale.

    Args:
      student: `[B, ...]` activations of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: the batches differ, or have fewer than 2 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(similarity_preserving(student, student[:, ::-1]))  # a rotation
    [0. 0.]

    References:
      Tung, Mori 2019, Similarity-Preserving Knowledge Distillation, equations 2 to 4.
    """
    student, teacher, keep = _rows("similarity_preserving", student, teacher, mask, 2)

    def similarities(x):
        x = x * keep[:, None]
        return normalize(x @ x.T)

    gap = (similarities(student) - similarities(teacher)) ** 2
    return divide(gap.sum(1) * keep, keep.sum())


def probabilistic_transfer(
    student: Student, teacher: Teacher, mask: Mask = None
) -> Anchors:
    """Probabilistic knowledge transfer (PKT) with the cosine kernel.

    `sum_{j != i} p[j|i] log(p[j|i] / q[j|i])`, each the share of
    `K(x_i, x_j) = (cos(x_i, x_j) + 1) / 2` among all j != i, p the teacher's. Zero when
    both spread each example's neighbourhood alike; +inf where the student turns an
    example to exactly the opposite of one that the teacher does not. (The authors' code
    keeps j = i, adds 1e-7 inside the logarithm and divides by B^2.)

    Args:
      student: `[B, ...]` embeddings of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.

    Returns:
      `[B]` values in nats, at least float32.

    Raises:
      ValueError: the batches differ, or have fewer than 3 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(probabilistic_transfer(student, 3 * student))
    [0. 0. 0.]

    References:
      Passalis, Tefas 2018, Learning Deep Representations with Probabilistic Knowledge
      Transfer, equations 3 to 6.
    """
    student, teacher, keep = _rows("probabilistic_transfer", student, teacher, mask, 3)
    pairs = _pairs(keep)

    def log_neighbours(x):
        x = normalize(x)
        kernel = pairs * (x @ x.T + 1) / 2
        share = divide(kernel, kernel.sum(1, keepdims=True))
        some = share > 0
        return jnp.where(some, jnp.log(jnp.where(some, share, 1)), -jnp.inf)

    return divergence(log_neighbours(teacher), log_neighbours(student))


def correlation_congruence(
    student: Student, teacher: Teacher, mask: Mask = None, *, gamma=0.4, order: int = 2
) -> Anchors:
    """Correlation congruence (CC) with the Gaussian kernel's Taylor expansion.

    `mean_j (k(s_i, s_j) - k(t_i, t_j))^2` on l2-normalised rows, with
    `k(x, y) = sum_{p=0}^order exp(-2 gamma) (2 gamma)^p / p! (x . y)^p`. Zero when all
    pairs are as close in the student as in the teacher.

    Args:
      student: `[B, ...]` embeddings of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.
      gamma: the kernel's inverse width, 0.4 in the paper; may be traced.
      order: the expansion's highest power, 2 in the paper.

    Returns:
      `[B]` values without unit, at least float32.

    Raises:
      ValueError: the batches differ, or have fewer than 2 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(correlation_congruence(student, 3 * student))
    [0. 0.]

    References:
      Peng et al. 2019, Correlation Congruence for Knowledge Distillation, equations 5
      to 9.
    """
    student, teacher, keep = _rows("correlation_congruence", student, teacher, mask, 2)
    check_numbers("correlation_congruence", gamma=gamma)
    degrees = range(order + 1)

    def kernel(x):
        x = normalize(x)
        cosines = x @ x.T
        powers = ((2 * gamma) ** p / math.factorial(p) * cosines**p for p in degrees)
        return jnp.exp(-2 * gamma) * sum(powers)

    gap = (kernel(student) - kernel(teacher)) ** 2
    return divide((gap * keep[None]).sum(1) * keep, keep.sum())


def linear_cka(student: Student, teacher: Teacher, mask: Mask = None) -> Anchors:
    """One minus linear centred kernel alignment (CKA).

    `1 - |Y^T X|^2 / (|X^T X| |Y^T Y|)` in Frobenius norms, of columns centred over the
    batch: in `[0, 1]`, zero when the centred rows are equal up to rotation and scale.
    Without any spread in one of them it is 1.

    Args:
      student: `[B, ...]` representations of any float type.
      teacher: `[B, ...]`; no gradient flows into them.
      mask: `[B]`, 0 for a row that is no example, or None.

    Returns:
      `[B]`: the batch's one value, without unit, at least float32, at every anchor.

    Raises:
      ValueError: the batches differ, or have fewer than 3 examples.

    >>> import jax.numpy as jnp
    >>> student = jnp.array([[1.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    >>> print(jnp.abs(linear_cka(student, 3 * student[:, ::-1]).round(4)))
    [0. 0. 0.]

    References:
      Kornblith et al. 2019, Similarity of Neural Network Representations Revisited,
      equation 4 with linear kernels.
    """
    student, teacher, keep = _rows("linear_cka", student, teacher, mask, 3)

    def gram(x):
        x = centre(x, keep[:, None] > 0, 0)
        return normalize((x @ x.T).reshape(-1))

    return keep * (1 - (gram(student) * gram(teacher)).sum())


def _rows(name: str, student: Array, teacher: Array, mask: Mask, least: int):
    """Vectors of either side and a mask of 0 and 1, in one float type.

    Raises:
      ValueError: the batches differ, or are so small that every student is perfect.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"{name}: a student batch of {len(student)} and a teacher batch of "
            f"{len(teacher)} are not the same examples"
        )
    size = len(student)
    if size < least:
        raise ValueError(
            f"{name} compares the examples of a batch: of fewer than {least} its value "
            f"is the same whatever the student does; got {size} (a device's under "
            "pmap, a micro-batch's where there are several)"
        )
    student, teacher = promote(student), fixed(teacher)
    keep = jnp.ones(size) if mask is None else mask > 0
    keep = keep.astype(student.dtype)
    return student.reshape(size, -1), teacher.reshape(size, -1), keep


def _pairs(keep: Array) -> Array:
    """1 for two different examples that both count."""
    return keep[:, None] * keep[None] * (1 - jnp.eye(len(keep), dtype=keep.dtype))


def contrastive(
    student: Float[Array, "b d"],
    teacher: Float[Array, "b d"],
    labels: Int[Array, " b"] | None = None,
    mask: Real[Array, " b"] | None = None,
    *,
    bank: Float[Array, "k d"] | None = None,
    bank_labels: Int[Array, " k"] | None = None,
    dataset_size=None,
    temperature=0.1,
) -> Float[Array, " b"]:
    """Contrastive representation distillation (CRD) with its noise-contrastive critic.

    `-log h(t_i, s_i) - sum_j log(1 - h(t_j, s_i))` over N negatives j, with
    `h(t, s) = e^g / (e^g + N / M)` and `g = cos(t, s) / temperature`. Negatives are the
    batch's other examples, or a bank of teacher embeddings; where labels are given,
    those with another label. It has no zero: the least is that of a student that tells
    its own teacher embedding from all others. The student's embedding goes through a
    learned projection to the teacher's width (`models.with_projector`), where the paper
    projects both; its second, teacher-anchored half is not taken. The batch is the
    global one under jit and a mesh, a device's own under pmap, and a micro-batch
    under accumulation.

    Args:
      student: `[B, D]` embeddings of any float type; normalised here.
      teacher: `[B, D]`; no gradient flows into them.
      labels: `[B]` integers, or None: any other example is a negative.
      mask: `[B]`, 0 for a row that is no example, or None.
      bank: `[K, D]` teacher embeddings, for more negatives than a batch has.
      bank_labels: `[K]`, needed beside `labels`.
      dataset_size: M, the paper's cardinality of the data set; None is M = N.
      temperature: above 0; may be traced.

    Returns:
      `[B]` values in nats, at least float32; 0 at masked anchors and those without
      negatives.

    Raises:
      ValueError: shapes differ, the temperature is not one number above 0, a bank
        lacks its labels, or a batch of one has no bank.

    >>> import jax.numpy as jnp
    >>> eye = jnp.eye(2)
    >>> value = contrastive(eye, eye, temperature=1.0)
    >>> print(value.round(4))  # -log e/(e + 1) - log 1/2
    [1.0064 1.0064]

    References:
      Tian, Krishnan, Isola 2020, Contrastive Representation Distillation, section 3.2,
      equations 17 to 19.
    """
    check_states("contrastive", student, teacher, "embeddings")
    check_temperature(temperature, "contrastive")
    if dataset_size is not None:
        check_numbers("contrastive", dataset_size=dataset_size)
    if bank is None and len(student) < 2:
        raise ValueError(
            "contrastive: a batch of one has no negatives; take a larger one or a bank"
        )
    if labels is not None and bank is not None and bank_labels is None:
        raise ValueError(
            "contrastive: with labels a bank needs bank_labels, or rows of the "
            "anchor's own class would be negatives"
        )
    student, teacher = normalize(promote(student)), normalize(fixed(teacher))
    keep = jnp.ones(len(student), bool) if mask is None else mask > 0
    if bank is None:
        others, their_labels = teacher, labels
        negative = keep[None] & ~jnp.eye(len(student), dtype=bool)
    else:
        others, their_labels = normalize(fixed(bank)), bank_labels
        negative = jnp.ones((len(student), len(bank)), bool)
    if labels is not None and their_labels is not None:
        negative &= labels[:, None] != their_labels[None]
    count = negative.sum(1).astype(student.dtype)
    size = jnp.maximum(count, 1)
    log_noise = jnp.log(size / (size if dataset_size is None else dataset_size))
    positive = (student * teacher).sum(-1) / temperature
    scores = student @ others.T / temperature
    noise = log_noise[:, None]
    values = jnp.logaddexp(positive, log_noise) - positive
    rejected = jnp.logaddexp(scores, noise) - noise
    values += jnp.where(negative, rejected, 0).sum(1)
    return jnp.where(keep & (count > 0), values, 0)
