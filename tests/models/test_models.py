# SPDX-License-Identifier: Apache-2.0
"""Models: the MLP, and BatchNorm that does not count padding."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill.models import MLP, BatchNorm, student
from tests.builders import assert_identical


def test_mlp_shapes_parameters_and_hidden_states():
    model = MLP((7, 4, 3))
    images = jax.random.normal(jax.random.key(0), (5, 2, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    outputs = jax.jit(model.apply)(variables, images)
    count = sum(x.size for x in jax.tree.leaves(variables))
    assert count == (6 * 7 + 7) + (7 * 4 + 4) + (4 * 3 + 3)
    assert outputs.logits.shape == (5, 3)
    assert [h.shape for h in outputs.hidden_states] == [(5, 7), (5, 4)]

    params = jax.tree.map(np.asarray, variables["params"])
    layers = [params[f"Dense_{i}"] for i in range(3)]
    x = np.asarray(images).reshape(5, -1)
    for layer, hidden in zip(layers[:-1], outputs.hidden_states, strict=True):
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
        np.testing.assert_allclose(hidden, x, atol=1e-5)
    logits = x @ layers[-1]["kernel"] + layers[-1]["bias"]
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-5)


@pytest.mark.parametrize("rates", [{"input_dropout": 0.5}, {"dropout": 0.5}])
def test_dropout_only_in_training(rates):
    model, x = MLP((16, 3), **rates), jnp.ones((4, 6))
    variables = jax.jit(model.init)(jax.random.key(0), x)

    @jax.jit
    def train(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, x, train=True, rngs=rngs).logits

    plain = MLP((16, 3)).apply(variables, x).logits
    np.testing.assert_array_equal(model.apply(variables, x).logits, plain)
    assert not np.allclose(train(1), plain)
    assert not np.allclose(train(1), train(2))
    np.testing.assert_array_equal(train(1), train(1))


def test_equal_modules_make_one_student():
    """jit caches by its functions: made anew each time, every step would retrace."""
    assert student(MLP((4, 3))) is student(MLP((4, 3)))
    assert student(MLP((4, 3))) is not student(MLP((5, 3)))


MASKS = {
    "all real": np.ones(8),
    "some padding": np.array([1, 0, 1, 1, 0, 0, 1, 1]),
    "one real": np.eye(8)[5],
}


def norm_and_input(shape=(8, 5, 3)):
    x = 3 * jax.random.normal(jax.random.key(0), shape) + 2
    variables = {
        "params": {"scale": jnp.array([0.5, 1.0, 2.0]), "bias": jnp.arange(3.0)},
        "batch_stats": {"mean": jnp.full(3, 0.3), "var": jnp.full(3, 1.7)},
    }
    return variables, x


@partial(jax.jit, static_argnames="train")
def norm(variables, x, mask=None, train=True):
    """Outputs and the updated statistics."""
    module = BatchNorm(momentum=0.8)
    y, updated = module.apply(variables, x, mask, train, mutable=["batch_stats"])
    return y, updated["batch_stats"]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", [(8, 3), (8, 5, 3), (8, 2, 2, 3)])
def test_batch_norm_is_that_of_the_real_rows(mask, shape):
    """Ioffe, Szegedy 2015, algorithm 1, in float64 on the rows that are real."""
    variables, x = norm_and_input(shape)
    spoiled = jnp.where(mask.reshape(8, *(1,) * (len(shape) - 1)) > 0, x, 1e6)
    found, stats = norm(variables, spoiled, jnp.asarray(mask))
    rows = np.asarray(x, np.float64)[mask > 0]
    flat = rows.reshape(-1, 3)
    mean, var = flat.mean(0), flat.var(0)
    scale, bias = np.array([0.5, 1.0, 2.0]), np.arange(3.0)
    expected = (rows - mean) / np.sqrt(var + 1e-5) * scale + bias
    # A single row of one position has variance 0: what is left is rounding.
    np.testing.assert_allclose(found[mask > 0], expected, atol=2e-3)
    np.testing.assert_allclose(stats["mean"], 0.8 * 0.3 + 0.2 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.8 * 1.7 + 0.2 * var, rtol=1e-5)


def test_batch_norm_of_padding_alone_leaves_the_statistics():
    variables, x = norm_and_input()
    found, stats = norm(variables, x, jnp.zeros(8))
    assert np.isfinite(found).all()
    assert_identical(stats, variables["batch_stats"])


def test_batch_norm_variance_of_large_means_does_not_cancel():
    variables, x = norm_and_input()
    _, stats = norm(variables, x + 1e4)
    var = np.asarray(x, np.float64).reshape(-1, 3).var(0)
    np.testing.assert_allclose(stats["var"], 0.8 * 1.7 + 0.2 * var, rtol=1e-3)


def test_batch_norm_in_evaluation_uses_the_running_statistics():
    variables, x = norm_and_input()
    expected = (np.asarray(x) - 0.3) / np.sqrt(1.7 + 1e-5)
    expected = expected * np.array([0.5, 1.0, 2.0]) + np.arange(3.0)
    for mask in (None, jnp.zeros(8)):
        found, stats = norm(variables, x, mask, train=False)
        assert_identical(stats, variables["batch_stats"])
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_batch_norm_trains_like_flax_and_torch():
    """Values, gradients, running mean; PyTorch's running variance is the unbiased."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    variables, x = norm_and_input((8, 3))
    weight = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)

    def gradients(model, *flags):
        def loss(params, x):
            state = {**variables, "params": params}
            y, updated = model.apply(state, x, *flags, mutable=["batch_stats"])
            return (y * weight).sum(), (y, updated["batch_stats"])

        both = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        return both(variables["params"], x)

    flax = nn.BatchNorm(use_running_average=False, momentum=0.8)
    ours, theirs = gradients(BatchNorm(momentum=0.8), None, True), gradients(flax)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), ours, theirs)
    (params, slope), (y, stats) = ours

    layer = torch.nn.BatchNorm1d(3, momentum=0.2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        layer.bias.copy_(torch.arange(3.0))
        layer.running_mean.fill_(0.3)
        layer.running_var.fill_(1.7)
    torch_x = torch.tensor(np.asarray(x), requires_grad=True)
    torch_y = layer(torch_x)
    (torch_y * torch.tensor(weight)).sum().backward()
    np.testing.assert_allclose(y, torch_y.detach(), atol=1e-5)
    np.testing.assert_allclose(slope, torch_x.grad, atol=1e-5)
    np.testing.assert_allclose(params["scale"], layer.weight.grad, atol=1e-4)
    np.testing.assert_allclose(params["bias"], layer.bias.grad, atol=1e-4)
    np.testing.assert_allclose(stats["mean"], layer.running_mean, atol=1e-5)
    unbiased = 0.8 * 1.7 + (np.asarray(stats["var"]) - 0.8 * 1.7) * 8 / 7
    np.testing.assert_allclose(unbiased, layer.running_var, atol=1e-5)
