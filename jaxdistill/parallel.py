# SPDX-License-Identifier: Apache-2.0
"""One step, three ways to run it: jit on a device, a mesh of devices, or pmap.

Every function run here has the form `f(whole, whole, split, *, replica) -> whole`: its
first two arguments (state or models; teacher or data) and all results are the same on
every device, its third is split along the batch axis.

    run = parallel.choose("auto")
    step = run.compile(make_train_step(student, objective, optimizer))
    state = run.place(state)
    state, metrics = step(state, teacher, batch)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdistill.steps import Replica

AXIS = "data"
"""The name of the mesh and pmap axis over which a batch is split."""

Kind = Literal["auto", "jit", "mesh", "pmap"]


@dataclass(frozen=True)
class Parallel:
    """A way to run steps on some devices.

    Attributes:
      name: "jit", "mesh" or "pmap".
      devices: the devices used.
      place: puts a tree on every device, as a copy: donation never eats the caller's.
      split: `(tree, axis=0)`, puts a tree on the devices in equal parts along `axis`.
      fetch: one device's copy of a placed tree, valid until that tree is donated.
      compile: `(function, batch_axis=0, donate=True)`; `batch_axis` is where the third
        argument is split, `donate` lets the first argument's buffers be reused.
    """

    name: str
    devices: tuple[Any, ...]
    place: Callable[[Any], Any]
    split: Callable[..., Any]
    fetch: Callable[[Any], Any]
    compile: Callable[..., Callable]

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError unless a batch divides evenly over the devices."""
        if batch_size % len(self.devices):
            raise ValueError(
                f"a batch of {batch_size} does not divide over {len(self.devices)} "
                f"devices; take a multiple of {len(self.devices)}, or --parallel jit"
            )


def choose(kind: Kind = "auto", devices: Sequence[Any] | None = None) -> Parallel:
    """The named way; "auto" is a mesh where there are several devices, else jit."""
    devices = jax.devices() if devices is None else devices
    if kind == "auto":
        kind = "mesh" if len(devices) > 1 else "jit"
    if kind not in ("jit", "mesh", "pmap"):
        raise ValueError(f"parallel must be auto, jit, mesh or pmap, got {kind!r}")
    return {"jit": jit, "mesh": mesh, "pmap": pmap}[kind](devices)


def jit(devices: Sequence[Any] | None = None) -> Parallel:
    """The first device alone."""
    device = (jax.devices() if devices is None else devices)[0]

    def put(tree, axis=0):
        del axis
        return jax.device_put(tree, device, may_alias=False)

    def compile(function, *, batch_axis=0, donate=True):
        del batch_axis
        return jax.jit(function, donate_argnums=(0,) if donate else ())

    return Parallel("jit", (device,), put, put, lambda tree: tree, compile)


def mesh(devices: Sequence[Any] | None = None) -> Parallel:
    """All devices under one global program; XLA places the communication."""
    devices = jax.devices() if devices is None else devices
    grid = Mesh(np.array(devices), (AXIS,))
    everywhere = NamedSharding(grid, PartitionSpec())

    def along(axis):
        return NamedSharding(grid, PartitionSpec(*(None,) * axis, AXIS))

    def place(tree):
        # A copy first: on its way to several devices, device_put keeps the buffer of
        # the one that has it, may_alias or not, and donation would eat the caller's.
        copy = lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x  # noqa: E731
        return jax.device_put(jax.tree.map(copy, tree), everywhere, may_alias=False)

    def split(tree, axis=0):
        return jax.device_put(tree, along(axis), may_alias=False)

    def fetch(tree):
        return jax.tree.map(lambda x: x.addressable_data(0), tree)

    def compile(function, *, batch_axis=0, donate=True):
        return jax.jit(
            function,
            in_shardings=(everywhere, everywhere, along(batch_axis)),
            out_shardings=everywhere,
            donate_argnums=(0,) if donate else (),
        )

    return Parallel("mesh", tuple(devices), place, split, fetch, compile)


def pmap(devices: Sequence[Any] | None = None) -> Parallel:
    """A copy of the step on each device, with explicit sums between them.

    Placed trees have a leading device axis. Equal to the mesh for deterministic models
    and per-example terms; dropout draws differ, terms that pair examples see the
    device's own, and BatchNorm is local unless it names `AXIS`.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    leading = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec(AXIS))

    def place(tree):
        copy = lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x)))  # noqa: E731
        return jax.device_put(jax.tree.map(copy, tree), leading)

    def split(tree, axis=0):
        def part(x):
            shape = (
                *x.shape[:axis],
                count,
                x.shape[axis] // count,
                *x.shape[axis + 1 :],
            )
            return np.moveaxis(np.asarray(x).reshape(shape), axis, 0)

        return jax.device_put(jax.tree.map(part, tree), leading)

    def fetch(tree):
        return jax.tree.map(lambda x: x.addressable_data(0)[0], tree)

    def compile(function, *, batch_axis=0, donate=True):
        del batch_axis  # `split` has made the device axis the first
        replica = Replica(
            sum=lambda tree: jax.lax.psum(tree, AXIS),
            key=lambda rng: jax.random.fold_in(rng, jax.lax.axis_index(AXIS)),
        )
        return jax.pmap(
            partial(function, replica=replica),
            axis_name=AXIS,
            devices=devices,
            donate_argnums=(0,) if donate else (),
        )

    return Parallel("pmap", tuple(devices), place, split, fetch, compile)
