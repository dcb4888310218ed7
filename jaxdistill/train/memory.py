# SPDX-License-Identifier: Apache-2.0
"""Out of device memory, in one sentence: which batch would fit."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.train import cost


class OutOfMemory(ValueError):
    """A step does not fit on a device; the message says which batch would."""


def explain(
    error: Exception, partitioner: Partitioner, step: Callable, given: tuple
) -> None:
    """Raises `OutOfMemory` if an error says that a step did not fit on a device.

    Args:
      error: what JAX raised.
      partitioner: see `parallel`.
      step: many steps in one dispatch, as `train.fit` takes them.
      given: its `(state, resident, indices)`; of a state that was donated the shapes
        are there still.
    """
    if processes.out_of_memory(error):
        raise OutOfMemory(sentence(partitioner, step, given)) from error


def explain_init(error: Exception, init: Callable, *given: Any) -> None:
    """Raises `OutOfMemory` if an error says that a fresh state did not fit.

    Args:
      error: what JAX raised.
      init: `(*given) -> (params, model_state)`.
      given: its arguments.
    """
    if not processes.out_of_memory(error):
        return
    leaves = jax.tree.leaves(jax.eval_shape(init, *given)[0])
    count = sum(leaf.size for leaf in leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e9
    raise OutOfMemory(
        f"out of device memory: the student's {count:,} parameters take {size:.3g} GB, "
        "which with the optimizer's state do not fit on a device; take a smaller one, "
        "or draw it in parts over several (parallel.fsdp)"
    ) from error


def sentence(partitioner: Partitioner, step: Callable, given: tuple) -> str:
    """What to take in place of a batch that does not fit."""
    own = jax.process_index()
    device = next(d for d in partitioner.devices if d.process_index == own)
    kind = device.device_kind
    each, size = _each(partitioner), _batch_size(partitioner, given)
    half, fits = size // 2 // each * each, None
    stats: Mapping[str, int] = {}
    try:
        stats = device.memory_stats() or {}
        fits = largest(partitioner, step, given, stats)
    except Exception:  # whatever cannot be counted must not hide what happened
        pass
    of = f" of {stats['bytes_limit'] / 1e9:.3g} GB" if "bytes_limit" in stats else ""
    said = f"out of device memory: a batch of {size} does not fit on a {kind}{of}"
    if half == 0 or fits == 0:
        return f"{said}, nor would a smaller one; take a smaller model, remat or fsdp"
    other = "fewer trials" if partitioner.shares_batch else "more micro-batches"
    if fits is None:
        return f"{said}; try {half}, which is a guess, or {other}"
    return f"{said}; by the compiler's count {fits} would, or take {other}"


def largest(
    partitioner: Partitioner, step: Callable, given: tuple, stats: Mapping[str, int]
) -> int | None:
    """A batch that fits, nearly the largest; 0 if none does, None if nobody can tell.

    The step is compiled, and not run, for half the batch, for half of that, until one
    fits; then a line is drawn to the one before. What a step takes is the most of what
    its moments take, which grow in proportion to the batch or not at all: such a curve
    is nowhere above that line between its ends, nor below it beyond them.

    Args:
      partitioner: see `explain`.
      step: compiled as `partitioner.compile` does it, or around such a one.
      given: arrays or shapes.
      stats: the device's `memory_stats()`.
    """
    if "bytes_limit" not in stats:
        return None
    each, batch = _each(partitioner), _batch_size(partitioner, given)
    size, large, most = batch, 0, 0
    while size:
        try:
            least, arguments = _needs(partitioner, step, given, size)
        except jax.errors.JaxRuntimeError as error:
            # A compiler that knows the limit, a TPU's, refuses what does not fit.
            if not processes.out_of_memory(error):
                raise
        else:
            # What else lies on the device stays there.
            others = max(0, stats.get("bytes_in_use", 0) - arguments)
            room = stats["bytes_limit"] - others - least
            slope = (most - least) / (large - size) if large else math.inf
            if room >= 0:
                if size == batch:
                    return None  # by this count it would have fitted
                return int(size + room / slope) // each * each
            if room + slope * size < 0:
                return 0
            large, most = size, least
        size = size // 2 // each * each
    return 0


def _needs(
    partitioner: Partitioner, step: Callable, given: tuple, size: int
) -> tuple[int, int]:
    """Bytes on a device for batches of another size: all, and the arguments."""

    def shape(x, dims=None):
        # pmap has its own places, and takes none.
        place = None if partitioner.name == "pmap" else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(dims or x.shape, x.dtype, sharding=place)

    def resized(x):
        before, after = x.shape[:axis], x.shape[axis + 1 :]
        return shape(x, (*before, size // parts, *after))

    state, resident, indices = given
    axis, parts = _batch_axis(partitioner, indices)
    state, resident = jax.tree.map(shape, (state, resident))
    # A sweep's step is a plain function around a compiled one.
    program: Any = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=0)
    lowered = program.lower(state, resident, jax.tree.map(resized, indices))
    parts_of = cost.memory(lowered.compile())
    # A donated argument is an output too.
    total = sum(parts_of.values()) - 2 * parts_of["aliased"]
    return total, parts_of["arguments"]


def _each(partitioner: Partitioner) -> int:
    """What the size of a batch must be a multiple of."""
    return 1 if partitioner.shares_batch else len(partitioner.devices)


def _batch_axis(
    partitioner: Partitioner, indices: Mapping[str, Any]
) -> tuple[int, int]:
    """Which axis of indices is the batch's, and in how many parts it is cut."""
    parts = len(partitioner.devices) if partitioner.name == "pmap" else 1
    return indices["mask"].ndim - 1, parts


def _batch_size(partitioner: Partitioner, given: tuple) -> int:
    axis, parts = _batch_axis(partitioner, given[2])
    return given[2]["mask"].shape[axis] * parts
