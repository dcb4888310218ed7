# SPDX-License-Identifier: Apache-2.0
"""One step, four ways to run it: jit on a device, a mesh of devices, fsdp, or pmap.

Every function run here has the form `f(whole, whole, split, *, replica) -> whole`: its
first two arguments (state or models; teacher or data) and all results are the same on
every device, its third is split along the batch axis. Under fsdp each device holds a
part of what is whole. The devices may belong to several processes (see `processes`).

    partitioner = parallel.choose("auto")
    step = partitioner.compile(make_train_step(student, objective, optimizer))
    state = partitioner.place(state)
    state, metrics = step(state, teacher, batch)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxdistill.parallel.sharding import FSDP, Rule, cut_width, numbers, put, whole
from jaxdistill.types import Replica

AXIS = "data"
"""The name of the mesh and pmap axis over which a batch is split."""

Kind = Literal["auto", "jit", "mesh", "fsdp", "pmap"]


@dataclass(frozen=True)
class Partitioner:
    """A way to run steps on some devices.

    Attributes:
      name: "jit", "mesh", "fsdp", "pmap", or a sweep's "trials".
      devices: the devices used, each process's in a row.
      place: puts a state or a model on the devices, as a copy: donation never eats the
        caller's. On each device all of it, under fsdp a part.
      replicate: puts data on every device, whole, as a copy.
      join: `(tree, axis=0)`, puts a batch on the devices in equal parts along `axis`,
        of which every process has its own rows, `own(batch_size)`.
      fetch: a placed tree in one piece: one device's copy, valid until that tree is
        donated; on the host what lies in parts.
      compile: `(function, batch_axis=0, donate=True)`; `batch_axis` is where the third
        argument is split, `donate` lets the first argument's buffers be reused.
      shardings: where `place` puts the leaves of a tree of arrays or shapes: for a
        checkpoint to be read there, or an init to be compiled there. None under pmap.
      shares_batch: every device has the whole batch (a sweep's), not a part.
    """

    name: str
    devices: tuple[Any, ...]
    place: Callable[[Any], Any]
    replicate: Callable[[Any], Any]
    join: Callable[..., Any]
    fetch: Callable[[Any], Any]
    compile: Callable[..., Callable]
    shardings: Callable[[Any], Any]
    shares_batch: bool = False

    def split(self, tree: Any, axis: int = 0) -> Any:
        """Puts a batch, whole in every process, on the devices in equal parts."""
        at = (slice(None),) * axis
        return self.join(
            jax.tree.map(lambda x: x[(*at, self.own(x.shape[axis]))], tree), axis
        )

    def own(self, batch_size: int) -> slice:
        """The rows of a batch that this process's devices take.

        A reader of records need read no others: give them to `join`.
        """
        if self.shares_batch:
            return slice(0, batch_size)
        index = jax.process_index()
        mine = [i for i, d in enumerate(self.devices) if d.process_index == index]
        each = batch_size // len(self.devices)
        return slice(mine[0] * each, (mine[-1] + 1) * each)

    def storable(self, tree: Any) -> Any:
        """A placed tree as `Checkpoints` takes it: the parts where they are."""
        return self.fetch(tree) if self.name == "pmap" else tree

    def check_batch(self, batch_size: int) -> None:
        """Raise ValueError unless a batch divides evenly over the devices."""
        count = len(self.devices)
        if batch_size % count and not self.shares_batch:
            or_one = ", or --parallel jit" if jax.process_count() == 1 else ""
            raise ValueError(
                f"a batch of {batch_size} does not divide over {count} devices; take a "
                f"multiple of {count}{or_one}"
            )


def choose(kind: Kind = "auto", devices: Sequence[Any] | None = None) -> Partitioner:
    """The named way; "auto" is a mesh where there are several devices, else jit."""
    devices = jax.devices() if devices is None else devices
    if kind == "auto":
        kind = "mesh" if len(devices) > 1 else "jit"
    if kind not in ("jit", "mesh", "fsdp", "pmap"):
        raise ValueError(
            f"parallel must be auto, jit, mesh, fsdp or pmap, got {kind!r}"
        )
    return {"jit": jit, "mesh": mesh, "fsdp": fsdp, "pmap": pmap}[kind](devices)


def jit(devices: Sequence[Any] | None = None) -> Partitioner:
    """The first device alone.

    Raises:
      ValueError: there are several processes, which would all train the same.
    """
    device = (jax.devices() if devices is None else devices)[0]
    if jax.process_count() > 1:
        raise ValueError(
            f"--parallel jit runs on one device, and {jax.process_count()} processes "
            "would all train the same; take mesh, fsdp or pmap, or one process"
        )

    def place(tree, axis=0):
        del axis
        # A copy: a step donates its state, and the caller's arrays must stay.
        return jax.device_put(numbers(tree), device, may_alias=False)

    shardings = partial(jax.tree.map, lambda _: SingleDeviceSharding(device))
    return Partitioner(
        "jit", (device,), place, place, place, lambda x: x, compile_whole, shardings
    )


def mesh(devices: Sequence[Any] | None = None) -> Partitioner:
    """All devices under one global program; XLA places the communication."""
    devices = _in_a_row(devices)
    grid = Mesh(np.array(devices), (AXIS,))
    everywhere = NamedSharding(grid, PartitionSpec())

    def along(axis):
        return NamedSharding(grid, PartitionSpec(*(None,) * axis, AXIS))

    def join(tree, axis=0):
        return jax.make_array_from_process_local_data(along(axis), tree)

    def compile(function, *, batch_axis=0, donate=True):
        return jax.jit(
            function,
            in_shardings=(everywhere, everywhere, along(batch_axis)),
            out_shardings=everywhere,
            donate_argnums=(0,) if donate else (),
        )

    place = partial(jax.tree.map, lambda x: put(x, everywhere))
    fetch = partial(jax.tree.map, lambda x: x.addressable_data(0))
    shardings = partial(jax.tree.map, lambda _: everywhere)
    return Partitioner("mesh", devices, place, place, join, fetch, compile, shardings)


def fsdp(
    devices: Sequence[Any] | None = None,
    shards: int | None = None,
    rule: Rule | None = None,
) -> Partitioner:
    """As the mesh, with every large array of a state or a model cut in parts.

    Each device holds its part of parameters, optimizer state and teacher, and takes its
    part of the batch. XLA gathers an array where it is used, a scanned module's layer
    by layer, and adds up the gradient's parts where they stay. For models larger than
    a device, start from `jax.jit(init, out_shardings=run.shardings(shapes))`.

    Args:
      devices: all, if None.
      shards: parts of an array, a divisor of the number of devices; all, if None. With
        fewer, groups of devices hold copies.
      rule: which axis is cut, `sharding.cut_width(shards)` if None.

    Raises:
      ValueError: the shards do not divide the devices.
    """
    devices = _in_a_row(devices)
    shards = len(devices) if shards is None else shards
    if len(devices) % shards:
        raise ValueError(f"{shards} shards do not divide {len(devices)} devices")
    rule = cut_width(shards) if rule is None else rule
    grid = Mesh(np.array(devices).reshape(-1, shards), (AXIS, FSDP))
    everywhere = NamedSharding(grid, PartitionSpec())

    def along(axis):
        return NamedSharding(grid, PartitionSpec(*(None,) * axis, (AXIS, FSDP)))

    def shardings(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: NamedSharding(grid, rule(path, jnp.shape(x))), tree
        )

    def place(tree):
        return jax.tree.map(put, tree, shardings(tree))

    def join(tree, axis=0):
        return jax.make_array_from_process_local_data(along(axis), tree)

    def rows(x):
        divides = jnp.ndim(x) > 0 and x.shape[0] % len(devices) == 0
        return jax.lax.with_sharding_constraint(x, along(0)) if divides else x

    def keep_rows(module, args, kwargs, context):
        # Else XLA may gather the batch where parameters are cut, not the parameters.
        if context.method_name != "__call__":
            return module(*args, **kwargs)
        return jax.tree.map(rows, module(*jax.tree.map(rows, args), **kwargs))

    def compile(function, *, batch_axis=0, donate=True):
        @wraps(function)
        def sharded(first, second, split):
            split = jax.lax.with_sharding_constraint(split, along(batch_axis))
            with nn.intercept_methods(keep_rows):
                result = function(first, second, split)
            # What was in parts stays so: the state is the next step's argument.
            return jax.lax.with_sharding_constraint(result, shardings(result))

        return jax.jit(sharded, donate_argnums=(0,) if donate else ())

    replicate = partial(jax.tree.map, lambda x: put(x, everywhere))
    fetch = partial(jax.tree.map, whole)
    return Partitioner(
        "fsdp", devices, place, replicate, join, fetch, compile, shardings
    )


def pmap(devices: Sequence[Any] | None = None) -> Partitioner:
    """A copy of the step on each device, with explicit sums between them.

    Placed trees have a leading device axis. Equal to the mesh for deterministic models
    and per-example terms; dropout draws differ, terms that pair examples see the
    device's own, and BatchNorm is local unless it names `AXIS`.
    """
    devices = _in_a_row(devices)
    # A process gives and gets the parts of its own devices.
    own = [d for d in devices if d.process_index == jax.process_index()]
    leading = NamedSharding(Mesh(np.array(own), (AXIS,)), PartitionSpec(AXIS))

    def place(tree):
        copy = lambda x: jnp.broadcast_to(x, (len(own), *jnp.shape(x)))  # noqa: E731
        tree = numbers(tree)
        return jax.device_put(jax.tree.map(copy, tree), leading)

    def join(tree, axis=0):
        def part(x):
            before, after = x.shape[:axis], x.shape[axis + 1 :]
            shape = (*before, len(own), x.shape[axis] // len(own), *after)
            return np.moveaxis(np.asarray(x).reshape(shape), axis, 0)

        return jax.device_put(jax.tree.map(part, tree), leading)

    def compile(function, *, batch_axis=0, donate=True):
        del batch_axis  # `join` has made the device axis the first
        replica = Replica(
            sum=lambda tree: jax.lax.psum(tree, AXIS),
            key=lambda rng: jax.random.fold_in(rng, jax.lax.axis_index(AXIS)),
            devices=len(devices),
        )
        return jax.pmap(
            partial(function, replica=replica),
            axis_name=AXIS,
            devices=devices,
            donate_argnums=(0,) if donate else (),
        )

    fetch = partial(jax.tree.map, lambda x: x.addressable_data(0)[0])
    return Partitioner(
        "pmap", devices, place, place, join, fetch, compile, lambda tree: None
    )


def compile_whole(function, *, batch_axis=0, donate=True):
    """A `Partitioner`'s `compile` for arguments that lie as they are used."""
    del batch_axis
    # A state is of no use after its step: its buffers become those of the new one.
    return jax.jit(function, donate_argnums=(0,) if donate else ())


def _in_a_row(devices: Sequence[Any] | None) -> tuple[Any, ...]:
    """Each process's devices together: its part of a batch is one slice."""
    devices = jax.devices() if devices is None else devices
    return tuple(sorted(devices, key=lambda device: device.process_index))
