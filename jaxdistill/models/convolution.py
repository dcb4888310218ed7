# SPDX-License-Identifier: Apache-2.0
"""Convolutions, and what makes them fast on a CPU, in loops and with their gradients.

XLA's CPU compiler has one fast convolution: channels last, stride 1, nothing reversed
or dilated. Outside loops it brings others into that form. Inside a loop, where training
steps are, it does not, and what autodiff writes for the two gradients becomes naive
loops. `in_form` is a convolution whose gradients are one more of that form and a
product of matrices.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxdistill.types import Array

_DIRECT = ContextVar("direct", default=False)

CHANNELS = 128
"""Up to so many channels, in and out, `in_form` is faster than `patches`."""

Padding = Sequence[tuple[int, int]]


@contextmanager
def direct() -> Iterator[None]:
    """What is traced in here has XLA's convolutions on a CPU too.

    For formats whose runtimes have a fast convolution, and no platforms to choose by.
    """
    before = _DIRECT.set(True)
    try:
        yield
    finally:
        _DIRECT.reset(before)


def convolve(images, kernel, strides, padding, **others):
    """`lax.conv_general_dilated` for `nn.Conv`, on a CPU by what is fastest there.

    Float32 with few channels takes `in_form`; 1x1 kernels, many channels and other
    types take `patches`; dilation and groups are left to XLA.
    """

    def convolution(images, kernel):
        return jax.lax.conv_general_dilated(images, kernel, strides, padding, **others)

    dilated = (others.get("lhs_dilation"), others.get("rhs_dilation"))
    plain = images.ndim in (3, 4) and all(set(d or (1,)) == {1} for d in dilated)
    grouped = others["feature_group_count"] > 1
    if isinstance(padding, str) or not plain or grouped or _DIRECT.get():
        return convolution(images, kernel)
    takes = in_form if _takes_form(images, kernel, padding) else patches
    on_cpu = partial(
        takes, strides=strides, padding=padding, precision=others["precision"]
    )
    return jax.lax.platform_dependent(images, kernel, cpu=on_cpu, default=convolution)


def _takes_form(images, kernel, padding) -> bool:
    *window, channels, features = kernel.shape
    inside = all(max(p) < size for p, size in zip(padding, window, strict=True))
    few = max(channels, features) <= CHANNELS
    float32 = images.dtype == kernel.dtype == jnp.float32
    return math.prod(window) > 1 and inside and few and float32


def patches(images, kernel, *, strides, padding, precision=None) -> Array:
    """A convolution as a product of the images' patches and a matrix."""
    *window, _, features = kernel.shape
    flat = _windows(images, window, strides, padding, first=1)
    matrix = kernel.reshape(-1, features)
    return jnp.matmul(flat, matrix, precision=precision)


def _windows(images, window, strides, padding, first: int) -> Array:
    """`[B, ..., C]` to `[B, ..., K * C]`: what a window of K numbers, on the axes from
    `first` on, sees at each place."""
    axes = range(first, images.ndim - 1)
    padded = jnp.pad(images, ((0, 0),) * first + (*padding, (0, 0)))
    places = [
        (padded.shape[axis] - size) // stride + 1
        for axis, size, stride in zip(axes, window, strides, strict=True)
    ]
    seen = []
    for starts in itertools.product(*map(range, window)):
        cut = [slice(None)] * first
        for start, stride, count in zip(starts, strides, places, strict=True):
            cut.append(slice(start, start + stride * (count - 1) + 1, stride))
        seen.append(padded[tuple(cut)])
    return jnp.concatenate(seen, -1)


def in_form(images, kernel, *, strides, padding: Padding, precision=None) -> Array:
    """A convolution whose derivatives of any order are fast on a CPU, too.

    Args:
      images: `[B, ..., C]`.
      kernel: `[..., C, D]`.
      strides: one for each axis between.
      padding: before and after on each of these, less than the kernel's size.
      precision: see `lax.conv_general_dilated`.

    Returns:
      `[B, ..., D]`.
    """
    settings = {
        "strides": tuple(map(int, strides)),
        "padding": tuple((int(low), int(high)) for low, high in padding),
        "precision": precision,
    }
    return _in_form.bind(images, kernel, **settings)


def _convolution(images, kernel, *, strides, padding, precision) -> Array:
    axes = "HW"[: len(padding)]
    forms = f"N{axes}C", f"{axes}IO", f"N{axes}C"
    return jax.lax.conv_general_dilated(
        images, kernel, strides, padding, dimension_numbers=forms, precision=precision
    )


def _shape(images, kernel, *, strides, padding, precision):
    del precision
    given = zip(images.shape[1:], kernel.shape, strides, padding, strict=False)
    places = [
        (size + low + high - window) // stride + 1
        for size, window, stride, (low, high) in given
    ]
    return images.update(shape=(images.shape[0], *places, kernel.shape[-1]))


def _to_images(cotangent, images, kernel, *, strides, padding, precision):
    """The gradient for images: the kernel turned round, its channels exchanged."""
    settings = {"strides": strides, "precision": precision}
    if set(strides) != {1}:
        run = partial(patches, kernel=kernel, padding=padding, **settings)
        return jax.linear_transpose(run, images.aval)(cotangent)[0]
    axes = range(len(padding))
    # Behind a barrier: XLA would take the turn back into the convolution.
    turned = jax.lax.optimization_barrier(jnp.flip(kernel, axes).swapaxes(-1, -2))
    rest = [
        (size - 1 - low, size - 1 - high)
        for size, (low, high) in zip(kernel.shape, padding, strict=False)
    ]
    return in_form(cotangent, turned, padding=rest, **settings)


def _to_kernel(cotangent, images, kernel, *, strides, padding, precision):
    """The gradient for a kernel: one product of matrices.

    The kernel's places on the first axis are windows on the cotangent, the others on
    the images: of 3x3, six copies in all in place of nine.
    """
    if set(strides) != {1}:
        settings = {"strides": strides, "padding": padding, "precision": precision}
        run = partial(patches, images, **settings)
        return jax.linear_transpose(run, kernel.aval)(cotangent)[0]
    height, *window, channels, features = kernel.aval.shape
    seen = _windows(images, window, strides[1:], padding[1:], first=2)
    low, high = padding[0]
    rows = (height - 1 - low, height - 1 - high), *((0, 0),) * len(window)
    column = (height, *(1,) * len(window))
    answers = _windows(cotangent, column, strides, rows, first=1)
    flat = seen.reshape(-1, seen.shape[-1]), answers.reshape(-1, answers.shape[-1])
    found = jax.lax.dot_general(*flat, (((0,), (0,)), ((), ())), precision=precision)
    found = found.reshape(*window, channels, height, features)
    # The last row of the cotangent's window met the images' first.
    return jnp.moveaxis(found, -2, 0)[::-1]


def _of_many(arguments, axes, **settings):
    """`jax.vmap` over images, kernels or both."""
    images, kernels = arguments
    of_images, of_kernels = axes

    def run(images, kernel):
        return in_form(images, kernel, **settings)

    if of_kernels is None:  # many images are a larger batch
        images = jnp.moveaxis(images, of_images, 0)
        found = run(images.reshape(-1, *images.shape[2:]), kernels)
        return found.reshape(*images.shape[:2], *found.shape[1:]), 0
    if of_images is None:  # many kernels are one with more features
        kernels = jnp.moveaxis(kernels, of_kernels, -2)
        found = run(images, kernels.reshape(*kernels.shape[:-2], -1))
        return found.reshape(*found.shape[:-1], *kernels.shape[-2:]), found.ndim - 1
    pairs = jnp.moveaxis(images, of_images, 0), jnp.moveaxis(kernels, of_kernels, 0)
    return jax.lax.map(lambda pair: run(*pair), pairs), 0


_in_form = Primitive("convolution_in_form")
_in_form.def_impl(_convolution)
_in_form.def_abstract_eval(_shape)
mlir.register_lowering(_in_form, mlir.lower_fun(_convolution, multiple_results=False))
ad.defbilinear(_in_form, _to_images, _to_kernel)
batching.primitive_batchers[_in_form] = _of_many
