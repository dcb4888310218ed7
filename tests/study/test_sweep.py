# SPDX-License-Identifier: Apache-2.0
"""A swept student is the one that a training of its own would give."""

import os
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.data import Batches
from jaxdistill.models import trained
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.study.sweep import (
    PerTrial,
    choose,
    compile_sweep,
    divide,
    grid,
    init_states,
    make_sweep_step,
    scan_sweep,
    size,
    stack,
    trial_state,
)
from jaxdistill.train import (
    Checkpoints,
    Evaluator,
    RunDir,
    fit,
    init_state,
    make_train_step,
    scan_train,
)
from tests.builders import (
    CLASSES,
    assert_identical,
    largest_difference,
    live,
    make_batch,
)

pytestmark = pytest.mark.usefixtures("any_teacher")

SIZE, BATCH, STEPS = 24, 6, 7
EXAMPLES = {k: make_batch(0, SIZE)[k] for k in ("inputs", "labels")}
FIRST = {**{k: v[:1] for k, v in EXAMPLES.items()}, "mask": np.ones(1, np.float32)}
MODULE = models.MLP((4, CLASSES), dropout=0.2)
STUDENT, TEACHER = models.student(MODULE), live(models.MLP((7, CLASSES)))
CELLS = grid(temperature=[1.0, 4.0], learning_rate=[0.05, 0.2], seed=[0, 3])


def make_objective(trial):
    soft = soft_targets(temperature=trial["temperature"])
    return combine({"hard": (0.3, hard_labels()), "soft": (0.7, soft)})


def make_optimizer(trial):
    decay = optax.cosine_decay_schedule(1.0, STEPS)
    return optax.sgd(lambda count: trial["learning_rate"] * decay(count), momentum=0.9)


def rows(seed):
    index = np.random.default_rng(seed).integers(0, SIZE, (STEPS, BATCH))
    mask = np.ones(index.shape, np.float32)
    mask[-1, 4:] = 0
    return {"index": index, "mask": mask}


def alone(number, order, teacher=TEACHER, examples=EXAMPLES):
    """The trial's training, on its own."""
    trial = {name: values[number] for name, values in CELLS.items()}
    optimizer = make_optimizer(trial)
    state = init_state(jax.random.key(int(trial["seed"])), STUDENT, optimizer, FIRST)
    step = make_train_step(STUDENT, make_objective(trial), optimizer)
    return jax.jit(scan_train(step))(state, (teacher, examples), order)


STEP = make_sweep_step(STUDENT, make_objective, make_optimizer)


def swept(order, partitioner=None, group=None, given=(TEACHER, EXAMPLES)):
    partitioner = partitioner or choose(CELLS, jax.devices()[:1])
    states = init_states(CELLS, STUDENT, make_optimizer, FIRST)
    resident = partitioner.replicate(given)
    step = compile_sweep(partitioner, STEP, CELLS, group=group)
    return step(partitioner.place(states), resident, partitioner.replicate(order))


def check(states, metrics, number, order, *given):
    state, expected = alone(number, order, *given)
    found = trial_state(states, number)
    assert int(found.step) == STEPS
    assert largest_difference(found.params, state.params) < 1e-5
    for name, (sums, counts) in expected.items():
        np.testing.assert_allclose(metrics[name][0][:, number], sums, rtol=1e-4)
        np.testing.assert_allclose(metrics[name][1][:, number], counts)


def test_a_grid_has_every_combination():
    assert size(CELLS) == 8
    combinations = set(zip(*(CELLS[name].tolist() for name in CELLS), strict=True))
    assert len(combinations) == 8
    assert {name: values.dtype for name, values in CELLS.items()} == {
        "temperature": np.float32,
        "learning_rate": np.float32,
        "seed": np.int32,
    }


def test_each_trial_is_a_training_of_its_own():
    states, metrics = swept(rows(0))
    for number in (0, 3, 6):
        check(states, metrics, number, rows(0))


def test_each_trial_may_have_its_own_batches():
    orders = [rows(i) for i in range(size(CELLS))]
    stacked = {k: np.stack([order[k] for order in orders], 1) for k in orders[0]}
    states, metrics = swept(stacked)
    for number in (1, 6):
        check(states, metrics, number, orders[number])


@pytest.mark.parametrize(
    ("devices", "group"), [(1, None), (1, 2), (2, None), (4, 1)], ids=str
)
def test_each_trial_may_have_its_own_labels_teacher_and_batches(devices, group):
    count = size(CELLS)
    orders = [rows(i) for i in range(count)]
    stacked = {k: np.stack([order[k] for order in orders], 1) for k in orders[0]}
    labels = [make_batch(i, SIZE)["labels"] for i in range(count)]
    examples = [{**EXAMPLES, "labels": own} for own in labels]
    their_teachers = [live(models.MLP((7, CLASSES)), i) for i in range(count)]
    given = stack(their_teachers), stack(examples)
    assert not isinstance(given[1]["inputs"], PerTrial)
    partitioner = choose(CELLS, jax.devices()[:devices])
    states, metrics = swept(stacked, partitioner, group, given)
    states, metrics = jax.device_get((states.replace(rng=()), metrics))
    for number in (0, 5, 7):
        check(
            states,
            metrics,
            number,
            orders[number],
            their_teachers[number],
            examples[number],
        )


def test_trials_divide_over_devices():
    partitioner = choose(CELLS)
    states, _ = swept(rows(0), partitioner)
    kernel = states.params["Dense_0"]["kernel"]
    assert {part.data.shape[0] for part in kernel.addressable_shards} == {1}
    expected, _ = swept(rows(0))
    assert largest_difference(partitioner.fetch(states.params), expected.params) < 1e-5


@pytest.mark.parametrize(("trials", "devices"), [(6, 6), (12, 6), (7, 7), (11, 1)])
def test_as_many_devices_as_divide_the_trials(trials, devices):
    assert len(choose(grid(seed=range(trials))).devices) == devices


def test_over_processes_all_devices_are_used(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="6 trials do not divide over 8 devices of 2"):
        choose(grid(seed=range(6)))


def test_seeds_are_divided_where_that_saves_time(monkeypatch):
    assert divide("jit", 5)[1] is False
    assert divide("auto", 5)[0].name == "mesh"  # eight devices of a CPU
    partitioner, together = divide("seeds", 5)
    assert (partitioner.name, together) == ("jit", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert divide("auto", 5)[1] is True
    assert divide("auto", 1)[1] is False
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert divide("auto", 5)[1] is False
    with pytest.raises(ValueError, match="--parallel seeds is for one process"):
        divide("seeds", 5)


@pytest.mark.parametrize(("devices", "group"), [(1, 1), (1, 3), (2, 2)])
def test_groups_one_after_another_train_the_same(devices, group):
    partitioner = choose(CELLS, jax.devices()[:devices])
    states, metrics = swept(rows(0), partitioner, group)
    expected, expected_metrics = swept(rows(0))
    assert largest_difference(partitioner.fetch(states.params), expected.params) < 1e-5
    assert int(states.step) == STEPS
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4), metrics, expected_metrics
    )


def test_trials_stay_on_their_devices():
    """Nothing is sent between devices: each trains its own trials."""
    partitioner = choose(CELLS, jax.devices()[:2])
    step = compile_sweep(partitioner, STEP, CELLS, group=2)
    states = partitioner.place(init_states(CELLS, STUDENT, make_optimizer, FIRST))
    resident = partitioner.replicate((TEACHER, EXAMPLES))
    text = jax.jit(step).lower(states, resident, rows(0)).compile().as_text()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert name not in text


@pytest.mark.parametrize(
    ("environment", "devices"),
    [({}, len(os.sched_getaffinity(0))), ({"JAX_NUM_CPU_DEVICES": "3"}, 3)],
)
def test_each_core_is_a_device(environment, devices):
    code = "from jaxdistill.study import sweep; sweep.use_cores(); import jax; "
    code += "print(jax.device_count()); sweep.use_cores()"
    unset = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**unset, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == devices


@pytest.mark.parametrize("devices", [1, 8])
def test_a_sweep_trains_evaluates_and_resumes_in_fit(tmp_path, devices):
    partitioner = choose(CELLS, jax.devices()[:devices])
    judge = Evaluator(partitioner, EXAMPLES, trials=True)
    scores = []

    def train(steps, folder):
        def evaluate(states):
            scores.append([trial["nll"] for trial in judge(trained(MODULE, states))])
            return {"nll": scores[-1]}

        checkpoints = Checkpoints(tmp_path / folder)
        states = fit(
            init_states(CELLS, STUDENT, make_optimizer, FIRST),
            compile_sweep(partitioner, STEP, CELLS),
            partitioner=partitioner,
            examples=partitioner.replicate(EXAMPLES),
            batches=Batches(SIZE, 9),
            steps=steps,
            teacher=partitioner.replicate(TEACHER),
            evaluate=evaluate,
            checkpoints=checkpoints,
            progress=False,
        )
        checkpoints.close()
        return states

    whole = train(9, "whole")
    train(3, "parts")
    resumed = train(9, "parts")
    assert_identical(resumed, whole)
    assert len(scores[-1]) == size(CELLS)
    for number in (0, 5):
        alone = Evaluator(parallel.jit(), EXAMPLES)
        model = trained(MODULE, trial_state(whole, number))
        assert alone(model)["nll"] == pytest.approx(scores[-1][number], rel=1e-5)


def test_a_trial_that_diverges_leaves_the_others_and_their_mean(tmp_path):
    trials = grid(temperature=[1.0], learning_rate=[0.1, 1e30], seed=[0])
    partitioner = choose(trials, jax.devices()[:1])
    run_dir = RunDir(tmp_path, {})
    states = fit(
        init_states(trials, STUDENT, make_optimizer, FIRST),
        compile_sweep(partitioner, STEP, trials),
        partitioner=partitioner,
        examples=EXAMPLES,
        batches=Batches(SIZE, 8),
        steps=6,
        teacher=TEACHER,
        run_dir=run_dir,
        progress=False,
    )
    kernels = states.params["Dense_0"]["kernel"]
    assert np.isfinite(kernels[0]).all()
    assert not np.isfinite(kernels[1]).all()
    assert all(np.isfinite(record["loss"]) for record in run_dir.records)


def test_one_compilation_serves_the_grid():
    states = init_states(CELLS, STUDENT, make_optimizer, FIRST)
    partitioner = jax.jit(scan_sweep(STEP))
    for temperature in (1.0, 2.0, 3.0):
        trials = {**CELLS, "temperature": np.full(8, temperature, np.float32)}
        partitioner(states, (trials, TEACHER, EXAMPLES), rows(0))
    assert partitioner._cache_size() == 1


def test_a_live_teacher_runs_once_for_all():
    """A shared batch has one teacher's forward pass, whatever the trials' number."""
    wide = live(models.MLP((1000, CLASSES)))

    def cost(trials):
        states = init_states(trials, STUDENT, make_optimizer, FIRST)
        batch = {k: v[:BATCH] for k, v in EXAMPLES.items()}
        batch["mask"] = np.ones(BATCH, np.float32)
        compiled = jax.jit(STEP).lower(states, trials, wide, batch).compile()
        return compiled.cost_analysis()["flops"]

    one, two, four = (
        cost(grid(temperature=[1.0], learning_rate=[0.1], seed=range(n)))
        for n in (1, 2, 4)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=0.2)
    assert four < 1.5 * one  # the teacher is most of it


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grid(), "values on every axis, none for any"),
        (lambda: grid(seed=[]), r"none for \['seed'\]"),
        (
            lambda: init_states({"rate": np.ones(2)}, STUDENT, make_optimizer, FIRST),
            "trials need a seed, got rate",
        ),
    ],
)
def test_bad_grids(call, message):
    with pytest.raises(ValueError, match=message):
        call()
