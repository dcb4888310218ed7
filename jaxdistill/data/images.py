# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: embedded digits, TFDS, or the original files."""

from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import fetch, image_files
from jaxdistill.data.examples import DataError, check_labels, normalize, some_of
from jaxdistill.data.image_files import Examples

DIGITS_TEST = 797

_PIXELS: dict[str, tuple[Any, Any]] = {
    "digits": (0.3049, 0.376),
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.286, 0.353),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}

Pixel = float | tuple[float, ...]


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
      name: "digits", "mnist", "fashion_mnist" or "cifar100".
      train: images and labels; a validation split is taken from it with `holdout`.
      test: images and labels, for the final report alone.
      num_classes: labels lie in `[0, num_classes)`.
      peak: the images' largest possible value.
      mean: of the training pixels divided by `peak`; colours have one a channel.
      deviation: likewise.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    peak: int
    mean: Pixel
    deviation: Pixel

    @property
    def background(self) -> Any:
        """A black pixel as a model sees it: what a shifted image is filled with."""
        black = -np.asarray(self.mean, np.float32) / np.asarray(self.deviation)
        return black.astype(np.float32)

    def inputs(self, split: Examples) -> Examples:
        """A split as a model takes it: normalised float32 `inputs`, and `labels`.

        Raises:
          DataError: a label is no integer in `[0, num_classes)`.
        """
        check_labels(split["labels"], self.num_classes)
        return {
            "inputs": normalize(split["images"], self.mean, self.deviation, self.peak),
            "labels": split["labels"],
        }

    def splits(self, validation: int | None) -> tuple[Examples, Examples, Any]:
        """`inputs` of the training images, of the test, and of those held out, if any.

        Args:
          validation: training images held out (`holdout`), or None.

        Raises:
          DataError: as `holdout` and `inputs`.
        """
        train, held = self.train, None
        if validation is not None:
            train, rest = holdout(train, validation)
            held = self.inputs(rest)
        return self.inputs(train), self.inputs(self.test), held


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name.

    "digits" is shipped with the package. "mnist" and "fashion_mnist" come from the
    original IDX files where `data_dir` (or `data_dir/name`) holds them, raw or gzipped,
    else from TFDS, which keeps its prepared copy in `data_dir` and downloads it where
    there is none. Both give the same arrays in the same order. "cifar100" comes from
    its original binary files in `data_dir`.

    Raises:
      DataError: an unknown name, a missing folder or file, a damaged file, no network.
    """
    if name == "digits":
        return _digits()
    if name == image_files.CIFAR:
        splits = image_files.read_cifar(data_dir)
        return Dataset(name, splits["train"], splits["test"], 100, 255, *_PIXELS[name])
    if name not in image_files.SHA256:
        known = ", ".join(["digits", *image_files.SHA256, image_files.CIFAR])
        raise DataError(f"unknown data set {name!r}; known: {known}")
    needed = [(file,) for file in sorted(image_files.SHA256[name])]
    folder = fetch.find_file(name, (name,), needed, data_dir)
    splits = (
        fetch.read_tfds(name, data_dir)
        if folder is None
        else image_files.read_idx(name, folder)
    )
    train, test = (_in_order(splits[split]) for split in ("train", "test"))
    return Dataset(name, train, test, 10, 255, *_PIXELS[name])


def holdout(examples: Examples, count: int, seed: int = 0) -> tuple[Examples, Examples]:
    """Splits off `count` random examples: `(the rest, the held-out)`.

    Raises:
      DataError: either part would be empty.
    """
    size = len(next(iter(examples.values())))
    if not 0 < count < size:
        raise DataError(
            f"cannot hold out {count} of {size} examples: one split would be empty"
        )
    order = np.random.default_rng(seed).permutation(size)
    rest, held = np.sort(order[count:]), np.sort(order[:count])
    return some_of(examples, rest), some_of(examples, held)


def _digits() -> Dataset:
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        examples = {
            "images": stored["images"],
            "labels": stored["labels"].astype(np.int32),
        }
    train, test = holdout(examples, DIGITS_TEST)
    return Dataset("digits", train, test, 10, 16, *_PIXELS["digits"])


def _in_order(examples: Examples) -> Examples:
    """Examples sorted by their bytes: TFDS shuffles as it writes, files have another
    order, and a seed must mean the same split and the same batches either way."""
    images, labels = examples["images"], examples["labels"]
    rows = np.concatenate(
        [images.reshape(len(images), -1), labels[:, None].astype(np.uint8)], axis=1
    )
    # Each row as one string of bytes: NumPy sorts no rows.
    order = np.argsort(np.ascontiguousarray(rows).view(f"S{rows.shape[1]}")[:, 0])
    return {"images": images[order], "labels": labels[order]}
