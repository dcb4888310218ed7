# SPDX-License-Identifier: Apache-2.0
"""Cells: every combination of hyperparameters and seeds."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Cell = Mapping[str, Any]
"""One cell's numbers, traced, by their names."""


def grid(**axes: Iterable[Any]) -> dict[str, np.ndarray]:
    """Every combination of the values, as `{name: [cells]}`; the last varies fastest.

    Raises:
      ValueError: no axes, or one without values.

    >>> cells = grid(temperature=[1.0, 4.0], seed=range(2))
    >>> print(cells["temperature"], cells["seed"])
    [1. 1. 4. 4.] [0 1 0 1]
    """
    values = {name: list(axis) for name, axis in axes.items()}
    empty = [name for name, axis in values.items() if not axis]
    if empty or not values:
        raise ValueError(
            f"a grid needs values on every axis, none for {empty or 'any'}"
        )
    combinations = list(itertools.product(*values.values()))
    columns = zip(*combinations, strict=True)
    cells = {}
    for name, column in zip(values, columns, strict=True):
        array = np.array(column)
        cells[name] = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return cells


def size(cells: Mapping[str, Any]) -> int:
    """How many cells there are."""
    return len(next(iter(cells.values())))
