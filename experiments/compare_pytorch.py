# SPDX-License-Identifier: Apache-2.0
"""Is it the same as the PyTorch script, and how much faster?

Question: the distillation script that most articles print, written for PyTorch and for
us (MNIST, teacher 784-512-256-10, student 784-128-64-10, batch 64, Adam 1e-3,
temperature 2, 0.7 cross-entropy + 0.3 KL times T squared; Hinton, Vinyals, Dean 2015,
section 2).

  parity    same weights, same batches, same trained teacher: the largest relative
            difference of any step's loss, and of the parameters over their largest,
            in 200 steps. Expected: below 1e-9 in float64; in float32, where both start
            every step from the same state, below 1e-6 for a loss and 1e-4 for nearly
            every parameter: Adam turns a gradient that is nothing but rounding into a
            step of full size. Two float32 runs left to themselves also part as soon as
            an activation within rounding of zero falls on either side of it, so what
            200 steps amount to then is reported, not expected.
  speed     seconds per epoch of the article's loop, of the same loop with all that
            makes eager PyTorch fast, of that under torch.compile, and of ours, all with
            the teacher's forward pass in every step. They take turns on the same cores.
            Expected on two cores: 6 times the article's loop, twice the tuned one.
  accuracy  ours and theirs for some seeds, each with its own initial weights and
            order, from one teacher a seed. Expected: no difference.

Needs jaxdistill[torch]. A run directory keeps the parts it has, so that one part can be
run again at a quiet time. Cost on two cores: about 15 minutes, a minute with `--smoke`.

  python -m experiments.compare_pytorch --data-dir ~/mnist
  python -m experiments.compare_pytorch --data-dir ~/mnist --part speed --rounds 9
  python -m experiments.compare_pytorch --smoke
"""

import io
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import tyro
from tqdm.auto import tqdm

from experiments.article_job import Config, Task, baseline, machine
from experiments.pytorch_parity import parity
from jaxdistill import benchmark
from jaxdistill.runs import Run, environment
from jaxdistill.statistics import paired, spread
from jaxdistill.study import FAILURES

PARTS = ("parity", "speed", "accuracy")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the comparison, prints its table, returns its summary."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    if hasattr(os, "sched_setaffinity"):  # before either side makes its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    try:
        return execute(config)
    except FAILURES as error:
        sys.exit(f"error: {error}")


def execute(config: Config) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds."""
    if config.smoke:
        small: dict[str, Any] = {"data": "digits", "teacher": (32,), "student": (16, 8)}
        config = replace(config, **small, epochs=2, rounds=2, seeds=2, compile=False)
    torch = baseline().torch
    free = ("part", "rounds", "data_dir", "run_dir", "save", "progress")
    log = Run(
        config.run_dir, {k: v for k, v in asdict(config).items() if k not in free}
    )
    task = Task(config)
    path = log.path / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    jobs: dict[str, Callable] = {"parity": parity, "speed": speed, "accuracy": accuracy}
    for part in PARTS if config.part == "all" else (config.part,):
        on = machine(torch.__version__, config.threads)
        summary[part] = {**jobs[part](task), "machine": on}
        log.write("summary.json", summary)
    env = environment()
    env["versions"]["torch"] = torch.__version__
    log.write("env.json", env)
    text = table(summary)
    log.write_bytes("table.md", text.encode())
    if "speed" in summary:
        log.write_bytes("speed.png", figure(summary["speed"]))
    if config.save is not None:
        save(log.path, config.save)
    print(text)
    print(f"run directory: {log.path}")
    return summary


def speed(task: Task) -> dict[str, Any]:
    """Seconds per epoch of every loop, in turns; ratios to ours, pair by pair."""
    torch, config = baseline(), task.config
    taught = task.taught(0)
    teacher = task.torch_module("teacher", taught)
    start = {"params": task.fresh("student", 0).params}
    shared = {"batch_size": config.batch_size, "learning_rate": config.learning_rate}

    def theirs(make, *images, **options):
        student = task.torch_module("student", start)
        return make(student, teacher, task.loss, *images, **shared, **options)

    raw = torch.Images(
        task.source.train["images"],
        task.source.train["labels"],
        task.source.mean,
        task.source.deviation,
        task.source.peak,
    )
    ready = (task.train["inputs"], task.train["labels"])
    jobs = {
        "PyTorch, the article's loop": theirs(torch.article, raw),
        "PyTorch, tuned": theirs(torch.tuned, *ready),
        "jaxdistill": task.epoch(taught),
    }
    skipped = {}
    compiled = "PyTorch, tuned and compiled"
    if config.compile:
        reason = torch.compiler_problem()
        if reason is None:
            jobs[compiled] = theirs(torch.tuned, *ready, compiled=True)
        else:
            skipped[compiled] = reason
    bar = tqdm(
        desc="speed",
        total=len(jobs) * (config.rounds + 1),
        unit="epoch",
        disable=not config.progress,
    )
    with bar:
        times = benchmark.interleave(
            {name: _counted(job, bar) for name, job in jobs.items()}, config.rounds
        )
    ours = times["jaxdistill"]
    return {
        "seconds": times,
        "ratios": {
            name: benchmark.ratios(slow, ours)
            for name, slow in times.items()
            if name != "jaxdistill"
        },
        "skipped": skipped,
        "images": len(task.train["labels"]),
        "batch_size": config.batch_size,
    }


def _counted(job: Callable[[], Any], bar: tqdm) -> Callable[[], None]:
    def counted() -> None:
        job()
        bar.update()

    return counted


def accuracy(task: Task) -> dict[str, Any]:
    """Test accuracy of either side; a seed's students share its teacher."""
    torch, config = baseline(), task.config
    seeds: dict[str, list[float]] = {"jaxdistill": [], "PyTorch": []}
    teacher_scores = []
    test = (task.test["inputs"], task.test["labels"])
    for seed in tqdm(range(config.seeds), desc="accuracy", disable=not config.progress):
        taught = task.taught(seed)
        teacher = task.torch_module("teacher", taught)
        teacher_scores.append(torch.accuracy(teacher, *test))
        live = task.run.place(task.teacher(taught))
        ours = task.fit("student", seed, live)
        # One judge for both: theirs.
        seeds["jaxdistill"].append(
            torch.accuracy(task.torch_module("student", ours), *test)
        )
        torch.torch.manual_seed(seed)
        student = task.torch_module("student")
        epoch = torch.tuned(
            student,
            teacher,
            task.loss,
            task.train["inputs"],
            task.train["labels"],
            config.batch_size,
            config.learning_rate,
        )
        for _ in range(config.epochs):
            epoch()
        seeds["PyTorch"].append(torch.accuracy(student, *test))
    return {
        "epochs": config.epochs,
        "seeds": {"teacher": teacher_scores, **seeds},
        "spread": {name: spread(values) for name, values in seeds.items()},
        "paired": paired(seeds["jaxdistill"], seeds["PyTorch"]),
    }


def table(summary: Mapping[str, Any]) -> str:
    """All parts as Markdown."""
    blocks = []
    if "speed" in summary:
        blocks.append(_speed_table(summary["speed"]))
    if "parity" in summary:
        names = {
            "float64": "float64",
            "restarted": "float32, both from the same state at every step",
            "float32": "float32, side by side",
            "as_is": "float32, each its own rounding of Adam's bias correction",
        }
        for key, name in names.items():
            runs = summary["parity"][key]
            loss, weight = (_median_and_most(runs, of) for of in ("loss", "params"))
            blocks.append(
                f"- {name}: largest relative difference in {runs[0]['steps']} steps, "
                f"of a loss {loss}, of a parameter (over the largest) {weight}; median "
                f"(most) of {len(runs)} initial weights"
            )
    if "accuracy" in summary:
        part = summary["accuracy"]
        scores = ", ".join(
            f"{name} {100 * value['mean']:.2f} ± {100 * value['std']:.2f}"
            for name, value in part["spread"].items()
        )
        gap = part["paired"]
        blocks.append(
            f"- test accuracy after {part['epochs']} epochs, %: {scores}; difference "
            f"{100 * gap['mean']:+.2f} points, 95% interval {100 * gap['low']:+.2f} to "
            f"{100 * gap['high']:+.2f} ({gap['n']} teachers)"
        )
    return "\n".join(blocks) + "\n"


def _median_and_most(runs: Sequence[Mapping[str, float]], key: str) -> str:
    values = [run[key] for run in runs]
    return f"{statistics.median(values):.1e} ({max(values):.1e})"


def _speed_table(part: Mapping[str, Any]) -> str:
    lines = ["| | seconds per epoch | ours is faster by |", "| --- | --: | --: |"]
    for name, times in part["seconds"].items():
        seconds = (
            f"{statistics.median(times):.3g} ({min(times):.3g} to {max(times):.3g})"
        )
        ratio = part["ratios"].get(name)
        faster = (
            "-"
            if ratio is None
            else f"{ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})"
        )
        lines.append(f"| {name} | {seconds} | {faster} |")
    lines += [f"| {name} | - | {why} |" for name, why in part["skipped"].items()]
    rounds = len(part["seconds"]["jaxdistill"])
    on = part["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"Median (lowest to highest) of {rounds} rounds in turns: "
            f"{part['images']:,} images, batch {part['batch_size']}, a live teacher, "
            f"{on['threads']} threads of {on['cpu']}, jax {on['jax']}, torch "
            f"{on['torch']}.",
            "",
        ]
    )


def figure(part: Mapping[str, Any]) -> bytes:
    """Seconds per epoch as bars, with the range over the rounds, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(part["seconds"])[::-1]
    medians = [statistics.median(part["seconds"][name]) for name in names]
    low = [m - min(part["seconds"][n]) for n, m in zip(names, medians, strict=True)]
    high = [max(part["seconds"][n]) - m for n, m in zip(names, medians, strict=True)]
    picture, axis = plt.subplots(figsize=(7, 0.8 + 0.5 * len(names)))
    axis.barh(names, medians, xerr=[low, high], capsize=3)
    axis.set(xlabel="seconds per epoch: median and range")
    axis.spines[["top", "right"]].set_visible(False)
    picture.tight_layout()
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=110)
    plt.close(picture)
    return buffer.getvalue()


def save(run: Any, destination: Path) -> None:
    """Copies a run's small files, to be committed."""
    destination.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "env.json", "summary.json", "table.md", "speed.png"):
        if (run / name).exists():
            (destination / name).write_bytes((run / name).read_bytes())


if __name__ == "__main__":
    main()
