# SPDX-License-Identifier: Apache-2.0
"""One artefact, or several in turns, each measured in a fresh process."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import runtimes
from jaxdistill.export import check
from jaxdistill.export.benchmark import child
from jaxdistill.train import cost

BATCH = 64
"""Examples at once, where throughput is measured."""
WARMUP = 20
FEWER = 10
"""A batch is run so many times less often than a single example, at least."""
SECONDS = 0.25
"""Batches go on for so long: one that is interrupted is then one of many."""
UNSET = ("NPROC", "JAX_COMPILATION_CACHE_DIR")
"""Not passed on: cores are counted, and a cold start compiles by itself."""
EXAMPLES = 64
"""Inputs that take turns, at most."""


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(
    path: str | Path,
    inputs: Any,
    *,
    threads: int | None = 1,
    repeats: int = 200,
    warmup: int = WARMUP,
    batch: int = BATCH,
    many: str | Path | None = None,
) -> dict[str, Any]:
    """What an artefact costs on the CPU, in a process that runs nothing else.

    Args:
      path: of the artefact, beside its manifest.
      inputs: examples as `runtimes.Model` takes them, one at least; they take turns.
      threads: see `runtimes.load`.
      repeats: calls that are timed with one example; with a batch a tenth as many, or
        more until `SECONDS` have passed.
      warmup: calls before them that are not.
      batch: examples at once, for throughput; where there are fewer they are repeated.
      many: the artefact that takes a batch, where the first takes one example alone.

    Returns:
      `cold_start_s`, from the process's start to its first answer, of which `import_s`
      is the runtime's import and `load_s` what follows it: to read, verify, compile
      (JAX's cache of compiled programs is not looked at) and answer once;
      `latency_us`, the repeats' `p50` and `p95`; `memory`, the process's peak bytes
      with single examples, and `memory_before` the runtime was imported; `per_second`,
      examples in so many `batches`, and `memory_batch`, the peak by then; `runtime` and
      its `version`; `threads`; `batch`. What a fixed batch does not allow is None, as
      is memory where the system tells none.

    Raises:
      ArtefactError: the artefact cannot be loaded or does not take the inputs.
      ValueError: a number is below 1, or `warmup` below 0.
    """
    numbers = {"repeats": repeats, "batch": batch, "warmup": warmup, "threads": threads}
    for name, given in numbers.items():
        least = 0 if name == "warmup" else 1
        if given is not None and given < least:
            raise ValueError(f"{name} must be at least {least}, got {given}")
    path = Path(path)
    arrays = _some(path, inputs)
    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "inputs.npz"
        np.savez(stored, **arrays)  # type: ignore[arg-type]
        job = {
            **numbers,
            "path": str(path),
            "inputs": str(stored),
            "many": None if many is None else str(many),
            "fewer": FEWER,
            "seconds": SECONDS,
        }
        return _run(path, job)


def in_turns(
    jobs: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """What each job found in each round, after one that is not counted.

    Args:
      jobs: calls of `measure`, by name.
      rounds: in which they take turns, see `cost.interleave`.

    Raises:
      ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}

    def keep(name: str) -> Callable[[], None]:
        return lambda: found[name].append(jobs[name]())

    cost.interleave({name: keep(name) for name in jobs}, rounds)
    return {name: results[1:] for name, results in found.items()}


def _some(path: Path, inputs: Any) -> dict[str, np.ndarray]:
    """The first examples, checked; of a fixed batch any number is taken."""
    arrays = runtimes.check_examples(runtimes.read_manifest(path)["inputs"], inputs)
    return {name: array[:EXAMPLES] for name, array in arrays.items()}


def _run(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    # The program is not taken from its folder: that would hide modules of Python's own.
    command = [sys.executable, "-P", child.__file__]
    package = Path(runtimes.__file__).parents[1]
    known = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {
        **{name: value for name, value in os.environ.items() if name not in UNSET},
        "PYTHONPATH": os.pathsep.join(known),
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    job = {**job, "started": time.monotonic()}
    ended = subprocess.run(
        [*command, json.dumps(job)], capture_output=True, text=True, env=env
    )
    if ended.returncode:
        raise runtimes.ArtefactError(f"cannot measure {path}: {check.why(ended)}")
    return json.loads(ended.stdout.splitlines()[-1])
