# SPDX-License-Identifier: Apache-2.0
"""Trainings on one task, of the same size, each compiled once, in one resumable run.

study = Study("runs/mine", examples=..., test=..., epochs=..., batch_size=...)
teacher = study.train("teacher", Arm(...), seed=0)
place = study.partitioner.place
student = study.train("distilled", Arm(...), 0, place(teacher))

`study.compare` makes a table of them.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxdistill.data import Batches, DataError, Orders, tokens
from jaxdistill.models import apply, student
from jaxdistill.models.apply import Precision
from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Partitioner, choose
from jaxdistill.study import sweep
from jaxdistill.study.arm import Arm
from jaxdistill.study.script import steps_of
from jaxdistill.study.stores import TeacherStores
from jaxdistill.teachers.knowledge import check_knowledge, control
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.evaluation import Evaluator
from jaxdistill.train.identity import Content, examine
from jaxdistill.train.intervals import interval
from jaxdistill.train.loop import fit
from jaxdistill.train.run_dir import RunDir, RunError
from jaxdistill.train.step import init_state, make_train_step, scan_train
from jaxdistill.types import TrainState

Arrays = Mapping[str, Any]
"""Examples: `inputs`, `labels` and what else a batch has, arrays of one length."""


class Study:
    """Trains arms on one task, in steps of the same size."""

    def __init__(
        self,
        run_dir: RunDir | str | os.PathLike,
        *,
        examples: Arrays | Callable[[Arm, int], Arrays],
        test: Any,
        batch_size: int,
        steps: int | None = None,
        epochs: int | None = None,
        validation: Any = None,
        partitioner: Partitioner | None = None,
        evaluations: int = 10,
        stored: bool = False,
        precision: Precision = "float32",
        together: bool = False,
        bucket_lengths: Sequence[int] = (),
        progress: bool = True,
        check_finite: bool = True,
        untrained: bool = False,
    ):
        """Everything the trainings share.

        Args:
          run_dir: the run directory, or where it is to be.
          examples: `inputs` and `labels` to train on, or `(arm, seed) -> arrays`. The
            same object returned twice is placed on the devices once.
          test: arrays on which the last state is evaluated once, or what evaluates it
            as an `Evaluator` does.
          batch_size: examples in a batch, over all devices.
          steps: optimizer steps of a training, unless its arm says otherwise.
          epochs: passes over the examples, in place of `steps`.
          validation: arrays or an `Evaluator` for evaluations along the way, or None.
          partitioner: how the steps run, see `parallel`; None is `choose("auto")`.
          evaluations: records, checkpoints and validations of a training, about so
            many (`train.interval`).
          stored: compute a live teacher's outputs once, below the run directory, for
            arms without augmentation, whose steps are bit-equal to live ones, and for
            those with `views`.
          precision: what the steps compute in, see `models.Precision`.
          together: train all seeds of an arm in one program (`study.sweep`), divided
            over all devices of this process; `partitioner` then is `parallel.jit()`.
          bucket_lengths: lengths in tokens: texts of like length train together, and a
            batch is cut to the shortest of these that holds it
            (`train.make_train_step`). A teacher's stored outputs then are of texts, not
            of tokens, and a live one's but for rounding. An `Evaluator` cuts by its
            own.
          progress: whether to show bars.
          check_finite: see `data.check_examples`.
          untrained: every teacher is a control that need not know the labels
            (`teachers.control`), as in a few steps that try a script.

        Raises:
          ValueError: not one of `steps` and `epochs`, or `epochs` where the examples
            depend on the arm.
        """
        partitioner = choose("auto") if partitioner is None else partitioner
        partitioner.check_batch(batch_size)
        if together and bucket_lengths:
            raise ValueError(
                "together and bucket_lengths exclude each other: all lengths would be "
                "computed"
            )
        self.steps = _steps(steps, epochs, examples, batch_size)
        if not isinstance(run_dir, RunDir):
            settings = {"steps": self.steps, "batch_size": batch_size}
            run_dir = RunDir(run_dir, {**settings, "precision": precision})
        self.partitioner, self.run_dir = partitioner, run_dir
        self.batch_size = batch_size
        self.examples = _by_arm(examples)
        evaluator = partial(Evaluator, partitioner, bucket_lengths=bucket_lengths)
        self.test: Callable[..., Any] = evaluator(test) if _arrays(test) else test
        self.validation: Evaluator | None = (
            evaluator(validation) if _arrays(validation) else validation
        )
        self.evaluations, self.progress = evaluations, progress
        self.check_finite, self._controls = check_finite, untrained
        self.stored, self.together = stored, together
        self.bucket_lengths = tuple(bucket_lengths)
        self.dtype = None if precision == "float32" else precision
        folder, cuts = run_dir.path / "outputs", self.bucket_lengths
        self._stores = TeacherStores(partitioner, folder, self.dtype, cuts, progress)
        self._compiled: dict[Arm, Callable] = {}
        self._placed: tuple[Any, Any] = ((None, None), None)

    def train(
        self, name: str, arm: Arm, seed: int, teacher: Any = None
    ) -> apply.BoundModule:
        """One training, resumed from its checkpoints; a live model, not placed.

        Args:
          name: in logs and the checkpoint folder, with the seed.
          arm: what to train; `arm.teacher` is not looked at.
          seed: of the weights and the batches.
          teacher: a placed teacher, or None.

        Raises:
          DataError: as `data.check_examples`.
          TeacherError: the teacher knows nothing of the labels, and is no control.
          CheckpointError: what is there is of another training (`train.identity`).
        """
        examples, content = self._checked(arm, seed)
        fresh = self.fresh(arm, seed, self.partitioner.fetch(teacher))
        steps = self.steps if arm.steps is None else arm.steps
        self._refuse(name, f"{name}-{seed}", "seeds")
        checkpoints = Checkpoints(
            self.run_dir.path / "checkpoints" / f"{name}-{seed}",
            identity={
                "name": name,
                "steps": steps,
                "settings": self.run_dir.settings,
            },
            best=self._best,
        )
        examples, step_teacher = self.with_teacher(arm, examples, teacher)
        validation = self.validation
        state = fit(
            fresh,
            self.compile(arm),
            partitioner=self.partitioner,
            examples=self.place(examples, content),
            content=content,
            batches=self.batches(examples, seed),
            steps=steps,
            teacher=step_teacher,
            evaluate=validation
            and (lambda state: validation(apply.trained(arm.module, state), teacher)),
            evaluate_every=interval(steps, self.evaluations),
            checkpoints=checkpoints,
            run_dir=self.run_dir,
            name=f"{name}-{seed}",
            progress=self.progress,
        )
        checkpoints.close()
        return apply.trained(arm.module, state)

    def train_together(
        self, name: str, arm: Arm, seeds: Sequence[int], placed_teachers: Sequence[Any]
    ) -> list[apply.BoundModule]:
        """An arm's trainings for some seeds in one program, each as `train` gives it.

        Args:
          name: likewise.
          arm: likewise; not one with a `start` of its own.
          seeds: one for each training.
          placed_teachers: a placed teacher or None, one for each seed.

        Raises:
          ValueError: the arm has a `start` of its own.
        """
        if arm.start is not None:
            raise ValueError(f"{name} has a start of its own: its seeds train apart")
        self._refuse(f"{name}-{seeds[0]}", name, "jit, mesh, fsdp or pmap")
        trials = {"seed": np.array(seeds, np.int32)}
        given = (
            self.with_teacher(arm, self._checked(arm, seed)[0], teacher)
            for seed, teacher in zip(seeds, placed_teachers, strict=True)
        )
        examples, step_teachers = zip(*given, strict=True)
        shown, validation = [f"{name}-{seed}" for seed in seeds], self.validation

        def judge(students):
            assert validation is not None
            return [
                validation(
                    self.partitioner.place(sweep.select_trial(students, i)), teacher
                )
                for i, teacher in enumerate(placed_teachers)
            ]

        size = len(examples[0]["labels"])
        students = sweep.train(
            trials,
            arm.module,
            lambda trial: arm.objective,
            lambda trial: arm.optimizer,
            run_dir=self.run_dir,
            name=name,
            examples=sweep.stack(examples),
            batches=Orders(tuple(Batches(size, self.batch_size, s) for s in seeds)),
            steps=self.steps if arm.steps is None else arm.steps,
            teacher=sweep.stack(step_teachers),
            names=shown,
            evaluate=judge if validation else None,
            evaluations=self.evaluations,
            best=self._best,
            progress=self.progress,
            dtype=self.dtype,
            untrained=True,  # each teacher was asked above
            **arm.options(self.stored),
        )
        students = jax.device_get(students)
        return [sweep.select_trial(students, i) for i in range(len(seeds))]

    def _refuse(self, other: str, name: str, division: str) -> None:
        """Raise RunError where the training is there as another division has it."""
        if (self.run_dir.path / "checkpoints" / other).exists():
            raise RunError(
                f"{self.run_dir.path} has checkpoints of {other}, and none of {name}: "
                f"it was begun with --parallel {division}; give that, or another "
                "--run-dir"
            )

    @property
    def _best(self) -> str | None:
        return "accuracy" if self.validation else None

    def _checked(self, arm: Arm, seed: int) -> tuple[Arrays, Content]:
        """A training's examples, checked, and their content.

        Raises:
          DataError: as `data.check_examples`, or there are no labels.
        """
        examples = self.examples(arm, seed)
        if "labels" not in examples:
            raise DataError(
                "a study's examples need labels, the test's at least: got "
                f"{', '.join(examples)}"
            )
        logits = self._logits(arm, seed)
        content = examine(examples, logits=logits, check_finite=self.check_finite)
        processes.check_examples(content.size)
        return examples, content

    def with_teacher(self, arm: Arm, examples, teacher: Any) -> tuple[Any, Any]:
        """Examples and a teacher as the step has them: live, or its stored outputs.

        Raises:
          ValueError: the arm has views or `top_k`, but nothing that can be stored so.
          TeacherError: the teacher knows nothing of the labels, and is no control.
        """
        if self._controls and teacher is not None:
            teacher = control(teacher)
        asked = self.partitioner.fetch(teacher)
        check_knowledge(asked, examples, progress=self.progress)
        if not arm.learns_from_disk(teacher, self.stored):
            self._say_live(arm, teacher)
            return examples, teacher
        size = self.batch_size // arm.micro_batches
        options: dict[str, Any] = {"top_k": arm.top_k}
        if views := arm.replays(self.stored):
            options |= {"augment": arm.augment, "views": views}
        return self._stores.of(examples, teacher, size, **options), StoredTeacher()

    def _say_live(self, arm: Arm, teacher: Any) -> None:
        """Warns that a teacher stays live, where nothing of the arm asks for that."""
        asked_for = arm.live or arm.rollout or arm.augment
        if self.stored and teacher is not None and not asked_for:
            warnings.warn(
                f"a {type(teacher).__name__} stays live though the study stores a "
                "teacher's outputs: a store takes those of one model or of the "
                "mean_logits of several",
                stacklevel=3,
            )

    def fresh(self, arm: Arm, seed: int, teacher: Any = None) -> TrainState:
        """The arm's state before its first step.

        Args:
          arm: its teacher is not looked at.
          seed: of the weights that are drawn.
          teacher: a model, for arms that start from one.
        """
        state = self._drawn(arm, seed)
        return state if arm.start is None else arm.start(state, teacher, seed)

    def untrained(self, arm: Arm, seed: int) -> Any:
        """The arm's model as it is drawn, a control (`teachers.control`); placed."""
        model = apply.trained(arm.module, self.fresh(arm, seed))
        return self.partitioner.place(control(model))

    def _drawn(self, arm: Arm, seed: int) -> TrainState:
        rng, example = jax.random.key(seed), self.example(arm, seed)
        return init_state(rng, student(arm.module), arm.optimizer, example)

    def forget(self, arm: Arm) -> None:
        """Drops an arm's compiled program: of many, a process has no room for all."""
        self._compiled.pop(arm, None)

    def example(self, arm: Arm, seed: int) -> dict[str, Any]:
        """A batch of a training's first example, without its stored outputs."""
        first = jax.tree.map(lambda x: x[:1], dict(self.examples(arm, seed)))
        return {**first, "mask": np.ones(1, np.float32)}

    def _logits(self, arm: Arm, seed: int) -> tuple[int, ...]:
        """The shape of one example's logits, of several students in one each one's."""

        def logits(batch):
            model = apply.trained(arm.module, self._drawn(arm, seed))
            return model(batch).logits

        return jax.eval_shape(logits, self.example(arm, seed)).shape[1:]

    def compile(self, arm: Arm) -> Callable:
        """An arm's training step, over many steps and on this run's devices."""
        if arm not in self._compiled:
            step = make_train_step(
                student(arm.module),
                arm.objective,
                arm.optimizer,
                dtype=self.dtype,
                bucket_lengths=self.bucket_lengths,
                **arm.options(self.stored),
            )
            many = scan_train(step)
            self._compiled[arm] = self.partitioner.compile(many, batch_axis=1)
        return self._compiled[arm]

    def batches(self, examples: Mapping[str, Any], seed: int = 0) -> Batches:
        """A training's order of examples, see `Batches`."""
        lengths = None
        if self.bucket_lengths:
            mask = np.asarray(tokens.attention_mask_of(examples["inputs"]))
            lengths = tuple(tokens.real_lengths(mask).tolist())
        return Batches(len(examples["labels"]), self.batch_size, seed, lengths)

    def place(self, examples: Mapping[str, np.ndarray], content: Any = None) -> Any:
        """Examples on all devices; the last ones stay there.

        Args:
          examples: the same object is placed once, unless its content has changed.
          content: as `identity.examine` found it; None takes it to be as it was.
        """
        (last, before), placed = self._placed
        changed = content is not None and content != before
        if last is not examples or changed:
            placed = self.partitioner.replicate(dict(examples))
            self._placed = ((examples, content), placed)
        return placed


def _arrays(given: Any) -> bool:
    return isinstance(given, Mapping)


def _by_arm(examples: Any) -> Callable[[Arm, int], Arrays]:
    return (lambda arm, seed: examples) if _arrays(examples) else examples


def _steps(
    steps: int | None, epochs: int | None, examples: Any, batch_size: int
) -> int:
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"a study takes steps or epochs, one of them: got {steps} and {epochs}"
        )
    if epochs is None:
        return steps or 0
    if not _arrays(examples):
        raise ValueError("examples that depend on the arm need steps, not epochs")
    return steps_of(epochs, examples, batch_size)
