# SPDX-License-Identifier: Apache-2.0
"""Many students in one program: a grid of hyperparameters and seeds, by vmap.

    cells = grid(temperature=[1.0, 4.0], learning_rate=[1e-3, 3e-3], seed=range(5))
    run = choose(cells)
    states = init_states(cells, student, make_optimizer, batch)
    step = make_sweep_step(student, make_objective, make_optimizer)
    states = fit(states, compile_sweep(run, step, cells), run=run, ...)

A cell is a mapping of traced numbers. `make_objective(cell)` and `make_optimizer(cell)`
are called once, under vmap: one compilation serves the whole grid. A small student
leaves most of a device idle; thirty of them share one teacher, one batch and one
dispatch.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import parallel
from jaxdistill.parallel import Parallel
from jaxdistill.sharding import put, whole
from jaxdistill.steps import init_state, make_train_step, take
from jaxdistill.types import Array, Batch, Objective, Student, TrainState

Cell = Mapping[str, Any]
AXIS = "cells"
STACKED = TrainState(step=None, params=0, model_state=0, opt_state=0, rng=0)
"""Which parts of a state have an axis of cells first."""


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

    The step is one number: all cells take theirs together.

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

    return jax.jit(jax.vmap(one, out_axes=STACKED))(dict(cells))


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
        many = jax.vmap(one, (STACKED, 0, None, own), (STACKED, 0))
        return many(states, dict(cells), teacher, batch)

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


def compile_sweep(run: Parallel, sweep_step: Callable, cells: Mapping[str, Any]):
    """Many steps of a sweep in one dispatch, as `loop.fit` takes them.

    Args:
      run: `choose(cells)`.
      sweep_step: see `make_sweep_step`.
      cells: `{name: [cells]}`.

    Returns:
      `(states, (teacher, examples), rows) -> (states, metrics)`.
    """
    program = run.compile(scan_sweep(sweep_step), batch_axis=1)
    placed = run.place(dict(cells))

    def step(states, resident, rows):
        return program(states, (placed, *resident), rows)

    return step


def cell_state(states: TrainState, index: int) -> TrainState:
    """One cell's state, as a single training would have it."""
    one = jax.tree.map(lambda x: x[index], replace(states, step=()))
    return replace(one, step=states.step)


def choose(cells: Mapping[str, Any], devices: Sequence[Any] | None = None) -> Parallel:
    """One device, or several that take equal parts of the cells and share all else.

    States and cells are placed (`place`); data and teachers, which have no axis of
    cells, are on every device (`replicate`).

    Raises:
      ValueError: the cells do not divide over the devices.
    """
    devices = tuple(jax.devices() if devices is None else devices)
    if len(devices) == 1:
        return parallel.jit(devices)
    if size(cells) % len(devices):
        raise ValueError(
            f"{size(cells)} cells do not divide over {len(devices)} devices; take a "
            f"multiple of {len(devices)}"
        )
    grid_of = Mesh(np.array(devices), (AXIS,))
    everywhere = NamedSharding(grid_of, PartitionSpec())
    parts = NamedSharding(grid_of, PartitionSpec(AXIS))

    def shardings(tree):
        return jax.tree.map(lambda x: parts if np.ndim(x) else everywhere, tree)

    def place(tree):
        return jax.tree.map(put, tree, shardings(tree))

    def replicate(tree, axis=0):
        del axis
        return jax.tree.map(lambda x: put(x, everywhere), tree)

    def compile(function, *, batch_axis=0, donate=True):
        del batch_axis
        return jax.jit(function, donate_argnums=(0,) if donate else ())

    def fetch(tree):
        return jax.tree.map(whole, tree)

    return Parallel(
        name="cells",
        devices=devices,
        place=place,
        replicate=replicate,
        join=replicate,
        fetch=fetch,
        compile=compile,
        shardings=shardings,
        shares_batch=True,
    )
