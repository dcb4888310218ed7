# SPDX-License-Identifier: Apache-2.0
"""Trials on devices: each takes an equal part of them, and nothing is sent between."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.parallel import partitioner as parallel
from jaxdistill.parallel.partitioner import Partitioner, compile_whole
from jaxdistill.parallel.sharding import put, whole
from jaxdistill.study.sweep.steps import axis_of, in_groups, scan_sweep
from jaxdistill.study.sweep.trials import axes_of, is_per_trial, size
from jaxdistill.types import TrainState

AXIS = "trials"

Division = Literal["auto", "seeds", "jit", "mesh", "fsdp", "pmap"]
"""What the devices of a study divide among them, see `divide`."""


def divide(over: Division, seeds: int) -> tuple[Partitioner, bool]:
    """A study's `run` and `together`.

    Args:
      over: "seeds" trains all in one program, each device its part of them, cores of a
        CPU too; the others split every batch (`parallel`). "auto" is seeds where one
        process has several of them and an accelerator, else as there: on two cores six
        seeds of MNIST's MLPs took as long together as one after another.
      seeds: how many there are.

    Raises:
      ValueError: of several processes, seeds cannot be divided.
    """
    if over == "seeds":
        use_cores()  # before anything asks for devices
    alone = jax.process_count() == 1
    if over == "auto" and alone and seeds > 1 and jax.default_backend() != "cpu":
        over = "seeds"
    if over != "seeds":
        return parallel.choose(over), False
    if not alone:
        raise ValueError(
            "--parallel seeds is for one process; take auto, mesh, fsdp or pmap"
        )
    return parallel.jit(), True


def compile_sweep(
    partitioner: Partitioner,
    sweep_step: Callable,
    trials: Mapping[str, Any],
    *,
    group: int | None = None,
):
    """Many steps of a sweep in one dispatch, as `train.fit` takes them.

    Args:
      partitioner: `choose(trials)`.
      sweep_step: see `make_sweep_step`.
      trials: `{name: [trials]}`.
      group: most trials of a device that train at once, see `in_groups`; None is all.
        See `group_for`.

    Returns:
      `(states, (teacher, examples), indices) -> (states, metrics)`, as `scan_sweep`'s.
    """
    program, each = scan_sweep(sweep_step), size(trials) // len(partitioner.devices)
    if group is not None and group < each:
        at_once = max(n for n in range(1, group + 1) if each % n == 0)
        program = in_groups(program, at_once)
    if len(partitioner.devices) > 1:
        program = _on_each(program, Mesh(np.array(partitioner.devices), (AXIS,)))
    program = partitioner.compile(program, batch_axis=1)
    placed = partitioner.place(dict(trials))

    def step(states, resident, indices):
        return program(states, (placed, *resident), indices)

    if (recipe_of := getattr(sweep_step, "recipe_of", None)) is not None:
        step.recipe = recipe_of(trials)  # type: ignore[attr-defined]
    return step


def _on_each(program: Callable, devices: Mesh) -> Callable:
    """`scan_sweep`'s program on every device for the trials that it has."""
    states_of = TrainState(P(), P(AXIS), P(AXIS), P(AXIS), P(AXIS))

    def run(states, resident, indices):
        trials, *given = resident
        own_indices = P() if axis_of(indices, 1) is None else P(None, AXIS)
        local = jax.shard_map(
            program,
            mesh=devices,
            in_specs=(states_of, (P(AXIS), *axes_of(given, P(AXIS), P())), own_indices),
            out_specs=(states_of, P(None, AXIS)),
            check_vma=False,
        )
        return local(states, (trials, *given), indices)

    return run


def group_for(partitioner: Partitioner) -> int | None:
    """How many trials of a device to train at once where they share no live teacher.

    All (None) on an accelerator; on a CPU one, all its steps: of MNIST's students of
    109,000 weights two cores took 0.23 ms a step and student one by one on each, 0.26
    two by two, 0.35 all sixteen at once.
    """
    return 1 if partitioner.devices[0].platform == "cpu" else None


def use_cores() -> None:
    """Makes each core of a CPU a device of its own, among which `choose` divides
    trials.

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


def choose(
    trials: Mapping[str, Any], devices: Sequence[Any] | None = None
) -> Partitioner:
    """One device, or several that take equal parts of the trials and share all else.

    States and trials are placed (`place`); data and teachers, which have no axis of
    trials, are on every device (`replicate`), but for what is `PerTrial`.

    Args:
      trials: `{name: [trials]}`.
      devices: of one process, the most to use, all if None; those beyond the largest
        number that divides the trials stay idle. Of several processes, all are used.

    Raises:
      ValueError: the trials do not divide over the devices of several processes.
    """
    devices = tuple(jax.devices() if devices is None else devices)
    count, most = size(trials), len(devices)
    if jax.process_count() > 1 and count % most:
        raise ValueError(
            f"{count} trials do not divide over {most} devices of "
            f"{jax.process_count()} processes; take a multiple of {most}"
        )
    devices = devices[: max(n for n in range(1, most + 1) if count % n == 0)]
    if len(devices) == 1:
        return parallel.jit(devices)
    grid_of = Mesh(np.array(devices), (AXIS,))
    everywhere = NamedSharding(grid_of, P())
    parts = NamedSharding(grid_of, P(AXIS))

    def shardings(tree):
        return jax.tree.map(lambda x: parts if np.ndim(x) else everywhere, tree)

    def place(tree):
        return jax.tree.map(put, tree, shardings(tree))

    def replicate(tree, axis=0):
        del axis
        return jax.tree.map(
            lambda x: place(x) if is_per_trial(x) else put(x, everywhere),
            tree,
            is_leaf=is_per_trial,
        )

    return Partitioner(
        name="trials",
        devices=devices,
        place=place,
        replicate=replicate,
        join=replicate,
        fetch=partial(jax.tree.map, whole),
        compile=compile_whole,
        shardings=shardings,
        shares_batch=True,
    )
