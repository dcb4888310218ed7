# SPDX-License-Identifier: Apache-2.0
"""Hinton's networks, how they train, and on which images: what the parts share."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from experiments.hinton.constraints import max_norm
from jaxdistill import data, models, objectives, parallel, study, teachers, train
from jaxdistill.data import Batches, augment
from jaxdistill.study import Arm, script, sweep

CHOICE_SEED = 1_000
"""The seed of what is chosen on the validation images: none of the final seeds."""


class Task:
    """The data, the networks and their trainings, as a configuration says."""

    def __init__(self, config: Any):
        self.config = config
        self.source = data.load(config.data, config.data_dir)
        self.examples: dict[str, Any] = {"train": self.source.splits(None)[0]}
        names = "fitted", "test", "validation"
        self.examples |= zip(names, self.source.splits(config.validation), strict=True)
        self.partitioner = parallel.choose("jit")
        self.jitter = augment.shift(config.jitter, self.source.background)
        # The same arm again is the same object: it compiles once.
        self.teacher_arm = cache(self._teacher_arm)

    def run_dir(self, part: str) -> train.RunDir:
        """The part's own run directory; it refuses other settings of this part."""
        mine = part.split("/")[0]
        free = ("part", *(f"{name}_" for name in PARTS if name != mine))
        flags = train.settings(self.config).items()
        kept = {name: value for name, value in flags if not name.startswith(free)}
        return train.RunDir(f"{self.config.run_dir}/{part}", kept)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Leaves a part's minutes in its folder, those before interruptions included.

        What a process did that was killed, not asked to end, is not among them. Where
        others use the machine, the processors' own time says more than the clock's.
        """
        clocks = {"clock": time.monotonic, "processors": time.process_time}
        run_dir = self.run_dir(part)
        began = {name: clock() for name, clock in clocks.items()}
        kept = run_dir.path / "minutes.json"
        spent = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        try:
            yield
        finally:
            for name, clock in clocks.items():
                spent[name] = spent.get(name, 0.0) + (clock() - began[name]) / 60
            run_dir.write("minutes.json", spent)
            said = (
                f"{spent['clock']:.0f} minutes on {os.cpu_count()} cores, which worked "
                f"{spent['processors']:.0f}.\n"
            )
            run_dir.write_bytes("minutes.md", said.encode())

    def study(self, part: str, split: str, **options: Any) -> study.Study:
        """A study of this part, on a split; on `fitted` it has the validation images.

        Its test tells the number of errors beside the other measures. Examples and
        batches may be others than the split's and the configuration's.
        """
        held = self.examples["validation"] if split == "fitted" else None
        usual = script.study_options(self.config, evaluations=5, stored=True)
        usual["test"] = Errors(self.partitioner, self.examples["test"])
        usual["steps"] = self.steps(self.config.epochs)
        usual |= {"examples": self.examples[split], "validation": held, **options}
        return study.Study(self.run_dir(part), partitioner=self.partitioner, **usual)

    def steps(self, epochs: int) -> int:
        """Optimizer steps of passes over all training images, in every part."""
        return script.steps_of(epochs, self.examples["train"], self.config.batch_size)

    def mlp(self, *widths: int, **options: Any) -> models.MLP:
        """A network on the images."""
        return models.MLP((*widths, self.source.num_classes), **options)

    def _teacher_arm(self, epochs: int | None = None) -> Arm:
        """The teacher: dropout, bounded weights, jittered images, the labels."""
        config = self.config
        module = self.mlp(
            *config.teacher, input_dropout=config.input_dropout, dropout=config.dropout
        )
        steps = self.steps(epochs or config.teacher_epochs)
        bounded = max_norm(config.max_norm)
        optimizer = optax.chain(adam(config.teacher_rate, steps), bounded)
        return Arm(module, labels(), optimizer, augment=self.jitter, steps=steps)

    def soft(self, temperature: Any, hard_weight: float | None = None):
        """Soft targets at a temperature, and the labels at their weight."""
        if hard_weight is None:
            hard_weight = self.config.hard_weight
        terms: dict[str, Any] = {
            "soft": (1.0, objectives.soft_targets(temperature=temperature))
        }
        if hard_weight:
            terms["hard"] = (hard_weight, objectives.hard_labels())
        return objectives.combine(terms)

    def with_outputs(self, teacher: Any, split: str, keep: np.ndarray | None = None):
        """Examples of a split with a teacher's logits; those at `keep`, or all."""
        examples = dict(self.examples[split])
        if keep is not None:
            examples = {name: values[keep] for name, values in examples.items()}
        logits = logits_of(teacher, examples)[:, None]
        return {**examples, "teacher": {"logits": logits}}

    def sweep(
        self,
        run_dir: train.RunDir,
        name: str,
        module: models.MLP,
        trials: Mapping[str, np.ndarray],
        examples: Mapping[str, Any],
        objective: Callable,
        epochs: int,
    ) -> models.BoundModule:
        """All trials at once; they have a `seed` and a `learning_rate`."""
        steps, second_moment = self.steps(epochs), self.config.second_moment
        return sweep.train(
            trials,
            module,
            objective,
            lambda trial: adam(trial["learning_rate"], steps, second_moment),
            run_dir=run_dir,
            name=name,
            untrained=self.config.smoke,
            examples=examples,
            batches=Batches(len(examples["labels"]), self.config.batch_size),
            steps=steps,
            teacher=teachers.StoredTeacher() if "teacher" in examples else None,
            progress=self.config.progress,
        )


class Errors:
    """An evaluator that also counts the errors."""

    def __init__(self, partitioner, examples: Mapping[str, np.ndarray]):
        self.evaluate = train.Evaluator(partitioner, examples)
        self.size = len(examples["labels"])

    def __call__(self, model: Any, teacher: Any = None) -> dict[str, Any]:
        found = self.evaluate(model, teacher)
        return {**found, "errors": round(self.size * (1 - found["accuracy"]))}


PARTS = ("triple", "temperature", "transfer", "beyond")


def labels(smoothing: float = 0.0):
    """The labels alone."""
    return objectives.combine(
        {"hard": (1.0, objectives.hard_labels(label_smoothing=smoothing))}
    )


def adam(
    rate: Any, steps: int, second_moment: float = 0.999
) -> optax.GradientTransformation:
    """Adam, its rate brought to nothing by a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=second_moment)


def logits_of(model: Any, examples: Mapping[str, np.ndarray], trials: bool = False):
    """A model's logits `[N, C]` on all examples, or `[trials, N, C]` of a sweep's."""
    parts = np.array_split(examples["inputs"], -(-len(examples["labels"]) // 1000))
    forward = _cell_logits if trials else _logits
    return np.concatenate([forward(model, part) for part in parts], axis=-2)


@jax.jit
def _logits(model, inputs):
    return model({"inputs": inputs, "mask": np.ones(len(inputs), np.float32)}).logits


@jax.jit
def _cell_logits(members, inputs):
    return jax.vmap(_logits, (0, None))(members, inputs)


def errors(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many are wrong, along the last axis of the guesses."""
    return (logits.argmax(-1) != labels).sum(-1)
