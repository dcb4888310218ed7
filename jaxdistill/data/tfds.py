# SPDX-License-Identifier: Apache-2.0
"""MNIST and its kin as TFDS data sets, made and read without TensorFlow."""

import gzip
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np

from jaxdistill.data import idx
from jaxdistill.data.errors import DataError
from jaxdistill.data.idx import Examples


def prepare(name: str, data_dir: str | Path | None, idx_dir: str | Path | None) -> None:
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
        files = [f"{file}.gz" for file in idx.SHA256[name]]
        missing = [file for file in files if not (Path(idx_dir) / file).is_file()]
        if missing:
            raise DataError(f"{idx_dir} does not hold {', '.join(missing)}")
    manual = None if idx_dir is None else str(idx_dir)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=manual)
    )


def read(name: str, data_dir: str | Path | None) -> dict[str, Examples]:
    """Both splits of TFDS's copy in `data_dir`, which is made where there is none.

    Raises:
      DataError: as `prepare`; a damaged copy, or one that only TensorFlow reads.
    """
    tfds = _library(name)
    builder = _builder(name, data_dir)
    if not builder.is_prepared():
        prepare(name, data_dir, None)
    splits = {}
    for split in idx.FILES:
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
    if name not in idx.SHA256:
        raise DataError(f"unknown data set {name!r}; known: {', '.join(idx.SHA256)}")
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
    with registered.skip_registration():

        class Builder(stock):  # type: ignore[misc, valid-type]
            def _split_generators(self, dl_manager):
                urls = {file: f"{self.URL}{file}.gz" for file in idx.SHA256[name]}
                paths = dl_manager.download(urls)
                return {
                    split: self._generate_examples(paths[images], paths[labels])
                    for split, (images, labels) in idx.FILES.items()
                }

            def _generate_examples(self, images, labels):
                from PIL import Image

                pair = [
                    idx.parse(gzip.decompress(p.read_bytes())) for p in (images, labels)
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
