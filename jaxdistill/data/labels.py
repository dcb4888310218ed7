# SPDX-License-Identifier: Apache-2.0
"""Labels: whether they are a network's classes, and which of them may be used."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from jaxdistill.data.errors import DataError
from jaxdistill.data.inputs import some_of


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


def few_labels(train: Mapping[str, np.ndarray], count: int | None):
    """Examples for a study in which only `count` labels may be used, by anyone.

    Args:
      train: `inputs` and `labels` of all training examples.
      count: how many labels are known; None is all.

    Returns:
      `(row, seed) -> examples`, other labels for every seed. Who has no teacher gets
      the labelled examples alone; a student of one gets all, with `labelled` marking
      those whose label it may use, because soft targets need none.
    """
    size = len(train["labels"])
    if count is None or count >= size:
        return lambda row, seed: train

    @lru_cache(maxsize=2)
    def choose(seed: int, taught: bool):
        # No epoch's key: with one, its first batches would hold all known labels.
        draw = np.random.default_rng([seed, 0, 1])
        chosen = np.sort(draw.permutation(size)[:count])
        known = np.isin(np.arange(size), chosen).astype(np.float32)
        examples = {**train, "labelled": known}
        return examples if taught else some_of(examples, chosen)

    return lambda row, seed: choose(seed, row.teacher is not None)
