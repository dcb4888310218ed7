# SPDX-License-Identifier: Apache-2.0
"""Contrastive distillation: find the teacher's embedding of an example among others."""

import jax.numpy as jnp
from jaxtyping import Float, Int, Real

from jaxdistill.losses.logits import check_temperature
from jaxdistill.losses.numerics import fixed, normalize, promote
from jaxdistill.types import Array


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
    learned projection to the teacher's width (`models.adapters`), where the paper
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
      ValueError: shapes differ, the temperature is not above 0, or a bank lacks its
        labels.

    >>> import jax.numpy as jnp
    >>> eye = jnp.eye(2)
    >>> value = contrastive(eye, eye, temperature=1.0)
    >>> print(value.round(4))  # -log e/(e + 1) - log 1/2
    [1.0064 1.0064]

    References:
      Tian, Krishnan, Isola 2020, Contrastive Representation Distillation, section 3.2,
      equations 17 to 19.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"contrastive: student embeddings of shape {student.shape} and teacher "
            f"embeddings of shape {teacher.shape} differ; project the student's "
            "(models.adapters)"
        )
    check_temperature(temperature)
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
