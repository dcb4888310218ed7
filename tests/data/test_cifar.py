# SPDX-License-Identifier: Apache-2.0
"""CIFAR-100's binary files, made here: the data set itself is not at hand."""

import numpy as np
import pytest

from jaxdistill import data
from jaxdistill.data import image_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five and three images, written by the format's description."""
    monkeypatch.setattr(image_files, "CIFAR_COUNTS", {"train": 5, "test": 3})
    rng, stored = np.random.default_rng(0), {}
    (tmp_path / "cifar-100-binary").mkdir()
    for split, count in image_files.CIFAR_COUNTS.items():
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        fine = rng.integers(0, 100, count)
        records = [
            bytes([7, label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(images, fine.tolist(), strict=True)
        ]
        path = tmp_path / "cifar-100-binary" / f"{split}.bin"
        path.write_bytes(b"".join(records))
        stored[split] = (images, fine)
    return tmp_path, stored


def test_reads_images_and_fine_labels(folder):
    path, stored = folder
    for where in (path, path / "cifar-100-binary"):
        source = data.load("cifar100", where)
        for split in ("train", "test"):
            images, labels = stored[split]
            found = getattr(source, split)
            np.testing.assert_array_equal(found["images"], images)
            np.testing.assert_array_equal(found["labels"], labels)
    inputs = source.inputs(source.test)["inputs"]
    black = (0 * inputs[0] - source.mean) / source.deviation
    np.testing.assert_allclose(black[0, 0], source.background, rtol=1e-6)
    assert inputs.dtype == np.float32
    expected = (stored["test"][0] / 255 - source.mean) / source.deviation
    np.testing.assert_allclose(inputs, expected, rtol=1e-5, atol=1e-6)


def test_what_is_missing_or_cut_short_is_said(folder, tmp_path):
    path, _ = folder
    with pytest.raises(data.DataError, match=r"cifar100 needs --data-dir"):
        data.load("cifar100")
    with pytest.raises(data.DataError, match=r"nowhere/train.bin does not exist"):
        data.load("cifar100", tmp_path / "nowhere")
    train = path / "cifar-100-binary" / "train.bin"
    train.write_bytes(train.read_bytes()[:-1])
    with pytest.raises(data.DataError, match="has 15369 bytes, expected 15370"):
        data.load("cifar100", path)
