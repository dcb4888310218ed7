# SPDX-License-Identifier: Apache-2.0
"""Text files of a data set, raw or gzipped, and TFDS's prepared copies of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdistill.data import idx
from jaxdistill.data.errors import DataError

Needed = Sequence[Sequence[str]]
"""The files of a data set, each by its possible names."""


def find(
    name: str, folders: Sequence[str], needed: Needed, data_dir: str | Path | None
) -> Path | None:
    """The folder that holds all files of a data set, None where there are none.

    Args:
      name: the data set's, for the sentence.
      folders: where in `data_dir` the files may be, beside `data_dir` itself.
      needed: the files.
      data_dir: an address such as `gs://...` is TFDS's alone.

    Raises:
      DataError: a folder that does not exist, or files that are only part of a set.
    """
    if data_dir is None or "://" in str(data_dir):
        return None
    root = Path(data_dir)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist or is not a folder")
    parts = []
    for folder in (root, *(root / inner for inner in folders)):
        missing = [each for each in needed if not _first(folder, each)]
        if not missing:
            return folder
        if len(missing) < len(needed):
            parts.append((folder, missing))
    if parts:
        folder, missing = parts[0]
        raise DataError(
            f"{folder} holds only part of {name}: missing {_names(missing)} (with or "
            "without .gz)"
        )
    return None


def path_of(folder: Path, names: Sequence[str]) -> Path:
    """The first file there is of several names, in a folder that `find` gave."""
    path = _first(folder, names)
    assert path is not None
    return path


def read(path: Path) -> str:
    """A file's text, its line ends as they are.

    Raises:
      DataError: it is damaged, empty, or no UTF-8.
    """
    raw = idx.unpack(path)
    if not raw.strip():
        raise DataError(f"{path} is empty")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: the text is no UTF-8") from error


def read_lines(path: Path) -> list[str]:
    """A file's lines, without their ends.

    Raises:
      DataError: as `read`.
    """
    lines = read(path).split("\n")  # splitlines also splits at rarer characters
    lines = lines if lines[-1] else lines[:-1]
    return [line.removesuffix("\r") for line in lines]


def prepared(tfds_name: str, data_dir: str | Path | None) -> dict[str, list] | None:
    """The records of each split of TFDS's copy, None where none is prepared.

    It is not made here: TFDS's builders of texts may parse with TensorFlow.

    Raises:
      DataError: a damaged copy, or one that only TensorFlow reads.
    """
    try:
        from tensorflow_datasets.core import read_only_builder
        from tensorflow_datasets.core.registered import DatasetNotFoundError
    except ImportError:
        return None
    try:
        builder: Any = read_only_builder.builder_from_files(
            tfds_name, data_dir=data_dir
        )
    except DatasetNotFoundError:
        return None
    try:
        sources = {
            split: builder.as_data_source(split) for split in builder.info.splits
        }
        return {
            split: source.__getitems__(list(range(len(source))))
            for split, source in sources.items()
        }
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"TFDS's copy of {tfds_name} in {builder.data_dir} cannot be read without "
            f"TensorFlow or is damaged: {reason}"
        ) from error


def absent(
    name: str,
    folders: Sequence[str],
    needed: Needed,
    data_dir: str | Path | None,
    tfds_name: str | None,
) -> DataError:
    """The sentence about a data set that is nowhere: what was looked for, and where."""
    files = f"{_names(needed)} (with or without .gz)"
    if data_dir is None:
        sentence = f"{name} needs --data-dir, a folder with {files}"
    else:
        root = Path(data_dir)
        where = ", ".join(str(path) for path in (root, *(root / f for f in folders)))
        sentence = f"no {name} in {where}: looked for {files}"
    if tfds_name is not None:
        sentence += (
            f"; TFDS (pip install 'jaxdistill[data]') has no prepared copy of "
            f"{tfds_name} either"
        )
    return DataError(sentence)


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    found = (idx.locate(folder, name) for name in names)
    return next((path for path in found if path), None)


def _names(needed: Needed) -> str:
    return ", ".join(" or ".join(each) for each in needed)
