# SPDX-License-Identifier: Apache-2.0
"""Running text for language models: its tokens, their numbers, windows of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxdistill.data import fetch
from jaxdistill.data.examples import DataError

FOLDERS = {
    "shakespeare": ("tiny_shakespeare", "shakespeare"),
    "wikitext2": ("wikitext2", "wikitext-2", "wikitext2_heldout"),
}
NEEDED = {
    "shakespeare": (("input.txt",),),
    "wikitext2": (("valid.txt",), ("test.txt",)),
}
COUNTS = {
    "input.txt": 1_115_394,
    "train.txt": 2_088_628,
    "valid.txt": 217_646,
    "test.txt": 245_569,
}
"""Tokens of each file: characters of input.txt, else words with their `<eos>`."""
UNKNOWN, END = "<unk>", "<eos>"


class Corpus(NamedTuple):
    """Running text in memory; a token is a string.

    Attributes:
      name: "shakespeare" or "wikitext2".
      train: tokens to train on; a `str` is a sequence of characters.
      validation: tokens for every choice.
      test: tokens for the final report, None where there are none left for it.
      origin: what each part was made of.
    """

    name: str
    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str] | None
    origin: str


def load_corpus(name: str, data_dir: str | Path | None = None) -> Corpus:
    """Running text by name, from files in `data_dir` or in a folder of it.

    "shakespeare" (folder `tiny_shakespeare` or `shakespeare`) is input.txt, its
    characters: the first 90% to train on, the rest for validation. Where the file is
    not there, TFDS's copy is the same text, if one is prepared.

    "wikitext2" (folder `wikitext2`, `wikitext-2` or `wikitext2_heldout`) is train.txt,
    valid.txt and test.txt, whose words have `<eos>` after each line. Without train.txt
    test.txt is trained on, as `origin` says, and there is no test.

    Args:
      name: "shakespeare" or "wikitext2".
      data_dir: a folder of files, raw or gzipped, or TFDS's.

    Raises:
      DataError: an unknown name, a missing folder or file, a file that is damaged or
        not the original.

    References:
      Karpathy 2015, char-rnn; Merity et al. 2016, Pointer Sentinel Mixture Models,
      section 4.3 (WikiText-2).
    """
    if name not in FOLDERS:
        raise DataError(f"unknown corpus {name!r}; known: {', '.join(FOLDERS)}")
    where = (name, FOLDERS[name], NEEDED[name], data_dir)
    folder = fetch.find_file(*where)
    if name == "wikitext2":
        if folder is None:
            raise fetch.absent(*where, None)
        return _wikitext2(folder)
    if folder is not None:
        path = fetch.path_of(folder, NEEDED[name][0])
        text = fetch.counted(path, fetch.read_file(path), COUNTS, "tokens")
        return _shakespeare(text, "input.txt")
    records = fetch.prepared("tiny_shakespeare", data_dir)
    if records is None:
        raise fetch.absent(*where, "tiny_shakespeare")
    splits = ("train", "validation", "test")  # in the order of the text
    text = "".join(records[split][0]["text"].decode() for split in splits)
    return _shakespeare(text, "TFDS's tiny_shakespeare")


def _shakespeare(text: str, source: str) -> Corpus:
    cut = int(0.9 * len(text))
    origin = f"the first 90% of {source}; validation is the rest"
    return Corpus("shakespeare", text[:cut], text[cut:], None, origin)


def _wikitext2(folder: Path) -> Corpus:
    valid, test = (
        _words(fetch.path_of(folder, names)) for names in NEEDED["wikitext2"]
    )
    train = fetch.find_file("wikitext2", (), (("train.txt",),), folder)
    if train is None:
        origin = "test.txt, as there was no train.txt; validation is valid.txt"
        return Corpus("wikitext2", test, valid, None, origin)
    words = _words(fetch.path_of(folder, ("train.txt",)))
    return Corpus("wikitext2", words, valid, test, "train.txt, valid.txt, test.txt")


def _words(path: Path) -> list[str]:
    lines = (line.split() for line in fetch.read_lines(path))
    words = [word for line in lines for word in (*line, END)]
    return fetch.counted(path, words, COUNTS, "tokens")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by their numbers, and back.

    >>> letters = Vocabulary.of("abca")
    >>> letters.tokens, letters.encode("cab")
    (('a', 'b', 'c'), array([2, 0, 1], dtype=int32))
    >>> "".join(letters.decode([2, 0, 1]))
    'cab'

    Attributes:
      tokens: V different strings; a token's position is its number.
    """

    tokens: tuple[str, ...]

    def __post_init__(self):
        if len(self._numbers) != len(self.tokens):
            twice = next(t for t, count in Counter(self.tokens).items() if count > 1)
            raise DataError(f"the vocabulary has the token {twice!r} more than once")

    @classmethod
    def of(cls, tokens: Iterable[str], at_least: int = 1) -> "Vocabulary":
        """The tokens of a text, sorted.

        Args:
          tokens: strings; a `str` is its characters.
          at_least: how often a token must occur; above 1 `<unk>` stands for the rest.

        >>> Vocabulary.of("abca", at_least=2).tokens
        ('<unk>', 'a')
        """
        counts = Counter(tokens)
        kept = {token for token, count in counts.items() if count >= at_least}
        return cls(tuple(sorted(kept | ({UNKNOWN} if at_least > 1 else set()))))

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Iterable[str]) -> np.ndarray:
        """Numbers, int32 `[N]`, of N tokens; one that is not there is `<unk>`.

        Raises:
          DataError: a token is not there, and `<unk>` is not either.
        """
        tokens = tokens if isinstance(tokens, Sequence) else list(tokens)
        unknown = self._numbers.get(UNKNOWN, -1)
        ids = np.array([self._numbers.get(t, unknown) for t in tokens], np.int32)
        wrong = np.flatnonzero(ids < 0)
        if len(wrong):
            raise DataError(
                f"token {tokens[wrong[0]]!r} at position {wrong[0]} is not among the "
                f"vocabulary's {len(self)}, and there is no {UNKNOWN}"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of numbers.

        Raises:
          DataError: a number is not in `[0, V)`.
        """
        ids = np.asarray(list(ids), np.int64)
        wrong = np.flatnonzero((ids < 0) | (ids >= len(self)))
        if len(wrong):
            raise DataError(
                f"number {ids[wrong[0]]} at position {wrong[0]} is out of range: with "
                f"{len(self)} tokens, numbers are 0 to {len(self) - 1}"
            )
        return [self.tokens[i] for i in ids]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def windows(ids: np.ndarray, length: int) -> dict[str, Any]:
    """Examples of running text: windows one after another, what is left over dropped.

    Args:
      ids: integers `[M]`.
      length: L, tokens in a window.

    Returns:
      `inputs`, a mapping with `input_ids` `[N, L]`, and `labels` `[N, L]`, the token
      that follows each; int32, with N = (M - 1) // L.

    Raises:
      DataError: there are fewer than L + 1 tokens, or L is not positive.

    >>> windows(np.arange(6), length=2)["labels"].tolist()
    [[1, 2], [3, 4]]
    """
    ids = np.asarray(ids, np.int32)
    if length < 1 or len(ids) <= length:
        raise DataError(
            f"windows of {length} tokens cannot be cut from {len(ids)}: one needs a "
            "positive length, and a token more"
        )
    used = (len(ids) - 1) // length * length
    inputs, labels = (ids[i : i + used].reshape(-1, length) for i in (0, 1))
    return {"inputs": {"input_ids": inputs}, "labels": labels}
