# SPDX-License-Identifier: Apache-2.0
"""CIFAR-100 from its original binary files."""

from pathlib import Path

import numpy as np

from jaxdistill.data.errors import DataError
from jaxdistill.data.idx import Examples

NAME = "cifar100"
URL = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
COUNTS = {"train": 50_000, "test": 10_000}
PIXELS = 3 * 32 * 32


def read(data_dir: str | Path | None) -> dict[str, Examples]:
    """Both splits from a folder with train.bin and test.bin; the labels are the fine.

    A record is a coarse label, a fine label, and the image channel by channel.

    Raises:
      DataError: a missing folder or file, or one of another size.
    """
    if data_dir is None:
        raise DataError(
            f"{NAME} needs --data-dir: unpack {URL} and give its folder with train.bin "
            "and test.bin"
        )
    root = Path(data_dir)
    folder = root / "cifar-100-binary"
    folder = folder if folder.is_dir() else root
    return {split: _split(folder / f"{split}.bin", n) for split, n in COUNTS.items()}


def _split(path: Path, count: int) -> Examples:
    if not path.is_file():
        raise DataError(f"{path} does not exist; it is in {URL}")
    raw = np.fromfile(path, np.uint8)
    if raw.size != count * (2 + PIXELS):
        raise DataError(
            f"{path} has {raw.size} bytes, expected {count * (2 + PIXELS)}: it is "
            f"damaged or cut short; fetch {URL} again"
        )
    records = raw.reshape(count, 2 + PIXELS)
    images = records[:, 2:].reshape(count, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = records[:, 1].astype(np.int32)
    return {"images": np.ascontiguousarray(images), "labels": labels}
