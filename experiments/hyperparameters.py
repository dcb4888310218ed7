# SPDX-License-Identifier: Apache-2.0
"""Which temperature, weight and learning rate? A whole grid in one program.

Question: one teacher, one small student; how does what the student learns depend on the
temperature, on the weight of the soft targets against the labels (weight 0 is the
student from scratch), and on the learning rate? Every setting trains with several
seeds, all of them at once by vmap: one compilation, one pass over the teacher's stored
outputs for all (`study.sweep`).

Adam with a cosine schedule; hard weight `1 - soft weight`; last epoch. The best setting
is chosen on the validation images by its mean over the seeds, and its test accuracy
stands beside it; that of the other settings is for the reader alone.

  python -m experiments.hyperparameters
  python -m experiments.hyperparameters --data mnist --data-dir ~/mnist --labels None

Cost: a minute or two on two cores for the digits, 420 students.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxdistill import (
    data,
    models,
    objectives,
    parallel,
    report,
    study,
    teachers,
    train,
)
from jaxdistill.parallel import processes
from jaxdistill.report import figures
from jaxdistill.study import sweep
from jaxdistill.types import Objective


@dataclass(frozen=True)
class Config:
    """Train a student with every setting of a grid and several seeds, all at once."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
    data_dir: str | None = None
    """a folder of original IDX files, or TFDS's data folder"""
    run_dir: str = "runs/hyperparameters"
    """where the run is kept and resumed from"""
    temperature: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """softens both distributions"""
    soft_weight: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 0.99, 1.0)
    """weight of the KL to the teacher, times temperature squared; the labels' is 1 -
    this, so that 0 is the student from scratch, 1 distillation without labels"""
    learning_rate: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Adam's peak rate"""
    seeds: int = 5
    """students of each setting, each with its own initial weights"""
    teacher: tuple[int, ...] = (256, 128)
    """hidden widths of the teacher"""
    student: tuple[int, ...] = (8,)
    """hidden widths of the students"""
    teacher_dropout: float = 0.3
    """dropout rate on the teacher's hidden layers"""
    labels: int | None = 100
    """training images whose label anyone may use; None is all"""
    validation: int = 300
    """training images held out to choose on"""
    epochs: int = 200
    """passes over the training images, for the teacher and the students"""
    batch_size: int = 50
    """examples in a batch; all students see the same"""
    evaluations: int = 5
    """evaluations, log records and checkpoints, about so many"""
    distributed: bool = False
    """one of several, see parallel.processes; SLURM and TPU pods need no flag"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""
    progress: bool = True
    """show progress bars"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the sweep, prints its table, returns its summary."""
    sweep.use_cores()
    config = train.parse({"": Config()}, argv, __doc__)
    with train.exit_with_message():
        return execute(config)


def execute(config: Config) -> dict[str, Any]:
    """Trains a teacher, then the grid; resumes what a run directory holds."""
    task = Task(config)
    students = task.train_students(task.train_teacher())
    accuracy = {
        split: [trial["accuracy"] for trial in task.evaluator(split)(students)]
        for split in ("validation", "test")
    }
    axes = {name: [float(x) for x in values] for name, values in task.axes.items()}
    summary = {"axes": axes, **accuracy}
    summary["best"] = figures.best_settings(summary)
    task.run_dir.write("summary.json", summary)
    text = processes.on_first(lambda: report.write(task.run_dir.path))
    if processes.is_first():
        print(text, task.run_dir, sep="\n")
    return summary


class Task:
    """The data, the grid, and how teacher and students train."""

    def __init__(self, config: Config):
        self.config = config
        source = data.load(config.data, config.data_dir)
        train_split, held = data.holdout(source.train, config.validation)
        self.examples = study.few_labels(source.inputs(train_split), config.labels)
        self.splits = {"validation": source.inputs(held)}
        self.splits["test"] = source.inputs(source.test)
        self.axes = {
            "temperature": config.temperature,
            "soft_weight": config.soft_weight,
            "learning_rate": config.learning_rate,
            "seed": range(config.seeds),
        }
        self.trials = sweep.grid(**self.axes)
        self.partitioner = sweep.choose(self.trials)
        self.run_dir = train.RunDir(config.run_dir, train.settings(config))
        self.batches = data.Batches(len(train_split["labels"]), config.batch_size)
        self.steps = config.epochs * self.batches.steps_per_epoch
        self.classes = source.num_classes

    def evaluator(self, split: str) -> train.Evaluator:
        """Judges all students on a split."""
        return train.Evaluator(self.partitioner, self.splits[split], trials=True)

    def train_teacher(self) -> models.BoundModule:
        """The teacher, on the labels."""
        config = self.config
        # A device is enough; several processes have no other way than together.
        partitioner = parallel.choose("jit" if jax.process_count() == 1 else "mesh")
        experiment = study.Study(
            self.run_dir,
            partitioner=partitioner,
            examples=self.examples,
            steps=self.steps,
            batch_size=config.batch_size,
            test=train.Evaluator(partitioner, self.splits["test"]),
            progress=config.progress,
        )
        widths = (*config.teacher, self.classes)
        arm = study.Arm(
            models.MLP(widths, dropout=config.teacher_dropout),
            objectives.combine({"hard": (1.0, objectives.hard_labels())}),
            optax.adam(optax.cosine_decay_schedule(1e-3, self.steps)),
        )
        return experiment.train("teacher", arm, 0)

    def train_students(self, teacher: models.BoundModule) -> models.BoundModule:
        """All students at once, from the teacher's stored outputs; placed."""
        module = models.MLP((*self.config.student, self.classes))
        trial = {name: values[0] for name, values in self.trials.items()}
        optimizer = self.make_optimizer(trial)
        arm = study.Arm(module, make_objective(trial), optimizer, "teacher")
        examples = dict(self.examples(arm, 0))
        every = {**examples, "mask": np.ones(len(examples["labels"]), np.float32)}
        logits = jax.jit(lambda teacher, batch: teacher(batch).logits)(teacher, every)
        examples["teacher"] = {"logits": np.asarray(logits)[:, None]}
        validation = self.evaluator("validation")

        def evaluate(students):
            return {"best_accuracy": max(c["accuracy"] for c in validation(students))}

        return sweep.train(
            self.trials,
            module,
            make_objective,
            self.make_optimizer,
            partitioner=self.partitioner,
            run_dir=self.run_dir,
            name="students",
            examples=examples,
            batches=self.batches,
            steps=self.steps,
            teacher=teachers.StoredTeacher(),
            evaluate=evaluate,
            evaluations=self.config.evaluations,
            progress=self.config.progress,
        )

    def make_optimizer(self, trial: sweep.Trial) -> optax.GradientTransformation:
        """Adam at the trial's rate, which a cosine brings to nothing."""
        decay = optax.cosine_decay_schedule(1.0, self.steps)
        return optax.adam(lambda count: trial["learning_rate"] * decay(count))


def make_objective(trial: sweep.Trial) -> Objective:
    """Labels and soft targets at the trial's weights and temperature."""
    soft = objectives.soft_targets(temperature=trial["temperature"])
    return objectives.combine(
        {
            "hard": (1 - trial["soft_weight"], objectives.hard_labels()),
            "soft": (trial["soft_weight"], soft),
        }
    )


if __name__ == "__main__":
    main()
