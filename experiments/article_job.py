# SPDX-License-Identifier: Apache-2.0
"""The articles' job, as compare_pytorch puts it to PyTorch and to us."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxdistill import convert, data, models, parallel, teachers
from jaxdistill.loop import fit
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.runs import environment
from jaxdistill.steps import init_state, make_train_step, scan_train
from jaxdistill.types import TrainState


@dataclass(frozen=True)
class Config:
    """Compare with PyTorch: step by step, in seconds, in test accuracy."""

    part: Literal["parity", "speed", "accuracy", "all"] = "all"
    """what to run"""
    smoke: bool = False
    """everything in seconds, on the shipped digits with small networks"""
    data: Literal["digits", "mnist"] = "mnist"
    """digits is shipped; mnist comes from --data-dir or TFDS"""
    data_dir: Path | None = None
    """a folder of original IDX files, or TFDS's data folder"""
    run_dir: str = "runs/compare_pytorch"
    """where the results are kept"""
    save: Path | None = None
    """also copy the small files there, as experiments/results/compare_pytorch"""
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
    parity_steps: int = 200
    """steps taken side by side"""
    rounds: int = 5
    """epochs timed of each loop, after one that is not counted"""
    threads: int = 2
    """cores for either side"""
    compile: bool = True
    """also time torch.compile"""
    seeds: int = 5
    """trainings of each side whose accuracy is compared"""
    progress: bool = True
    """show progress bars"""


def baseline():
    """The PyTorch side.

    Raises:
      ValueError: PyTorch is not installed.
    """
    try:
        from experiments import pytorch_baseline
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ValueError(
            "comparing with PyTorch needs it: pip install 'jaxdistill[torch]'"
        ) from error
    return pytorch_baseline


class Task:
    """The article's job, as both sides need it."""

    def __init__(self, config: Config):
        self.config = config
        baseline().torch.set_num_threads(config.threads)
        self.source = data.load(config.data, config.data_dir)
        self.train, self.test = (
            self._examples(split) for split in (self.source.train, self.source.test)
        )
        self.run = parallel.choose("jit")
        self.placed = self.run.place(self.train)
        self.optimizer = optax.adam(config.learning_rate)
        self.modules = {
            "teacher": models.MLP((*config.teacher, self.source.num_classes)),
            "student": models.MLP((*config.student, self.source.num_classes)),
        }
        self.loss = baseline().make_loss(
            config.temperature, config.hard_weight, config.soft_weight
        )
        soft = soft_targets(temperature=config.temperature)
        both = {
            "hard": (config.hard_weight, hard_labels()),
            "soft": (config.soft_weight, soft),
        }
        self.objectives = {
            "teacher": combine({"hard": (1.0, hard_labels())}),
            "student": combine(both),
        }
        self._steps: dict[str, Callable] = {}
        self._taught: dict[int, Any] = {}

    def fresh(self, name: str, seed: int) -> TrainState:
        """The state a training starts from."""
        first = {key: value[:1] for key, value in self.train.items()}
        example = {**first, "mask": np.ones(1, np.float32)}
        student = models.student(self.modules[name])
        return init_state(jax.random.key(seed), student, self.optimizer, example)

    def step(self, name: str) -> Callable:
        """Many steps of a training in one dispatch."""
        if name not in self._steps:
            student = models.student(self.modules[name])
            step = make_train_step(student, self.objectives[name], self.optimizer)
            self._steps[name] = self.run.compile(scan_train(step), batch_axis=1)
        return self._steps[name]

    def batches(self, seed: int) -> data.Batches:
        """Our order of the examples."""
        return data.Batches(
            len(self.train["labels"]), self.config.batch_size, seed=seed
        )

    def fit(self, name: str, seed: int, teacher=None) -> Any:
        """Our training, start to end; the model's variables."""
        batches = self.batches(seed)
        state = fit(
            self.fresh(name, seed),
            self.step(name),
            run=self.run,
            examples=self.placed,
            batches=batches,
            steps=self.config.epochs * batches.steps_per_epoch,
            teacher=teacher,
            name=f"{name}-{seed}",
            progress=self.config.progress,
        )
        return jax.tree.map(np.asarray, {"params": state.params})

    def taught(self, seed: int) -> Any:
        """The variables of a teacher trained on the labels."""
        if seed not in self._taught:
            self._taught[seed] = self.fit("teacher", seed)
        return self._taught[seed]

    def epoch(self, taught: Any) -> Callable[[], float]:
        """A function that trains our student for an epoch in one dispatch."""
        step = self.step("student")
        teacher = self.run.place(self.teacher(taught))
        batches = self.batches(0)
        state, done = self.run.place(self.fresh("student", 0)), 0

        def epoch() -> float:
            nonlocal state, done
            stop = done + batches.steps_per_epoch
            rows = self.run.split(batches.rows(done, stop), 1)
            state, metrics = step(state, (teacher, self.placed), rows)
            done = stop
            return float(np.asarray(metrics["loss"][0]).mean())

        return epoch

    def teacher(self, taught: Any) -> teachers.Live:
        """A live teacher, not placed."""
        return teachers.live(self.modules["teacher"], taught)

    def torch_module(self, name: str, variables: Any = None):
        """The same network in PyTorch, with these weights or those it draws."""
        widths = (self.train["inputs"].shape[1], *self.modules[name].features)
        module = baseline().mlp(widths)
        if variables is None:
            return module
        weights = convert.to_torch(variables, module.state_dict())
        return baseline().load(module, weights)

    def _examples(self, split) -> dict[str, np.ndarray]:
        examples = self.source.inputs(split)
        flat = examples["inputs"].reshape(len(examples["inputs"]), -1)
        return {**examples, "inputs": flat}


def machine(torch_version: str, threads: int) -> dict[str, Any]:
    """What a part's numbers depend on; parts may come from different days."""
    env = environment()
    return {
        "time": env["time"],
        "commit": env["commit"],
        "jax": env["versions"]["jax"],
        "torch": torch_version,
        "cpu": _processor(),
        "threads": threads,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
