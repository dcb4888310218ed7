# SPDX-License-Identifier: Apache-2.0
"""What examples must be: inputs, labels in range, and the error that says otherwise."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def some_of(examples: Any, rows: np.ndarray) -> Any:
    """The examples at some rows, of an array or of a mapping of such.

    >>> some_of({"inputs": {"ids": np.arange(4)}}, np.array([3, 0]))
    {'inputs': {'ids': array([3, 0])}}
    """
    if isinstance(examples, Mapping):
        return {name: some_of(part, rows) for name, part in examples.items()}
    return np.asarray(examples)[rows]


def check_inputs(inputs: Any) -> None:
    """Raise DataError where a text is all padding; what has no mask is not looked at.

    Attention without any token to look at is uniform over the padding, and a mean of
    no tokens is no text's: a model would learn from what is not there.

    Args:
      inputs: an array, or a mapping that may have `attention_mask` `[N, L]`.
    """
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        return
    empty = np.flatnonzero(~np.asarray(inputs["attention_mask"]).any(axis=-1))
    if len(empty):
        raise DataError(
            f"row {empty[0]} is all padding: its attention_mask has no 1, and a text "
            "needs a token at least"
        )


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for; one sentence says so."""


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


def normalize(
    images: np.ndarray,
    mean: float | tuple[float, ...],
    deviation: float | tuple[float, ...],
    peak: int = 255,
) -> np.ndarray:
    """`(images / peak - mean) / deviation` as float32; one value, or one a channel.

    >>> normalize(np.array([0, 255], np.uint8), mean=0.5, deviation=0.5)
    array([-1.,  1.], dtype=float32)
    """
    # As many axes as the images have: JAX may be told to refuse to add some.
    lift = (1,) * (images.ndim - 1) + (-1,)
    centre, spread = (
        np.asarray(x, np.float32).reshape(lift) for x in (mean, deviation)
    )
    return (images / np.float32(peak) - centre) / spread
