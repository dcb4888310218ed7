# SPDX-License-Identifier: Apache-2.0
"""Where examples come from: embedded digits, TFDS, or the original IDX files."""

import gzip
import hashlib
import math
import socket
import zlib
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import numpy as np

from jaxdistill.data.transforms import normalize

Examples = dict[str, np.ndarray]
"""`images` uint8 `[N, H, W]` and `labels` int32 `[N]`."""

DIGITS_TEST = 797

_PIXELS = {
    "digits": (0.3049, 0.376),
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.286, 0.353),
}

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the uncompressed files, so that a re-compressed copy is still the original.
_SHA256 = {
    "mnist": {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
}


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for; one sentence says so."""


class Dataset(NamedTuple):
    """A data set in memory.

    Attributes:
      name: "digits", "mnist" or "fashion_mnist".
      train: images and labels; a validation split is taken from it with `holdout`.
      test: images and labels, for the final report alone.
      num_classes: labels lie in `[0, num_classes)`.
      peak: the images' largest possible value.
      mean: of the training pixels divided by `peak`.
      deviation: likewise.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    peak: int
    mean: float
    deviation: float

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


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """A data set by name.

    "digits" is shipped with the package. "mnist" and "fashion_mnist" come from the
    original IDX files where `data_dir` (or `data_dir/name`) holds them, raw or gzipped,
    else from TFDS, which keeps its prepared copy in `data_dir` and downloads it where
    there is none. Both give the same arrays in the same order.

    Raises:
      DataError: an unknown name, a missing folder or file, a damaged file, no network.
    """
    if name == "digits":
        return _digits()
    if name not in _SHA256:
        known = ", ".join(["digits", *_SHA256])
        raise DataError(f"unknown data set {name!r}; known: {known}")
    folder = _idx_folder(name, data_dir)
    splits = _read_tfds(name, data_dir) if folder is None else _read_idx(name, folder)
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
    return (
        {key: value[rest] for key, value in examples.items()},
        {key: value[held] for key, value in examples.items()},
    )


def prepare_tfds(
    name: str, data_dir: str | Path | None, idx_dir: str | Path | None
) -> None:
    """Writes the TFDS copy of a data set into `data_dir`, without TensorFlow.

    TFDS's own MNIST builders parse with TensorFlow; this is the same data set (name,
    version, features, checksums) parsed with NumPy and stored as array_record.

    Args:
      name: "mnist" or "fashion_mnist".
      data_dir: where TFDS keeps prepared data sets; None is its own default.
      idx_dir: a folder with the four gzipped IDX files; None downloads them.

    Raises:
      DataError: an unknown name, a missing file, no network, TFDS not installed.
    """
    tfds = _tfds(name)
    builder = _tfds_builder(name, data_dir)
    if idx_dir is None:
        _check_network(name, builder.URL)
    else:
        # TFDS looks for what is missing on the network, and retries for minutes.
        files = [f"{file}.gz" for file in _SHA256[name]]
        missing = [file for file in files if not (Path(idx_dir) / file).is_file()]
        if missing:
            raise DataError(f"{idx_dir} does not hold {', '.join(missing)}")
    manual = None if idx_dir is None else str(idx_dir)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual)
    )


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise DataError unless every label is an integer in `[0, num_classes)`."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers, got {labels.dtype}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"label {labels.flat[wrong[0]]} at position {wrong[0]} is out of range: "
            f"with {num_classes} classes, labels are 0 to {num_classes - 1}"
        )


def _digits() -> Dataset:
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        examples = {
            "images": stored["images"],
            "labels": stored["labels"].astype(np.int32),
        }
    train, test = holdout(examples, DIGITS_TEST)
    return Dataset("digits", train, test, 10, 16, *_PIXELS["digits"])


def _idx_folder(name: str, data_dir: str | Path | None) -> Path | None:
    """The folder of IDX files, None where there are none; half a set is an error."""
    if data_dir is None:
        return None
    root = Path(data_dir)
    if "://" in str(data_dir):
        return None
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist or is not a folder")
    for folder in (root, root / name):
        found = [file for file in _SHA256[name] if _idx_path(folder, file)]
        missing = sorted(set(_SHA256[name]) - set(found))
        if found and missing:
            raise DataError(
                f"{folder} holds only part of {name}: missing {', '.join(missing)} "
                "(with or without .gz)"
            )
        if found:
            return folder
    return None


def _idx_path(folder: Path, file: str) -> Path | None:
    return next(
        (p for p in (folder / f"{file}.gz", folder / file) if p.is_file()), None
    )


def _read_idx(name: str, folder: Path) -> dict[str, Examples]:
    splits = {}
    for split, (images, labels) in _FILES.items():
        arrays = []
        for file in (images, labels):
            path = _idx_path(folder, file)
            assert path is not None
            raw = _unpack(path)
            if hashlib.sha256(raw).hexdigest() != _SHA256[name][file]:
                raise DataError(
                    f"{path} is not the original {name} file: its SHA-256 differs "
                    f"({len(raw)} bytes uncompressed); fetch it again"
                )
            arrays.append(parse_idx(raw))
        splits[split] = {"images": arrays[0], "labels": arrays[1].astype(np.int32)}
    return splits


def _unpack(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut short: {error}") from error


def parse_idx(raw: bytes) -> np.ndarray:
    """The uint8 array in an IDX file: zeros, type 8, rank, big-endian shape, bytes.

    Raises:
      DataError: another format or type, or more or fewer bytes than the shape says.
    """
    if raw[:3] != b"\0\0\x08" or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"not an IDX file of unsigned bytes: it begins {raw[:4]!r}")
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).tolist()
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape))
    if values.size != math.prod(shape):
        raise DataError(
            f"the IDX file says shape {tuple(shape)} but holds {values.size} values"
        )
    return values.reshape(shape)


def _read_tfds(name: str, data_dir: str | Path | None) -> dict[str, Examples]:
    tfds = _tfds(name)
    builder = _tfds_builder(name, data_dir)
    if not builder.is_prepared():
        prepare_tfds(name, data_dir, None)
    splits = {}
    for split in _FILES:
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        try:
            rows = source.__getitems__(list(range(len(source))))
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise DataError(
                f"TFDS's copy of {name} in {builder.data_dir} is damaged: {reason}; "
                "delete that folder to have it made again"
            ) from error
        splits[split] = {
            "images": np.stack([row["image"][..., 0] for row in rows]),
            "labels": np.array([row["label"] for row in rows], np.int32),
        }
    return splits


def _tfds(name: str) -> Any:
    if name not in _SHA256:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(_SHA256)}")
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading {name} needs tensorflow-datasets (pip install "
            "'jaxdistill[data]'), or --data-dir with the original IDX files"
        ) from error
    return tfds


def _tfds_builder(name: str, data_dir: str | Path | None) -> Any:
    from tensorflow_datasets.core import registered

    stock = _tfds(name).builder_cls(name)
    with registered.skip_registration():

        class Builder(stock):  # type: ignore[misc, valid-type]
            def _split_generators(self, dl_manager):
                urls = {file: f"{self.URL}{file}.gz" for file in _SHA256[name]}
                paths = dl_manager.download(urls)
                return {
                    split: self._generate_examples(paths[images], paths[labels])
                    for split, (images, labels) in _FILES.items()
                }

            def _generate_examples(self, images, labels):
                from PIL import Image

                pair = [
                    parse_idx(gzip.decompress(p.read_bytes())) for p in (images, labels)
                ]
                for index, (image, label) in enumerate(zip(*pair, strict=True)):
                    yield index, {"image": Image.fromarray(image), "label": int(label)}

    Builder.name = name
    try:
        return Builder(data_dir=data_dir, file_format="array_record")
    except ValueError as error:
        raise DataError(
            f"TFDS's copy of {name} in {data_dir or 'its default folder'} cannot be "
            f"read without TensorFlow ({error}); give another --data-dir"
        ) from error


def _check_network(name: str, url: str) -> None:
    """TFDS retries for minutes without a network; one look-up tells at once."""
    host = urlparse(url).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        raise DataError(
            f"no network: {host} cannot be reached to download {name}; give "
            "--data-dir, a folder with its four original IDX files or TFDS's own copy"
        ) from error


def _in_order(examples: Examples) -> Examples:
    """Examples sorted by their bytes: TFDS shuffles as it writes, files have another
    order, and a seed must mean the same split and the same batches either way."""
    images, labels = examples["images"], examples["labels"]
    rows = np.concatenate(
        [images.reshape(len(images), -1), labels[:, None].astype(np.uint8)], axis=1
    )
    order = np.argsort(np.ascontiguousarray(rows).view(f"S{rows.shape[1]}")[:, 0])
    return {"images": images[order], "labels": labels[order]}
