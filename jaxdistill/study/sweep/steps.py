# SPDX-License-Identifier: Apache-2.0
"""The states and steps of many students at once: the single ones under vmap."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill.study.sweep.trials import (
    Trial,
    apart,
    axes_of,
    combine,
    has_per_trial,
    of_one,
    size,
)
from jaxdistill.train.step import (
    gather_batch,
    init_state,
    make_train_step,
    or_nan,
    shortest,
    within,
)
from jaxdistill.types import Batch, Objective, Student, TrainState

STACKED = TrainState(step=None, params=0, model_state=0, opt_state=0, rng=0)
"""Which parts of a state have an axis of trials first."""


def init_states(
    trials: Mapping[str, Any],
    student: Student,
    make_optimizer: Callable[[Trial], optax.GradientTransformation],
    batch: Batch,
) -> TrainState:
    """A state for each trial, stacked; trial `seed`s are those of single trainings.

    The step is one number: all trials take theirs together.

    Args:
      trials: `{name: [trials]}`, with `seed`.
      student: see `models.student`.
      make_optimizer: an optimizer from a trial's numbers.
      batch: any batch, for shapes.

    Raises:
      ValueError: the trials have no seed.
    """
    if "seed" not in trials:
        raise ValueError(f"trials need a seed, got {', '.join(trials)}")

    def one(trial):
        rng = jax.random.key(trial["seed"])
        return init_state(rng, student, make_optimizer(trial), batch)

    return jax.jit(jax.vmap(one, out_axes=STACKED))(dict(trials))


def make_sweep_step(
    student: Student,
    make_objective: Callable[[Trial], Objective],
    make_optimizer: Callable[[Trial], optax.GradientTransformation],
    **options: Any,
) -> Callable:
    """One optimizer step of every trial: `(states, trials, teacher, batch)`.

    Args:
      student: see `models.student`.
      make_objective: an objective from a trial's numbers, which may be its weights and
        temperatures.
      make_optimizer: likewise.
      options: `augment`, drawn for each trial, `micro_batches` and `dtype`, see
        `train.make_train_step`.

    Returns:
      `(states, trials, teacher, batch) -> (states, metrics)`. A batch is all trials'
      own where its leaves have an axis of trials first (`mask` is `[trials, B]`), else
      it is shared, and with it the forward pass of a live teacher that is not
      `PerTrial`. Metrics gain an axis of trials.
    """

    def one(state, trial, teacher, batch):
        objective, optimizer = (make_objective(trial), make_optimizer(trial))
        step = make_train_step(student, objective, optimizer, **options)
        return step(state, of_one(teacher), batch)

    def sweep_step(states, trials, teacher, batch):
        given = (states, dict(trials), teacher, batch)
        axes = (STACKED, 0, axes_of(teacher, 0, None), axis_of(batch))
        if size(trials) == 1:
            return _alone(one, axes, (STACKED, 0))(*given)
        return jax.vmap(one, axes, (STACKED, 0))(*given)

    def recipe(trials):
        first = {name: np.asarray(values)[0] for name, values in trials.items()}
        made = make_objective(first), make_optimizer(first)
        step: Any = make_train_step(student, *made, **options)
        every = {name: np.asarray(values).tolist() for name, values in trials.items()}
        return step.recipe._replace(trials=every)

    sweep_step.recipe_of = recipe  # type: ignore[attr-defined]
    return sweep_step


def _alone(function: Callable, axes: Any, out_axes: Any) -> Callable:
    """`jax.vmap` over an axis of one, without what it costs.

    Of a product under vmap XLA's CPU compiler transposes the gradient twice.
    """

    def at(index, axes, tree):
        def change(axis, part):
            return part if axis is None else jax.tree.map(lambda x: x[index], part)

        return jax.tree.map(change, axes, tree, is_leaf=lambda x: x is None)

    def run(*given):
        return at(None, out_axes, function(*at(0, axes, given)))

    return run


def scan_sweep(sweep_step: Callable) -> Callable:
    """Many steps in one dispatch over resident data, as `train.scan_train`.

    Returns:
      `(states, (trials, teacher, examples), indices) -> (states, metrics)`: `indices`
      has `index` and `mask` `[K, B]` for batches that all trials share, or
      `[K, trials, B]`;
      metrics are `[K, trials]`. Teacher and examples may be `PerTrial` in part.
    """

    def run(states, resident, indices):
        trials, teacher, examples = resident
        own, shared = apart(examples)
        each = jax.tree.map(lambda x: x[0], own)  # without the axis of trials
        size = shortest({"own": each, "shared": shared})
        indices, inside = within(size, indices)

        def body(states, at):
            batch = _take(examples, at)
            return sweep_step(states, trials, teacher, batch)

        states, metrics = jax.lax.scan(body, states, indices)
        return states, or_nan(metrics, inside)

    return run


def in_groups(program: Callable, group: int) -> Callable:
    """`scan_sweep`'s program for some trials after others, each group all its steps.

    Few states stay in a processor's cache where many are read from memory at every
    step. A live teacher's forward pass is run again for each group.

    Args:
      program: see `scan_sweep`.
      group: trials that train at once; a divisor of all.
    """

    def cut(tree, axis=0):  # [..., trials, ...] to [groups, ..., of a group, ...]
        def leaf(x):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            return jnp.moveaxis(x.reshape(*before, -1, group, *after), axis, 0)

        return jax.tree.map(leaf, tree)

    def join(x):
        return x.reshape(-1, *x.shape[2:])

    def run(states, resident, indices):
        trials, *given = resident
        # The step is one number for all trials: it has no axis to cut.
        first, bodies = states.step, replace(states, step=())
        each, shared = apart(given)
        each_indices = cut(indices, 1) if axis_of(indices, 1) is not None else None

        def train(part):
            states, trials, each, each_indices = part
            states = replace(states, step=first)
            group_indices = indices if each_indices is None else each_indices
            resident = (trials, *combine(each, shared))
            states, metrics = program(states, resident, group_indices)
            metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
            return replace(states, step=()), metrics, states.step

        parts = (*cut((bodies, dict(trials), each)), each_indices)
        # One group after another, each all its steps: few states stay in the cache.
        bodies, metrics, steps = jax.lax.map(train, parts)
        bodies, metrics = jax.tree.map(join, (bodies, metrics))
        metrics = jax.tree.map(lambda x: x.swapaxes(0, 1), metrics)
        return replace(bodies, step=steps[0]), metrics

    return run


def select_trial(tree: Any, index: int) -> Any:
    """One trial's part of a tree whose leaves have an axis of trials first."""
    return jax.tree.map(lambda x: x[index], tree)


def trial_state(states: TrainState, index: int) -> TrainState:
    """One trial's state, as a single training would have it."""
    return replace(select_trial(replace(states, step=()), index), step=states.step)


def axis_of(batch: Batch, before: int = 0) -> int | None:
    """0 where a batch is each trial's own; None where all share it."""
    return 0 if batch["mask"].ndim > before + 1 else None


def _take(examples: Any, at: Batch) -> Batch:
    """`step.gather_batch`, whoever examples and indices belong to."""
    if axis_of(at) is None and not has_per_trial(examples):
        return gather_batch(examples, at)
    one = lambda examples, at: gather_batch(of_one(examples), at)  # noqa: E731
    return jax.vmap(one, (axes_of(examples, 0, None), axis_of(at)))(examples, at)
