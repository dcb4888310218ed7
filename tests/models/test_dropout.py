# SPDX-License-Identifier: Apache-2.0
"""Dropout against what it is defined by: shares, means, independence, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill.models.layers import LEVELS, Dropout, draws


def drop(rate, x, seed=0, train=True):
    return Dropout(rate).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_share_is_zeroed_and_the_rest_scaled_to_the_same_mean(rate):
    x = jnp.ones((200, 501))
    found = np.asarray(drop(rate, x))
    kept = found != 0
    spread = np.sqrt(rate * (1 - rate) / x.size)
    assert abs(kept.mean() - (1 - rate)) < 4 * spread
    np.testing.assert_allclose(found[kept], 1 / (1 - rate), rtol=1e-3)
    exact = found[kept][0] * round((1 - rate) * LEVELS) / LEVELS
    np.testing.assert_allclose(exact, 1, rtol=1e-6)


def test_nothing_changes_out_of_training_or_at_rate_zero_and_all_goes_at_one():
    x = jax.random.normal(jax.random.key(1), (3, 7))
    assert drop(0.5, x, train=False) is x
    assert Dropout(0.0).apply({}, x, True) is x  # not even a key is asked for
    assert not drop(1.0, x).any()


def test_the_gradient_goes_where_the_values_went():
    x = jax.random.normal(jax.random.key(1), (4, 33))
    slope = jax.grad(lambda x: drop(0.3, x).sum())(x)
    np.testing.assert_allclose(slope * x, drop(0.3, x), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_the_type_stays(dtype):
    assert drop(0.1, jnp.ones((4, 5), dtype)).dtype == dtype


def test_what_is_zeroed_keeps_not_a_number_out():
    x = jnp.full((64,), jnp.nan)
    assert np.isfinite(drop(0.5, x)).sum() > 8


def test_all_sixteen_bits_are_fair_and_no_two_numbers_go_together():
    found = np.asarray(draws(jax.random.key(2), (2000, 9))).astype(np.int64)
    bits = (found[..., None] >> np.arange(16)) & 1
    assert np.abs(bits.mean((0, 1)) - 0.5).max() < 5 * 0.5 / np.sqrt(18_000)
    together = np.corrcoef(found.T) - np.eye(9)
    assert np.abs(together).max() < 5 / np.sqrt(2000)


def test_it_draws_as_often_as_flax_does():
    x, rngs = jnp.ones((400, 300)), {"dropout": jax.random.key(3)}
    theirs = nn.Dropout(0.25, deterministic=False).apply({}, x, rngs=rngs)
    assert abs(float((theirs != 0).mean() - (drop(0.25, x) != 0).mean())) < 0.01
