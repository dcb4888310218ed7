# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from jaxdistill.augment import shift


@pytest.mark.parametrize("shape", [(64, 5, 7), (64, 5, 7, 3)])
def test_every_image_is_one_of_its_shifted_copies_and_all_shifts_occur(shape):
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    still = ((0, 0),) * (len(shape) - 3)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), *still), constant_values=-9.0)
    batch = {"inputs": images, "labels": np.arange(64)}
    moved = shift(1, fill=-9.0)(batch, jax.random.key(0))
    seen = set()
    for before, after in zip(padded, np.asarray(moved["inputs"]), strict=True):
        windows = {
            (i, j): before[i : i + 5, j : j + 7] for i in range(3) for j in range(3)
        }
        matches = [
            at for at, window in windows.items() if np.array_equal(window, after)
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 9
    assert moved["labels"] is batch["labels"]


def test_no_pixels_is_the_identity_and_fewer_is_an_error():
    batch = {"inputs": np.ones((2, 3, 3), np.float32)}
    same = shift(0, fill=0.0)(batch, jax.random.key(0))
    np.testing.assert_array_equal(same["inputs"], batch["inputs"])
    with pytest.raises(ValueError, match="by up to -1 pixels"):
        shift(-1, fill=0.0)
