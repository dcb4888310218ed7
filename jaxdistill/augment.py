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
        size, height, width = images.shape[:3]
        still = ((0, 0),) * (images.ndim - 3)
        border = ((0, 0), (pixels, pixels), (pixels, pixels), *still)
        padded = jnp.pad(images, border, constant_values=fill)
        offsets = jax.random.randint(rng, (size, 2), 0, 2 * pixels + 1)
        rows = offsets[:, :1] + jnp.arange(height)[None]
        columns = offsets[:, 1:] + jnp.arange(width)[None]
        example = jnp.arange(size)[:, None, None]
        moved = padded[example, rows[:, :, None], columns[:, None, :]]
        return {**batch, "inputs": moved}

    return prepare
