# SPDX-License-Identifier: Apache-2.0
"""The paper's parts of hinton_mnist: each leaves a summary in its own folder."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from experiments.hinton.task import CHOICE_SEED, Task, adam, errors, labels, logits_of
from jaxdistill import models, report, study
from jaxdistill.study import sweep
from jaxdistill.train import RunDir

BIASES = np.arange(0.0, 20.05, 0.1)
"""What is tried for a class's bias: the paper's are 3.5 and 7.6."""


def triple(task: Task) -> str:
    """Teacher, the same student from scratch and distilled; on all training images.

    The two students' rates are chosen on the validation images, from the same three.
    """
    arms = triple_arms(task, chosen_rates(task))
    experiment = task.study("triple", "train")
    study.compare(experiment, arms, task.config.seeds)
    return report.write(experiment.run_dir.path)


def triple_arms(
    task: Task, rates: Mapping[str, float], epochs: int | None = None
) -> dict[str, study.Arm]:
    """Teacher and both students, for so many epochs or those of the configuration."""
    return {
        "teacher": task.teacher_arm(epochs),
        "scratch": student_arm(task, labels(), rates["scratch"], epochs=epochs),
        "distilled": distilled_arm(task, rates["distilled"], epochs=epochs),
    }


def chosen_rates(task: Task) -> dict[str, float]:
    """The triple's best rate of either student, chosen now unless it has been.

    The validation errors of all tried stand beside them.
    """
    config, run_dir = task.config, task.run_dir("triple")
    if (chosen := run_dir.path / "chosen.json").exists():
        return json.loads(chosen.read_text(encoding="utf-8"))["rates"]
    teacher = choice_teacher(task)
    trials = sweep.grid(learning_rate=config.rates, seed=[CHOICE_SEED])
    module, held = task.mlp(*config.student), task.examples["validation"]
    jobs = {
        "scratch": (task.examples["fitted"], labels()),
        "distilled": (
            task.with_outputs(teacher, "fitted"),
            task.soft(config.temperature),
        ),
    }
    rates, tried = {}, {}
    for name, (examples, objective) in jobs.items():
        same = partial(_same, objective)
        students = task.sweep(
            run_dir, f"choose_{name}", module, trials, examples, same, config.epochs
        )
        wrong = errors(logits_of(students, held, trials=True), held["labels"])
        rates[name] = float(config.rates[int(wrong.argmin())])
        tried[name] = dict(zip(map(str, config.rates), wrong.tolist(), strict=True))
    run_dir.write("chosen.json", {"rates": rates, "validation errors": tried})
    return rates


def _same(objective: Any, trial: Any) -> Any:
    """The same objective for every trial."""
    return objective


def choice_teacher(task: Task) -> models.BoundModule:
    """A teacher that has not seen the validation images."""
    experiment = task.study("beyond", "fitted")
    return experiment.train("choice_teacher", task.teacher_arm(), CHOICE_SEED)


def first_teacher(task: Task) -> models.BoundModule:
    """The triple's teacher of seed 0, trained now unless it is there."""
    return task.study("triple", "train").train("teacher", task.teacher_arm(), 0)


def student_arm(task: Task, objective: Any, rate: float, **options: Any) -> study.Arm:
    """The student of the paper: no regularisation."""
    module, epochs = task.mlp(*task.config.student), options.pop("epochs", None)
    steps = task.steps(epochs or task.config.epochs)
    optimizer = adam(rate, steps, task.config.second_moment)
    return study.Arm(module, objective, optimizer, steps=steps, **options)


def distilled_arm(task: Task, rate: float, **options: Any) -> study.Arm:
    """The student on soft targets, by default of the teacher's unshifted outputs."""
    options = {"teacher": "teacher", **options}
    return student_arm(task, task.soft(task.config.temperature), rate, **options)


def temperature(task: Task) -> str:
    """Test errors by temperature and width: one swept program a width."""
    config, run_dir = task.config, task.run_dir("temperature")
    teacher, rate = first_teacher(task), chosen_rates(task)["distilled"]
    examples, test = task.with_outputs(teacher, "train"), task.examples["test"]
    found = {}
    values, epochs = config.temperature_values, config.temperature_epochs

    def soft(trial):
        return task.soft(trial["temperature"])

    sizes = zip(config.temperature_widths, config.temperature_seeds, strict=True)
    for width, seeds in sizes:
        trials = sweep.grid(temperature=values, learning_rate=[rate], seed=range(seeds))
        name, module = f"width_{width}", task.mlp(width, width)
        students = task.sweep(run_dir, name, module, trials, examples, soft, epochs)
        wrong = errors(logits_of(students, test, trials=True), test["labels"])
        by_value = wrong.reshape(-1, seeds).tolist()
        names = [f"{value:g}" for value in values]
        found[f"{width}_units"] = dict(zip(names, by_value, strict=True))
    return written(run_dir, "temperature", found)


def written(run_dir: RunDir, across: str, series: Any, **more: str) -> str:
    """A part's summary, left in its folder, as a table."""
    summary = {"measure": "test errors", "across": across, "series": series}
    run_dir.write("summary.json", {**summary, **more})
    return report.write(run_dir.path)


def transfer(task: Task) -> str:
    """Students that never saw a class, before and after their bias is corrected."""
    config, run_dir = task.config, task.run_dir("transfer")
    teacher, rate = first_teacher(task), chosen_rates(task)["distilled"]
    trials = sweep.grid(learning_rate=[rate], seed=range(config.seeds))
    shown = task.examples["train"]["labels"]
    sets = {
        "without_3": (shown != 3, [3], 1.0),
        "7_and_8_only": (np.isin(shown, (7, 8)), [7, 8], -1.0),
    }
    module, epochs = task.mlp(*config.student), config.transfer_epochs
    soft = partial(_same, task.soft(config.temperature, hard_weight=0.0))
    found: dict[str, dict[str, list[float]]] = {}
    for name, (keep, classes, sign) in sets.items():
        examples = task.with_outputs(teacher, "train", keep)
        students = task.sweep(run_dir, name, module, trials, examples, soft, epochs)
        train_logits, test_logits = (
            logits_of(students, task.examples[split], trials=True)
            for split in ("train", "test")
        )
        for train, test in zip(train_logits, test_logits, strict=True):
            values = corrected(task, train, test, classes, sign)
            for measure, value in values.items():
                found.setdefault(measure, {}).setdefault(name, []).append(value)
    note = (
        "The bias is added to the logits of the classes in question; chosen for the "
        "fewest errors on the training images, or, as the paper did, on the test."
    )
    return written(run_dir, "transfer set", found, note=note)


def corrected(
    task: Task, train: np.ndarray, test: np.ndarray, classes: list[int], sign: float
) -> dict[str, float]:
    """A student's test errors before and after the correction, chosen both ways."""
    train_labels, test_labels = (task.examples[k]["labels"] for k in ("train", "test"))
    chosen = {
        "": 0.0,
        ", bias from training": best_bias(train, train_labels, classes, sign),
        ", bias from test": best_bias(test, test_labels, classes, sign),
    }
    found: dict[str, float] = {}
    for how, bias in chosen.items():
        moved = test + bias * np.isin(np.arange(test.shape[-1]), classes)
        found[f"errors{how}"] = float(errors(moved, test_labels))
        if classes == [3]:
            threes = test_labels == 3
            found[f"on threes{how}"] = float(errors(moved[threes], test_labels[threes]))
        if how:
            found[how[2:]] = bias
    return found


def best_bias(
    logits: np.ndarray, labels: np.ndarray, classes: list[int], sign: float
) -> float:
    """Of `BIASES`, in the direction of `sign`, the one with the fewest errors."""
    raised = np.isin(np.arange(logits.shape[-1]), classes)
    wrong = [errors(logits + sign * bias * raised, labels) for bias in BIASES]
    return float(sign * BIASES[int(np.argmin(wrong))])
