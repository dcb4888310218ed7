# SPDX-License-Identifier: Apache-2.0
"""`fit`: cadence, logs, resume, and stopping on a loss that is not finite."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.data import Batches
from jaxdistill.objectives import combine, hard_labels
from jaxdistill.teachers import fingerprints
from jaxdistill.train import (
    Checkpoints,
    NonFiniteLoss,
    RunDir,
    fit,
    init_state,
    interval,
    make_train_step,
    scan_train,
)
from jaxdistill.train.loop import dispatches

SIZE, BATCH = 22, 4  # six batches an epoch, the last padded


class Job:
    """A small training, its directory, and `fit` with the settings under test."""

    def __init__(self, path, rate=0.1, weight=1.0):
        draw = np.random.default_rng(0)
        self.examples = {
            "inputs": draw.normal(size=(SIZE, 3)).astype(np.float32),
            "labels": draw.integers(0, 4, SIZE).astype(np.int32),
        }
        self.partitioner = parallel.jit()
        student = models.student(models.MLP((5, 4), dropout=0.5))
        optimizer = optax.adam(rate)
        objective = combine({"hard": (weight, hard_labels())})
        step = make_train_step(student, objective, optimizer)
        self.step = self.partitioner.compile(scan_train(step), batch_axis=1)
        self.batches = Batches(SIZE, BATCH)
        example = next(self.batches.iterate(self.examples, 0))
        self.state = init_state(jax.random.key(0), student, optimizer, example)
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.run_dir = RunDir(path, {"seed": 0})

    def fit(self, steps=24, **settings):
        return fit(
            self.state,
            self.step,
            partitioner=self.partitioner,
            examples=self.partitioner.place(self.examples),
            batches=self.batches,
            steps=steps,
            checkpoints=self.checkpoints,
            run_dir=self.run_dir,
            progress=False,
            **settings,
        )


def parameters(state):
    return fingerprints.of_tree(state.params)


@pytest.mark.parametrize("most", [1000, 4])
def test_dispatches_cover_every_step_once_wherever_they_resume(most):
    whole = list(dispatches(0, 23, 6, most))
    assert [start for start, _ in whole[1:]] == [stop for _, stop in whole[:-1]]
    assert whole[0][0] == 0
    assert whole[-1][1] == 23
    for done in (stop for _, stop in whole):
        assert list(dispatches(done, 23, 6, most)) == [d for d in whole if d[0] >= done]


@pytest.mark.parametrize("done", range(23))
def test_a_run_that_other_boundaries_interrupted_misses_no_step(done):
    rest = list(dispatches(done, 23, 6, 4))
    assert [step for low, high in rest for step in range(low, high)] == list(
        range(done, 23)
    )


@pytest.mark.parametrize("evaluations", [1, 2, 5, 10])
def test_few_lengths_compile(evaluations):
    """One where a number of evaluations near the one asked for divides the steps."""
    for steps in range(1, 200):
        every = interval(steps, evaluations)
        plan = list(dispatches(0, steps, every, 1000))
        assert len({stop - start for start, stop in plan}) <= 2
        near = range(evaluations // 2 + 1, 3 * evaluations // 2 + 1)
        assert len(plan) <= max(near)
        if any(steps % n == 0 for n in near):
            assert {stop - start for start, stop in plan} == {every}
            assert len(plan) in near


def test_a_run_goes_on_at_another_cadence(tmp_path):
    expected = Job(tmp_path / "a").fit(evaluate_every=24)
    job = Job(tmp_path / "b")
    job.fit(steps=10, evaluate_every=10)
    state = job.fit(evaluate_every=6)
    assert int(state.step) == 24
    assert [r["step"] for r in job.run_dir.records] == [10, 12, 18, 24]
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4), state.params, expected.params
    )


@pytest.mark.parametrize("every", [None, 2])
def test_the_best_is_saved_with_its_own_score(tmp_path, every):
    """Also where another cadence interrupted a run, and between evaluations."""
    job = Job(tmp_path)
    job.fit(steps=10, evaluate_every=10)
    job.checkpoints = Checkpoints(tmp_path / "checkpoints", best="accuracy")
    scores = {12: 0.9, 18: 0.3, 24: 0.5}
    job.fit(
        evaluate=lambda state: {"accuracy": scores[int(state.step)]},
        evaluate_every=6,
        steps_per_dispatch=2,
        checkpoint_every=every,
    )
    assert job.checkpoints.best_step() == 12


def test_logs_evaluates_and_saves_at_its_cadence(tmp_path):
    job, seen = Job(tmp_path), []

    def evaluate(state):
        seen.append(int(state.step))
        return {"accuracy": 0.5, "class_error": [0.1]}

    state = job.fit(evaluate=evaluate, evaluate_every=12, steps_per_dispatch=6)
    assert int(state.step) == 24
    assert seen == [12, 24]
    assert [r["step"] for r in job.run_dir.records] == [6, 12, 18, 24]
    assert [r["epoch"] for r in job.run_dir.records] == [1, 2, 3, 4]
    assert ["accuracy" in r for r in job.run_dir.records] == [False, True, False, True]
    assert job.checkpoints.steps() == [12, 24]


def test_the_logged_loss_is_the_mean_over_real_examples(tmp_path):
    """At rate 0 with no dropout draws to compare, one epoch sees each example once."""
    job = Job(tmp_path, rate=0.0)
    job.fit(steps=6)
    record = job.run_dir.records[-1]
    state, sums = job.step(
        job.partitioner.place(job.state),
        (None, job.partitioner.place(job.examples)),
        job.partitioner.split(job.batches.indices(0, 6), 1),
    )
    total, count = (np.asarray(x, np.float64).sum() for x in sums["hard"])
    assert count == SIZE
    assert record["hard"] == pytest.approx(total / count, rel=1e-12)
    assert parameters(state) == parameters(job.state)


def test_an_interrupted_fit_resumes_bit_for_bit_and_rewrites_its_log(tmp_path):
    whole = Job(tmp_path / "a")
    expected = whole.fit()

    job = Job(tmp_path / "b")

    def fail_at_18(state):
        if int(state.step) == 18:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        job.fit(evaluate=fail_at_18)
    job.checkpoints.close()
    resumed = Job(tmp_path / "b")
    assert resumed.checkpoints.steps()[-1] == 12
    assert parameters(resumed.fit()) == parameters(expected)
    assert resumed.run_dir.records == whole.run_dir.records
    assert Job(tmp_path / "b").run_dir.records == whole.run_dir.records


def test_a_finished_fit_is_restored_and_not_repeated(tmp_path):
    expected = parameters(Job(tmp_path).fit())
    job = Job(tmp_path)
    job.step = None
    with pytest.warns(UserWarning, match="a checkpoint cannot tell when"):
        assert parameters(job.fit()) == expected


def test_nan_names_its_step_and_keeps_the_last_good_checkpoint(tmp_path):
    job = Job(tmp_path, weight=lambda step: jnp.where(step == 8, jnp.nan, 1.0))
    job.fit(steps=6)
    with pytest.raises(NonFiniteLoss, match=r"fit: the loss is nan at step 9; stopped"):
        job.fit()
    assert job.checkpoints.steps() == [6]
    assert [r["step"] for r in job.run_dir.records] == [6]


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(tmp_path):
    job = Job(tmp_path)
    job.partitioner = parallel.mesh(jax.devices()[:8])
    with pytest.raises(ValueError, match="a batch of 4 does not divide over 8 devices"):
        job.fit()
