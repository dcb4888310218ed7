# SPDX-License-Identifier: Apache-2.0
"""A table of trainings: rows by seeds, compiled once a row, in one resumable run.

study = Study(run, log, examples=..., steps=..., batch_size=..., test=...)
summary = study.compare({"teacher": Row(...), "scratch": Row(...),
                         "distilled": Row(..., teacher="teacher")}, seeds=5)
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxdistill import benchmark, processes, report, saved, teachers
from jaxdistill.checkpoint import CheckpointError, Checkpoints
from jaxdistill.data import Batches, check_labels
from jaxdistill.evaluate import Evaluator
from jaxdistill.lessons import Lessons
from jaxdistill.loop import NonFiniteLoss, fit
from jaxdistill.models import student
from jaxdistill.parallel import Parallel
from jaxdistill.precision import Precision
from jaxdistill.runs import Run, RunError
from jaxdistill.steps import init_state, make_train_step, scan_train
from jaxdistill.types import Batch, Objective, TrainState

FAILURES = (RunError, CheckpointError, NonFiniteLoss, ValueError)
"""What a script ends with in one sentence: its message says what to do."""


class Row(NamedTuple):
    """One line of a table: a network, what it learns, and from whom.

    Attributes:
      module: the linen module that is trained.
      objective: see `objectives.combine`.
      optimizer: an optax transformation.
      teacher: the row whose trained model teaches this one, or None.
      prepare: augmentation, see `steps.make_train_step`.
      micro_batches: see `steps.make_train_step`.
      steps: optimizer steps, or None for as many as the study's.
    """

    module: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    teacher: str | None = None
    prepare: Callable[[Batch, jax.Array], Batch] | None = None
    micro_batches: int = 1
    steps: int | None = None


class Study:
    """Trains rows on one task, in steps of the same size."""

    def __init__(
        self,
        run: Parallel,
        log: Run,
        *,
        examples: Callable[[Row, int], Mapping[str, np.ndarray]],
        steps: int,
        batch_size: int,
        test: Callable[[Any, Any], Mapping[str, Any]],
        validation: Evaluator | None = None,
        evaluations: int = 10,
        stored: bool = False,
        precision: Precision = "float32",
        progress: bool = True,
    ):
        """Everything the trainings share.

        Args:
          run: see `parallel`.
          log: the run directory.
          examples: `(row, seed) -> arrays` to train on. The same object returned twice
            is placed on the devices once.
          steps: optimizer steps of a training, unless its row says otherwise.
          batch_size: examples in a batch, over all devices.
          test: evaluates once, the last state, as an `Evaluator` does.
          validation: evaluates `evaluations` times along the way, or never.
          evaluations: records, checkpoints and validations of a training.
          stored: compute a live teacher's outputs once, below the run directory, for
            rows without augmentation; their steps are bit-equal to live ones.
          precision: what the steps compute in, see `precision`.
          progress: whether to show bars.
        """
        run.check_batch(batch_size)
        self.run, self.log, self.steps = run, log, steps
        self.examples, self.batch_size = examples, batch_size
        self.test, self.validation = test, validation
        self.evaluations, self.progress = evaluations, progress
        self.stored = stored
        self.dtype = None if precision == "float32" else precision
        self._lessons = Lessons(run, log.path / "outputs", self.dtype, progress)
        self._compiled: dict[Row, Callable] = {}
        self._costs: dict[nn.Module, dict[str, float]] = {}
        self._placed: tuple[Any, Any] = (None, None)

    def compare(
        self,
        rows: Mapping[str, Row],
        seeds: int,
        *,
        given: Callable[[int], Mapping[str, Any]] = lambda seed: {},
        pairs: Mapping[str, Sequence[str]] | None = None,
        timed_steps: int = 0,
    ) -> dict[str, Any]:
        """Trains all rows for all seeds and writes the run's summary.

        Args:
          rows: in the order they train, "teacher" among them, before its students.
          seeds: each draws its own weights and batches.
          given: `seed -> {name: placed teacher}`, teachers that are not rows and have
            other names.
          pairs: `{row: rows it is compared with}`; None compares "distilled" with
            all but the teacher.
          timed_steps: measure milliseconds per step on so many, if any.

        Returns:
          The summary (`report.summarize`), with each training's digest.
        """
        results: dict[str, list] = {name: [] for name in rows}
        costs, digests = {}, {}
        for seed in range(seeds):
            trained = dict(given(seed))
            if both := sorted({*trained} & {*rows}):
                raise ValueError(f"{both} are rows, and given teachers as well")
            for name, row in rows.items():
                teacher = None if row.teacher is None else trained[row.teacher]
                model = self.train(name, row, seed, teacher)
                trained[name] = self.run.place(model)
                results[name].append(self.test(trained[name], trained["teacher"]))
                digests[f"{name}-{seed}"] = teachers.digest(model.variables)
                if seed == 0:
                    costs[name] = dict(self._cost(model, self._example(row, seed)))
                    saved.save_model(self.log, name, model)
        if timed_steps:
            for name, ms in self._step_ms(rows, trained, timed_steps).items():
                costs[name]["step_ms"] = ms
        if pairs is None:
            others = [name for name in rows if name not in ("teacher", "distilled")]
            pairs = {"distilled": others}
        summary = report.summarize(results, costs, pairs)
        self.log.write("summary.json", {**summary, "digests": digests})
        return {**summary, "digests": digests}

    def train(
        self, name: str, row: Row, seed: int, teacher: Any = None
    ) -> teachers.Live:
        """One training, resumed from its checkpoints; a live model, not placed.

        Args:
          name: in logs and the checkpoint folder, with the seed.
          row: what to train; `row.teacher` is not looked at.
          seed: of the weights and the batches.
          teacher: a placed teacher, or None.

        Raises:
          DataError: a label is not one of the module's classes.
        """
        examples = self.examples(row, seed)
        processes.check_examples(len(examples["labels"]))
        fresh = self.fresh(row, seed)
        check_labels(examples["labels"], self._classes(row, seed, fresh))
        taught_by = (
            None if teacher is None else teachers.digest(self.run.fetch(teacher))
        )
        checkpoints = Checkpoints(
            self.log.path / "checkpoints" / f"{name}-{seed}",
            identity={"name": name, "seed": seed, "teacher": taught_by},
            best="accuracy" if self.validation else None,
        )
        validation, lesson = self.validation, teacher
        steps = row.steps or self.steps
        if self.stored and row.prepare is None and isinstance(teacher, teachers.Live):
            size = self.batch_size // row.micro_batches
            examples = self._lessons.of(examples, teacher, size)
            lesson = teachers.Stored()
        state = fit(
            fresh,
            self._compile(row),
            run=self.run,
            examples=self._place(examples),
            batches=Batches(len(examples["labels"]), self.batch_size, seed),
            steps=steps,
            teacher=lesson,
            evaluate=validation
            and (
                lambda state: validation(teachers.trained(row.module, state), teacher)
            ),
            evaluate_every=-(-steps // self.evaluations),
            checkpoints=checkpoints,
            log=self.log,
            name=f"{name}-{seed}",
            progress=self.progress,
        )
        checkpoints.close()
        return teachers.trained(row.module, state)

    def fresh(self, row: Row, seed: int) -> TrainState:
        """The row's state before its first step."""
        example = self._example(row, seed)
        return init_state(
            jax.random.key(seed), student(row.module), row.optimizer, example
        )

    def forget(self, row: Row) -> None:
        """Drops a row's compiled program: of many, a process has no room for all."""
        self._compiled.pop(row, None)

    def _cost(self, model: teachers.Live, example: Batch) -> dict[str, float]:
        """What a model costs; measured once for rows that are one network."""
        if model.module not in self._costs:
            self._costs[model.module] = benchmark.cost(model, example)
        return self._costs[model.module]

    def _step_ms(self, rows, trained, steps: int) -> dict[str, float]:
        """Milliseconds per training step of each row, in turns on an idle machine."""

        def job(name, row):
            examples = self.examples(row, 0)
            batches = Batches(len(examples["labels"]), self.batch_size)
            index = self.run.split(batches.rows(0, steps), 1)
            resident = (trained.get(row.teacher), self._place(examples))
            state = self.run.place(self.fresh(row, 0))

            def steps_on():
                nonlocal state
                state, metrics = self._compile(row)(state, resident, index)
                jax.block_until_ready(metrics)

            return steps_on

        jobs = {name: job(name, row) for name, row in rows.items()}
        times = benchmark.interleave(jobs, rounds=5)
        return {name: 1e3 * statistics.median(t) / steps for name, t in times.items()}

    def _example(self, row: Row, seed: int) -> dict[str, np.ndarray]:
        first = {key: value[:1] for key, value in self.examples(row, seed).items()}
        return {**first, "mask": np.ones(1, np.float32)}

    def _classes(self, row: Row, seed: int, state: TrainState) -> int:
        model = teachers.trained(row.module, state)
        return jax.eval_shape(model, self._example(row, seed)).logits.shape[-1]

    def _compile(self, row: Row) -> Callable:
        if row not in self._compiled:
            step = make_train_step(
                student(row.module),
                row.objective,
                row.optimizer,
                prepare=row.prepare,
                micro_batches=row.micro_batches,
                dtype=self.dtype,
            )
            self._compiled[row] = self.run.compile(scan_train(step), batch_axis=1)
        return self._compiled[row]

    def _place(self, examples: Mapping[str, np.ndarray]) -> Any:
        if self._placed[0] is not examples:
            self._placed = (examples, self.run.replicate(dict(examples)))
        return self._placed[1]


def few_labels(train: Mapping[str, np.ndarray], count: int | None):
    """Examples for a study in which only `count` labels may be used, by anyone.

    Args:
      train: `inputs` and `labels` of all training examples.
      count: how many labels are known; None is all.

    Returns:
      `(row, seed) -> examples`, other labels for every seed. Who has no teacher gets
      the labelled examples alone; a student of one gets all, with `labelled` marking
      those whose label it may use, because soft targets need none.
    """
    size = len(train["labels"])
    if count is None or count >= size:
        return lambda row, seed: train

    @lru_cache(maxsize=2)
    def choose(seed: int, taught: bool):
        chosen = np.sort(np.random.default_rng([seed, 1]).permutation(size)[:count])
        known = np.isin(np.arange(size), chosen).astype(np.float32)
        examples = {**train, "labelled": known}
        return examples if taught else {k: v[chosen] for k, v in examples.items()}

    return lambda row, seed: choose(seed, row.teacher is not None)
