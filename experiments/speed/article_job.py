# SPDX-License-Identifier: Apache-2.0
"""The articles' job, as the scripts put it to others and to us."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from experiments.speed.parts import baseline_module
from jaxdistill import data, models, objectives, parallel, pretrained, teachers, train
from jaxdistill.types import Objective, TrainState


@dataclass(frozen=True)
class Job:
    """The job's numbers; a script's configuration adds its own."""

    smoke: bool = False
    """everything in seconds, on the shipped digits with small networks"""
    data: Literal["digits", "mnist"] = "mnist"
    """digits is shipped; mnist comes from --data-dir or TFDS"""
    data_dir: str | None = None
    """a folder of original IDX files, or TFDS's data folder"""
    teacher: tuple[int, ...] = (512, 256)
    """hidden widths of the teacher"""
    student: tuple[int, ...] = (128, 64)
    """hidden widths of the student"""
    batch_size: int = 64
    """examples in a batch"""
    learning_rate: float = 1e-3
    """Adam's rate"""
    temperature: float = 2.0
    """softens both distributions"""
    hard_weight: float = 0.7
    """weight of the cross-entropy with labels"""
    soft_weight: float = 0.3
    """weight of the KL to the teacher, times temperature squared"""
    epochs: int = 10
    """passes over the training images, the teacher's and the students'"""
    threads: int = 2
    """cores for either side"""
    save: Path | None = None
    """also copy the small files there, below experiments/results"""
    progress: bool = True
    """show progress bars"""

    def objective(self) -> Objective:
        """What the student learns."""
        return objectives.hinton(self.temperature, self.soft_weight, self.hard_weight)


def baseline():
    """The PyTorch side.

    Raises:
      ValueError: PyTorch is not installed.
    """
    needed = "comparing with PyTorch needs it: pip install 'jaxdistill[torch]'"
    return baseline_module("pytorch_mlp", ("torch",), needed)


class Task:
    """The article's job, as both sides need it."""

    def __init__(self, config: Job):
        self.config: Any = config  # a script's own, with flags of its own
        self.source = data.load(config.data, config.data_dir)
        self.train, self.test = map(_flat, self.source.splits(None)[:2])
        self.partitioner = parallel.choose("jit")
        self.placed = self.partitioner.replicate(self.train)
        self.optimizer = optax.adam(config.learning_rate)
        self.modules = {
            "teacher": models.MLP((*config.teacher, self.source.num_classes)),
            "student": models.MLP((*config.student, self.source.num_classes)),
        }
        self.objectives = {
            "teacher": objectives.combine({"hard": (1.0, objectives.hard_labels())}),
            "student": config.objective(),
        }
        self.step = cache(self._step)
        self.teacher_variables = cache(self._teacher_variables)

    def fresh(self, name: str, seed: int) -> TrainState:
        """The state a training starts from."""
        student = models.student(self.modules[name])
        return train.init_state(
            jax.random.key(seed), student, self.optimizer, self.first()
        )

    def first(self) -> dict[str, np.ndarray]:
        """A batch of the first example, for shapes."""
        first = {key: value[:1] for key, value in self.train.items()}
        return {**first, "mask": np.ones(1, np.float32)}

    def _step(self, name: str) -> Callable:
        """Many steps of a training in one dispatch."""
        student = models.student(self.modules[name])
        step = train.make_train_step(student, self.objectives[name], self.optimizer)
        return self.partitioner.compile(train.scan_train(step), batch_axis=1)

    def batches(self, seed: int) -> data.Batches:
        """Our order of the examples."""
        return data.Batches(
            len(self.train["labels"]), self.config.batch_size, seed=seed
        )

    def fit(self, name: str, seed: int, teacher=None, checkpoints=None) -> TrainState:
        """Our training, start to end."""
        batches = self.batches(seed)
        steps = self.config.epochs * batches.steps_per_epoch
        if self.config.smoke and teacher is not None:
            teacher = teachers.control(teacher)  # nobody knows anything yet
        return train.fit(
            self.fresh(name, seed),
            self.step(name),
            partitioner=self.partitioner,
            examples=self.placed,
            batches=batches,
            steps=steps,
            teacher=teacher,
            checkpoints=checkpoints,
            checkpoint_every=steps,
            name=f"{name}-{seed}",
            progress=self.config.progress,
        )

    def _teacher_variables(self, seed: int) -> Any:
        """The variables of a teacher trained on the labels."""
        return _variables(self.fit("teacher", seed))

    def teacher(self, variables: Any) -> models.BoundModule:
        """A live teacher, not placed."""
        return teachers.live(self.modules["teacher"], variables)

    def torch_loss(self) -> Callable:
        """The student's loss in PyTorch."""
        config = self.config
        return baseline().make_loss(
            config.temperature, config.hard_weight, config.soft_weight
        )

    def torch_module(self, name: str, variables: Any = None):
        """The same network in PyTorch, with these weights or those it draws."""
        module = baseline().mlp(self._widths(name))
        if variables is None:
            return module
        return baseline().load(module, self.torch_weights(name, variables))

    def torch_weights(self, name: str, variables: Any) -> dict[str, np.ndarray]:
        """The network's weights by their names in PyTorch, which need not be there."""
        like: dict[str, np.ndarray] = {}
        for i, (inputs, outputs) in enumerate(pairwise(self._widths(name))):
            like[f"{2 * i + 1}.weight"] = np.empty((outputs, inputs))
            like[f"{2 * i + 1}.bias"] = np.empty(outputs)
        return pretrained.to_torch(variables, like)

    def drawn(self, name: str) -> Any:
        """A network's variables before any training."""
        return _variables(self.fresh(name, 0))

    def _widths(self, name: str) -> tuple[int, ...]:
        return (self.train["inputs"].shape[1], *self.modules[name].features)


def _flat(examples: Any) -> dict[str, np.ndarray]:
    inputs = examples["inputs"]
    return {**examples, "inputs": inputs.reshape(len(inputs), -1)}


def _variables(state: TrainState) -> Any:
    return jax.tree.map(np.asarray, {"params": state.params})
