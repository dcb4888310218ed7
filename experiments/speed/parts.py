# SPDX-License-Identifier: Apache-2.0
"""What the scripts of speed share: parts that a run keeps, turns, and the machine."""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxdistill import report, train
from jaxdistill.parallel.sealed import unseal
from jaxdistill.train import cost
from jaxdistill.train.run_dir import processor, version

FREE = ("part", "rounds", "processes")
"""Flags that are no settings either: each part may have others."""


def keep_to_threads(config: Any) -> None:
    """Leaves the process so many cores, before any side makes its threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])


def baseline_module(name: str, packages: Sequence[str], needed: str) -> Any:
    """A module of `experiments.baselines`, which is for another library.

    Raises:
      ValueError: as `needed` says, one of the packages is not installed.
    """
    try:
        return importlib.import_module(f"experiments.baselines.{name}")
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise
        raise ValueError(needed) from error


def run_parts(
    config: Any,
    jobs: Mapping[str, Callable[[], Mapping[str, Any]]],
    tables: Callable[[Mapping[str, Any]], Mapping[str, str]],
    figures: Callable[[Mapping[str, Any]], Mapping[str, bytes]] = lambda summary: {},
    *,
    packages: Sequence[str] = ("torch", "keras"),
    noted: Sequence[str] = (),
) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds.

    Args:
      config: with `part`, `run_dir`, `threads` and `save`.
      jobs: what measures each part, in their order.
      tables: `summary -> {file name: Markdown}`, which are printed.
      figures: likewise `{file name: PNG}`.
      packages: whose versions each part has.
      noted: whose versions env.json has.
    """
    kept = {k: v for k, v in train.settings(config).items() if k not in FREE}
    run_dir = train.RunDir(config.run_dir, kept)
    path = run_dir.path / "summary.json"
    summary = unseal(path.read_bytes()) if path.exists() else {}
    for part in jobs if config.part == "all" else (config.part,):
        result = jobs[part]()
        summary[part] = {**result, "machine": machine(config.threads, packages)}
        run_dir.write("summary.json", summary)
    env = train.environment()
    env["versions"] |= {name: version(name) for name in noted}
    run_dir.write("env.json", env)
    texts = tables(summary)
    for name, text in texts.items():
        run_dir.write_bytes(name, text.encode())
    for name, png in figures(summary).items():
        run_dir.write_bytes(name, png)
    if config.save is not None:
        report.save(run_dir.path, config.save)
    print("\n".join(texts.values()), run_dir, sep="\n")
    return summary


def in_turns(config: Any, name: str, jobs: Any, rounds: int) -> dict[str, list[float]]:
    """`cost.interleave`, with a bar."""
    total = len(jobs) * (rounds + 1)
    with tqdm(desc=name, total=total, disable=not config.progress) as bar:

        def counted(job):
            return lambda: (job(), bar.update())

        return cost.interleave({k: counted(j) for k, j in jobs.items()}, rounds)


def machine(threads: int, packages: Sequence[str]) -> dict[str, Any]:
    """What a part's numbers depend on; parts may come from different days."""
    env, first = train.environment(), jax.devices()[0]
    return {
        "time": env["time"],
        "commit": env["commit"],
        "jax": env["versions"]["jax"],
        **{name: version(name) for name in packages},
        "device": None if first.platform == "cpu" else first.device_kind,
        "cpu": processor(),
        "threads": threads,
    }
