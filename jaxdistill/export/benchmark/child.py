# SPDX-License-Identifier: Apache-2.0
"""A fresh process that measures one artefact, and prints what it found as JSON.

`process.measure` starts it, by its path: NumPy, `runtimes` and the artefact's own
runtime are all that it imports.

    python -P child.py '{"path": "student.onnx", ...}'
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import runtimes
from jaxdistill.runtimes import peak_memory

MODULES = {
    "jax": "jax",
    "onnxruntime": "onnxruntime",
    "ai-edge-litert": "ai_edge_litert.interpreter",
}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """What `process.measure` returns, of a job that it wrote."""
    with np.load(job["inputs"], allow_pickle=False) as stored:
        inputs = dict(stored)
    path, threads = Path(job["path"]), job["threads"]
    size = len(next(iter(inputs.values())))
    ones = [{k: x[i : i + 1] for k, x in inputs.items()} for i in range(size)]
    before = peak_memory()
    begin = time.monotonic()
    runtime = runtimes.read_manifest(path)["runtime"]
    library, extra, _ = runtimes.RUNTIMES[runtime]
    runtimes.need(library, extra)
    if runtime == "jax" and threads is not None:
        runtimes.keep_to_cores(threads)
    importlib.import_module(MODULES[runtime])
    imported = time.monotonic()
    model = runtimes.load(path, threads)
    model(first(ones, model))
    answered = time.monotonic()
    result = {
        "runtime": runtime,
        "version": runtimes.version(runtime),
        "threads": threads,
        "cold_start_s": answered - job["started"],
        "import_s": imported - begin,
        "load_s": answered - imported,
        "latency_us": None,
        "memory_before": before,
        "memory": peak_memory(),
        "batch": job["batch"],
        "batches": 0,
        "per_second": None,
        "memory_batch": None,
    }
    warmup, repeats = job["warmup"], job["repeats"]
    if model.batch_size in (None, 1):
        times = timed(model, ones, warmup, repeats)
        p50, p95 = 1e6 * np.percentile(times, (50, 95))
        result |= {"latency_us": {"p50": p50, "p95": p95}, "memory": peak_memory()}
    if job["many"] is not None:
        model = runtimes.load(job["many"], threads)
    if model.batch_size in (None, job["batch"]):
        rows = np.arange(job["batch"]) % size
        many = [{name: array[rows] for name, array in inputs.items()}]
        least = max(1, repeats // job["fewer"])
        times = timed(model, many, 1 + warmup // job["fewer"], least, job["seconds"])
        result |= {"batches": len(times), "memory_batch": peak_memory()}
        result["per_second"] = job["batch"] * len(times) / sum(times)
    return result


def first(ones: list[Any], model: runtimes.Model) -> Any:
    """The first example, as often as the model wants it."""
    size = model.batch_size or 1
    return {name: np.repeat(array, size, 0) for name, array in ones[0].items()}


def timed(
    model: runtimes.Model,
    inputs: Sequence[Any],
    warmup: int,
    repeats: int,
    seconds: float = 0.0,
) -> list[float]:
    """Seconds of each call, from NumPy to NumPy; the inputs take turns.

    There are so many calls as `repeats` says, or more until `seconds` have passed.
    """
    run: Callable = model.run
    for i in range(warmup):
        run(inputs[i % len(inputs)])
    gc.collect()
    # No garbage is collected within a call that is timed.
    gc.disable()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < repeats or time.perf_counter() < end:
        one = inputs[len(times) % len(inputs)]
        start = time.perf_counter()
        run(one)
        times.append(time.perf_counter() - start)
    gc.enable()
    return times


if __name__ == "__main__":
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except runtimes.ArtefactError as error:
        sys.exit(f"error: {error}")
