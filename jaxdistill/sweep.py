# SPDX-License-Identifier: Apache-2.0
"""Many students in one program: a grid of hyperparameters and seeds, by vmap.

    cells = grid(temperature=[1.0, 4.0], learning_rate=[1e-3, 3e-3], seed=range(5))
    states = init_states(cells, student, make_optimizer, batch)
    step = make_sweep_step(student, make_objective, make_optimizer)
    run = jax.jit(scan_sweep(step), donate_argnums=0)
    states, metrics = run(states, (cells, teacher, examples), rows)

A cell is a mapping of traced numbers. `make_objective(cell)` and `make_optimizer(cell)`
are called once, under vmap: one compilation serves the whole grid. A small student
leaves most of a device idle; thirty of them share one teacher, one batch and one
dispatch.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.steps import init_state, make_train_step, take
from jaxdistill.types import Array, Batch, Objective, Student, TrainState

Cell = Mapping[str, Any]
AXIS = "cells"


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


def init_states(
    cells: Mapping[str, Any],
    student: Student,
    make_optimizer: Callable[[Cell], optax.GradientTransformation],
    batch: Batch,
) -> TrainState:
    """A state for each cell, stacked; cell `seed`s are those of single trainings.

    Args:
      cells: `{name: [cells]}`, with `seed`.
      student: see `models.student`.
      make_optimizer: an optimizer from a cell's numbers.
      batch: any batch, for shapes.

    Raises:
      ValueError: the cells have no seed.
    """
    if "seed" not in cells:
        raise ValueError(f"cells need a seed, got {', '.join(cells)}")

    def one(cell):
        rng = jax.random.key(cell["seed"])
        return init_state(rng, student, make_optimizer(cell), batch)

    return jax.jit(jax.vmap(one))(dict(cells))


def make_sweep_step(
    student: Student,
    make_objective: Callable[[Cell], Objective],
    make_optimizer: Callable[[Cell], optax.GradientTransformation],
    *,
    prepare: Callable[[Batch, Array], Batch] | None = None,
    dtype: Any = None,
) -> Callable:
    """One optimizer step of every cell: `(states, cells, teacher, batch)`.

    Args:
      student: see `models.student`.
      make_objective: an objective from a cell's numbers, which may be its weights and
        temperatures.
      make_optimizer: likewise.
      prepare: see `steps.make_train_step`; drawn for each cell.
      dtype: see `steps.make_train_step`.

    Returns:
      `(states, cells, teacher, batch) -> (states, metrics)`. A batch is all cells' own
      where its leaves have an axis of cells first (`mask` is `[cells, B]`), else it is
      shared, and a live teacher's forward pass with it. Metrics gain an axis of cells.
    """

    def one(state, cell, teacher, batch):
        objective, optimizer = make_objective(cell), make_optimizer(cell)
        step = make_train_step(
            student, objective, optimizer, prepare=prepare, dtype=dtype
        )
        return step(state, teacher, batch)

    def sweep_step(states, cells, teacher, batch):
        own = 0 if batch["mask"].ndim > 1 else None
        return jax.vmap(one, (0, 0, None, own))(states, dict(cells), teacher, batch)

    return sweep_step


def scan_sweep(sweep_step: Callable) -> Callable:
    """Many steps in one dispatch over resident data, as `steps.scan_train`.

    Returns:
      `(states, (cells, teacher, examples), rows) -> (states, metrics)`: `rows` has
      `index` and `mask` `[K, B]` for batches that all cells share, or `[K, cells, B]`;
      metrics are `[K, cells]`.
    """

    def run(states, resident, rows):
        cells, teacher, examples = resident

        def body(states, row):
            return sweep_step(states, cells, teacher, take(examples, row))

        return jax.lax.scan(body, states, rows)

    return run


def cell_state(states: TrainState, index: int) -> TrainState:
    """One cell's state, as a single training would have it."""
    return jax.tree.map(lambda x: x[index], states)


def place(states: TrainState, cells: Mapping[str, Any], devices=None):
    """States and cells in equal parts on several devices; everything else is copied.

    Raises:
      ValueError: the cells do not divide over the devices.
    """
    devices = jax.devices() if devices is None else devices
    if size(cells) % len(devices):
        raise ValueError(
            f"{size(cells)} cells do not divide over {len(devices)} devices"
        )
    mesh = Mesh(np.array(devices), (AXIS,))
    split = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.device_put((states, dict(cells)), split)
