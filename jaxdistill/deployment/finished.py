# SPDX-License-Identifier: Apache-2.0
"""A finished run's models as they are deployed: exported, measured, in one summary.

RUN/deployment/ then holds summary.json, table.md and frontier.png, and in artefacts/
what `jaxdistill export` had not exported.
"""

import datetime
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm.auto import tqdm

from jaxdistill import benchmark, export, report, runtimes
from jaxdistill.data import normalize
from jaxdistill.data.inputs import some_of
from jaxdistill.deployment import artefacts
from jaxdistill.deployment.artefacts import Artefact
from jaxdistill.deployment.process import (
    BATCH,
    FEWER,
    SECONDS,
    WARMUP,
    cores,
    in_turns,
    measure,
)
from jaxdistill.export import ExportError, Int8, Subject, Target, check
from jaxdistill.runs import RunError, processor
from jaxdistill.statistics import spread

ROWS = ("teacher", "scratch", "distilled")
FOLDER = "deployment"


def from_run(
    run_dir: Any,
    rows: Sequence[str] = (),
    *,
    to: Sequence[Target] = (),
    int8: Int8 | None = "static",
    data_dir: Any = None,
    rounds: int = 5,
    repeats: int = 200,
    progress: bool = True,
) -> dict[str, Any]:
    """Measures a run's models in the runtimes, and writes RUN/deployment.

    Args:
      run_dir: a run directory, no object storage.
      rows: which of its models; none is those of `ROWS` that it has.
      to: in which formats; none is those whose packages are installed.
      int8: which quantisation is measured beside floats, if any.
      data_dir: see `export.from_run`.
      rounds: fresh processes of each artefact and number of threads.
      repeats: see `measure`.
      progress: show progress bars.

    Returns:
      The summary: `rows` as `report.summarize` has them, with all that was measured;
      `lines` for `frontier.draw`; under `deployed` how it was measured.

    Raises:
      RunError: the run has no such models, or no data.
      ArtefactError: no runtime is installed, or an artefact cannot be measured.
      ExportError: nothing can be exported.
      ValueError: `rounds` or `repeats` is below 1.
    """
    _check(rounds=rounds, repeats=repeats)
    names = _rows(run_dir, rows)
    formats, left_out = artefacts.targets(to)
    read = {name: export.from_run(run_dir, name, data_dir=data_dir) for name in names}
    plan = artefacts.plan(names, formats, int8)
    made, failed = _export(Path(run_dir), read, plan, progress)
    left_out |= failed
    found = {name: _describe(read[each.row], each) for name, each in made.items()}
    threads = sorted({1, cores()})
    times = _measure(made, read, threads, rounds, repeats, progress)
    for name, row in found.items():
        row["threads"] = {str(n): times[f"{name} {n}"] for n in threads}
        p50 = [each["latency_us"]["p50"] for each in row["threads"]["1"]]
        row["cost"]["latency_us"] = statistics.median(p50)
    families = {each.row: None for each in made.values()}
    how = {"rounds": rounds, "repeats": repeats, "threads": threads}
    summary = {
        "measure": "accuracy",
        "rows": found,
        "lines": {f: [n for n, e in made.items() if e.row == f] for f in families},
        "deployed": _how(how, left_out, found),
    }
    folder = Path(run_dir) / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report.write(folder)
    return summary


def _check(**numbers: int) -> None:
    """Raise ValueError where one is below 1, before anything is exported."""
    for name, given in numbers.items():
        if given < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}")


def _rows(run_dir: Any, given: Sequence[str]) -> list[str]:
    """The rows that are measured, all of them in the run.

    Raises:
      RunError: one is not, or there is none to measure.
    """
    if "://" in str(epath.Path(run_dir)):
        raise RunError(f"{run_dir} is no local folder: copy the run to one")
    there = sorted(path.stem for path in Path(run_dir).glob("models/*.msgpack"))
    if not there:
        raise RunError(f"{run_dir} holds no models: it is no run, or was never trained")
    rows = list(dict.fromkeys(given or [name for name in ROWS if name in there]))
    wrong = [name for name in rows if name not in there]
    if wrong or not rows:
        lacks = ", ".join(wrong) or f"none of {', '.join(ROWS)}"
        raise RunError(
            f"{run_dir} holds no model {lacks}; name --rows that it has: "
            f"{', '.join(there)}"
        )
    return rows


def _export(
    run_dir: Path, read: Mapping[str, Subject], plan: Sequence[Any], progress: bool
) -> tuple[dict[str, Artefact], dict[str, str]]:
    """The artefacts by name, and why some could not be exported.

    Raises:
      ExportError: none could.
    """
    made, failed = {}, {}
    for row, to, kind in tqdm(plan, desc="exporting", disable=not progress):
        name = f"{row} {artefacts.kind(to, kind)}"
        try:
            made[name] = artefacts.obtain(
                read[row], run_dir, run_dir / FOLDER, row, to, kind, BATCH
            )
        except ExportError as error:
            failed[name] = str(error)
    if not made:
        raise ExportError(f"nothing was exported: {next(iter(failed.values()))}")
    return made, failed


def _describe(subject: Subject, made: Artefact) -> dict[str, Any]:
    """What needs no clock: accuracy in the runtime, and what the model costs."""
    logits, labels = check.run_fresh(made.path, subject.inputs), subject.labels
    inputs = some_of(subject.examples["inputs"], np.arange(1))
    if subject.pixels is not None:
        peak, mean, deviation = subject.pixels
        inputs = normalize(np.asarray(inputs), mean, deviation, peak)
    batch = {"inputs": inputs, "mask": np.ones(1, np.float32)}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compiled = benchmark.compile_forward(subject.student, batch)
    manifest = made.manifest
    return {
        "row": made.row,
        "kind": made.kind,
        "runtime": manifest["runtime"],
        "int8": manifest["int8"],
        "sha256": manifest["sha256"],
        "examples": len(labels),
        "accuracy": spread([float((logits.argmax(-1) == labels).mean())]),
        "cost": {
            "parameters": manifest["student"]["parameters"],
            "flops": benchmark.flops(compiled),
            "bytes": manifest["bytes"],
        },
    }


def _measure(
    made: Mapping[str, Artefact],
    read: Mapping[str, Subject],
    threads: Sequence[int],
    rounds: int,
    repeats: int,
    progress: bool,
) -> dict[str, list[dict[str, Any]]]:
    """`{"NAME THREADS": [what was measured in each round]}`, all in turns."""
    total = len(made) * len(threads) * (rounds + 1)
    with tqdm(total=total, desc="measuring", disable=not progress) as bar:

        def job(each: Artefact, count: int) -> Callable[[], dict[str, Any]]:
            def run() -> dict[str, Any]:
                found = measure(
                    each.path,
                    read[each.row].inputs,
                    threads=count,
                    repeats=repeats,
                    many=each.many,
                )
                bar.update()
                return found

            return run

        jobs = {
            f"{name} {count}": job(each, count)
            for name, each in made.items()
            for count in threads
        }
        return in_turns(jobs, rounds)


def _how(
    given: Mapping[str, Any],
    left_out: Mapping[str, str],
    rows: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the numbers depend on: the method, and the machine."""
    used = dict.fromkeys(row["runtime"] for row in rows.values())
    return {
        **given,
        "warmup": WARMUP,
        "batch": BATCH,
        "batches": max(1, given["repeats"] // FEWER),
        "seconds": SECONDS,
        "left_out": left_out,
        "machine": {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cpu": processor(),
            "cores": cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": {name: runtimes.version(name) for name in (*used, "numpy")},
        },
    }
