# SPDX-License-Identifier: Apache-2.0
"""Does a teacher help a small MLP?

Question: does a student learn more from a teacher's distribution than from labels
alone? Three networks at equal steps, batch and optimizer: a teacher, the student from
scratch, and the same student distilled (Hinton, Vinyals, Dean 2015, section 2).

Presets:
  digits   1,797 real 8x8 digits, shipped with the package (UCI, 1998). 100 labels for
           everyone, teacher included; the other 600 training images have none, and
           only soft targets can use them. Teacher 64-256-128-10 with dropout,
           student 64-8-10. Chosen on the validation split: with 16 hidden units or
           all labels the student comes close to its teacher, and little is left to
           distil.
  article  MNIST, teacher 784-512-256-10, student 784-128-64-10, batch 64, Adam 1e-3,
           10 epochs, temperature 2, 0.7 cross-entropy + 0.3 KL times T squared. The
           script that most articles print never trains its teacher; here it is
           trained, and the untrained one stays as a control, beside label smoothing.

Selection on the validation split, report on test, last epoch, all seeds.

  python experiments/digits_mlp.py
  python experiments/digits_mlp.py --preset article --data-dir ~/mnist --seeds 20
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro

from jaxdistill import benchmark, data, models, parallel, report, teachers
from jaxdistill.checkpoint import CheckpointError, Checkpoints
from jaxdistill.evaluate import Evaluator
from jaxdistill.loop import NonFiniteLoss, fit
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.parallel import Kind, Parallel
from jaxdistill.runs import Run, RunError
from jaxdistill.steps import init_state, make_train_step, scan_train
from jaxdistill.types import Objective

PIXELS = {
    "digits": (0.305, 0.376),
    "mnist": (0.1307, 0.3081),
    "fashion_mnist": (0.286, 0.353),
}
"""Mean and deviation of the training pixels, scaled to [0, 1]."""


@dataclass(frozen=True)
class Config:
    """Train a teacher, a student from scratch and a distilled student; compare them."""

    preset: Literal["digits", "article"] = "digits"
    """where the defaults come from"""
    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
    data_dir: Path | None = None
    """a folder of original IDX files, or TFDS's data folder"""
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
    """rows beside the three: distilled from an untrained teacher; labels smoothed"""
    smoothing: float = 0.1
    """how much the label-smoothing control smooths"""
    seeds: int = 5
    """runs of everything, each with its own weights, order and labels"""
    evaluations: int = 10
    """evaluations, log records and checkpoints of a training"""
    parallel: Kind = "auto"
    """how a step runs: a mesh where there are several devices, else jit"""
    progress: bool = True
    """show progress bars"""


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


class Row(NamedTuple):
    """One line of the table: a network, what it learns, and from whom."""

    module: models.MLP
    objective: Objective
    teacher: str | None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, returns its summary."""
    config = parse(argv)
    try:
        return execute(config)
    except (
        data.DataError,
        RunError,
        CheckpointError,
        NonFiniteLoss,
        ValueError,
    ) as error:
        sys.exit(f"error: {error}")


def parse(argv: Sequence[str] | None = None) -> Config:
    """The command line as a Config; --preset chooses the defaults."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", default="digits")
    preset = early.parse_known_args(argv)[0].preset
    default = PRESETS.get(preset, PRESETS["digits"])
    return tyro.cli(Config, args=argv, default=default, description=__doc__)


def execute(config: Config) -> dict[str, Any]:
    """Trains every row for every seed, resuming what a run directory already holds."""
    task = Task(config)
    lines = rows(config)
    compiled = {name: task.compile(row) for name, row in lines.items()}
    results: dict[str, list] = {name: [] for name in lines}
    costs, digests = {}, {}
    for seed in range(config.seeds):
        trained: dict[str, Any] = {}
        if "untrained_teacher" in lines:
            trained["untrained"] = task.untrained(seed)
        for name, row in lines.items():
            teacher = None if row.teacher is None else trained[row.teacher]
            model = task.train(name, row, compiled[name], seed, teacher)
            trained[name] = task.run.place(model)
            results[name].append(task.test(trained[name], trained["teacher"]))
            digests[f"{name}-{seed}"] = teachers.digest(model.variables)
            if seed == 0:
                costs[name] = benchmark.cost(model, task.example)
                path = f"models/{name}.msgpack"
                task.log.write_bytes(path, benchmark.weights(model.variables))
    against = [name for name in lines if name not in ("teacher", "distilled")]
    summary = {**report.summarize(results, costs, against), "digests": digests}
    task.log.write("summary.json", summary)
    print(report.write(task.log.path))
    print(f"run directory: {task.log.path}")
    return summary


def rows(config: Config) -> dict[str, Row]:
    """The table's lines, in the order they train: a teacher before its students."""
    teacher = models.MLP((*config.teacher, 10), dropout=config.teacher_dropout)
    student = models.MLP((*config.student, 10))
    hard = combine({"hard": (1.0, hard_labels())})
    both = combine(
        {
            "hard": (config.hard_weight, hard_labels()),
            "soft": (config.soft_weight, soft_targets(temperature=config.temperature)),
        }
    )
    smooth = combine({"hard": (1.0, hard_labels(label_smoothing=config.smoothing))})
    lines = {
        "teacher": Row(teacher, hard, None),
        "scratch": Row(student, hard, None),
        "distilled": Row(student, both, "teacher"),
    }
    if "label_smoothing" in config.controls:
        lines["label_smoothing"] = Row(student, smooth, None)
    if "untrained_teacher" in config.controls:
        lines["untrained_teacher"] = Row(student, both, "untrained")
    return lines


def make_optimizer(config: Config, total: int) -> optax.GradientTransformation:
    """Adam as the configuration says; decay and clipping where they are asked for."""
    rate: Any = config.learning_rate
    if config.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, total)
    if config.weight_decay:
        adam = optax.adamw(rate, weight_decay=config.weight_decay)
    else:
        adam = optax.adam(rate)
    if config.clip_norm is None:
        return adam
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


class Task:
    """The data, the devices and the run directory that all trainings share."""

    def __init__(self, config: Config):
        self.config = config
        free = ("run_dir", "data_dir", "parallel", "progress")
        settings = {k: v for k, v in asdict(config).items() if k not in free}
        source = data.load(config.data, config.data_dir)
        train = source.train
        if config.validation:
            train, validation = data.holdout(train, config.validation)
        self.run: Parallel = parallel.choose(config.parallel)
        self.train_set = self._examples(train, source.peak)
        self.total = config.epochs * self._batches(self.train_set, 0).steps_per_epoch
        self.optimizer = make_optimizer(config, self.total)
        self.example = {**_first(self.train_set), "mask": np.ones(1, np.float32)}
        self.log = Run(config.run_dir.format(preset=config.preset), settings)
        self.test = Evaluator(self.run, self._examples(source.test, source.peak))
        self.validate = (
            Evaluator(self.run, self._examples(validation, source.peak))
            if config.validation
            else None
        )
        self._placed: dict[Any, Any] = {}

    def compile(self, row: Row) -> Callable:
        """The row's training, compiled once for all seeds."""
        step = make_train_step(
            models.student(row.module),
            row.objective,
            self.optimizer,
            micro_batches=self.config.micro_batches,
        )
        return self.run.compile(scan_train(step), batch_axis=1)

    def untrained(self, seed: int) -> teachers.Live:
        """The teacher as it is drawn, never trained: the popular script's mistake."""
        module = rows(self.config)["teacher"].module
        return self.run.place(
            teachers.trained(module, self._fresh(module, seed + 10_000))
        )

    def train(self, name: str, row: Row, step: Callable, seed: int, teacher: Any):
        """One training of one row, resumed from its checkpoints; a live model."""
        placed, batches = self._data(seed, labelled_only=row.teacher is None)
        fingerprint = None
        if teacher is not None:
            fingerprint = teachers.digest(self.run.fetch(teacher.variables))
        checkpoints = Checkpoints(
            self.log.path / "checkpoints" / f"{name}-{seed}",
            identity={"row": name, "seed": seed, "teacher": fingerprint},
            best="accuracy" if self.validate else None,
        )

        validate = self.validate
        state = fit(
            self._fresh(row.module, seed),
            step,
            run=self.run,
            examples=placed,
            batches=batches,
            steps=self.total,
            teacher=teacher,
            evaluate=validate
            and (lambda s: validate(teachers.trained(row.module, s), teacher)),
            evaluate_every=-(-self.total // self.config.evaluations),
            checkpoints=checkpoints,
            log=self.log,
            name=f"{name}-{seed}",
            progress=self.config.progress,
        )
        checkpoints.close()
        return teachers.trained(row.module, state)

    def _fresh(self, module, seed: int):
        rng = jax.random.key(seed)
        return init_state(rng, models.student(module), self.optimizer, self.example)

    def _data(self, seed: int, labelled_only: bool):
        """Placed examples and their batches; soft targets use the unlabelled too."""
        count = self.config.labels
        size = len(self.train_set["labels"])
        key, examples = (-1, False), self.train_set
        if count is not None and count < size:
            key = (seed, labelled_only)
            chosen = np.sort(np.random.default_rng([seed, 1]).permutation(size)[:count])
            known = np.zeros(size, np.float32)
            known[chosen] = 1
            examples = {**self.train_set, "labelled": known}
            if labelled_only:
                examples = {k: v[chosen] for k, v in examples.items()}
        if key not in self._placed:
            self._placed[key] = self.run.place(examples)
        return self._placed[key], self._batches(examples, seed)

    def _batches(self, examples, seed: int) -> data.Batches:
        return data.Batches(len(examples["labels"]), self.config.batch_size, seed)

    def _examples(self, split, peak: int) -> dict[str, np.ndarray]:
        mean, deviation = PIXELS[self.config.data]
        images = split["images"].reshape(len(split["images"]), -1)
        return {
            "inputs": data.normalize(images, mean, deviation, peak),
            "labels": split["labels"],
        }


def _first(examples) -> dict[str, np.ndarray]:
    return {key: value[:1] for key, value in examples.items()}


if __name__ == "__main__":
    main()
