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

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from jaxdistill import data, models, objectives, parallel, study, teachers, train
from jaxdistill.report import figures
from jaxdistill.study import script, sweep
from jaxdistill.types import Objective


@dataclass(frozen=True)
class Config(script.SharedFlags):
    """Train a student with every setting of a grid and several seeds, all at once."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
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
    script.show(task.run_dir)
    return summary


class Task:
    """The data, the grid, and how teacher and students train."""

    def __init__(self, config: Config):
        self.config = config
        source = data.load(config.data, config.data_dir)
        train_split, test, held = source.splits(config.validation)
        self.examples = study.few_labels(train_split, config.labels)
        self.splits = {"validation": held, "test": test}
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
        widths = (*config.teacher, source.num_classes)
        self.arm = study.Arm(
            models.MLP(widths, dropout=config.teacher_dropout),
            objectives.combine({"hard": (1.0, objectives.hard_labels())}),
            self.adam(1e-3),
        )
        self.student = models.MLP((*config.student, source.num_classes))

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
            test=self.splits["test"],
            steps=self.steps,
            batch_size=config.batch_size,
            progress=config.progress,
        )
        return experiment.train("teacher", self.arm, 0)

    def train_students(self, teacher: models.BoundModule) -> models.BoundModule:
        """All students at once, from the teacher's stored outputs; placed."""
        shown = self.examples(self.arm._replace(teacher="teacher"), 0)
        examples = jax.device_get(teachers.with_logits(teacher, shown))
        validation = self.evaluator("validation")

        def evaluate(students):
            return {"best_accuracy": max(c["accuracy"] for c in validation(students))}

        return sweep.train(
            self.trials,
            self.student,
            make_objective,
            lambda trial: self.adam(trial["learning_rate"]),
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

    def adam(self, rate: Any) -> optax.GradientTransformation:
        """Adam at a rate, which a cosine brings to nothing."""
        return optax.adam(optax.cosine_decay_schedule(rate, self.steps))


def make_objective(trial: sweep.Trial) -> Objective:
    """Labels and soft targets at the trial's weights and temperature."""
    return objectives.hinton(trial["temperature"], trial["soft_weight"])


main = script.command(execute, {"": Config()}, __doc__, before=sweep.use_cores)

if __name__ == "__main__":
    main()
