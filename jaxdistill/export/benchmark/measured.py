# SPDX-License-Identifier: Apache-2.0
"""A finished run's models as they are deployed: exported, measured, in one summary.

RUN/deployment/ then holds summary.json, table.md and frontier.png, and in artefacts/
what `jaxdistill export` had not exported.
"""

import datetime
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from jaxdistill import export, runtimes
from jaxdistill.data.examples import some_of
from jaxdistill.export import ExportError, Int8, Subject, Target, check
from jaxdistill.export.benchmark import artefacts, process
from jaxdistill.export.benchmark.artefacts import Artefact
from jaxdistill.parallel.lock import folder_at
from jaxdistill.report import tables
from jaxdistill.report.statistics import spread
from jaxdistill.runtimes import ArtefactError
from jaxdistill.train import cost
from jaxdistill.train.run_dir import RunError, processor

ARMS = ("teacher", "scratch", "distilled")
FOLDER = "deployment"


def from_run(
    run_dir: Any,
    arms: Sequence[str] = (),
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
      arms: which of its models; none is those of `ARMS` that it has.
      to: in which formats; none is those whose packages are installed.
      int8: which quantisation is measured beside floats, if any.
      data_dir: see `export.from_run`.
      rounds: fresh processes of each artefact and number of threads.
      repeats: see `measure`.
      progress: show progress bars.

    Returns:
      The summary: `arms` as `report.summarize` has them, with all that was measured;
      `lines` for `frontier.draw`; under `deployed` how it was measured.

    Raises:
      RunError: the run has no such models, or no data.
      ArtefactError: no runtime is installed.
      ExportError: nothing can be exported, or none of it measured.
      ValueError: `rounds` or `repeats` is below 1.
    """
    _check(rounds=rounds, repeats=repeats)
    names = _arms(run_dir, arms)
    formats, left_out = artefacts.targets(to)
    read = {name: export.from_run(run_dir, name, data_dir=data_dir) for name in names}
    plan = artefacts.plan(names, formats, int8)
    made, found = _export(Path(run_dir), read, plan, progress, left_out)
    threads = sorted({1, process.cores()})
    times = _measure(made, read, threads, rounds, repeats, progress, left_out)
    made = {name: each for name, each in made.items() if name in times}
    found = {name: {**found[name], "threads": times[name]} for name in made}
    for arm in found.values():
        p50 = [each["latency_us"]["p50"] for each in arm["threads"]["1"]]
        # One thread may have failed where several ran: then there is no latency.
        arm["cost"]["latency_us"] = statistics.median(p50) if p50 else None
    families = {each.arm: None for each in made.values()}
    how = {"rounds": rounds, "repeats": repeats, "threads": threads}
    summary = {
        "measure": "accuracy",
        "arms": found,
        "lines": {f: [n for n, e in made.items() if e.arm == f] for f in families},
        "deployed": _how(how, left_out, found),
    }
    folder = Path(run_dir) / FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(
        json.dumps(summary, indent=1) + "\n", encoding="utf-8"
    )
    tables.write(folder)
    return summary


def _check(**numbers: int) -> None:
    """Raise ValueError where one is below 1, before anything is exported."""
    for name, given in numbers.items():
        if given < 1:
            raise ValueError(f"--{name} must be at least 1, got {given}")


def _arms(run_dir: Any, given: Sequence[str]) -> list[str]:
    """The arms that are measured, all of them in the run.

    Raises:
      RunError: one is not, or there is none to measure.
    """
    if "://" in str(folder_at(run_dir)):
        raise RunError(f"{run_dir} is no local folder: copy the run to one")
    there = sorted(path.stem for path in Path(run_dir).glob("models/*.msgpack"))
    if not there:
        raise RunError(f"{run_dir} holds no models: it is no run, or was never trained")
    arms = list(dict.fromkeys(given or [name for name in ARMS if name in there]))
    wrong = [name for name in arms if name not in there]
    if wrong or not arms:
        lacks = ", ".join(wrong) or f"none of {', '.join(ARMS)}"
        raise RunError(
            f"{run_dir} holds no model {lacks}; name --arms that it has: "
            f"{', '.join(there)}"
        )
    return arms


def _export(
    run_dir: Path,
    read: Mapping[str, Subject],
    plan: Sequence[Any],
    progress: bool,
    left_out: dict[str, str],
) -> tuple[dict[str, Artefact], dict[str, dict[str, Any]]]:
    """The artefacts by name, and what needs no clock; why some are left out is noted.

    Raises:
      ExportError: none could be exported.
    """
    made, found = {}, {}
    for arm, to, kind in tqdm(plan, desc="exporting", disable=not progress):
        name = f"{arm} {artefacts.kind(to, kind)}"
        try:
            each = artefacts.obtain(
                read[arm], run_dir, run_dir / FOLDER, arm, to, kind, process.BATCH
            )
            found[name] = _describe(read[arm], each)
            made[name] = each
        except (ExportError, ArtefactError) as error:
            left_out[name] = reason = str(error)
    if not made:
        raise ExportError(f"nothing was exported: {reason}")
    return made, found


def _describe(subject: Subject, made: Artefact) -> dict[str, Any]:
    """What needs no clock: accuracy in the runtime, and what the model costs."""
    logits, labels = check.run_fresh(made.path, subject.inputs), subject.labels
    inputs = some_of(subject.examples["inputs"], np.arange(1))
    batch = {"inputs": subject.prepare(inputs), "mask": np.ones(1, np.float32)}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        forward = cost.compile_forward(subject.student, batch)
    manifest = made.manifest
    return {
        "arm": made.arm,
        "kind": made.kind,
        "runtime": manifest["runtime"],
        "int8": manifest["int8"],
        "sha256": manifest["sha256"],
        "examples": len(labels),
        "accuracy": spread([float((logits.argmax(-1) == labels).mean())]),
        "cost": {
            "parameters": manifest["student"]["parameters"],
            "flops": forward.flops,
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
    left_out: dict[str, str],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """`{NAME: {THREADS: [what was measured in each round]}}`, all in turns.

    Of what fails once nothing is kept, and why is noted; a name without any is none.

    Raises:
      ExportError: all of it fails.
    """
    failed: dict[str, str] = {}
    total = len(made) * len(threads) * (rounds + 1)
    labels = {f"{name}, threads {n}": (name, n) for name in made for n in threads}
    with tqdm(total=total, desc="measuring", disable=not progress) as bar:

        def run(label: str) -> dict[str, Any]:
            bar.update()
            if label in failed:
                return {}
            name, count = labels[label]
            each = made[name]
            given: Any = {"threads": count, "repeats": repeats, "many": each.many}
            try:
                return process.measure(each.path, read[each.arm].inputs, **given)
            except ArtefactError as error:
                failed[label] = str(error)
                return {}

        jobs = {label: partial(run, label) for label in labels}
        found = process.in_turns(jobs, rounds)
    left_out |= failed
    if len(failed) == len(labels):
        raise ExportError(f"nothing was measured: {next(iter(failed.values()))}")
    times: dict[str, dict[str, list]] = {name: {} for name in made}
    for label, (name, n) in labels.items():
        times[name][str(n)] = [] if label in failed else found[label]
    return {name: counts for name, counts in times.items() if any(counts.values())}


def _how(
    given: Mapping[str, Any],
    left_out: Mapping[str, str],
    arms: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the numbers depend on: the method, and the machine."""
    used = dict.fromkeys(arm["runtime"] for arm in arms.values())
    return {
        **given,
        "warmup": process.WARMUP,
        "batch": process.BATCH,
        "batches": max(1, given["repeats"] // process.FEWER),
        "seconds": process.SECONDS,
        "left_out": left_out,
        "machine": {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "cpu": processor(),
            "cores": process.cores(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "versions": {name: runtimes.version(name) for name in (*used, "numpy")},
        },
    }
