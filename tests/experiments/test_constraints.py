# SPDX-License-Identifier: Apache-2.0
"""Constraints on weights do what torch.renorm and the formula do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.hinton.constraints import max_norm

PARAMS = {
    "kernel": jnp.array([[3.0, 0.1, 0.0], [4.0, 0.2, 0.0]]),
    "bias": jnp.array([9.0, 9.0, 9.0]),
}


def stepped(optimizer, gradients):
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(gradients, state, PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_large_columns_are_scaled_and_the_rest_is_free():
    found = stepped(max_norm(2.0), jax.tree.map(jnp.zeros_like, PARAMS))
    expected = [[1.2, 0.1, 0.0], [1.6, 0.2, 0.0]]
    np.testing.assert_allclose(found["kernel"], expected, rtol=1e-6)
    np.testing.assert_array_equal(found["bias"], PARAMS["bias"])


def test_it_projects_what_the_step_leads_to():
    """An axis of units is the last, whatever comes before it: a convolution's too."""
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(3, 3, 4, 8)), jnp.float32)}
    gradients = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape)), params)
    optimizer = optax.chain(optax.sgd(0.5), max_norm(6.5))
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    found = optax.apply_updates(params, updates)["kernel"]
    moved = np.asarray(params["kernel"] - 0.5 * gradients["kernel"]).reshape(-1, 8)
    expected = torch.renorm(torch.tensor(moved.T), 2, 0, 6.5).numpy().T
    np.testing.assert_allclose(found.reshape(-1, 8), expected, rtol=1e-5)
    assert 0 < (np.linalg.norm(moved, axis=0) > 6.5).mean() < 1


def test_bad_input_is_a_clear_error():
    with pytest.raises(ValueError, match="max_norm needs a limit above 0, got 0"):
        max_norm(0)
    with pytest.raises(ValueError, match="max_norm needs the params"):
        max_norm(1.0).update(PARAMS, optax.EmptyState())
