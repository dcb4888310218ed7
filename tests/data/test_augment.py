# SPDX-License-Identifier: Apache-2.0
import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from jaxdistill.data.augment import chain, crop, describe, flip, mixup, shift


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


def test_a_border_of_one_colour():
    batch = {"inputs": np.ones((32, 4, 4, 2), np.float32)}
    found = np.asarray(shift(1, fill=[3.0, -1.0])(batch, jax.random.key(0))["inputs"])
    assert set(map(tuple, found.reshape(-1, 2).tolist())) == {(1, 1), (3, -1)}


IMAGES = np.random.default_rng(1).normal(size=(64, 4, 6, 2)).astype(np.float32)
BATCH = {
    "inputs": IMAGES,
    "labels": np.arange(64),
    "mask": (np.arange(64) < 50).astype(np.float32),
}
KEY = jax.random.key(1)


def test_a_crop_is_a_window_and_all_windows_occur():
    found = np.asarray(crop(3, 4)(BATCH, KEY)["inputs"])
    seen = set()
    for image, window in zip(IMAGES, found, strict=True):
        at = [
            (i, j)
            for i in range(2)
            for j in range(3)
            if np.array_equal(image[i : i + 3, j : j + 4], window)
        ]
        assert len(at) == 1
        seen.update(at)
    assert len(seen) == 6
    with pytest.raises(ValueError, match=r"\(4, 6, 2\) have no 5 x 5 window"):
        crop(5, 5)(BATCH, KEY)


def test_a_flip_turns_half_of_the_images_left_to_right():
    found = np.asarray(flip()(BATCH, KEY)["inputs"])
    turned = [np.array_equal(a[:, ::-1], b) for a, b in zip(IMAGES, found, strict=True)]
    kept = [np.array_equal(a, b) for a, b in zip(IMAGES, found, strict=True)]
    assert [a != b for a, b in zip(turned, kept, strict=True)] == [True] * 64
    assert 16 < sum(turned) < 48


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_real_examples_with_each_other(seed):
    found = mixup(0.5)(BATCH, jax.random.key(seed))
    share, partner = np.asarray(found["share"]), np.asarray(found["partner"])
    weight = share[:, None, None, None]
    expected = weight * IMAGES + (1 - weight) * IMAGES[partner]  # labels are positions
    np.testing.assert_allclose(found["inputs"], expected, rtol=1e-5, atol=1e-6)
    assert (partner[:50] < 50).all()
    assert ((share >= 0) & (share <= 1)).all()
    assert (partner != np.arange(64)).sum() > 20
    assert 0.3 < share.mean() < 0.7
    with pytest.raises(ValueError, match="alpha above 0, got 0"):
        mixup(0)


def test_a_chain_gives_each_its_own_key():
    found = chain(flip(), shift(1, 0.0))(BATCH, KEY)["inputs"]
    turned = flip()(BATCH, jax.random.fold_in(KEY, 0))
    expected = shift(1, 0.0)(turned, jax.random.fold_in(KEY, 1))["inputs"]
    np.testing.assert_array_equal(found, expected)


def test_mixup_shows_no_label_that_must_not_be_used():
    labelled = (np.arange(64) % 3 == 0).astype(np.float32)
    found = mixup()({**BATCH, "labelled": labelled}, KEY)
    partner = np.asarray(found["partner"])
    assert labelled[partner][labelled > 0].all()
    assert (partner != np.arange(64)).any()
    raw = {**BATCH, "inputs": np.full((64, 4, 4), 200, np.uint8)}
    np.testing.assert_allclose(mixup()(raw, KEY)["inputs"], 200, rtol=1e-6)


def darken(share, batch, rng, floor=0.0):
    return {**batch, "inputs": np.maximum(share * batch["inputs"], floor)}


@dataclasses.dataclass(frozen=True, slots=True)
class Darken:
    share: float

    def __call__(self, batch, rng):
        return darken(self.share, batch, rng)


class Both:
    def __init__(self, first, second):
        self.first, self.second = first, second

    def __call__(self, batch, rng):
        return self.second(self.first(batch, rng), rng)

    def backwards(self, batch, rng):
        return self.first(self.second(batch, rng), rng)


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (mixup(0.5), "mixup(alpha=0.5)"),
        (partial(darken, 0.5), "darken(share=0.5)"),
        (partial(partial(darken, 0.5), floor=0.1), "darken(floor=0.1, share=0.5)"),
        (jax.jit(crop(3, 4)), "crop(height=3, width=4)"),
        (Darken(0.5), "Darken(share=0.5)"),
        (
            chain(flip(), partial(darken, 0.5), Darken(0.25)),
            "Chain(augmentations=(flip(), darken(share=0.5), Darken(share=0.25)))",
        ),
        (
            Both(flip(), Darken(0.5)).backwards,
            "Both.backwards(first=flip(), second=Darken(share=0.5))",
        ),
    ],
)
def test_an_augmentation_is_described_by_what_it_was_made_with(augment, words):
    assert describe(augment) == words
    assert augment(BATCH, KEY)["inputs"].shape[0] == len(IMAGES)


@pytest.mark.parametrize("augment", [print, Darken])
def test_what_cannot_be_described_is_refused(augment):
    with pytest.raises(ValueError, match="a functools.partial or an object with fie"):
        describe(augment)
