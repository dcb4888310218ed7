"""Convolutions on this CPU: XLA's own, in values and in derivatives of any order."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill.models import convolution
from jaxdistill.models.convolution import convolve, in_form

SIZES = {1: ((7,), (3,)), 2: ((7, 6), (3, 2))}
FORMS = [
    (1, [(1, 1)], (1,)),
    (1, [(2, 0)], (1,)),
    (1, [(1, 1)], (3,)),
    (2, [(1, 1), (1, 0)], (1, 1)),
    (2, [(0, 2), (0, 1)], (1, 1)),
    (2, [(1, 1), (1, 0)], (2, 2)),
    (2, [(1, 2), (0, 1)], (2, 1)),
]
"""Spatial axes, padding and strides."""


def xlas(images, kernel, *, strides, padding):
    axes = "HW"[: len(strides)]
    forms = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=forms
    )


def gradient(function):
    return jax.grad(lambda x, w: jnp.sin(function(x, w)).sum(), (0, 1))


def of_gradient(function):
    def total(x, w):
        return sum((part**2).sum() for part in gradient(function)(x, w))

    return jax.grad(total, (0, 1))


def forward_mode(function):
    return lambda x, w: jax.jvp(function, (x, w), (x + 1, w * w))


DERIVATIVES = {
    "values": lambda function: function,
    "gradient": gradient,
    "gradient of the gradient": of_gradient,
    "forward mode": forward_mode,
    "forward over reverse": lambda function: jax.jacfwd(gradient(function)),
}


def arrays(axes):
    draw = np.random.default_rng(0)
    size, window = SIZES[axes]
    images = draw.normal(size=(3, *size, 4))
    return jnp.asarray(images), jnp.asarray(draw.normal(size=(*window, 4, 5)))


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(("axes", "padding", "strides"), FORMS)
def test_it_is_xlas_in_float64(axes, padding, strides, derivative):
    made = DERIVATIVES[derivative]
    settings = {"strides": strides, "padding": padding}
    with jax.enable_x64(True):
        given = arrays(axes)
        found = jax.jit(made(partial(in_form, **settings)))(*given)
        expected = jax.jit(made(partial(xlas, **settings)))(*given)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("derivative", ["values", "gradient", "forward mode"])
@pytest.mark.parametrize("of", ["images", "kernels", "both", "other axes"])
@pytest.mark.parametrize(("axes", "padding", "strides"), [FORMS[0], FORMS[3], FORMS[5]])
def test_many_at_once(axes, padding, strides, of, derivative):
    made = DERIVATIVES[derivative]
    settings = {"strides": strides, "padding": padding}
    with jax.enable_x64(True):
        images, kernel = arrays(axes)
        many = jnp.stack([images, images + 1, 3 * images])
        kernels = jnp.stack([kernel, 2 * kernel, kernel + 1])
        over, *given = {
            "images": ((0, None), many, kernel),
            "kernels": ((None, 0), images, kernels),
            "both": ((0, 0), many, kernels),
            "other axes": ((1, -1), many.swapaxes(0, 1), jnp.moveaxis(kernels, 0, -1)),
        }[of]
        found = jax.jit(jax.vmap(made(partial(in_form, **settings)), over))(*given)
        expected = jax.vmap(made(partial(xlas, **settings)), over)(*given)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1, "SAME"])
def test_a_layer_is_xlas(size, stride, padding):
    """On this CPU, values and gradients, of odd sizes too."""
    images = jax.random.normal(jax.random.key(0), (2, 7, 8, 3))
    conv = partial(nn.Conv, 4, (size, size), strides=stride, padding=padding)
    ours, xlas = conv(conv_general_dilated=convolve), conv()
    variables = xlas.init(jax.random.key(1), images)

    def both(module):
        def total(variables, images):
            found = module.apply(variables, images)
            return (found**2).sum(), found

        return jax.value_and_grad(total, (0, 1), has_aux=True)(variables, images)

    for found, expected in zip(
        jax.tree.leaves(both(ours)), jax.tree.leaves(both(xlas)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "padding", "dtype", "taken"),
    [
        ((3, 3, 16, 32), [(1, 1), (1, 1)], "float32", True),
        ((3, 16, 32), [(1, 1)], "float32", True),
        ((1, 1, 16, 32), [(0, 0), (0, 0)], "float32", False),
        ((3, 3, 16, 256), [(1, 1), (1, 1)], "float32", False),
        ((3, 3, 16, 32), [(3, 3), (1, 1)], "float32", False),
        ((3, 3, 16, 32), [(1, 1), (1, 1)], "bfloat16", False),
    ],
)
def test_which_way_is_taken(kernel, padding, dtype, taken):
    images = jax.ShapeDtypeStruct((2, *(8,) * len(padding), 16), dtype)
    strides = (1,) * len(padding)
    axes = "HW"[: len(padding)]
    numbers = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    settings = {"feature_group_count": 1, "precision": None}
    program = jax.make_jaxpr(
        lambda x, w: convolve(
            x, w, strides, padding, dimension_numbers=numbers, **settings
        )
    )(images, jax.ShapeDtypeStruct(kernel, dtype))
    assert (convolution._in_form.name in str(program)) == taken


def test_another_type_is_the_convolution_too():
    """bfloat16 by patches; a sum of 36 products of bfloat16."""
    images, kernel = (x.astype(jnp.bfloat16) for x in arrays(2))
    layer = nn.Conv(5, (3, 2), padding=1, conv_general_dilated=convolve)
    layer = layer.clone(dtype=jnp.bfloat16, use_bias=False)
    found = layer.apply({"params": {"kernel": kernel}}, images)
    plain = layer.clone(conv_general_dilated=None)
    expected = plain.apply({"params": {"kernel": kernel}}, images)
    assert found.dtype == expected.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0.02, atol=0.1
    )
