# SPDX-License-Identifier: Apache-2.0
"""Losses between attention maps, and between query, key and value relations.

One value per query. A mask marks the keys that count: those of masked keys may be
anything, -inf included. What a masked query gives is finite and for the caller to mask.
"""

import jax.numpy as jnp
from jaxtyping import Float, Real

from jaxdistill.losses.numerics import divergence, divide, fixed, log_normalize, promote
from jaxdistill.types import Array

Maps = Float[Array, "b h l s"]
TheirMaps = Float[Array, "b h2 l s"]
Keys = Real[Array, "b s"] | None
Queries = Float[Array, "b l"]


def attention_mse(
    student: Maps, teacher: TheirMaps, mask: Keys = None, *, mean_heads: bool = False
) -> Queries:
    """Mean squared difference of attention maps, head by head, or of the heads' means.

    `mean_h mean_s (A_s[h, l, s] - A_t[h, l, s])^2` over the keys that count, zero
    exactly when the maps are equal there. The paper takes the scores before softmax,
    which learn faster; probabilities do too. Scores of -inf on both sides (a causal
    mask) do not count either.

    Args:
      student: `[B, H, L, S]` scores or probabilities of any float type.
      teacher: `[B, H', L, S]`, the same kind; no gradient flows into it.
      mask: `[B, S]`, 0 for a padded key, or None.
      mean_heads: compare `mean_h A_s[h]` with `mean_h A_t[h]`; the sides may then have
        different numbers of heads.

    Returns:
      `[B, L]` values in squared units of the maps, at least float32.

    Raises:
      ValueError: shapes differ, but for the number of heads with `mean_heads`.

    >>> import jax.numpy as jnp
    >>> maps = jnp.array([[[[1.0, 0.0]]]])
    >>> print(attention_mse(maps, maps[..., ::-1]))  # (1 + 1) / 2
    [[1.]]

    References:
      Jiao et al. 2020, TinyBERT, equation 7; Yang et al. 2020, TextBrewer, whose
      losses of attention take sums or means over heads.
    """
    student, teacher = _heads(promote(student), fixed(teacher), mean_heads)
    keep = _keys("attention_mse", student, teacher, mask)
    keep = keep & ((student > -jnp.inf) | (teacher > -jnp.inf))
    gap = jnp.where(keep, student, 0) - jnp.where(keep, teacher, 0)
    return divide((gap**2).sum((1, 3)), keep.sum((1, 3)))


def attention_kl(
    student: Maps, teacher: TheirMaps, mask: Keys = None, *, mean_heads: bool = False
) -> Queries:
    """KL divergence between attention distributions, by head, or of the heads' means.

    `mean_h sum_s A_t log(A_t / A_s)` over the keys that count, zero exactly when the
    distributions are equal. A key to which the teacher gives no attention adds 0; one
    to which only the teacher gives any makes the value +inf.

    Args:
      student: `[B, H, L, S]` probabilities (after softmax) of any float type.
      teacher: `[B, H', L, S]` probabilities; no gradient flows into them.
      mask: `[B, S]`, 0 for a padded key, or None.
      mean_heads: compare `mean_h A_s[h]` with `mean_h A_t[h]`; the sides may then have
        different numbers of heads.

    Returns:
      `[B, L]` values in nats, at least float32.

    Raises:
      ValueError: shapes differ, but for the number of heads with `mean_heads`.

    >>> import jax.numpy as jnp
    >>> student, teacher = jnp.array([[[[0.5, 0.5]]]]), jnp.array([[[[0.75, 0.25]]]])
    >>> value = attention_kl(student, teacher)
    >>> print(value.round(4))  # 3/4 log 3/2 + 1/4 log 1/2
    [[0.1308]]

    References:
      Wang et al. 2020, MiniLM, equation 5 (self-attention distribution transfer); Yang
      et al. 2020, TextBrewer, whose losses of attention take sums or means over heads.
    """
    student, teacher = _heads(promote(student), fixed(teacher), mean_heads)
    keep = _keys("attention_kl", student, teacher, mask)

    def log(probabilities):
        some = keep & (probabilities > 0)
        return jnp.where(some, jnp.log(jnp.where(some, probabilities, 1)), -jnp.inf)

    return divergence(log(teacher), log(student)).mean(1)


def relation_kl(
    student: Float[Array, "b l d"],
    teacher: Float[Array, "b l d2"],
    mask: Real[Array, "b l"] | None = None,
    *,
    heads: int,
) -> Queries:
    """KL divergence between self-attention relations of queries, keys or values.

    The vectors of all heads, concatenated, are cut into `heads` relation heads of width
    `d`; a relation is `softmax(X X^T / sqrt(d))` over the keys that count, and the
    value is the mean over the relation heads of `KL(R_t[l] || R_s[l])`. Zero when the
    relations are equal, so also when student and teacher differ by a rotation. Neither
    widths nor numbers of attention heads need agree.

    Args:
      student: `[B, L, D]` queries, keys or values of any float type.
      teacher: `[B, L, D']`, the same kind; no gradient flows into them.
      mask: `[B, L]`, 0 for a padded token, or None.
      heads: relation heads, a divisor of both widths; the paper takes more than the
        teacher has attention heads. MiniLM's value relation has as many as the model.

    Returns:
      `[B, L]` values in nats, at least float32.

    Raises:
      ValueError: batch or length differ, or `heads` does not divide a width.

    >>> import jax.numpy as jnp
    >>> teacher = jnp.array([[[1.0], [0.0]]])
    >>> value = relation_kl(jnp.zeros((1, 2, 1)), teacher, heads=1)
    >>> print(value.round(4))  # log 2 - entropy of (0.7311, 0.2689); equal rows
    [[0.1109 0.    ]]

    References:
      Wang et al. 2020, MiniLM, equations 6 to 8 (value relation); Wang et al. 2021,
      MiniLMv2, equations 1 to 5 (query, key and value relations, relation heads).
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"relation_kl: student vectors of shape {student.shape} and teacher "
            f"vectors of shape {teacher.shape} are not of the same tokens"
        )
    if heads < 1:
        raise ValueError(f"relation_kl needs at least 1 relation head, got {heads}")
    for side, vectors in (("student", student), ("teacher", teacher)):
        if vectors.shape[-1] % heads:
            raise ValueError(
                f"relation_kl: {heads} relation heads do not divide the {side}'s width "
                f"of {vectors.shape[-1]}"
            )
    keep = jnp.ones(student.shape[:2]) if mask is None else mask
    keep = (keep > 0)[:, None, None, :]
    log_q, log_p = (
        _relation(x, keep, heads) for x in (promote(student), fixed(teacher))
    )
    return divergence(log_p, log_q).mean(1)


def _relation(x: Array, keep: Array, heads: int) -> Array:
    """Log of `softmax(X X^T / sqrt(d))`, `[B, heads, L, L]`; -inf at masked keys."""
    batch, length, width = x.shape
    parts = x.reshape(batch, length, heads, width // heads)
    scores = jnp.einsum("blhd,bshd->bhls", parts, parts) / (width // heads) ** 0.5
    return log_normalize(scores, keep)


def _heads(student: Array, teacher: Array, mean: bool) -> tuple[Array, Array]:
    """Maps as they are, or the mean of each side's heads, `[B, 1, L, S]`."""
    if not mean:
        return student, teacher
    return student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)


def _keys(name: str, student: Array, teacher: Array, mask: Array | None) -> Array:
    """Which keys count, `[B, 1, 1, S]`."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: student maps of shape {student.shape} and teacher maps of shape "
            f"{teacher.shape} differ; of other numbers of heads mean_heads=True "
            "compares the means, and relation_kl relations"
        )
    keys = student.shape[::3]
    return (jnp.ones(keys) if mask is None else mask)[:, None, None, :] > 0
