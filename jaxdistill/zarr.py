# SPDX-License-Identifier: Apache-2.0
"""Arrays of examples on disk: TensorStore's zarr3, sharded, compressed, checksummed."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

SHARD, CHUNK = 4096, 512
"""Examples in a file, the unit that is written and resumed, and in a part of it that is
compressed and has a checksum."""


class DamagedError(ValueError):
    """A file is missing, cut short or changed; one sentence says which."""


def read_array(path: epath.Path, size: int) -> np.ndarray:
    """A whole array of `size` examples.

    Raises:
      DamagedError: a file is missing, cut short or has a flipped bit.
    """
    check_files(path, size)
    try:
        return np.asarray(open_array(path).read().result())
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise DamagedError(f"{path} is damaged: {reason}") from error


def open_array(path: epath.Path, shape: Sequence[int] = (), dtype: Any = None) -> Any:
    """A zarr3 array; made where there is none and a shape is given."""
    import tensorstore

    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": _kvstore(path)}
    if not shape:
        return tensorstore.open(spec).result()
    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},  # a flipped bit is an error when it is read
    ]
    sharding = {"chunk_shape": [CHUNK, *shape[1:]], "codecs": inner}
    spec["metadata"] = {
        "shape": list(shape),
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [SHARD, *shape[1:]]},
        },
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    # Otherwise a file of zeros is left out, and one that is lost reads as zeros.
    spec["store_data_equal_to_fill_value"] = True
    return tensorstore.open(spec, create=True, open=True).result()


def _kvstore(path: epath.Path) -> Any:
    text = str(path)
    return f"{text}/" if "://" in text else {"driver": "file", "path": f"{text}/"}


def check_files(path: epath.Path, size: int) -> None:
    """Raise DamagedError unless an array of `size` examples has all its files.

    TensorStore reads what is not there as zeros.
    """
    axes = len(json.loads((path / "zarr.json").read_text())["shape"])
    for number in range(-(-size // SHARD)):
        file = path.joinpath("c", str(number), *["0"] * (axes - 1))
        if not file.exists():
            raise DamagedError(
                f"{path} is damaged: {file.relative_to(path)} is missing"
            )
