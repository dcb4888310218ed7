# SPDX-License-Identifier: Apache-2.0
"""ResNets: published sizes, PyTorch's values, and statistics that skip padding."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import pretrained
from jaxdistill.models import ResNet, resnet_cifar, resnet_imagenet
from tests.builders import assert_identical

TINY = ResNet(5, stages=(1, 1), widths=(4, 4, 8))


def abstract(model, shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def tiny(seed=0, rows=6):
    """The tiny network's variables, statistics not those of a new one, and images."""
    images = jax.random.normal(jax.random.key(seed), (rows, 6, 6, 3))
    variables = jax.jit(TINY.init)(jax.random.key(1), images)
    stats = jax.tree.map(lambda x: x + 0.3, variables["batch_stats"])
    return {**variables, "batch_stats": stats}, images


@partial(jax.jit, static_argnames=("model", "train"))
def apply(model, variables, images, mask=None, train=True):
    found, updated = model.apply(
        variables, images, mask, train, mutable=["batch_stats"]
    )
    return found, updated["batch_stats"]


CIFAR_SIZES = {
    (20, 1): 278_324,
    (32, 1): 472_756,
    (44, 1): 667_188,
    (56, 1): 861_620,
    (110, 1): 1_736_564,
    (8, 4): 1_233_540,
    (32, 4): 7_433_860,
}
IMAGENET_SIZES = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032}


@pytest.mark.parametrize(("depth", "width"), CIFAR_SIZES)
def test_cifar_networks_have_the_published_sizes(depth, width):
    """RepDistiller's, 100 classes; He et al. 2016, table 6: 0.27M for 20 and so on."""
    variables = abstract(resnet_cifar(depth, 100, width), (1, 32, 32, 3))
    sizes = [x.size for x in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == CIFAR_SIZES[depth, width]


@pytest.mark.parametrize("depth", IMAGENET_SIZES)
def test_imagenet_networks_have_the_published_sizes(depth):
    """torchvision's."""
    variables = abstract(resnet_imagenet(depth), (1, 224, 224, 3))
    sizes = [x.size for x in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == IMAGENET_SIZES[depth]


@pytest.mark.parametrize(
    ("model", "side", "hidden_states"),
    [
        (
            resnet_cifar(20),
            32,
            [(2, 32, 32, 16), (2, 16, 16, 32), (2, 8, 8, 64), (2, 64)],
        ),
        (
            resnet_cifar(8, 10, 4, norm="group"),
            28,
            [(2, 28, 28, 64), (2, 14, 14, 128), (2, 7, 7, 256), (2, 256)],
        ),
        (
            resnet_imagenet(50, 10),
            224,
            [
                (2, 56, 56, 256),
                (2, 28, 28, 512),
                (2, 14, 14, 1024),
                (2, 7, 7, 2048),
                (2, 2048),
            ],
        ),
    ],
    ids=["cifar", "wide", "imagenet"],
)
@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "colour"])
def test_hidden_states_are_the_stages_and_the_pooled_vector(
    model, side, hidden_states, channels
):
    images = jax.ShapeDtypeStruct((2, side, side, *channels), jnp.float32)
    found, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert [h.shape for h in found.hidden_states] == hidden_states
    assert found.logits.shape == (2, 10)


@pytest.mark.parametrize("train", [False, True])
def test_a_grey_image_is_one_of_one_channel(train):
    images = jax.random.normal(jax.random.key(0), (2, 6, 6))
    variables = jax.jit(TINY.init)(jax.random.key(1), images)
    found = apply(TINY, variables, images, train=train)
    assert_identical(found, apply(TINY, variables, images[..., None], train=train))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet_cifar(18), "no CIFAR ResNet has depth 18: expected 8, 14"),
        (lambda: resnet_cifar(2), "no CIFAR ResNet has depth 2: expected 8, 14"),
        (lambda: resnet_cifar(20, width=2), "width=2, expected one of [1, 4]"),
        (lambda: resnet_imagenet(20), "depth 20: expected one of [18, 34, 50]"),
        (
            lambda: abstract(resnet_cifar(8, norm="layer"), (1, 8, 8)),
            "norm='layer', expected 'batch' or 'group'",
        ),
        (
            lambda: abstract(resnet_cifar(8), (8, 8)),
            "images of shape (8, 8), expected [B, H, W] or [B, H, W, C]",
        ),
    ],
)
def test_what_does_not_exist_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_padding_changes_nothing_in_training():
    """Also with a large spoiled row, and rows spread unevenly over two devices."""
    variables, images = tiny()
    mask = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    real = np.flatnonzero(mask)
    spoiled = jnp.where(mask[:, None, None, None] > 0, images, 1e3)
    expected, stats = apply(TINY, variables, images[real])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)

    found, found_stats = apply(TINY, variables, spoiled, mask)
    jax.tree.map(lambda a, b: close(a[real], b), found, expected)
    jax.tree.map(close, found_stats, stats)

    parts = TINY.clone(axis_name="devices")
    split = jax.vmap(partial(apply, parts, variables), axis_name="devices")
    found, found_stats = split(spoiled.reshape(2, 3, 6, 6, 3), mask.reshape(2, 3))
    jax.tree.map(
        lambda a, b: close(a.reshape(6, *a.shape[2:])[real], b), found, expected
    )
    jax.tree.map(lambda a, b: close(a[0], b), found_stats, stats)


def test_statistics_move_in_training_only():
    variables, images = tiny()
    found, stats = apply(TINY, variables, images, train=False)
    assert_identical(stats, variables["batch_stats"])
    alone, _ = apply(TINY, variables, images[:1], train=False)
    np.testing.assert_allclose(found.logits[:1], alone.logits, atol=1e-5)
    _, stats = apply(TINY, variables, images)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).all()), stats, variables["batch_stats"]
    )
    assert all(jax.tree.leaves(moved))


def test_convolutions_start_at_the_scale_of_their_outputs():
    """PyTorch's kaiming_normal_, fan_out: variance 2 / (9 * 64) for 64 channels."""
    model = ResNet(5, stages=(1,), widths=(32, 64))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4)))["params"]
    kernel = params["stage0_block0"]["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.03)


def torch_resnet(torch, model):
    """The same network in PyTorch. Norms and statistics random."""
    from experiments.baselines.pytorch_resnet import ResNet as TorchResNet

    network = TorchResNet(model)
    for name, value in network.state_dict().items():
        if value.ndim == 1:
            value.uniform_(0.5, 1.5) if "var" in name else value.normal_(0.5, 0.5)
    return network


@pytest.mark.parametrize(
    "model",
    [
        ResNet(5, stages=(2, 1), widths=(4, 4, 8)),
        ResNet(5, (1, 2), (4, 4, 8), bottleneck=True, large_stem=True),
        ResNet(5, (1, 1), (16, 16, 32), norm="group"),
    ],
    ids=["basic", "bottleneck", "group"],
)
@pytest.mark.parametrize("side", [10, 13])
def test_values_are_those_of_torch(model, side):
    """Odd and even sides: there the paddings of a stride of two differ."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    network = torch_resnet(torch, model)
    images = torch.randn(3, 3, side, side)
    ours = np.asarray(images.permute(0, 2, 3, 1))
    variables = pretrained.from_torch(network.state_dict(), abstract(model, ours.shape))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for train in (False, True):
        network.train(train)
        found, _ = model.apply(variables, ours, train=train, mutable=["batch_stats"])
        stem, *stages, head = network
        with torch.no_grad():
            x = stem(images)
            for stage, hidden in zip(stages, found.hidden_states[:-1], strict=True):
                x = stage(x)
                close(hidden, x.permute(0, 2, 3, 1))
            x = x.mean((2, 3))
            close(found.hidden_states[-1], x)
            close(found.logits, head(x))
