# SPDX-License-Identifier: Apache-2.0
"""Dropout that draws half the random bits, for transformers, which draw many."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

LEVELS = 2**16
"""What a rate is rounded to a fraction of: 16 bits are drawn for each number."""


class Dropout(nn.Module):
    """Zeros numbers at random and scales the others up, so that the mean stays.

    As `nn.Dropout`, which draws 32 bits for each number; on a CPU that is a good part
    of a transformer's training step.

    Attributes:
      rate: the share that is zeroed, in [0, 1], rounded to 2^-16.

    References:
      Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from
      Overfitting, section 4.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """The same shape and type; unchanged unless `train`."""
        kept = round((1 - self.rate) * LEVELS)
        if not train or kept == LEVELS:
            return x
        if kept == 0:
            return jnp.zeros_like(x)
        keep = draws(self.make_rng("dropout"), x.shape) < kept
        return jnp.where(keep, x * (LEVELS / kept), 0).astype(x.dtype)


def draws(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform 16-bit integers of a shape with an axis, two of each 32-bit draw."""
    *outer, last = shape
    words = jax.random.bits(key, (*outer, -(-last // 2)), jnp.uint32)
    halves = [(words >> shift).astype(jnp.uint16) for shift in (0, 16)]
    return jnp.concatenate(halves, axis=-1)[..., :last]
