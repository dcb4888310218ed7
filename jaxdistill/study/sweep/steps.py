# SPDX-License-Identifier: Apache-2.0
"""The states and steps of many students at once: the single ones under vmap."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.study.sweep import own
from jaxdistill.study.sweep.trials import Cell, size
from jaxdistill.train.step import init_state, make_train_step, take
from jaxdistill.types import Batch, Objective, Student, TrainState

STACKED = TrainState(step=None, params=0, model_state=0, opt_state=0, rng=0)
"""Which parts of a state have an axis of cells first."""


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
    **options: Any,
) -> Callable:
    """One optimizer step of every cell: `(states, cells, teacher, batch)`.

    Args:
      student: see `models.student`.
      make_objective: an objective from a cell's numbers, which may be its weights and
        temperatures.
      make_optimizer: likewise.
      options: `prepare`, drawn for each cell, `micro_batches` and `dtype`, see
        `steps.make_train_step`.

    Returns:
      `(states, cells, teacher, batch) -> (states, metrics)`. A batch is all cells' own
      where its leaves have an axis of cells first (`mask` is `[cells, B]`), else it is
      shared, and with it the forward pass of a live teacher that is not `Own`. Metrics
      gain an axis of cells.
    """

    def one(state, cell, teacher, batch):
        objective, optimizer = make_objective(cell), make_optimizer(cell)
        step = make_train_step(student, objective, optimizer, **options)
        return step(state, own.of_a_cell(teacher), batch)

    def sweep_step(states, cells, teacher, batch):
        given = (states, dict(cells), teacher, batch)
        axes = (STACKED, 0, own.axes(teacher, 0, None), axis_of(batch))
        if size(cells) == 1:
            return _alone(one, axes, (STACKED, 0))(*given)
        return jax.vmap(one, axes, (STACKED, 0))(*given)

    return sweep_step


def _alone(function: Callable, axes: Any, out_axes: Any) -> Callable:
    """`jax.vmap` over an axis of one, without what it costs.

    Of a product under vmap XLA's CPU compiler transposes the gradient twice.
    """

    def squeeze(axis, part):
        return part if axis is None else jax.tree.map(lambda x: x[0], part)

    def expand(axis, part):
        return part if axis is None else jax.tree.map(lambda x: x[None], part)

    def apply(change, axes, tree):
        leaf = lambda x: x is None  # noqa: E731
        return jax.tree.map(change, axes, tree, is_leaf=leaf)

    def run(*given):
        return apply(expand, out_axes, function(*apply(squeeze, axes, given)))

    return run


def scan_sweep(sweep_step: Callable) -> Callable:
    """Many steps in one dispatch over resident data, as `steps.scan_train`.

    Returns:
      `(states, (cells, teacher, examples), rows) -> (states, metrics)`: `rows` has
      `index` and `mask` `[K, B]` for batches that all cells share, or `[K, cells, B]`;
      metrics are `[K, cells]`. Teacher and examples may be `Own` in part.
    """

    def run(states, resident, rows):
        cells, teacher, examples = resident

        def body(states, row):
            return sweep_step(states, cells, teacher, _take(examples, row))

        return jax.lax.scan(body, states, rows)

    return run


def in_groups(program: Callable, group: int) -> Callable:
    """`scan_sweep`'s program for some cells after others, each group all its steps.

    Few states stay in a processor's cache where many are read from memory at every
    step. A live teacher's forward pass is run again for each group.

    Args:
      program: see `scan_sweep`.
      group: cells that train at once; a divisor of all.
    """

    def cut(tree, axis=0):  # [..., cells, ...] to [groups, ..., of a group, ...]
        def leaf(x):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            return jnp.moveaxis(x.reshape(*before, -1, group, *after), axis, 0)

        return jax.tree.map(leaf, tree)

    def join(x):
        return x.reshape(-1, *x.shape[2:])

    def run(states, resident, rows):
        cells, *given = resident
        first, bodies = states.step, replace(states, step=())
        each, shared = own.apart(given)
        each_rows = cut(rows, 1) if axis_of(rows, 1) is not None else None

        def train(part):
            states, cells, each, each_rows = part
            states = replace(states, step=first)
            group_rows = rows if each_rows is None else each_rows
            resident = (cells, *own.combine(each, shared))
            states, metrics = program(states, resident, group_rows)
            metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
            return replace(states, step=()), metrics, states.step

        parts = (*cut((bodies, dict(cells), each)), each_rows)
        bodies, metrics, steps = jax.lax.map(train, parts)
        bodies, metrics = jax.tree.map(join, (bodies, metrics))
        metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
        return replace(bodies, step=steps[0]), metrics

    return run


def cell(tree: Any, index: int) -> Any:
    """One cell's part of a tree whose leaves have an axis of cells first."""
    return jax.tree.map(lambda x: x[index], tree)


def cell_state(states: TrainState, index: int) -> TrainState:
    """One cell's state, as a single training would have it."""
    return replace(cell(replace(states, step=()), index), step=states.step)


def axis_of(batch: Batch, before: int = 0) -> int | None:
    """0 where a batch is each cell's own; None where all share it."""
    return 0 if batch["mask"].ndim > before + 1 else None


def _take(examples: Any, row: Batch) -> Batch:
    """`steps.take`, whoever examples and row belong to."""
    if axis_of(row) is None and not own.has_own(examples):
        return take(examples, row)
    one = lambda examples, row: take(own.of_a_cell(examples), row)  # noqa: E731
    return jax.vmap(one, (own.axes(examples, 0, None), axis_of(row)))(examples, row)
