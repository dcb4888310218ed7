# SPDX-License-Identifier: Apache-2.0
"""Transforms of images, before they go to a device."""

import numpy as np


def normalize(
    images: np.ndarray,
    mean: float | tuple[float, ...],
    deviation: float | tuple[float, ...],
    peak: int = 255,
) -> np.ndarray:
    """`(images / peak - mean) / deviation` as float32; one value, or one a channel.

    >>> normalize(np.array([0, 255], np.uint8), mean=0.5, deviation=0.5)
    array([-1.,  1.], dtype=float32)
    """
    centre, spread = np.asarray(mean, np.float32), np.asarray(deviation, np.float32)
    return (images / np.float32(peak) - centre) / spread
