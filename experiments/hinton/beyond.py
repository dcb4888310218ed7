# SPDX-License-Identifier: Apache-2.0
"""The last part of hinton_mnist: what the paper left out."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from experiments.hinton.parts import (
    chosen_rates,
    distilled_arm,
    student_arm,
    triple_arms,
)
from experiments.hinton.task import CHOICE_SEED, Task, adam, errors, labels, logits_of
from jaxdistill import models, report, study, teachers
from jaxdistill.report.figures import words

SHIFTED = ("jittered", "matching", "conv_matching", "ensemble_matching")
"""Rows that see shifted images, each at its own temperature and rate."""


def beyond(task: Task) -> str:
    """What the paper left out: controls, better teachers, fewer labels.

    The control of those that match a teacher on shifted images is `jittered`, which
    sees every shift anew; they see `beyond_views` draws of each image, the same for all
    seeds.
    """
    chosen, said = choice(task)
    arms, run_dir = beyond_arms(task, chosen), task.run_dir("beyond")
    experiment = task.study("triple", "train")
    students = [name for name, arm in arms.items() if "teacher" not in name]
    others = ("scratch", "distilled", "jittered")
    study.compare(
        experiment,
        arms,
        task.config.seeds,
        given=lambda seed: given_teachers(task, experiment, arms, seed),
        pairs={k: [other for other in others if other != k] for k in students},
        to=run_dir,
    )
    run_dir.write_bytes("chosen.md", said.encode())
    texts = [report.write(run_dir.path), said]
    texts += [few_labels_table(task, n) for n in task.config.beyond_labels]
    return "\n".join(texts)


def beyond_arms(
    task: Task, shifted: Mapping[str, tuple[float, float]]
) -> dict[str, study.Arm]:
    """The triple's arms, and those that the paper lacks.

    Args:
      shifted: temperature and rate of `SHIFTED`; the others take the triple's.
    """
    config, rates = task.config, chosen_rates(task)
    long: dict[str, Any] = {"augment": task.jitter, "epochs": config.beyond_epochs}
    steps = task.steps(config.beyond_conv_epochs)
    conv = study.Arm(
        models.ConvNet((32, 64), 256, task.source.num_classes, dropout=0.5),
        labels(),
        adam(config.teacher_rate, steps),
        augment=task.jitter,
        steps=steps,
    )

    def distilled(teacher, temperature, rate, **options):
        soft = task.soft(temperature, hard_weight=0.0)
        return student_arm(task, soft, rate, teacher=teacher, **options)

    def matching(name, teacher):
        return distilled(teacher, *shifted[name], **long, views=config.beyond_views)

    return {
        **triple_arms(task, rates),
        "conv_teacher": conv,
        "label_smoothing": student_arm(task, labels(0.1), rates["scratch"]),
        "jittered": student_arm(task, labels(), shifted["jittered"][1], **long),
        "untrained": distilled_arm(task, rates["distilled"], teacher="drawn"),
        "no_labels": distilled("teacher", config.temperature, rates["distilled"]),
        "matching": matching("matching", "teacher"),
        "conv_matching": matching("conv_matching", "conv_teacher"),
        "ensemble_matching": matching("ensemble_matching", "ensemble"),
    }


def given_teachers(
    task: Task,
    experiment: study.Study,
    arms: Mapping[str, study.Arm],
    seed: int,
    prefix: str = "",
) -> dict[str, Any]:
    """Teachers that are no arms: two as one, and one as it is drawn."""
    members = [
        experiment.train(f"{prefix}{name}", arms[name], seed)
        for name in ("teacher", "conv_teacher")
    ]
    return {
        "ensemble": task.partitioner.place(teachers.mean_logits(members)),
        "drawn": experiment.untrained(arms["teacher"], seed + 10_000),
    }


def choice(task: Task) -> tuple[dict[str, tuple[float, float]], str]:
    """Temperatures and rates of `SHIFTED`; which student is best on validation images.

    All are trained once more, without these images, as are their teachers; those of
    `SHIFTED` at each of the triple's rates and, with a teacher, each temperature.

    Returns:
      `{name: (temperature, rate)}`, and the errors of all in words.
    """

    def label(name, setting):
        used = () if name not in SHIFTED else setting
        used = used[1:] if name == "jittered" else used  # no teacher, no temperature
        return "".join([f"choice_{name}", *(f"_{value:g}" for value in used)])

    config, found = task.config, {}
    for setting in product(config.beyond_temperatures, config.rates):
        arms = beyond_arms(task, dict.fromkeys(SHIFTED, setting))
        for name in (name for name in arms if "teacher" not in name):
            if (at := label(name, setting)) not in found:
                found[at] = choice_errors(task, arms, name, at), name, setting
    best: dict[str, Any] = {}
    for count, name, setting in sorted(found.values(), reverse=True):
        best[name] = setting, count  # the last is the least
    chosen = {name: best[name][0] for name in SHIFTED}
    return chosen, said_of({name: count for name, (_, count) in best.items()}, chosen)


def said_of(wrong: Mapping[str, int], chosen: Mapping[str, tuple[float, float]]) -> str:
    """What `choice` found, as sentences."""
    listed = ", ".join(f"{words(name)} {count}" for name, count in wrong.items())
    settled = ", ".join(
        f"{words(name)} {temperature:g} and {rate:g}"
        for name, (temperature, rate) in chosen.items()
        if name != "jittered"
    )
    return (
        "Best on the validation images, in one training without them: "
        f"{words(min(wrong, key=lambda name: wrong[name]))}. Errors there: {listed}. "
        f"Chosen there as well: temperature and rate of {settled}; jittered's rate, "
        f"{chosen['jittered'][1]:g}. The others take those of scratch and distilled.\n"
    )


def choice_errors(
    task: Task, arms: Mapping[str, study.Arm], name: str, label: str
) -> int:
    """A student's errors on the validation images, which it has not seen.

    Neither has its teacher.
    """
    experiment, held = task.study("beyond", "fitted"), task.examples["validation"]
    by, teacher = arms[name].teacher, None
    if by is not None and by in arms:
        own = experiment.train(f"choice_{by}", arms[by], CHOICE_SEED)
        teacher = task.partitioner.place(own)
    elif by is not None:
        teacher = given_teachers(task, experiment, arms, CHOICE_SEED, "choice_")[by]
    model = experiment.train(label, arms[name], CHOICE_SEED, teacher)
    return int(errors(logits_of(model, held), held["labels"]))


def few_labels_table(task: Task, count: int) -> str:
    """The triple where anyone may use so many labels only, as a titled table.

    But for the rates, which are the triple's, chosen with all labels.
    """
    config = task.config
    experiment = task.study(
        f"beyond/labels_{count}",
        "train",
        examples=study.few_labels(task.examples["train"], count),
        batch_size=min(config.batch_size, count),
    )
    arms = triple_arms(task, chosen_rates(task), config.beyond_few_epochs)
    study.compare(experiment, arms, config.seeds)
    return f"{count} labels\n\n{report.write(experiment.run_dir.path)}"
