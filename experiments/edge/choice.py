# SPDX-License-Identifier: Apache-2.0
"""How edge's students learn: temperatures and rates, chosen on held-out images."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import optax

from jaxdistill import data, models, objectives, report, train
from jaxdistill.report.figures import words
from jaxdistill.study import sweep
from jaxdistill.types import Objective

CHOICE_SEED = 1_000
"""The seed of what is chosen on the validation images: none of the final seeds."""

Setting = dict[str, float]
"""A temperature, the labels' weight and a rate; of what was tried, its accuracy too."""


def choose(task: Any) -> tuple[dict[str, Setting], str]:
    """The best setting of every float student, chosen now unless it has been.

    Returns:
      `{"scratch_W" or "distilled_W": setting}`, and a table of these. The run's
      directory keeps both, and the validation accuracy of all that was tried.
    """
    run_dir = task.run_dir
    if not (kept := run_dir.path / "chosen.json").exists():
        tried = try_all(task)
        best = {name: max(each, key=_accuracy) for name, each in tried.items()}
        run_dir.write("chosen.json", {"chosen": best, "tried": tried})
    chosen = json.loads(kept.read_text(encoding="utf-8"))["chosen"]
    text = table(task.config, chosen)
    run_dir.write_bytes("chosen.md", text.encode())
    return chosen, text


def try_all(task: Any) -> dict[str, list[Setting]]:
    """All settings of every float student, with their accuracy on held-out images.

    Each is trained once, in as many steps as at last and without these images, and so
    is the teacher of all; those of a width in one program.
    """
    config = task.config
    fitted, _, held = task.source.splits(config.validation)
    experiment = task.study_on(fitted, held)
    teacher = experiment.train("choice_teacher", task.teacher, CHOICE_SEED)
    given = experiment.with_teacher(
        task.teacher, fitted, task.partitioner.place(teacher)
    )
    kinds = trials(config)
    grid = as_trials([setting for each in kinds.values() for setting in each])
    judge, tried = train.Evaluator(sweep.choose(grid), held, trials=True), {}
    for width in config.widths:
        students = train_width(task, width, grid, given)
        found = iter([each["accuracy"] for each in judge(students)])
        for kind, each in kinds.items():
            tried[f"{kind}_{width}"] = [{**s, "accuracy": next(found)} for s in each]
    return tried


def trials(config: Any) -> dict[str, list[Setting]]:
    """What is tried of either kind, at every width.

    From scratch the labels have all the weight, and the temperature has no effect.
    """
    names = ("temperature", "hard_weight", "learning_rate")
    kinds = {
        "scratch": product([1.0], [1.0], config.rates),
        "distilled": product(config.temperatures, [config.hard_weight], config.rates),
    }
    return {
        kind: [dict(zip(names, values, strict=True)) for values in each]
        for kind, each in kinds.items()
    }


def as_trials(tried: Sequence[Setting]) -> dict[str, np.ndarray]:
    """Settings as the trials of a sweep."""
    trials = {k: np.array([s[k] for s in tried], np.float32) for k in tried[0]}
    return {**trials, "seed": np.full(len(tried), CHOICE_SEED, np.int32)}


def train_width(
    task: Any, width: int, trials: Mapping[str, np.ndarray], given: tuple[Any, Any]
) -> models.BoundModule:
    """Students of a width, all at once, from a `Study.given`."""
    (examples, teacher), steps = given, task.study.steps
    size, batch_size = len(examples["labels"]), task.config.batch_size
    return sweep.train(
        trials,
        task.mlp(width),
        make_objective,
        lambda trial: adam(trial["learning_rate"], steps),
        run_dir=task.run_dir,
        name=f"choose_{width}",
        untrained=task.config.smoke,
        examples=examples,
        batches=data.Batches(size, batch_size, CHOICE_SEED),
        steps=steps,
        teacher=teacher,
        progress=task.config.progress,
    )


def make_objective(setting: sweep.Trial) -> Objective:
    """The labels at their weight, and soft targets at the rest."""
    weight = setting["hard_weight"]
    return objectives.hinton(setting["temperature"], 1 - weight, weight)


def adam(rate: Any, steps: int) -> optax.GradientTransformation:
    """Adam, its rate brought to nothing by a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


def table(config: Any, chosen: Mapping[str, Setting]) -> str:
    """What was chosen, as Markdown, and of how much."""
    counts = {kind: len(each) for kind, each in trials(config).items()}
    lines = []
    for name, setting in chosen.items():
        warm = f"{setting['temperature']:g}" if name.startswith("distilled") else "-"
        rate, accuracy = setting["learning_rate"], 100 * setting["accuracy"]
        lines.append([words(name), warm, f"{rate:g}", f"{accuracy:.2f}"])
    return report.markdown_table(
        ("chosen", "temperature", "rate", "validation accuracy %"),
        lines,
        f"One training of each setting without {config.validation:,} training images, "
        f"on which it is judged: {counts['scratch']} from scratch, "
        f"{counts['distilled']} with the teacher.",
    )


def _accuracy(tried: Setting) -> float:
    return tried["accuracy"]
