# SPDX-License-Identifier: Apache-2.0
"""The last part of hinton_mnist: what the paper left out."""

from collections.abc import Mapping
from typing import Any

from experiments.hinton_parts import (
    chosen_rates,
    distilled_row,
    student_row,
    triple_rows,
)
from experiments.hinton_task import CHOICE_SEED, Task, adam, errors, labels, logits_of
from jaxdistill import models, report, teachers
from jaxdistill.comparison import compare
from jaxdistill.data import few_labels
from jaxdistill.figures import words
from jaxdistill.study import Row, Study


def beyond(task: Task) -> str:
    """What the paper left out: controls, better teachers, fewer labels.

    The control of those that match a teacher on shifted images is `jittered`, which
    sees every shift anew; they see `beyond_views` draws of each image, the same for all
    seeds.
    """
    rows, log = beyond_rows(task), task.log("beyond")
    study = task.study("triple", "train")
    students = [name for name, row in rows.items() if "teacher" not in name]
    said = choice(task, rows, students)
    others = ("scratch", "distilled", "jittered")
    compare(
        study,
        rows,
        task.config.seeds,
        given=lambda seed: given_teachers(task, study, rows, seed),
        pairs={k: [other for other in others if other != k] for k in students},
        to=log,
    )
    log.write_bytes("chosen.md", said.encode())
    texts = [report.write(log.path), said]
    texts += [few_labels_table(task, n) for n in task.config.beyond_labels]
    return "\n".join(texts)


def beyond_rows(task: Task) -> dict[str, Row]:
    """The triple's rows, and those that the paper lacks."""
    config, rates = task.config, chosen_rates(task)
    soft = task.soft(config.temperature, hard_weight=0.0)
    long: dict[str, Any] = {"prepare": task.jitter, "epochs": config.beyond_epochs}
    views: dict[str, Any] = {**long, "views": config.beyond_views}
    conv = Row(
        models.ConvNet((32, 64), 256, task.source.num_classes, dropout=0.5),
        labels(),
        adam(config.teacher_rate, task.steps(config.beyond_conv_epochs)),
        prepare=task.jitter,
        steps=task.steps(config.beyond_conv_epochs),
    )

    def taught(teacher, **options):
        return student_row(task, soft, rates["distilled"], teacher=teacher, **options)

    def labelled(objective, **options):
        return student_row(task, objective, rates["scratch"], **options)

    return {
        **triple_rows(task, rates),
        "conv_teacher": conv,
        "label_smoothing": labelled(labels(0.1)),
        "jittered": labelled(labels(), **long),
        "untrained": distilled_row(task, rates["distilled"], teacher="drawn"),
        "no_labels": taught("teacher"),
        "matching": taught("teacher", **views),
        "conv_matching": taught("conv_teacher", **views),
        "ensemble_matching": taught("ensemble", **views),
    }


def given_teachers(
    task: Task, study: Study, rows: Mapping[str, Row], seed: int, prefix: str = ""
) -> dict[str, Any]:
    """Teachers that are no rows: two as one, and one as it is drawn."""
    members = [
        study.train(f"{prefix}{name}", rows[name], seed)
        for name in ("teacher", "conv_teacher")
    ]
    drawn = study.fresh(rows["teacher"], seed + 10_000)
    return {
        "ensemble": task.run.place(teachers.mean_logits(members)),
        "drawn": task.run.place(teachers.trained(rows["teacher"].module, drawn)),
    }


def choice(task: Task, rows: Mapping[str, Row], students: list[str]) -> str:
    """Which student is best on the validation images, as a sentence.

    All are trained once more, without these images, as are their teachers.
    """
    study = task.study("beyond", "fitted")
    known = given_teachers(task, study, rows, CHOICE_SEED, "choice_")
    for name in ("teacher", "conv_teacher"):
        model = study.train(f"choice_{name}", rows[name], CHOICE_SEED)
        known[name] = task.run.place(model)
    held, wrong = task.examples["validation"], {}
    for name in students:
        teacher = rows[name].teacher
        taught_by = None if teacher is None else known[teacher]
        model = study.train(f"choice_{name}", rows[name], CHOICE_SEED, taught_by)
        wrong[name] = int(errors(logits_of(model, held), held["labels"]))
    best = min(wrong, key=lambda name: wrong[name])
    listed = ", ".join(f"{words(name)} {count}" for name, count in wrong.items())
    return (
        f"Best on the {len(held['labels']):,} validation images, in one training "
        f"without them: {words(best)}. Errors there: {listed}. The rates of scratch "
        "and distilled were chosen on them, and the others take theirs.\n"
    )


def few_labels_table(task: Task, count: int) -> str:
    """The triple where anyone may use so many labels only, as a titled table.

    But for the rates, which are the triple's, chosen with all labels.
    """
    config = task.config
    study = task.study(
        f"beyond/labels_{count}",
        "train",
        few_labels(task.examples["train"], count),
        batch_size=min(config.batch_size, count),
    )
    rows = triple_rows(task, chosen_rates(task), config.beyond_few_epochs)
    compare(study, rows, config.seeds)
    return f"{count} labels\n\n{report.write(study.log.path)}"
