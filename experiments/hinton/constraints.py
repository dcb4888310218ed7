# SPDX-License-Identifier: Apache-2.0
"""Constraints on weights, as optax transformations at the end of a chain."""

import jax
import jax.numpy as jnp
import optax

from jaxdistill.types import Array


def max_norm(limit: float) -> optax.GradientTransformation:
    """Scales each unit's incoming weights back to a norm of at most `limit`.

    A unit's incoming weights are a kernel without its last axis, `[..., units]`; arrays
    of one axis (biases, scales) are free. It projects what the updates before it lead
    to, so that it comes last: `optax.chain(optax.adam(1e-3), max_norm(3.0))`.

    Args:
      limit: the largest L2 norm, above 0.

    Raises:
      ValueError: `limit` is not above 0.

    References:
      Hinton et al. 2012, Improving neural networks by preventing co-adaptation of
      feature detectors, section 2; Srivastava et al. 2014, Dropout, section 5.1.
    """
    if not limit > 0:
        raise ValueError(f"max_norm needs a limit above 0, got {limit}")

    def project(kernel: Array) -> Array:
        if kernel.ndim < 2:
            return kernel
        norm = jnp.sqrt((kernel**2).sum(range(kernel.ndim - 1), keepdims=True))
        return kernel * jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("max_norm needs the params: optimizer.update(..., params)")
        moved = optax.apply_updates(params, updates)
        return jax.tree.map(lambda w, p: project(w) - p, moved, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
