# SPDX-License-Identifier: Apache-2.0
"""Does a teacher help a small MLP?

Question: does a student learn more from a teacher's distribution than from labels
alone? Three networks at equal steps, batch and optimizer: a teacher, the student from
scratch, and the same student distilled (Hinton, Vinyals, Dean 2015, section 2).

Presets:
  digits   1,797 real 8x8 digits, shipped with the package (UCI, 1998). 100 labels for
           everyone, teacher included; the other 600 training images have none, and
           only soft targets can use them. Teacher 64-256-128-10 with dropout,
           student 64-8-10, a size chosen on the validation split.
  article  MNIST, teacher 784-512-256-10, student 784-128-64-10, batch 64, Adam 1e-3,
           10 epochs, temperature 2, 0.7 cross-entropy + 0.3 KL times T squared. The
           script often printed never trains its teacher; here it is
           trained, and the untrained one stays as a control, beside label smoothing.

Selection on the validation split, report on test, last epoch, all seeds.

  python experiments/digits_mlp.py
  python experiments/digits_mlp.py --preset article --data-dir ~/mnist --seeds 20
"""

from dataclasses import dataclass
from typing import Any, Literal

import optax

from jaxdistill import data, models, objectives, study, train
from jaxdistill.study import script
from jaxdistill.study.sweep import Division, divide


@dataclass(frozen=True)
class Config(script.SharedFlags):
    """Train a teacher, a student from scratch and a distilled student; compare them."""

    preset: Literal["digits", "article"] = "digits"
    """where the defaults come from"""
    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
    run_dir: str = "runs/{preset}"
    """where the run is kept and resumed from; gs:// works"""
    teacher: tuple[int, ...] = (256, 128)
    """hidden widths of the teacher"""
    student: tuple[int, ...] = (8,)
    """hidden widths of the student"""
    teacher_dropout: float = 0.3
    """dropout rate on the teacher's hidden layers"""
    labels: int | None = 100
    """training images whose label anyone may use; None is all"""
    validation: int = 300
    """training images held out for validation"""
    epochs: int = 200
    """passes over the training images; every training takes as many steps"""
    batch_size: int = 50
    """examples in a batch, over all devices"""
    micro_batches: int = 1
    """parts of a batch whose gradients are accumulated"""
    learning_rate: float = 1e-3
    """Adam's peak rate"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """the rate over the steps"""
    weight_decay: float = 0.0
    """AdamW's decoupled decay"""
    clip_norm: float | None = None
    """clip gradients to this global norm"""
    temperature: float = 2.0
    """softens both distributions"""
    hard_weight: float = 0.1
    """weight of the cross-entropy with labels"""
    soft_weight: float = 0.9
    """weight of the KL to the teacher, times temperature squared"""
    controls: tuple[Literal["untrained_teacher", "label_smoothing"], ...] = ()
    """arms beside the three: distilled from an untrained teacher; labels smoothed"""
    smoothing: float = 0.1
    """how much the label-smoothing control smooths"""
    seeds: int = 5
    """runs of everything, each with its own weights, order and labels"""
    evaluations: int = 10
    """evaluations, log records and checkpoints of a training, about so many"""
    stored: bool = False
    """compute the teacher's outputs once, in the run directory, and read them"""
    precision: models.Precision = "float32"
    """what the steps compute in; parameters and losses are float32 either way"""
    parallel: Division = "auto"
    """what devices divide: seeds (all in one program), or a batch (mesh, fsdp, pmap);
    auto is seeds on an accelerator, else a mesh where there are several devices"""


PRESETS = {
    "digits": Config(),
    "article": Config(
        preset="article",
        data="mnist",
        teacher=(512, 256),
        student=(128, 64),
        teacher_dropout=0.0,
        labels=None,
        validation=0,
        epochs=10,
        batch_size=64,
        schedule="constant",
        temperature=2.0,
        hard_weight=0.7,
        soft_weight=0.3,
        controls=("untrained_teacher", "label_smoothing"),
    ),
}


LIMITS = (
    ("at least 1", lambda x: x >= 1, ("epochs", "batch_size", "micro_batches")),
    ("at least 1", lambda x: x >= 1, ("seeds", "evaluations", "labels")),
    ("at least 1", lambda x: x >= 1, ("teacher", "student")),
    ("0 or more", lambda x: x >= 0, ("validation", "weight_decay")),
    ("above 0", lambda x: x > 0, ("learning_rate", "clip_norm")),
    ("0 or more and below 1", lambda x: 0 <= x < 1, ("teacher_dropout", "smoothing")),
)
"""What flags must be; data, losses and devices check the others against each other."""


def check(config: Config) -> None:
    """Raise ValueError at a setting that can give nothing, before anything is made."""
    for limit, holds, names in LIMITS:
        for name in names:
            value = getattr(config, name)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not holds(number):
                    flag = name.replace("_", "-")
                    raise ValueError(f"--{flag} must be {limit}, got {number}")


def execute(config: Config) -> dict[str, Any]:
    """Trains every arm for every seed, resuming what a run directory already holds."""
    check(config)
    source = data.load(config.data, config.data_dir)
    train_set, test, held = source.splits(config.validation or None)
    partitioner, together = divide(config.parallel, config.seeds)
    steps = script.steps_of(config.epochs, train_set, config.batch_size)
    lines = arms(config, steps)
    path = config.run_dir.replace("{preset}", config.preset)
    experiment = study.Study(
        train.RunDir(path, train.settings(config)),
        partitioner=partitioner,
        examples=study.few_labels(train_set, config.labels),
        steps=steps,
        batch_size=config.batch_size,
        test=test,
        validation=held,
        evaluations=config.evaluations,
        stored=config.stored,
        precision=config.precision,
        together=together,
        progress=config.progress,
    )

    def untrained(seed):
        """The teacher as it is drawn, never trained: the popular script's mistake."""
        return {"untrained": experiment.untrained(lines["teacher"], seed + 10_000)}

    summary = study.compare(experiment, lines, config.seeds, given=untrained)
    script.show(experiment.run_dir)
    return summary


def arms(config: Config, steps: int) -> dict[str, study.Arm]:
    """The table's lines, in the order they train: a teacher before its students."""
    teacher = models.MLP((*config.teacher, 10), dropout=config.teacher_dropout)
    student = models.MLP((*config.student, 10))
    hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
    smooth = objectives.combine(
        {"hard": (1.0, objectives.hard_labels(label_smoothing=config.smoothing))}
    )
    both = objectives.hinton(config.temperature, config.soft_weight, config.hard_weight)
    optimizer, parts = make_optimizer(config, steps), config.micro_batches

    def arm(module, objective, teacher=None):
        return study.Arm(module, objective, optimizer, teacher, micro_batches=parts)

    lines = {
        "teacher": arm(teacher, hard),
        "scratch": arm(student, hard),
        "distilled": arm(student, both, "teacher"),
    }
    if "label_smoothing" in config.controls:
        lines["label_smoothing"] = arm(student, smooth)
    if "untrained_teacher" in config.controls:
        lines["untrained_teacher"] = arm(student, both, "untrained")
    return lines


def make_optimizer(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam as the configuration says; decay and clipping where they are asked for."""
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, steps)
    if config.weight_decay:
        adam = optax.adamw(rate, weight_decay=config.weight_decay)
    else:
        adam = optax.adam(rate)
    if config.clip_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


main = script.command(execute, PRESETS, __doc__)

if __name__ == "__main__":
    main()
