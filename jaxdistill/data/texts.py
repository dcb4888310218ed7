# SPDX-License-Identifier: Apache-2.0
"""Labelled texts: sentences of film reviews (SST-2), and news (AG News)."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxdistill.data import fetch
from jaxdistill.data.examples import DataError, check_labels
from jaxdistill.data.images import holdout

FOLDERS = {"sst2": ("sst2", "SST-2"), "ag_news": ("ag_news", "ag_news_small")}
NEEDED = {
    "sst2": (("train.tsv",), ("dev.tsv",), ("test_sentences.tsv",)),
    "ag_news": (("train.csv", "train_10k.csv"), ("test.csv",)),
}
SPLITS = {"sst2": ("train", "validation", "test"), "ag_news": ("train", "test")}
TFDS = {"sst2": "glue/sst2", "ag_news": "ag_news_subset"}
CLASSES = {"sst2": 2, "ag_news": 4}
COUNTS = {
    "train.tsv": 67_349,
    "dev.tsv": 872,
    "test_sentences.tsv": 1_821,
    "train.csv": 120_000,
    "train_10k.csv": 10_000,
    "test.csv": 7_600,
}
"""Rows of each file, its header not counted."""
HELD_OUT = {"sst2": 872, "ag_news": 1_000}
"""Examples for validation, where a source has no split for it."""


class Labelled(NamedTuple):
    """Texts and their classes.

    Attributes:
      texts: N strings.
      labels: int32 `[N]`.
    """

    texts: list[str]
    labels: np.ndarray


class Texts(NamedTuple):
    """A data set of labelled texts in memory.

    Attributes:
      name: "sst2" or "ag_news".
      train: for training.
      validation: for every choice.
      test: for the final report alone.
      num_classes: labels lie in `[0, num_classes)`.
      origin: what each split was made of.
    """

    name: str
    train: Labelled
    validation: Labelled
    test: Labelled
    num_classes: int
    origin: str


def load_texts(name: str, data_dir: str | Path | None = None) -> Texts:
    """A data set of labelled texts by name, each split sorted by its texts.

    The files are read where `data_dir` or a folder in it holds them, raw or gzipped,
    else TFDS's copy, if one is prepared.

    "sst2" (folder `sst2` or `SST-2`) is GLUE's train.tsv and dev.tsv, and
    test_sentences.tsv, the labelled test that GLUE keeps to itself, with its columns
    the other way round. TFDS has GLUE alone: there the test is dev, and 872 of train
    are held out. "ag_news" (folder `ag_news` or `ag_news_small`) is test.csv and
    train.csv, or train_10k.csv, a part of it; a text is the title and the description,
    with " . " between them, and 1,000 of train are held out.

    Args:
      name: "sst2" or "ag_news".
      data_dir: a folder of files, or TFDS's; None is TFDS's own default.

    Raises:
      DataError: an unknown name, a missing folder or file, a file that is damaged or
        not the original; it names the line.

    References:
      Socher et al. 2013, Recursive Deep Models for Semantic Compositionality; Wang et
      al. 2018, GLUE; Zhang et al. 2015, Character-level Convolutional Networks, section
      4 (AG News).
    """
    if name not in FOLDERS:
        raise DataError(f"unknown texts {name!r}; known: {', '.join(FOLDERS)}")
    where = (name, FOLDERS[name], NEEDED[name], data_dir)
    folder = fetch.find_file(*where)
    if folder is not None:
        return _texts(name, *_of_files(name, folder))
    records = fetch.prepared(TFDS[name], data_dir)
    if records is None:
        raise fetch.absent(*where, TFDS[name])
    return _texts(name, *_of_tfds(name, records))


Splits = dict[str, Labelled]


def _texts(name: str, splits: Splits, origin: str) -> Texts:
    splits = {split: _in_order(labelled) for split, labelled in splits.items()}
    for labelled in splits.values():
        check_labels(labelled.labels, CLASSES[name])
    if "validation" not in splits:
        count = HELD_OUT[name]
        origin = f"{origin}; validation is {count:,} of train"
        texts, labels = splits["train"]
        parts = holdout({"texts": np.array(texts, object), "labels": labels}, count)
        splits["train"], splits["validation"] = (
            Labelled(part["texts"].tolist(), part["labels"]) for part in parts
        )
    train, validation, test = (splits[x] for x in ("train", "validation", "test"))
    return Texts(name, train, validation, test, CLASSES[name], origin)


def _of_files(name: str, folder: Path) -> tuple[Splits, str]:
    read, splits, origin = _tsv if name == "sst2" else _csv, {}, []
    for names, split in zip(NEEDED[name], SPLITS[name], strict=True):
        path = fetch.path_of(folder, names)
        origin.append(path.name.removesuffix(".gz"))
        splits[split] = read(path)
    return splits, ", ".join(origin)


def _tsv(path: Path) -> Labelled:
    is_test = path.name.startswith("test_sentences")
    header = ("label", "content") if is_test else ("sentence", "label")
    first, *rows = (line.split("\t") for line in fetch.read_lines(path))
    if tuple(first) != header:
        raise DataError(
            f"{path}, line 1: the header is {' '.join(first)!r}, expected "
            f"{' '.join(header)!r} with a tab between"
        )
    at, texts, labels = header.index("label"), [], []
    for number, row in enumerate(rows, 2):
        if len(row) != 2:
            raise DataError(
                f"{path}, line {number}: {len(row)} columns, expected 2 with a tab "
                "between"
            )
        labels.append(_label(path, number, row[at], ("0", "1")))
        texts.append(row[1 - at].strip())
    return _labelled(path, texts, labels)


def _csv(path: Path) -> Labelled:
    columns = 2 if path.name.startswith("train_10k") else 3
    # newline="" keeps line ends inside quotes as they are.
    reader = csv.reader(io.StringIO(fetch.read_file(path), newline=""), strict=True)
    texts, labels = [], []
    try:
        for row in reader:
            if len(row) != columns:
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(row)} columns, expected "
                    f"{columns} with commas between"
                )
            label = _label(path, reader.line_num, row[0], ("1", "2", "3", "4"))
            labels.append(label - 1)
            texts.append(_news(*row[1:]))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    return _labelled(path, texts, labels)


def _labelled(path: Path, texts: list[str], labels: list[int]) -> Labelled:
    texts = fetch.counted(path, texts, COUNTS, "examples")
    return Labelled(texts, np.array(labels, np.int32))


def _news(*parts: str) -> str:
    return " . ".join(parts).strip()


def _label(path: Path, number: int, found: str, known: tuple[str, ...]) -> int:
    if found not in known:
        raise DataError(
            f"{path}, line {number}: the label {found!r} is no class; known: "
            f"{', '.join(known)}"
        )
    return int(found)


def _of_tfds(name: str, records: dict[str, list]) -> tuple[Splits, str]:
    origin = f"TFDS's {TFDS[name]}"
    if name == "sst2":
        records = {"train": records["train"], "test": records["validation"]}
        origin += ", whose test has no labels; test is its validation"
    keys = ("sentence",) if name == "sst2" else ("title", "description")
    splits = {
        split: Labelled(
            [_news(*(row[key].decode() for key in keys)) for row in rows],
            np.array([row["label"] for row in rows], np.int32),
        )
        for split, rows in records.items()
    }
    return splits, origin


def _in_order(labelled: Labelled) -> Labelled:
    """Sorted: TFDS shuffles as it writes, and a seed must mean the same batches."""
    rows = sorted(zip(labelled.texts, labelled.labels.tolist(), strict=True))
    return Labelled(
        [text for text, _ in rows], np.array([label for _, label in rows], np.int32)
    )
