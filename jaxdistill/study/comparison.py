# SPDX-License-Identifier: Apache-2.0
"""A table of trainings: arms by seeds, from one study.

summary = compare(study, {"teacher": Arm(...), "scratch": Arm(...),
                          "distilled": Arm(..., teacher="teacher")}, seeds=5)
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from jaxdistill.models import apply
from jaxdistill.report import tables
from jaxdistill.report.statistics import MEASURES
from jaxdistill.study.arm import Arm
from jaxdistill.study.study import Study
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.knowledge import unwrap
from jaxdistill.train import cost, saved
from jaxdistill.train.run_dir import RunDir


def compare(
    study: Study,
    arms: Mapping[str, Arm],
    seeds: int,
    *,
    given: Callable[[int], Mapping[str, Any]] = lambda seed: {},
    pairs: Mapping[str, Sequence[str]] | None = None,
    measure: str = "accuracy",
    timed_steps: int = 0,
    example: Mapping[str, Any] | None = None,
    to: RunDir | None = None,
) -> dict[str, Any]:
    """Trains all arms for all seeds and writes the run's summary.

    Of seeds that train together the best checkpoint is that of their mean.

    Args:
      study: how they train.
      arms: in the order they train, "teacher" among them, before its students.
      seeds: each draws its own weights and batches.
      given: `seed -> {name: placed teacher}`, teachers that are not arms and have
        other names.
      pairs: `{arm: arms it is compared with}`; None compares "distilled" with
        all but the teacher.
      measure: which metric the comparison and its figure are of, see
        `report.statistics.MEASURES`.
      timed_steps: measure milliseconds per step on so many, if any.
      example: `inputs` and `mask` of one, on which costs are measured; None is the
        first that is trained on.
      to: where summary and models go, the study's own run directory if None.

    Returns:
      The summary (`report.summarize`), with each training's digest.

    Raises:
      ValueError: an unknown measure, a pair of what is no arm, a given teacher with a
        arm's name, no teacher, or an arm taught by none before it.
    """
    if pairs is None:
        others = [name for name in arms if name not in ("teacher", "distilled")]
        pairs = {"distilled": others} if "distilled" in arms else {}
    _check_pairs(arms, pairs, measure)
    to = study.run_dir if to is None else to
    results: dict[str, list] = {name: [] for name in arms}
    costs: dict[str, dict[str, float]] = {}
    costs_of: dict[nn.Module, dict[str, float]] = {}
    digests = {}
    groups = [range(seeds)] if study.together else [[seed] for seed in range(seeds)]
    for group in groups:
        trained = [dict(given(seed)) for seed in group]
        _check_teachers(arms, trained[0])
        for name, arm in arms.items():
            models = _train(study, name, arm, group, trained)
            for seed, known, model in zip(group, trained, models, strict=True):
                known[name] = study.partitioner.place(model)
                results[name].append(study.test(known[name], known["teacher"]))
                digests[f"{name}-{seed}"] = fingerprints.of_tree(model.variables)
                if seed == 0:
                    if model.module not in costs_of:
                        one = study.example(arm, seed) if example is None else example
                        costs_of[model.module] = cost.cost(model, one)
                    costs[name] = dict(costs_of[model.module])
                    source, by = None, arm.teacher
                    if by is not None:
                        source = by, unwrap(study.partitioner.fetch(known[by]))
                    saved.save_model(to, name, model, source)
    if timed_steps:
        for name, ms in _step_ms(study, arms, trained[-1], timed_steps).items():
            costs[name]["step_ms"] = ms
    summary = tables.summarize(results, costs, pairs, measure)
    to.write("summary.json", {**summary, "digests": digests})
    return {**summary, "digests": digests}


def _check_pairs(
    arms: Mapping[str, Arm], pairs: Mapping[str, Sequence[str]], measure: str
) -> None:
    if measure not in MEASURES:
        names = ", ".join(MEASURES)
        raise ValueError(f"arms cannot be compared by {measure!r}; known: {names}")
    wrong = {*pairs, *(b for others in pairs.values() for b in others)} - {*arms}
    if wrong:
        raise ValueError(f"{sorted(wrong)} are to be compared, and are no arms")


def _check_teachers(arms: Mapping[str, Arm], given: Mapping[str, Any]) -> None:
    if both := sorted({*given} & {*arms}):
        raise ValueError(f"{both} are arms, and given teachers as well")
    if "teacher" not in {*arms, *given}:
        raise ValueError(f"none of {sorted({*arms, *given})} is called 'teacher'")
    known = {*given}
    for name, arm in arms.items():
        if arm.teacher is not None and arm.teacher not in known:
            raise ValueError(
                f"{name} is taught by {arm.teacher!r}, which is no arm before it, and "
                "not given"
            )
        known.add(name)


def _train(
    study: Study, name: str, arm: Arm, seeds: Sequence[int], trained: Sequence[Mapping]
) -> list[apply.BoundModule]:
    """An arm's models for some seeds, each with what was trained before it."""
    teacher = arm.teacher
    placed_teachers = [None if teacher is None else known[teacher] for known in trained]
    if study.together and arm.start is None:
        return study.train_together(name, arm, seeds, placed_teachers)
    return [
        study.train(name, arm, seed, by)
        for seed, by in zip(seeds, placed_teachers, strict=True)
    ]


def _step_ms(
    study: Study, arms: Mapping[str, Arm], trained: Mapping[str, Any], steps: int
) -> dict[str, float]:
    """Milliseconds per training step of each arm, in turns on an idle machine."""

    def job(arm):
        teacher = None if arm.teacher is None else trained[arm.teacher]
        examples, step_teacher = study.with_teacher(
            arm, study.examples(arm, 0), teacher
        )
        index = study.partitioner.split(study.batches(examples).indices(0, steps), 1)
        resident = (step_teacher, study.place(examples))
        state = study.partitioner.place(
            study.fresh(arm, 0, study.partitioner.fetch(teacher))
        )

        def steps_on():
            nonlocal state
            state, metrics = study.compile(arm)(state, resident, index)
            jax.block_until_ready(metrics)

        return steps_on

    jobs = {name: job(arm) for name, arm in arms.items()}
    times = cost.interleave(jobs, rounds=5)
    return {name: 1e3 * statistics.median(t) / steps for name, t in times.items()}
