# SPDX-License-Identifier: Apache-2.0
"""Arithmetic whose values and gradients stay finite where a plain formula's do not.

A gradient through `where` is NaN if the branch not taken is: so the argument is made
harmless first, and the result replaced after.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.types import Array


def check_numbers(name: str, **settings: Any) -> None:
    """Raise ValueError unless each hyperparameter is one number, traced or not.

    One for each example would be taken for one of each class where they are as many.
    """
    for setting, value in settings.items():
        if jnp.ndim(value):
            raise ValueError(
                f"{name}: {setting} must be one number, got shape {jnp.shape(value)}; "
                "values may be weighed by example after the loss"
            )


def promote(x: Array) -> Array:
    """At least float32; float64 stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def fixed(x: Array) -> Array:
    """A teacher's array: promoted, and no gradient flows into it."""
    return jax.lax.stop_gradient(promote(x))


def divide(total: Array, count: Array) -> Array:
    """`total / count`, and 0 where the count is 0."""
    some = count > 0
    return jnp.where(some, total / jnp.where(some, count, 1), 0)


def root(square: Array) -> Array:
    """The square root, with gradient 0 instead of infinity at 0."""
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)


def normalize(x: Array, axis=-1) -> Array:
    """`x` over its l2 norm along `axis`; a zero vector stays zero."""
    # Scaled first: the gradient of a division takes the square of a small norm.
    peak = jax.lax.stop_gradient(jnp.abs(x).max(axis, keepdims=True))
    # Not 0: over a norm below the smallest normal number the gradient overflows.
    some = peak > jnp.finfo(x.dtype).tiny
    x = jnp.where(some, x, 0) / jnp.where(some, peak, 1)
    return divide(x, root((x * x).sum(axis, keepdims=True)))


def centre(x: Array, keep: Array, axis: int) -> Array:
    """`x` less its mean along `axis` over the entries `keep` marks; 0 at the others.

    Equal entries give exact zeros, where a mean would be off by its rounding.
    """
    keep = jnp.broadcast_to(keep, x.shape)
    peak = jnp.where(keep, x, -jnp.inf).max(axis, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(peak > -jnp.inf, peak, 0))
    x = jnp.where(keep, x - peak, 0)
    mean = divide(x.sum(axis, keepdims=True), keep.sum(axis, keepdims=True))
    return jnp.where(keep, x - mean, 0)


def log_sum(logits: Array, keep: Array) -> Array:
    """`log sum exp` over the last axis of what `keep` marks; -inf where that is none.

    A marked entry may be -inf: it adds nothing and gets no gradient.
    """
    keep = keep & (logits > -jnp.inf)
    some = keep.any(-1)
    peak = jnp.where(keep, logits, -jnp.inf).max(-1, keepdims=True)
    peak = jax.lax.stop_gradient(jnp.where(some[..., None], peak, 0))
    total = jnp.where(keep, jnp.exp(jnp.where(keep, logits - peak, 0)), 0).sum(-1)
    return jnp.where(some, jnp.log(jnp.where(some, total, 1)) + peak[..., 0], -jnp.inf)


def log_normalize(logits: Array, keep: Array) -> Array:
    """Log-probabilities over what `keep` marks; -inf elsewhere, or if that is none."""
    total = log_sum(logits, keep)[..., None]
    return jnp.where(keep, logits - jnp.where(total > -jnp.inf, total, 0), -jnp.inf)


def divergence(log_p: Array, log_q: Array) -> Array:
    """`sum p (log p - log q)` over the last axis, from log-probabilities.

    A class with `p = 0` adds 0 whatever `q` is; one with `q = 0 < p` makes it +inf.
    """
    # optax.kl_divergence is NaN at -inf student log-probabilities, its log-target form
    # at -inf teacher logits: both compute 0 * inf. The same classes are cut out of both
    # sides before the product, so that neither value nor gradient meets an infinity.
    p = jnp.exp(log_p)
    seen = p > 0
    gap = jnp.where(seen, log_p, 0) - jnp.where(seen, log_q, 0)
    return (p * gap).sum(-1)
