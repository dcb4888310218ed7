# SPDX-License-Identifier: Apache-2.0
"""Examples of several arrays: some of their rows, and whether each text has tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.data.errors import DataError


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
