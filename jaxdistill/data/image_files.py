# SPDX-License-Identifier: Apache-2.0
"""Image data sets from their original files: IDX (MNIST) and CIFAR-100's binaries."""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from jaxdistill.data.examples import DataError

Examples = dict[str, np.ndarray]
"""`images` uint8 `[N, H, W]` and `labels` int32 `[N]`."""

IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# SHA-256 of the uncompressed files, so that a re-compressed copy is still the original.
SHA256 = {
    name: dict(zip((*IDX_FILES["train"], *IDX_FILES["test"]), digests, strict=True))
    for name, digests in {
        "mnist": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        "fashion_mnist": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    }.items()
}


def locate_idx(folder: Path, file: str) -> Path | None:
    """A folder's file, gzipped or raw, None where there is neither."""
    return next(
        (p for p in (folder / f"{file}.gz", folder / file) if p.is_file()), None
    )


def read_idx(name: str, folder: Path) -> dict[str, Examples]:
    """Both splits from a folder that `fetch.find_file` gave.

    Raises:
      DataError: a damaged file, or another one of that name.
    """
    splits = {}
    for split, (images, labels) in IDX_FILES.items():
        arrays = []
        for file in (images, labels):
            path = locate_idx(folder, file)
            assert path is not None
            raw = unpack_idx(path)
            if hashlib.sha256(raw).hexdigest() != SHA256[name][file]:
                raise DataError(
                    f"{path} is not the original {name} file: its SHA-256 differs "
                    f"({len(raw)} bytes uncompressed); fetch it again"
                )
            arrays.append(parse_idx(raw))
        splits[split] = {"images": arrays[0], "labels": arrays[1].astype(np.int32)}
    return splits


def unpack_idx(path: Path) -> bytes:
    """A file's bytes, unpacked where it is gzipped.

    Raises:
      DataError: it is damaged or cut short.
    """
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


CIFAR = "cifar100"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
CIFAR_PIXELS = 3 * 32 * 32


def read_cifar(data_dir: str | Path | None) -> dict[str, Examples]:
    """Both splits from a folder with train.bin and test.bin; the labels are the fine.

    A record is a coarse label, a fine label, and the image channel by channel.

    Raises:
      DataError: a missing folder or file, or one of another size.
    """
    if data_dir is None:
        raise DataError(
            f"{CIFAR} needs --data-dir: unpack {CIFAR_URL} and give its folder with "
            "train.bin and test.bin"
        )
    root = Path(data_dir)
    folder = root / "cifar-100-binary"
    folder = folder if folder.is_dir() else root
    return {
        split: _cifar_split(folder / f"{split}.bin", n)
        for split, n in CIFAR_COUNTS.items()
    }


def _cifar_split(path: Path, count: int) -> Examples:
    if not path.is_file():
        raise DataError(f"{path} does not exist; it is in {CIFAR_URL}")
    raw = np.fromfile(path, np.uint8)
    if raw.size != count * (2 + CIFAR_PIXELS):
        raise DataError(
            f"{path} has {raw.size} bytes, expected {count * (2 + CIFAR_PIXELS)}: it "
            f"is damaged or cut short; fetch {CIFAR_URL} again"
        )
    records = raw.reshape(count, 2 + CIFAR_PIXELS)
    images = records[:, 2:].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = records[:, 1].astype(np.int32)
    return {"images": np.ascontiguousarray(images), "labels": labels}
