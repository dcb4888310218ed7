# SPDX-License-Identifier: Apache-2.0
"""Arrays of examples on disk: TensorStore's zarr3, sharded, compressed, checksummed."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath

SHARD, CHUNK = 4096, 512
"""Examples in a file, the unit that is written and resumed, and in a part of it that is
compressed and has a checksum."""


class DamagedError(ValueError):
    """A file is missing, cut short or changed; one sentence says which."""


def read_array(path: epath.Path, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A whole array, whose first axis is the example.

    Raises:
      DamagedError: a file is missing, cut short or has a flipped bit, or the array is
        another one.
    """
    check_files(path, shape)
    array = open_array(path, shape, dtype)
    with _damage(path):
        return np.asarray(array.read().result())


def open_array(
    path: epath.Path, shape: Sequence[int], dtype: Any, *, create: bool = False
) -> Any:
    """A zarr3 array, which must be as it would be made; made where there is none.

    Raises:
      DamagedError: there is none or another one.
    """
    import tensorstore

    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},  # a flipped bit is an error when it is read
    ]
    sharding = {"chunk_shape": [CHUNK, *shape[1:]], "codecs": inner}
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "metadata": {
            "shape": list(shape),
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD, *shape[1:]]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Otherwise a file of zeros is left out, and one that is lost reads as zeros.
        "store_data_equal_to_fill_value": True,
    }
    with _damage(path):
        return tensorstore.open(spec, create=create, open=True).result()


@contextmanager
def _damage(path: epath.Path):
    """TensorStore's errors as one sentence."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise DamagedError(f"{path} is damaged: {reason}") from error


def _kvstore(path: epath.Path) -> Any:
    text = str(path)
    return f"{text}/" if "://" in text else {"driver": "file", "path": f"{text}/"}


def check_files(path: epath.Path, shape: Sequence[int]) -> None:
    """Raise DamagedError unless an array has all its files.

    TensorStore reads what is not there as zeros.
    """
    for number in range(-(-shape[0] // SHARD)):
        file = path.joinpath("c", str(number), *["0"] * (len(shape) - 1))
        if not file.exists():
            raise DamagedError(
                f"{path} is damaged: {file.relative_to(path)} is missing"
            )
