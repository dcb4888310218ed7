# SPDX-License-Identifier: Apache-2.0
"""Trainings on one task, of the same size, each compiled once, in one resumable run.

study = Study(run, log, examples=..., steps=..., batch_size=..., test=...)
teacher = study.train("teacher", Row(...), seed=0)
student = study.train("distilled", Row(...), 0, study.run.place(teacher))

`study.compare` makes a table of them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill.data import (
    Batches,
    Orders,
    check_inputs,
    check_labels,
    tokens,
)
from jaxdistill.models import apply, student
from jaxdistill.models.apply import Precision
from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.study import sweep
from jaxdistill.study.arm import Arm
from jaxdistill.study.stores import TeacherStores
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.evaluation import Evaluator
from jaxdistill.train.loop import fit, interval
from jaxdistill.train.run_dir import RunDir, RunError
from jaxdistill.train.step import init_state, make_train_step, scan_train
from jaxdistill.types import TrainState


class Study:
    """Trains rows on one task, in steps of the same size."""

    def __init__(
        self,
        run: Partitioner,
        log: RunDir,
        *,
        examples: Callable[[Arm, int], Mapping[str, np.ndarray]],
        steps: int,
        batch_size: int,
        test: Callable[[Any, Any], Mapping[str, Any]],
        validation: Evaluator | None = None,
        evaluations: int = 10,
        stored: bool = False,
        precision: Precision = "float32",
        together: bool = False,
        trim_to: Sequence[int] = (),
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
          validation: evaluates along the way, or never.
          evaluations: records, checkpoints and validations of a training, about so
            many (`train.interval`).
          stored: compute a live teacher's outputs once, below the run directory, for
            rows without augmentation, whose steps are bit-equal to live ones, and for
            those with `views`.
          precision: what the steps compute in, see `models.Precision`.
          together: train all seeds of a row in one program (`study.sweep`), divided
            over all devices of this process; `run` then is `parallel.jit()`.
          trim_to: lengths in tokens: texts of like length train together, and a batch
            is cut to the shortest of these that holds it (`train.make_train_step`). A
            teacher's stored outputs then are of texts, not of tokens, and a live one's
            but for rounding. An `Evaluator` cuts by its own.
          progress: whether to show bars.
        """
        run.check_batch(batch_size)
        if together and trim_to:
            raise ValueError(
                "together and trim_to exclude each other: all lengths would be computed"
            )
        self.run, self.log, self.steps = run, log, steps
        self.examples, self.batch_size = examples, batch_size
        self.test, self.validation = test, validation
        self.evaluations, self.progress = evaluations, progress
        self.stored, self.together = stored, together
        self.trim_to = tuple(trim_to)
        self.dtype = None if precision == "float32" else precision
        self._lessons = TeacherStores(
            run, log.path / "outputs", self.dtype, self.trim_to, progress
        )
        self._compiled: dict[Arm, Callable] = {}
        self._placed: tuple[Any, Any] = (None, None)

    def train(
        self, name: str, row: Arm, seed: int, teacher: Any = None
    ) -> apply.BoundModule:
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
        examples, fetched = self._checked(row, seed), self.run.fetch(teacher)
        fresh = self.fresh(row, seed, fetched)
        taught_by = None if teacher is None else fingerprints.of_tree(fetched)
        steps = self._steps(row)
        self._refuse(name, f"{name}-{seed}", "seeds")
        checkpoints = Checkpoints(
            self.log.path / "checkpoints" / f"{name}-{seed}",
            identity={
                "name": name,
                "seed": seed,
                "teacher": taught_by,
                "steps": steps,
                "objective": fingerprints.described(row.objective),
                "views": row.replays(self.stored),
                **row.unusual(self.stored),
                **({"trim_to": list(self.trim_to)} if self.trim_to else {}),
            },
            best=self._best,
        )
        examples, lesson = self.lesson(row, examples, teacher)
        validation = self.validation
        state = fit(
            fresh,
            self.compile(row),
            run=self.run,
            examples=self.place(examples),
            batches=self.batches(examples, seed),
            steps=steps,
            teacher=lesson,
            evaluate=validation
            and (lambda state: validation(apply.trained(row.module, state), teacher)),
            evaluate_every=interval(steps, self.evaluations),
            checkpoints=checkpoints,
            log=self.log,
            name=f"{name}-{seed}",
            progress=self.progress,
        )
        checkpoints.close()
        return apply.trained(row.module, state)

    def train_together(
        self, name: str, row: Arm, seeds: Sequence[int], taught_by: Sequence[Any]
    ) -> list[apply.BoundModule]:
        """A row's trainings for some seeds in one program, each as `train` gives it.

        Args:
          name: likewise.
          row: likewise; not one with a `start` of its own.
          seeds: one for each training.
          taught_by: a placed teacher or None, one for each seed.

        Raises:
          ValueError: the row has a `start` of its own.
        """
        if row.start is not None:
            raise ValueError(f"{name} has a start of its own: its seeds train apart")
        self._refuse(f"{name}-{seeds[0]}", name, "jit, mesh, fsdp or pmap")
        cells = {"seed": np.array(seeds, np.int32)}
        given = (
            self.lesson(row, self._checked(row, seed), teacher)
            for seed, teacher in zip(seeds, taught_by, strict=True)
        )
        examples, lessons = zip(*given, strict=True)
        shown, validation = [f"{name}-{seed}" for seed in seeds], self.validation

        def judge(students):
            assert validation is not None
            return [
                validation(self.run.place(sweep.select_trial(students, i)), teacher)
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
            steps=self._steps(row),
            teacher=sweep.stack(lessons),
            names=shown,
            evaluate=judge if validation else None,
            evaluations=self.evaluations,
            best=self._best,
            progress=self.progress,
            dtype=self.dtype,
            **row.options(self.stored),
        )
        students = jax.device_get(students)
        return [sweep.select_trial(students, i) for i in range(len(seeds))]

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

    def _checked(self, row: Arm, seed: int) -> Mapping[str, np.ndarray]:
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

    def lesson(self, row: Arm, examples, teacher: Any) -> tuple[Any, Any]:
        """Examples and a teacher as the step has them: live, or its stored outputs.

        Raises:
          ValueError: the row has views or `top_k`, but nothing that can be stored so.
        """
        if not row.learns_from_disk(teacher, self.stored):
            return examples, teacher
        size = self.batch_size // row.micro_batches
        options: dict[str, Any] = {"top_k": row.top_k}
        if views := row.replays(self.stored):
            options |= {"prepare": row.prepare, "views": views}
        return self._lessons.of(examples, teacher, size, **options), StoredTeacher()

    def _steps(self, row: Arm) -> int:
        return self.steps if row.steps is None else row.steps

    def fresh(self, row: Arm, seed: int, teacher: Any = None) -> TrainState:
        """The row's state before its first step.

        Args:
          row: its teacher is not looked at.
          seed: of the weights that are drawn.
          teacher: a model, for rows that start from one.
        """
        state = self._drawn(row, seed)
        return state if row.start is None else row.start(state, teacher, seed)

    def _drawn(self, row: Arm, seed: int) -> TrainState:
        rng, example = jax.random.key(seed), self.example(row, seed)
        return init_state(rng, student(row.module), row.optimizer, example)

    def forget(self, row: Arm) -> None:
        """Drops a row's compiled program: of many, a process has no room for all."""
        self._compiled.pop(row, None)

    def example(self, row: Arm, seed: int) -> dict[str, Any]:
        """A batch of a training's first example, without its stored outputs."""
        first = jax.tree.map(lambda x: x[:1], dict(self.examples(row, seed)))
        return {**first, "mask": np.ones(1, np.float32)}

    def _classes(self, row: Arm, seed: int) -> int:
        def logits(batch):
            model = apply.trained(row.module, self._drawn(row, seed))
            return model(batch).logits

        return jax.eval_shape(logits, self.example(row, seed)).shape[-1]

    def compile(self, row: Arm) -> Callable:
        """A row's training step, over many steps and on this run's devices."""
        if row not in self._compiled:
            step = make_train_step(
                student(row.module),
                row.objective,
                row.optimizer,
                dtype=self.dtype,
                trim_to=self.trim_to,
                **row.options(self.stored),
            )
            self._compiled[row] = self.run.compile(scan_train(step), batch_axis=1)
        return self._compiled[row]

    def batches(self, examples: Mapping[str, Any], seed: int = 0) -> Batches:
        """A training's order of examples, see `Batches`."""
        lengths = None
        if self.trim_to:
            mask = np.asarray(tokens.attention_mask_of(examples["inputs"]))
            lengths = tuple(tokens.real_lengths(mask).tolist())
        return Batches(len(examples["labels"]), self.batch_size, seed, lengths)

    def place(self, examples: Mapping[str, np.ndarray]) -> Any:
        """Examples on all devices; the last ones stay there."""
        if self._placed[0] is not examples:
            self._placed = (examples, self.run.replicate(dict(examples)))
        return self._placed[1]
