# SPDX-License-Identifier: Apache-2.0
"""The small convolutional network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill import pretrained
from jaxdistill.models import ConvNet
from jaxdistill.models.layers import halve
from tests.builders import assert_identical

TINY = ConvNet((3, 5), hidden=7, num_classes=4)


@partial(jax.jit, static_argnames=("model", "train"))
def apply(model, variables, images, mask=None, train=True):
    return model.apply(variables, images, mask, train, mutable=["batch_stats"])


def test_shapes_and_parameters():
    images = jax.ShapeDtypeStruct((2, 28, 28), jnp.float32)
    found, variables = jax.eval_shape(
        ConvNet().init_with_output, jax.random.key(0), images
    )
    expected = [(2, 14, 14, 32), (2, 7, 7, 64), (2, 128)]
    assert [h.shape for h in found.hidden_states] == expected
    assert found.logits.shape == (2, 10)
    convolutions = (9 * 32 + 32) + (9 * 32 * 64 + 64)
    dense = (7 * 7 * 64 * 128 + 128) + (128 * 10 + 10)
    sizes = [x.size for x in jax.tree.leaves(variables)]
    assert sum(sizes) == convolutions + dense


def test_a_grey_image_is_one_of_one_channel():
    images = jax.random.normal(jax.random.key(0), (2, 5, 5))
    variables = jax.jit(TINY.init)(jax.random.key(1), images)
    found = apply(TINY, variables, images)
    assert_identical(found, apply(TINY, variables, images[..., None]))


def test_dropout_only_in_training():
    images = jax.random.normal(jax.random.key(0), (4, 4, 4))
    model = TINY.clone(dropout=0.5)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    plain = TINY.apply(variables, images)
    assert_identical(model.apply(variables, images), plain)
    rngs = {"dropout": jax.random.key(2)}
    found = model.apply(variables, images, train=True, rngs=rngs)
    assert_identical(found.hidden_states, plain.hidden_states)
    assert not np.allclose(found.logits, plain.logits)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_padding_changes_nothing_in_training(norm):
    model = TINY.clone(norm=norm)
    images = jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    real = np.flatnonzero(mask)
    spoiled = jnp.where(mask[:, None, None, None] > 0, images, 1e3)
    found, stats = apply(model, variables, spoiled, mask)
    expected, expected_stats = apply(model, variables, images[real])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: close(a[real], b), found, expected)
    jax.tree.map(close, stats, expected_stats)


@pytest.mark.parametrize("norm", [None, "batch"])
def test_values_are_those_of_torch(norm):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    nn = torch.nn

    def stage(inner, out):
        norms = [] if norm is None else [nn.BatchNorm2d(out)]
        conv = nn.Conv2d(inner, out, 3, padding=1, bias=norm is None)
        return nn.Sequential(conv, *norms, nn.ReLU(), nn.MaxPool2d(2))

    # Down to one pixel: PyTorch flattens channels first.
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), nn.ReLU())
    network = nn.Sequential(stage(2, 3), stage(3, 5), hidden, nn.Linear(7, 4))
    images = torch.randn(3, 2, 5, 5)
    ours = np.asarray(images.permute(0, 2, 3, 1))
    model = TINY.clone(norm=norm)
    like = jax.eval_shape(model.init, jax.random.key(0), ours)
    variables = pretrained.from_torch(network.state_dict(), like)
    found, _ = apply(model, variables, ours)
    x = images
    for layer, value in zip(network, (*found.hidden_states, found.logits), strict=True):
        x = layer(x)
        axes = (0, 2, 3, 1) if x.ndim == 4 else (0, 1)
        np.testing.assert_allclose(value, x.detach().permute(axes), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 5, 7, 1)])
def test_halving_is_max_pooling(shape):
    images = jax.random.normal(jax.random.key(0), shape)
    pool = partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))
    np.testing.assert_array_equal(halve(images), pool(images))
    slopes = [jax.grad(lambda x, f=f: (f(x) ** 3).sum())(images) for f in (halve, pool)]
    np.testing.assert_allclose(*slopes, rtol=1e-6)
