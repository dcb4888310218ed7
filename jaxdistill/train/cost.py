# SPDX-License-Identifier: Apache-2.0
"""What a model costs (parameters, FLOPs, latency, bytes), and fair timing of jobs."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import serialization
from jax.extend import core

from jaxdistill.types import whole_logits


def parameters(variables: Any) -> int:
    """The number of trained parameters in `variables["params"]`."""
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def weights(variables: Any) -> bytes:
    """Variables as msgpack: what the size on disk is measured on.

    Read back with `flax.serialization.msgpack_restore`.
    """
    return serialization.msgpack_serialize(
        serialization.to_state_dict(jax.tree.map(np.asarray, variables))
    )


def cost(model: Any, batch: Mapping[str, Any], repeats: int = 200) -> dict[str, float]:
    """What one model costs at inference, on the default device.

    Args:
      model: a live teacher or trained student (see `teachers`), not placed.
      batch: `inputs` and `mask`; only its first example is used.
      repeats: calls timed in each of five rounds.

    Returns:
      `parameters`; `flops` of one example's forward pass (`Forward`);
      `latency_us`, microseconds for batch 1 with the input on the device, the median
      of the best round; `bytes` of the weights on disk.
    """
    one = _first(batch)
    model = jax.device_put(model)
    forward = compile_forward(model, one)

    def call():
        forward.run(model, one).block_until_ready()

    call()

    # A machine that does other work too slows whole rounds; the best is the model's.
    rounds = [
        statistics.median(seconds(call) for _ in range(repeats)) for _ in range(5)
    ]
    return {
        "parameters": parameters(model.variables),
        "flops": forward.flops,
        "latency_us": 1e6 * min(rounds),
        "bytes": len(weights(model.variables)),
    }


class Forward(NamedTuple):
    """A compiled forward pass.

    Attributes:
      run: `(model, batch of one) -> logits`.
      flops: floating-point operations by XLA's count, which has the body of a loop
        once, and the other turns of `lax.scan`, as of an RNN or of scanned layers.
    """

    run: Any
    flops: float


def compile_forward(model: Any, batch: Mapping[str, Any]) -> Forward:
    """A model's forward pass on a batch's first example, compiled."""
    forward = jax.jit(lambda model, batch: whole_logits(model(batch).logits))
    traced = forward.trace(model, _first(batch))
    compiled = traced.lower().compile()
    return Forward(compiled, flops(compiled) + _further_turns(traced.jaxpr.jaxpr))


def _further_turns(jaxpr: Any) -> float:
    """FLOPs of the scans below a program, but for their first turns."""
    found = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            body, length = equation.params["jaxpr"], equation.params["length"]
            turn = jax.jit(core.jaxpr_as_fun(body)).lower(*body.in_avals).compile()
            found += (length - 1) * flops(turn) + length * _further_turns(body.jaxpr)
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            if isinstance(inner, core.Jaxpr | core.ClosedJaxpr):
                found += _further_turns(getattr(inner, "jaxpr", inner))
    return found


def _first(batch: Mapping[str, Any]) -> dict[str, Any]:
    one = {key: batch[key] for key in ("inputs", "mask")}
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[:1]), one)


def flops(compiled: Any) -> float:
    """Floating-point operations of a compiled function, by XLA's count."""
    return _analysis(compiled, "flops")


def bytes_accessed(compiled: Any) -> float:
    """Bytes that a compiled function reads and writes, by XLA's count."""
    return _analysis(compiled, "bytes accessed")


def _analysis(compiled: Any, key: str) -> float:
    analysis = compiled.cost_analysis()
    # JAX promises no structure here: some versions give a list.
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis.get(key, float("nan")))


def memory(compiled: Any) -> dict[str, int]:
    """Bytes per device of a compiled function: arguments, outputs, temporaries."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def interleave(
    jobs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each job in each round, after one round that is not counted.

    The jobs take turns, and the order turns round every time, so that a machine whose
    speed drifts slows all of them alike.
    """
    for job in jobs.values():
        job()
    times: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            times[name].append(seconds(jobs[name]))
    return times


def span(values: Sequence[float] | Mapping[str, float], form: str = ".3g") -> str:
    """A median, and the ends of the range; a mapping is of `ratios`."""
    if not isinstance(values, Mapping):
        values = ratios(values, [1.0] * len(values))
    middle, low, high = (f"{values[k]:{form}}" for k in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """Pair by pair `slow / fast`: median, minimum, maximum."""
    pairs = [s / f for s, f in zip(slow, fast, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
