# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: `prepare` functions for `steps.make_train_step`.

They run before the teacher sees the batch, so teacher and student get the same view
(function matching: Beyer et al. 2022, Knowledge distillation: a good teacher is patient
and consistent, section 3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdistill.types import Array, Batch


def shift(pixels: int, fill: float) -> Callable[[Batch, Array], Batch]:
    """Moves each image by up to `pixels` up or down and left or right, independently.

    Args:
      pixels: the largest move; every whole number up to it is equally likely.
      fill: the value that comes in at the border, the background's.

    Returns:
      `(batch, rng) -> batch` for `inputs` of shape `[B, H, W, ...]`.

    Raises:
      ValueError: `pixels` is negative.
    """
    if pixels < 0:
        raise ValueError(f"images cannot be shifted by up to {pixels} pixels")

    def prepare(batch: Batch, rng: Array) -> Batch:
        images = batch["inputs"]
        size = images.shape[0]
        still = ((0, 0),) * (images.ndim - 3)
        border = ((0, 0), (pixels, pixels), (pixels, pixels), *still)
        padded = jnp.pad(images, border, constant_values=fill)
        corners = jax.random.randint(rng, (size, 2), 0, 2 * pixels + 1)

        def window(image, corner):
            start = (corner[0], corner[1], *(0,) * len(still))
            return jax.lax.dynamic_slice(image, start, images.shape[1:])

        # A slice an image; indexing every pixel was 17 times slower on a CPU.
        moved = jax.vmap(window)(padded, corners)
        return {**batch, "inputs": moved}

    return prepare
