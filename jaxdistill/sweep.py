# SPDX-License-Identifier: Apache-2.0
"""Many students in one program: a grid of hyperparameters and seeds, by vmap.

    cells = grid(temperature=[1.0, 4.0], learning_rate=[1e-3, 3e-3], seed=range(5))
    run = choose(cells)
    students = train(cells, module, make_objective, make_optimizer, run=run, ...)

A cell is a mapping of traced numbers. `make_objective(cell)` and `make_optimizer(cell)`
are called once, under vmap: one compilation serves the whole grid. A small student
leaves most of a device idle; thirty of them share one teacher, one batch and one
dispatch.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill import models, parallel, teachers
from jaxdistill.checkpoint import Checkpoints
from jaxdistill.data import Batches
from jaxdistill.loop import fit
from jaxdistill.parallel import Parallel
from jaxdistill.runs import Run
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


def in_groups(program: Callable, group: int, devices: int = 1) -> Callable:
    """`scan_sweep`'s program for some cells after others, each group all its steps.

    Few states stay in a processor's cache where many are read from memory at every
    step. A live teacher's forward pass is run again for each group.

    Args:
      program: see `scan_sweep`; batches are shared.
      group: cells of a device that train at once; a divisor of the cells it has.
      devices: over which the cells are divided in equal parts.
    """

    def run(states, resident, rows):
        cells, *shared = resident

        def part(x):  # [cells, ...] to [groups, cells of a group on all devices, ...]
            each = x.reshape(devices, -1, group, *x.shape[1:]).swapaxes(0, 1)
            return each.reshape(-1, devices * group, *x.shape[1:])

        def join(x):
            each = x.reshape(-1, devices, group, *x.shape[2:]).swapaxes(0, 1)
            return each.reshape(-1, *x.shape[2:])

        def train(parts):
            states, cells = parts
            states = replace(states, step=first)
            states, metrics = program(states, (cells, *shared), rows)
            metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
            return replace(states, step=()), metrics, states.step

        first, bodies = states.step, replace(states, step=())
        parts = jax.tree.map(part, (bodies, cells))
        bodies, metrics, steps = jax.lax.map(train, parts)
        bodies, metrics = jax.tree.map(join, (bodies, metrics))
        metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
        return replace(bodies, step=steps[0]), metrics

    return run


def compile_sweep(
    run: Parallel,
    sweep_step: Callable,
    cells: Mapping[str, Any],
    *,
    group: int | None = None,
):
    """Many steps of a sweep in one dispatch, as `loop.fit` takes them.

    Args:
      run: `choose(cells)`.
      sweep_step: see `make_sweep_step`.
      cells: `{name: [cells]}`.
      group: most cells of a device that train at once, see `in_groups`; None is all.
        See `group_for`.

    Returns:
      `(states, (teacher, examples), rows) -> (states, metrics)`.
    """
    program, each = scan_sweep(sweep_step), size(cells) // len(run.devices)
    if group is not None and group < each:
        at_once = max(n for n in range(1, group + 1) if each % n == 0)
        program = in_groups(program, at_once, len(run.devices))
    program = run.compile(program, batch_axis=1)
    placed = run.place(dict(cells))

    def step(states, resident, rows):
        return program(states, (placed, *resident), rows)

    return step


def train(
    cells: Mapping[str, Any],
    module: nn.Module,
    make_objective: Callable[[Cell], Objective],
    make_optimizer: Callable[[Cell], optax.GradientTransformation],
    *,
    run: Parallel,
    log: Run,
    name: str,
    examples: Mapping[str, Any],
    batches: Batches,
    steps: int,
    teacher: Any = None,
    evaluate: Callable[[teachers.Live], Mapping[str, Any]] | None = None,
    evaluations: int = 5,
    progress: bool = True,
) -> teachers.Live:
    """Trains a grid through `loop.fit`, resumed from its checkpoints.

    Args:
      cells: `{name: [cells]}`, with `seed`.
      module: the linen module of every cell.
      make_objective: see `make_sweep_step`.
      make_optimizer: likewise.
      run: `choose(cells)`.
      log: the run directory.
      name: in logs and of the checkpoint folder.
      examples: not placed; with stored outputs as `teacher`, see `cache.read`.
      batches: which examples go into which batch, the same for all cells.
      steps: optimizer steps.
      teacher: not placed: `teachers.Stored()`, a live teacher, or None.
      evaluate: `all students -> {name: number}`.
      evaluations: records and checkpoints of the training.
      progress: whether to show a bar.

    Returns:
      All students as one placed model, whose variables have an axis of cells first.
    """
    student = models.student(module)
    first = {k: v[:1] for k, v in examples.items() if k != "teacher"}
    first["mask"] = np.ones(1, np.float32)
    checkpoints = Checkpoints(
        log.path / "checkpoints" / name,
        identity={"name": name, "teacher": teachers.digest((teacher, examples))},
    )
    step = make_sweep_step(student, make_objective, make_optimizer)
    stored = isinstance(teacher, teachers.Stored)
    trained = partial(teachers.trained, module)
    states = fit(
        init_states(cells, student, make_optimizer, first),
        compile_sweep(run, step, cells, group=group_for(run) if stored else None),
        run=run,
        examples=run.replicate(dict(examples)),
        batches=batches,
        steps=steps,
        teacher=run.replicate(teacher),
        evaluate=None if evaluate is None else lambda x: evaluate(trained(x)),
        evaluate_every=-(-steps // evaluations),
        checkpoints=checkpoints,
        log=log,
        name=name,
        progress=progress,
    )
    checkpoints.close()
    return trained(run.place(states))


def cell_state(states: TrainState, index: int) -> TrainState:
    """One cell's state, as a single training would have it."""
    one = jax.tree.map(lambda x: x[index], replace(states, step=()))
    return replace(one, step=states.step)


def group_for(run: Parallel) -> int | None:
    """How many cells of a device to train at once where outputs are stored.

    All (None) on an accelerator; on a CPU two, whose states stay in a core's cache:
    MNIST's students of 109,000 weights took 0.24 ms a step and student two by two on
    two cores, 0.35 all sixteen at once.
    """
    return 2 if run.devices[0].platform == "cpu" else None


def use_cores() -> None:
    """Makes each core of a CPU a device of its own, among which `choose` divides cells.

    One student's small products leave cores waiting for each other; two students do
    not. To be called before anything touches a device; nothing changes where that has
    happened, or where JAX_NUM_CPU_DEVICES or XLA_FLAGS say how many devices there are.
    Every device has the data: on many cores set JAX_NUM_CPU_DEVICES lower.
    """
    said = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" in said:
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        usable = getattr(os, "sched_getaffinity", None)  # Linux alone has it
        cores = len(usable(0)) if usable else os.cpu_count() or 1
        with contextlib.suppress(RuntimeError):  # devices are in use already
            jax.config.update("jax_num_cpu_devices", cores)


def choose(cells: Mapping[str, Any], devices: Sequence[Any] | None = None) -> Parallel:
    """One device, or several that take equal parts of the cells and share all else.

    States and cells are placed (`place`); data and teachers, which have no axis of
    cells, are on every device (`replicate`).

    Args:
      cells: `{name: [cells]}`.
      devices: of one process, the most to use, all if None; those beyond the largest
        number that divides the cells stay idle. Of several processes, all are used.

    Raises:
      ValueError: the cells do not divide over the devices of several processes.
    """
    devices = tuple(jax.devices() if devices is None else devices)
    count, most = size(cells), len(devices)
    if jax.process_count() > 1 and count % most:
        raise ValueError(
            f"{count} cells do not divide over {most} devices of "
            f"{jax.process_count()} processes; take a multiple of {most}"
        )
    devices = devices[: max(n for n in range(1, most + 1) if count % n == 0)]
    if len(devices) == 1:
        return parallel.jit(devices)
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
