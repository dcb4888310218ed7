# SPDX-License-Identifier: Apache-2.0
"""Losses over a large vocabulary, some of its words at a time.

Logits `[B, L, V]` are often the largest arrays of a language model's step: student's,
teacher's, both log-softmaxes and their gradients. Here they are made, used and dropped
a part of the vocabulary at a time, forward and backward; what is kept is of the size of
the hidden states. The values are those of `cross_entropy` and `forward_kl`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdistill.losses.logits import (
    Logits,
    Values,
    check_labels,
    check_pair,
    check_softmax,
    check_temperature,
    of_classes,
)
from jaxdistill.losses.numerics import (
    divergence,
    fixed,
    log_normalize,
    log_sum,
    promote,
)
from jaxdistill.types import Array, Factored, TopK, is_concrete

CHUNK = 4096


def chunked_cross_entropy(
    student: Factored, labels: Array, *, chunk: int = CHUNK
) -> Values:
    """Cross-entropy with integer labels, as `cross_entropy` of the logits.

    Args:
      student: hidden states `[..., D]` and the last layer, of V classes.
      labels: `[...]` integers in `[0, V)`; the value of any other is NaN.
      chunk: classes whose logits exist at once.

    Returns:
      `[...]` values in nats, at least float32.

    Raises:
      ValueError: shapes do not fit, there is one class, or `chunk` is below 1.

    >>> head = Factored(jnp.ones((3, 2)), jnp.zeros((4, 2)))
    >>> print(chunked_cross_entropy(head, jnp.array([0, 1, 3]), chunk=3))  # log 4
    [1.3862944 1.3862944 1.3862944]
    """
    check_labels("chunked_cross_entropy", student, labels)

    def body(carry, part):
        (logits,), start = _logits([student], part), part[-1]
        at = labels - start
        mine = (at >= 0) & (at < logits.shape[-1])
        at = jnp.where(mine, at, 0)[..., None]
        own = jnp.where(mine, jnp.take_along_axis(logits, at, -1)[..., 0], 0)
        total, label = carry
        return (_add(total, logits), label + own), None

    first = _start(student)
    zero = jnp.zeros_like(first[0])
    (total, label), _ = _scan(body, (first, zero), [student], chunk)
    return of_classes(_log(total) - label, labels, student)


def chunked_forward_kl(
    student: Factored, teacher: Factored, *, temperature=1.0, chunk: int = CHUNK
) -> Values:
    """Temperature-scaled KL from teacher to student, as `forward_kl` of the logits.

    Args:
      student: hidden states `[..., D]` and the last layer, of V classes.
      teacher: hidden states `[..., E]` and the last layer, of the same classes; no
        gradient flows into either.
      temperature: `T > 0`, applied to both sides; may be traced.
      chunk: classes whose logits exist at once.

    Returns:
      `[...]` values in nats times `T^2`, at least float32.

    Raises:
      ValueError: shapes differ, there is one class, the temperature is not one number
        above 0, or `chunk` is below 1.

    >>> student = Factored(jnp.zeros((1, 2)), jnp.ones((2, 2)))
    >>> teacher = Factored(jnp.ones((1, 1)), jnp.array([[jnp.log(3.0)], [0.0]]))
    >>> print(chunked_forward_kl(student, teacher, chunk=1).round(4))  # as forward_kl
    [0.1308]

    References:
      Hinton, Vinyals, Dean 2015, section 2, for the loss; the running sums are those of
      Milakov, Gimelshein 2018, Online Normalizer Calculation for Softmax, section 3.
    """
    check_pair("chunked_forward_kl", student, teacher)
    check_softmax("chunked_forward_kl", student)
    check_temperature(temperature, "chunked_forward_kl")
    teacher = jax.lax.stop_gradient(teacher)

    def body(carry, part):
        mine, theirs = (x / temperature for x in _logits([student, teacher], part))
        sums, (peak, total), gaps = carry
        after = jnp.maximum(peak, theirs.max(-1))
        weights = jnp.exp(theirs - after[..., None])
        seen = weights > 0
        gap = jnp.where(seen, theirs, 0) - jnp.where(seen, mine, 0)
        scale = jnp.exp(peak - after)
        total = total * scale + weights.sum(-1)
        # What a later peak makes 0 may be infinite, and 0 times that is NaN.
        gaps = jnp.where(scale > 0, gaps, 0) * scale + (weights * gap).sum(-1)
        return (_add(sums, mine), (after, total), gaps), None

    first, theirs = _start(student), _start(teacher)
    dtype = jnp.result_type(first[0], theirs[0], temperature)
    carry = jax.tree.map(
        lambda x: x.astype(dtype), (first, theirs, jnp.zeros_like(first[1]))
    )
    (mine, theirs, gaps), _ = _scan(body, carry, [student, teacher], chunk)
    value = gaps / theirs[1] - _log(theirs) + _log(mine)
    return value * temperature**2


def _start(head: Factored) -> tuple[Array, Array]:
    """The largest logit so far, and the sum of exponentials less that: of no class."""
    dtype = jax.eval_shape(head.multiply).dtype
    shape = head.shape[:-1]
    # Not -inf: two such peaks, of words that are ruled out, would differ by NaN.
    return jnp.full(shape, jnp.finfo(dtype).min), jnp.zeros(shape, dtype)


def _add(sums: tuple[Array, Array], logits: Array) -> tuple[Array, Array]:
    peak, total = sums
    after = jax.lax.stop_gradient(jnp.maximum(peak, logits.max(-1)))
    part = jnp.exp(logits - after[..., None]).sum(-1)
    return after, total * jnp.exp(peak - after) + part


def _log(sums: tuple[Array, Array]) -> Array:
    peak, total = sums
    return peak + jnp.log(total)


def _scan(body, carry, heads: Sequence[Factored], chunk: int):
    """The body over parts of the vocabulary, whose logits the backward pass remakes."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    classes = heads[0].shape[-1]
    chunk = min(chunk, classes)
    count = -(-classes // chunk)
    missing = count * chunk - classes

    def cut(x):
        padded = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
        return padded.reshape(count, chunk, *x.shape[1:])

    real = jnp.arange(count * chunk) < classes
    layers = [(head.kernel, _bias(head)) for head in heads]
    parts = (
        jax.tree.map(cut, layers),
        real.reshape(count, chunk),
        jnp.arange(count) * chunk,
    )
    return jax.lax.scan(jax.checkpoint(body), carry, parts)


def _bias(head: Factored) -> Array:
    return jnp.zeros_like(head.kernel[:, 0]) if head.bias is None else head.bias


def _logits(heads: Sequence[Factored], part) -> list[Array]:
    layers, real, _ = part
    found = []
    for head, (kernel, bias) in zip(heads, layers, strict=True):
        logits = Factored(head.hidden, kernel, bias).multiply()
        exists = jnp.broadcast_to(real, logits.shape)
        found.append(jnp.where(exists, logits, -jnp.inf))
    return found


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
      ValueError: shapes do not fit, there is one class or one outcome, an id is no
        class of the student's, or the temperature is not one number above 0. Ids that
        are traced cannot be looked at: there such an id makes the value NaN.

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
    check_softmax("sparse_forward_kl", student)
    check_temperature(temperature, "sparse_forward_kl")
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
    if kept[-1] < 2 and not tail:
        raise ValueError(
            "sparse_forward_kl: one class alone has probability 1, and nothing would "
            "be learned; keep more classes, or the tail"
        )
    check_ids("sparse_forward_kl", student.shape[-1], teacher)
    log_p, log_q = fixed(teacher.log_probs), jax.nn.log_softmax(promote(student))
    known = ((teacher.ids >= 0) & (teacher.ids < student.shape[-1])).all(-1)
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
    value = divergence(log_p, log_q) * temperature**2
    return jnp.where(known, value, jnp.nan)


def check_ids(name: str, classes: int, teacher: TopK) -> None:
    """Raise ValueError at a kept class that the student has not.

    Under jit ids are traced, and nothing can be said.
    """
    if not is_concrete(teacher.ids):
        return
    lowest, largest = int(teacher.ids.min()), int(teacher.ids.max())
    if lowest < 0:
        raise ValueError(
            f"{name}: the teacher keeps class {lowest}, and classes count from 0; "
            "leave out what another tool filled up with, keep fewer classes"
        )
    if largest >= classes:
        raise ValueError(
            f"{name}: the teacher keeps class {largest}, the student has only "
            f"{classes} classes (objectives.first_classes cuts whole logits, not ids)"
        )


def _log_rest(log_probs):
    """`log(1 - sum exp)`; -inf where the rest cannot be told from rounding."""
    rest = -jnp.expm1(jax.nn.logsumexp(log_probs, axis=-1))
    some = rest > 4 * jnp.finfo(rest.dtype).eps
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1)), -jnp.inf)
