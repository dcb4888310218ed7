# SPDX-License-Identifier: Apache-2.0
"""The parts of hinton_mnist: each trains, and leaves a summary in its own folder."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.hinton_task import CHOICE_SEED, Task, adam, errors, labels, logits_of
from jaxdistill import models, report, sweep, teachers
from jaxdistill.data import few_labels
from jaxdistill.runs import Run
from jaxdistill.study import Row

BIASES = np.arange(0.0, 20.05, 0.1)
"""What is tried for a class's bias: the paper's are 3.5 and 7.6."""


def triple(task: Task) -> str:
    """Teacher, the same student from scratch and distilled; on all training images.

    The two students' rates are chosen on the validation images, from the same three.
    """
    study = task.study("triple", "train")
    rates, tried = choose(task, study.log)
    study.log.write("chosen.json", {"rates": rates, "validation errors": tried})
    rows = {
        "teacher": task.teacher_row(),
        "scratch": student_row(task, labels(), rates["scratch"]),
        "distilled": distilled_row(task, rates["distilled"]),
    }
    study.compare(rows, task.config.seeds)
    return report.write(study.log.path)


def choose(task: Task, log: Run) -> tuple[dict[str, float], dict[str, Any]]:
    """The best rate of either student, and the validation errors of all tried."""
    config = task.config
    teacher = choice_teacher(task)
    cells = sweep.grid(learning_rate=config.rates, seed=[CHOICE_SEED])
    module, held = task.mlp(*config.student), task.examples["validation"]
    jobs = {
        "scratch": (task.examples["fitted"], labels()),
        "distilled": (task.taught(teacher, "fitted"), task.soft(config.temperature)),
    }
    rates, tried = {}, {}
    for name, (examples, objective) in jobs.items():
        students, _ = task.sweep(
            log,
            f"choose_{name}",
            module,
            cells,
            examples,
            lambda cell, objective=objective: objective,
            config.epochs,
        )
        wrong = errors(logits_of(students, held, cells=True), held["labels"])
        rates[name] = float(config.rates[int(wrong.argmin())])
        tried[name] = dict(zip(map(str, config.rates), wrong.tolist(), strict=True))
    return rates, tried


def choice_teacher(task: Task) -> teachers.Live:
    """A teacher that has not seen the validation images."""
    study = task.study("beyond", "fitted")
    return study.train("teacher", task.teacher_row(), CHOICE_SEED)


def first_teacher(task: Task) -> teachers.Live:
    """The triple's teacher of seed 0, trained now unless it is there."""
    return task.study("triple", "train").train("teacher", task.teacher_row(), 0)


def chosen_rate(task: Task, name: str) -> float:
    """The rate that the triple chose for a student, now unless it has."""
    log = task.log("triple")
    return choose(task, log)[0][name]


def student_row(task: Task, objective: Any, rate: float, **options: Any) -> Row:
    """The student of the paper: no regularisation."""
    module, epochs = task.mlp(*task.config.student), options.pop("epochs", None)
    steps = task.steps(epochs or task.config.epochs)
    return Row(module, objective, adam(rate, steps), steps=steps, **options)


def distilled_row(task: Task, rate: float, **options: Any) -> Row:
    """The student on soft targets, by default of the teacher's unshifted outputs."""
    options = {"teacher": "teacher", **options}
    return student_row(task, task.soft(task.config.temperature), rate, **options)


def temperature(task: Task) -> str:
    """Test errors by temperature and width: one swept program a width."""
    config, log = task.config, task.log("temperature")
    teacher, rate = first_teacher(task), chosen_rate(task, "distilled")
    examples, test = task.taught(teacher, "train"), task.examples["test"]
    found = {}
    for width, seeds in zip(
        config.temperature_widths, config.temperature_seeds, strict=True
    ):
        cells = sweep.grid(
            temperature=config.temperature_values,
            learning_rate=[rate],
            seed=range(seeds),
        )
        students, _ = task.sweep(
            log,
            f"width_{width}",
            task.mlp(width, width),
            cells,
            examples,
            lambda cell: task.soft(cell["temperature"]),
            config.temperature_epochs,
        )
        wrong = errors(logits_of(students, test, cells=True), test["labels"])
        by_value = wrong.reshape(-1, seeds).tolist()
        names = [f"{value:g}" for value in config.temperature_values]
        found[f"{width}_units"] = dict(zip(names, by_value, strict=True))
    summary = {"measure": "test errors", "across": "temperature", "series": found}
    log.write("summary.json", summary)
    return report.write(log.path)


def transfer(task: Task) -> str:
    """Students that never saw a class, before and after their bias is corrected."""
    config, log = task.config, task.log("transfer")
    teacher, rate = first_teacher(task), chosen_rate(task, "distilled")
    cells = sweep.grid(learning_rate=[rate], seed=range(config.seeds))
    shown = task.examples["train"]["labels"]
    sets = {
        "without_3": (shown != 3, [3], 1.0),
        "7_and_8_only": (np.isin(shown, (7, 8)), [7, 8], -1.0),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for name, (keep, classes, sign) in sets.items():
        students, _ = task.sweep(
            log,
            name,
            task.mlp(*config.student),
            cells,
            task.taught(teacher, "train", keep),
            lambda cell: task.soft(config.temperature, hard_weight=0.0),
            config.transfer_epochs,
        )
        seeds = zip(
            *(
                logits_of(students, task.examples[split], cells=True)
                for split in ("train", "test")
            ),
            strict=True,
        )
        for train, test in seeds:
            values = corrected(task, train, test, classes, sign)
            for measure, value in values.items():
                found.setdefault(measure, {}).setdefault(name, []).append(value)
    note = (
        "The bias is added to the logits of the classes in question; chosen for the "
        "fewest errors on the training images, or, as the paper did, on the test."
    )
    summary = {"measure": "test errors", "across": "transfer set", "series": found}
    log.write("summary.json", {**summary, "note": note})
    return report.write(log.path)


def corrected(
    task: Task,
    train: np.ndarray,
    test: np.ndarray,
    classes: list[int],
    sign: float,
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


def beyond(task: Task) -> str:
    """What the paper left out: controls, better teachers, fewer labels."""
    config, study = task.config, task.study("beyond", "fitted")
    scratch, distilled = (chosen_rate(task, k) for k in ("scratch", "distilled"))
    soft, teacher = task.soft(config.temperature, hard_weight=0.0), task.teacher_row()
    long: dict[str, Any] = {"prepare": task.jitter, "epochs": config.beyond_epochs}
    conv = Row(
        models.ConvNet((32, 64), 256, task.source.num_classes, dropout=0.5),
        labels(),
        adam(config.teacher_rate, task.steps(config.beyond_conv_epochs)),
        prepare=task.jitter,
        steps=task.steps(config.beyond_conv_epochs),
    )
    rows = {
        "teacher": teacher,
        "conv_teacher": conv,
        "scratch": student_row(task, labels(), scratch),
        "label_smoothing": student_row(task, labels(0.1), scratch),
        "jittered": student_row(task, labels(), scratch, **long),
        "untrained_teacher": distilled_row(task, distilled, teacher="untrained"),
        "distilled": distilled_row(task, distilled),
        "no_labels": student_row(task, soft, distilled, teacher="teacher"),
        "matching": student_row(task, soft, distilled, teacher="teacher", **long),
        "conv_matching": student_row(
            task, soft, distilled, teacher="conv_teacher", **long
        ),
        "ensemble_matching": student_row(
            task, soft, distilled, teacher="ensemble", **long
        ),
    }

    def given(seed: int) -> Mapping[str, Any]:
        members = [study.train("teacher", teacher, seed)]
        members.append(study.train("conv_teacher", conv, seed))
        drawn = teachers.trained(teacher.module, study.fresh(teacher, seed + 10_000))
        both = {"ensemble": teachers.ensemble(members), "untrained": drawn}
        return {name: task.run.place(model) for name, model in both.items()}

    others = ("scratch", "distilled")
    pairs = {k: [o for o in others if o != k] for k in rows if "teacher" not in k}
    study.compare(rows, config.seeds, given=given, pairs=pairs)
    study.log.write_bytes("chosen.md", best_row(study.log, list(pairs)).encode())
    texts = [report.write(study.log.path), best_row(study.log, list(pairs))]
    for count in config.beyond_labels:
        few = task.study(
            f"beyond/labels_{count}",
            "fitted",
            few_labels(task.examples["fitted"], count),
            batch_size=min(config.batch_size, count),
        )
        few.compare(
            {
                "teacher": teacher,
                "scratch": student_row(task, labels(), scratch),
                "distilled": distilled_row(task, distilled),
            },
            config.seeds,
        )
        texts.append(f"{count} labels\n\n{report.write(few.log.path)}")
    return "\n".join(texts)


def best_row(log: Run, names: list[str]) -> str:
    """Which student is best on the validation images, as a sentence."""
    last = {record["fit"]: record["accuracy"] for record in log.records}
    found = {
        name: np.mean([v for k, v in last.items() if k.rsplit("-", 1)[0] == name])
        for name in names
    }
    best = max(found, key=lambda name: found[name])
    return (
        f"Best on the validation images: {best.replace('_', ' ')}, "
        f"{100 * found[best]:.2f}% (mean over seeds).\n"
    )
