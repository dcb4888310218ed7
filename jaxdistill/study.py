# SPDX-License-Identifier: Apache-2.0
"""A table of trainings: rows by seeds, compiled once a row, in one resumable run.

study = Study(run, log, examples=..., steps=..., batch_size=..., test=...)
summary = study.compare({"teacher": Row(...), "scratch": Row(...),
                         "distilled": Row(..., teacher="teacher")}, seeds=5)
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxdistill import benchmark, processes, report, saved, sweep, teachers
from jaxdistill.checkpoint import CheckpointError, Checkpoints
from jaxdistill.data import Batches, Orders, check_inputs, check_labels
from jaxdistill.evaluate import Evaluator
from jaxdistill.journal import NonFiniteLoss
from jaxdistill.lessons import Lessons
from jaxdistill.loop import fit
from jaxdistill.models import student
from jaxdistill.parallel import Parallel
from jaxdistill.precision import Precision
from jaxdistill.runs import Run, RunError
from jaxdistill.steps import init_state, make_train_step, scan_train
from jaxdistill.types import Batch, Objective, TrainState
from jaxdistill.views import replay

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
      views: of each example, shown again in place of ever new ones where the study
        stores a teacher's outputs (`views.replay`); 0 leaves the teacher live.
      micro_batches: see `steps.make_train_step`.
      steps: optimizer steps, or None for as many as the study's.
    """

    module: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    teacher: str | None = None
    prepare: Callable[[Batch, jax.Array], Batch] | None = None
    views: int = 0
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
        together: bool = False,
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
            rows without augmentation, whose steps are bit-equal to live ones, and for
            those with `views`.
          precision: what the steps compute in, see `precision`.
          together: train all seeds of a row in one program (`sweep`), divided over all
            devices of this process; `run` then is `parallel.jit()`.
          progress: whether to show bars.
        """
        run.check_batch(batch_size)
        self.run, self.log, self.steps = run, log, steps
        self.examples, self.batch_size = examples, batch_size
        self.test, self.validation = test, validation
        self.evaluations, self.progress = evaluations, progress
        self.stored, self.together = stored, together
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
        to: Run | None = None,
    ) -> dict[str, Any]:
        """Trains all rows for all seeds and writes the run's summary.

        Of seeds that train together the best checkpoint is that of their mean.

        Args:
          rows: in the order they train, "teacher" among them, before its students.
          seeds: each draws its own weights and batches.
          given: `seed -> {name: placed teacher}`, teachers that are not rows and have
            other names.
          pairs: `{row: rows it is compared with}`; None compares "distilled" with
            all but the teacher.
          timed_steps: measure milliseconds per step on so many, if any.
          to: where summary and models go, the study's own run directory if None.

        Returns:
          The summary (`report.summarize`), with each training's digest.
        """
        to = self.log if to is None else to
        results: dict[str, list] = {name: [] for name in rows}
        costs, digests = {}, {}
        groups = [range(seeds)] if self.together else [[seed] for seed in range(seeds)]
        for group in groups:
            trained = [dict(given(seed)) for seed in group]
            if both := sorted({*trained[0]} & {*rows}):
                raise ValueError(f"{both} are rows, and given teachers as well")
            for name, row in rows.items():
                taught_by = [
                    None if row.teacher is None else known[row.teacher]
                    for known in trained
                ]
                models = self._train_group(name, row, group, taught_by)
                for seed, known, model in zip(group, trained, models, strict=True):
                    known[name] = self.run.place(model)
                    results[name].append(self.test(known[name], known["teacher"]))
                    digests[f"{name}-{seed}"] = teachers.digest(model.variables)
                    if seed == 0:
                        costs[name] = dict(self._cost(model, self._example(row, seed)))
                        saved.save_model(to, name, model)
        if timed_steps:
            for name, ms in self._step_ms(rows, trained[-1], timed_steps).items():
                costs[name]["step_ms"] = ms
        if pairs is None:
            others = [name for name in rows if name not in ("teacher", "distilled")]
            pairs = {"distilled": others}
        summary = report.summarize(results, costs, pairs)
        to.write("summary.json", {**summary, "digests": digests})
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
          DataError: a label is not one of the module's classes, or a text is all
            padding.
        """
        fresh, examples = self.fresh(row, seed), self._checked(row, seed)
        taught_by = (
            None if teacher is None else teachers.digest(self.run.fetch(teacher))
        )
        steps = row.steps or self.steps
        self._refuse(name, f"{name}-{seed}", "seeds")
        checkpoints = Checkpoints(
            self.log.path / "checkpoints" / f"{name}-{seed}",
            identity={
                "name": name,
                "seed": seed,
                "teacher": taught_by,
                "steps": steps,
                "views": self._views(row),
            },
            best=self._best,
        )
        examples, lesson = self._lesson(row, examples, teacher)
        validation = self.validation
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

    def _train_group(
        self, name: str, row: Row, seeds: Sequence[int], taught_by: Sequence[Any]
    ) -> list[teachers.Live]:
        """A row's trainings for some seeds, each as `train` would give it."""
        if not self.together:
            one = partial(self.train, name, row)
            return [one(*pair) for pair in zip(seeds, taught_by, strict=True)]
        self._refuse(f"{name}-{seeds[0]}", name, "jit, mesh, fsdp or pmap")
        cells = {"seed": np.array(seeds, np.int32)}
        given = (
            self._lesson(row, self._checked(row, seed), teacher)
            for seed, teacher in zip(seeds, taught_by, strict=True)
        )
        examples, lessons = zip(*given, strict=True)
        shown, validation = [f"{name}-{seed}" for seed in seeds], self.validation

        def judge(students):
            assert validation is not None
            return [
                validation(self.run.place(sweep.cell(students, i)), teacher)
                for i, teacher in enumerate(taught_by)
            ]

        size = len(examples[0]["labels"])
        students = sweep.train(
            cells,
            row.module,
            lambda cell: row.objective,
            lambda cell: row.optimizer,
            run=sweep.choose(cells),
            log=self.log,
            name=name,
            examples=sweep.stack(examples),
            batches=Orders(tuple(Batches(size, self.batch_size, s) for s in seeds)),
            steps=row.steps or self.steps,
            teacher=sweep.stack(lessons),
            names=shown,
            evaluate=judge if validation else None,
            evaluations=self.evaluations,
            best=self._best,
            progress=self.progress,
            prepare=self._prepare(row),
            micro_batches=row.micro_batches,
            dtype=self.dtype,
        )
        students = jax.device_get(students)
        return [sweep.cell(students, i) for i in range(len(seeds))]

    def _refuse(self, other: str, name: str, division: str) -> None:
        """Raise RunError where the training is there as another division has it."""
        if (self.log.path / "checkpoints" / other).exists():
            raise RunError(
                f"{self.log.path} has checkpoints of {other}, and none of {name}: it "
                f"was begun with --parallel {division}; give that, or another --run-dir"
            )

    @property
    def _best(self) -> str | None:
        return "accuracy" if self.validation else None

    def _checked(self, row: Row, seed: int) -> Mapping[str, np.ndarray]:
        """A training's examples.

        Raises:
          DataError: a label is not one of the module's classes, or a text is all
            padding.
        """
        examples = self.examples(row, seed)
        processes.check_examples(len(examples["labels"]))
        check_inputs(examples["inputs"])
        check_labels(examples["labels"], self._classes(row, seed))
        return examples

    def _lesson(self, row: Row, examples, teacher: Any) -> tuple[Any, Any]:
        """Examples and a teacher as the step has them: live, or its stored outputs.

        Raises:
          ValueError: the row has views, but nothing of which to store them.
        """
        one = isinstance(teacher, teachers.Live | teachers.MeanLogits)
        views = self._views(row)
        if views and not (one and row.prepare):
            raise ValueError(
                "a row with views needs an augmentation and one teacher's logits; of "
                "several teachers teachers.mean_logits has them"
            )
        if not (self.stored and one and (row.prepare is None or views)):
            return examples, teacher
        size = self.batch_size // row.micro_batches
        seen: dict[str, Any] = {}
        if views:
            seen = {"prepare": row.prepare, "views": views}
        return self._lessons.of(examples, teacher, size, **seen), teachers.Stored()

    def _views(self, row: Row) -> int:
        return row.views if self.stored else 0

    def _prepare(self, row: Row) -> Any:
        """A row's augmentation; with stored views, the one that shows them again."""
        views = self._views(row)
        return replay(row.prepare, 0, views) if views and row.prepare else row.prepare

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
            teacher = None if row.teacher is None else trained[row.teacher]
            examples, lesson = self._lesson(row, self.examples(row, 0), teacher)
            batches = Batches(len(examples["labels"]), self.batch_size)
            index = self.run.split(batches.rows(0, steps), 1)
            resident = (lesson, self._place(examples))
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
        first = jax.tree.map(lambda x: x[:1], dict(self.examples(row, seed)))
        return {**first, "mask": np.ones(1, np.float32)}

    def _classes(self, row: Row, seed: int) -> int:
        def logits(batch):
            model = teachers.trained(row.module, self.fresh(row, seed))
            return model(batch).logits

        return jax.eval_shape(logits, self._example(row, seed)).shape[-1]

    def _compile(self, row: Row) -> Callable:
        if row not in self._compiled:
            step = make_train_step(
                student(row.module),
                row.objective,
                row.optimizer,
                prepare=self._prepare(row),
                micro_batches=row.micro_batches,
                dtype=self.dtype,
            )
            self._compiled[row] = self.run.compile(scan_train(step), batch_axis=1)
        return self._compiled[row]

    def _place(self, examples: Mapping[str, np.ndarray]) -> Any:
        if self._placed[0] is not examples:
            self._placed = (examples, self.run.replicate(dict(examples)))
        return self._placed[1]
