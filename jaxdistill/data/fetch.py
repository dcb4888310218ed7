# SPDX-License-Identifier: Apache-2.0
"""Where data files are: a folder, a prepared copy, or TFDS without TensorFlow."""

import gzip
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from jaxdistill.data import image_files
from jaxdistill.data.examples import DataError
from jaxdistill.data.image_files import Examples

Needed = Sequence[Sequence[str]]
"""The files of a data set, each by its possible names."""


def find_file(
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


def read_file(path: Path) -> str:
    """A file's text, its line ends as they are.

    Raises:
      DataError: it is damaged, empty, or no UTF-8.
    """
    raw = image_files.unpack_idx(path)
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
    lines = read_file(path).split("\n")  # splitlines also splits at rarer characters
    lines = lines if lines[-1] else lines[:-1]
    return [line.removesuffix("\r") for line in lines]


def counted(path: Path, found: Any, counts: Mapping[str, int], what: str) -> Any:
    """What was found in a file, of as many as the original has.

    Raises:
      DataError: it has more or fewer.
    """
    count = counts[path.name.removesuffix(".gz")]
    if len(found) != count:
        raise DataError(
            f"{path} has {len(found)} {what}, the original {count}: it is cut short or "
            "another file"
        )
    return found


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
        records = {}
        for split in builder.info.splits:
            source = builder.as_data_source(split)
            records[split] = source.__getitems__(list(range(len(source))))
        return records
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
    found = (image_files.locate_idx(folder, name) for name in names)
    return next((path for path in found if path), None)


def _names(needed: Needed) -> str:
    return ", ".join(" or ".join(each) for each in needed)


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
    tfds = _library(name)
    builder = _builder(name, data_dir)
    if idx_dir is None:
        _check_network(name, builder.URL)
    else:
        # TFDS looks for what is missing on the network, and retries for minutes.
        files = [f"{file}.gz" for file in image_files.SHA256[name]]
        missing = [file for file in files if not (Path(idx_dir) / file).is_file()]
        if missing:
            raise DataError(f"{idx_dir} does not hold {', '.join(missing)}")
    manual = None if idx_dir is None else str(idx_dir)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual)
    )


def read_tfds(name: str, data_dir: str | Path | None) -> dict[str, Examples]:
    """Both splits of TFDS's copy in `data_dir`, which is made where there is none.

    Raises:
      DataError: as `augment`; a damaged copy, or one that only TensorFlow reads.
    """
    tfds = _library(name)
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        prepare_tfds(name, data_dir, None)
    splits = {}
    for split in image_files.IDX_FILES:
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


def _library(name: str) -> Any:
    if name not in image_files.SHA256:
        raise DataError(
            f"unknown data set {name!r}; known: {', '.join(image_files.SHA256)}"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading {name} needs tensorflow-datasets (pip install "
            "'jaxdistill[data]'), or --data-dir with the original IDX files"
        ) from error
    return tfds


def _builder(name: str, data_dir: str | Path | None) -> Any:
    from tensorflow_datasets.core import registered

    stock = _library(name).builder_cls(name)
    # The class has the name of TFDS's own builder, and TFDS refuses a second one.
    with registered.skip_registration():

        class Builder(stock):  # type: ignore[misc, valid-type]
            def _split_generators(self, dl_manager):
                urls = {
                    file: f"{self.URL}{file}.gz" for file in image_files.SHA256[name]
                }
                paths = dl_manager.download(urls)
                return {
                    split: self._generate_examples(paths[images], paths[labels])
                    for split, (images, labels) in image_files.IDX_FILES.items()
                }

            def _generate_examples(self, images, labels):
                from PIL import Image

                pair = [
                    image_files.parse_idx(gzip.decompress(p.read_bytes()))
                    for p in (images, labels)
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
