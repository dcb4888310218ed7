# SPDX-License-Identifier: Apache-2.0
"""Is it the same as the PyTorch script? (How much faster: `benchmark`.)

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
  accuracy  ours and theirs for some seeds, each with its own initial weights and
            order, from one teacher a seed. Expected: no difference.

Needs jaxdistill[torch]. A run directory keeps the parts it has, so that one part can be
run again. Cost on two cores: about a quarter of an hour, a minute with `--smoke`.

  python -m experiments.baselines.compare_pytorch --data-dir ~/mnist
  python -m experiments.baselines.compare_pytorch --smoke
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tqdm.auto import tqdm

from experiments.baselines.parity import parity
from experiments.speed.article_job import Job, Task, baseline
from experiments.speed.parts import keep_to_threads, run_parts
from jaxdistill import report
from jaxdistill.study import script


@dataclass(frozen=True)
class Config(Job):
    """Compare with PyTorch: step by step, and in test accuracy."""

    part: Literal["parity", "accuracy", "all"] = "all"
    """what to run"""
    run_dir: str = "runs/compare_pytorch"
    """where the results are kept"""
    parity_steps: int = 200
    """steps taken side by side"""
    seeds: int = 5
    """trainings of each side whose accuracy is compared"""
    compilation_cache: bool = True
    """keep our compiled programs on disk, for the next run"""


SMOKE = "--data digits --teacher 32 --student 16 8 --epochs 2 --seeds 2"


def execute(config: Config) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds."""
    if config.smoke:
        config = script.with_flags(config, SMOKE)
    baseline().torch.set_num_threads(config.threads)
    task = Task(config)
    jobs = {"parity": partial(parity, task), "accuracy": partial(accuracy, task)}
    return run_parts(
        config, jobs, lambda summary: {"table.md": table(summary)}, noted=("torch",)
    )


def accuracy(task: Task) -> dict[str, Any]:
    """Test accuracy of either side; a seed's students share its teacher."""
    torch, config = baseline(), task.config
    seeds: dict[str, list[float]] = {"jaxdistill": [], "PyTorch": []}
    teacher_scores = []
    test = (task.test["inputs"], task.test["labels"])
    for seed in tqdm(range(config.seeds), desc="accuracy", disable=not config.progress):
        variables = task.teacher_variables(seed)
        teacher = task.torch_module("teacher", variables)
        teacher_scores.append(torch.accuracy(teacher, *test))
        live = task.partitioner.place(task.teacher(variables))
        ours = task.fit("student", seed, live)
        # One judge for both: theirs.
        seeds["jaxdistill"].append(
            torch.accuracy(task.torch_module("student", {"params": ours.params}), *test)
        )
        torch.torch.manual_seed(seed)
        student = task.torch_module("student")
        images = task.train["inputs"], task.train["labels"]
        sizes = config.batch_size, config.learning_rate
        epoch = torch.tuned(student, teacher, task.torch_loss(), *images, *sizes)
        for _ in range(config.epochs):
            epoch()
        seeds["PyTorch"].append(torch.accuracy(student, *test))
    return {
        "epochs": config.epochs,
        "seeds": {"teacher": teacher_scores, **seeds},
        "spread": {name: report.spread(values) for name, values in seeds.items()},
        "paired": report.paired(seeds["jaxdistill"], seeds["PyTorch"]),
    }


def table(summary: Mapping[str, Any]) -> str:
    """All parts as Markdown."""
    blocks = []
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
    values = [one[key] for one in runs]
    return f"{statistics.median(values):.1e} ({max(values):.1e})"


main = script.command(execute, {"": Config()}, __doc__, begin=keep_to_threads)

if __name__ == "__main__":
    main()
