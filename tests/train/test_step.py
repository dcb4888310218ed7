# SPDX-License-Identifier: Apache-2.0
"""The train step: one reduction, padding that weighs nothing, keys by step number."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, train
from jaxdistill.objectives import combine, hard_labels, on_hidden_states, on_logits
from jaxdistill.train import make_train_step
from jaxdistill.train import step as steps
from jaxdistill.types import Outputs, Student
from tests.builders import (
    CLASSES,
    HARD_AND_SOFT,
    RECORDER,
    NormNet,
    TokenNet,
    assert_identical,
    largest_difference,
    live,
    make_batch,
    start,
    train_step,
)

MLP = models.MLP((8, CLASSES))
NORM = NormNet()
DROPPING = models.MLP((32, CLASSES), dropout=0.5)
MASK = np.array([1, 0, 1, 1, 0, 1, 0, 1])
UNEVEN = [
    np.array([1, 1, 1, 0, 1, 0, 1, 0]),
    # Micro-batch i takes the rows i, i + 2, ...: the second holds only padding.
    np.array([1, 0, 1, 0, 1, 0, 0, 0]),
]


def one_step(module, batch, *, step=None, micro_batches=1):
    """The state and metrics after a step from the same start; opt_state: gradient."""
    tokens = batch["inputs"].shape[1] if batch["inputs"].ndim == 3 else None
    teacher = live(TokenNet() if tokens else MLP, tokens=tokens)
    step = step or train_step(module, micro_batches=micro_batches)
    return jax.jit(step)(start(module, batch), teacher, batch)


def step_on(module, term, **options):
    """A step whose objective is one term."""
    objective = combine({"term": (1.0, term)})
    return make_train_step(models.student(module), objective, RECORDER, **options)


def spoil(batch, mask):
    """Padded rows with large inputs and another label."""
    gone = np.asarray(mask) == 0
    inputs, labels = batch["inputs"].copy(), batch["labels"].copy()
    inputs[gone] = 1e3
    labels[gone] = (labels[gone] + 1) % CLASSES
    return {**batch, "inputs": inputs, "labels": labels}


@pytest.mark.parametrize("tokens", [None, 3])
def test_the_loss_is_the_weighted_sum_of_masked_means(tokens):
    module = TokenNet() if tokens else MLP
    batch = make_batch(0, 8, mask=MASK, tokens=tokens)
    _, metrics = one_step(module, batch)
    state = start(module, batch)
    student = module.apply({"params": state.params}, batch["inputs"])
    teacher_outputs = live(module, tokens=tokens)(batch)
    loss = 0
    for name, (weight, values, mask) in HARD_AND_SOFT(
        student, teacher_outputs, batch, 0
    ).items():
        values, mask = np.asarray(values, np.float64), np.asarray(mask, np.float64)
        np.testing.assert_allclose(metrics[name][0], (values * mask).sum(), rtol=1e-5)
        assert metrics[name][1] == mask.sum()
        loss += weight * (values * mask).sum() / mask.sum()
    np.testing.assert_allclose(metrics["loss"], (loss, 1), rtol=1e-5)


@pytest.mark.parametrize("module", [MLP, NORM], ids=["mlp", "batch norm"])
def test_a_mask_is_dropping_the_rows(module):
    batch = make_batch(0, 8, mask=MASK)
    kept = {key: value[MASK > 0] for key, value in batch.items()}
    found, metrics = one_step(module, spoil(batch, MASK))
    expected, expected_metrics = one_step(module, kept)
    assert largest_difference(found.opt_state, expected.opt_state) < 1e-6
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5),
        (metrics, found.model_state),
        (expected_metrics, expected.model_state),
    )


@pytest.mark.parametrize("label", [-100, -1, CLASSES, 10**6])
def test_padded_rows_may_have_any_label(label):
    batch = make_batch(0, 8, mask=MASK)
    labels = np.where(MASK > 0, batch["labels"], label)
    found = one_step(MLP, {**batch, "labels": labels})
    assert_identical(found, one_step(MLP, batch))


def test_padded_values_may_be_nan():
    def values_and_nan(student, teacher, batch, step):
        values = (student.logits**2).mean(-1)
        return jnp.where(batch["mask"] > 0, values, jnp.nan), batch["mask"]

    def plain(student, teacher, batch, step):
        return (student.logits**2).mean(-1), batch["mask"]

    batch = make_batch(0, 8, mask=MASK)
    found, expected = (
        one_step(MLP, batch, step=step_on(MLP, term))
        for term in (values_and_nan, plain)
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-6),
        (found[0].params, found[1]),
        (expected[0].params, expected[1]),
    )


@pytest.mark.parametrize(("module", "parts"), [(NORM, 1), (MLP, 2)])
def test_a_step_without_examples_changes_only_its_number(module, parts):
    """AdamW would move the parameters by its decay and momentum alone."""
    optimizer, batch = optax.adamw(0.1, weight_decay=0.1), make_batch(0, 8)
    step = jax.jit(train_step(module, optimizer, parts))
    teacher = live(MLP)
    before, _ = step(start(module, batch, optimizer), teacher, batch)
    empty = {**batch, "mask": np.zeros(8, np.float32)}
    after, metrics = step(before, teacher, empty)
    assert_identical(after.replace(step=before.step), before)
    assert after.step == before.step + 1
    assert metrics == {"hard": (0, 0), "soft": (0, 0), "loss": (0, 1)}


def test_a_term_without_examples_adds_nothing():
    batch = {**make_batch(0, 8), "labelled": np.zeros(8, np.float32)}
    state, metrics = one_step(MLP, batch)
    assert metrics["hard"] == (0, 0)
    np.testing.assert_allclose(metrics["loss"][0], 0.3 * metrics["soft"][0] / 8, 1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("mask", UNEVEN, ids=["uneven", "one part empty"])
@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("tokens", [None, 3])
def test_micro_batches_give_the_large_batchs_gradient(mask, parts, tokens):
    module = TokenNet() if tokens else MLP
    batch = spoil(make_batch(0, 8, mask=mask, tokens=tokens), mask)
    whole, metrics = one_step(module, batch)
    found, found_metrics = one_step(module, batch, micro_batches=parts)
    assert largest_difference(found.opt_state, whole.opt_state) < 1e-6
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found_metrics, metrics)


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(ValueError, match="batch of 8 does not divide into 3 micro-"):
        one_step(MLP, make_batch(0, 8), micro_batches=3)


def test_comparing_examples_within_micro_batches_warns():
    """Warnings are errors here: the whole batch gives none."""
    terms = {
        "hard": (1.0, hard_labels()),
        "dist": (1.0, on_logits(losses.dist)),
        "layers": (1.0, on_hidden_states(losses.relational_distance, ((0, 0),))),
    }
    student, batch = models.student(MLP), make_batch(0, 8)
    for parts in (1, 2):
        options = {"micro_batches": parts}
        step = make_train_step(student, combine(terms), RECORDER, **options)
        said = "^dist, layers: examples are compared within each of 2 parts of a batch"
        with pytest.warns(UserWarning, match=said) if parts > 1 else nullcontext():
            one_step(MLP, batch, step=step)


def test_micro_batches_drop_units_of_their_own():
    """Equal halves of a batch would otherwise get equal masks."""
    half = make_batch(0, 4)
    twice = {key: np.repeat(value, 2, axis=0) for key, value in half.items()}
    dropped = []

    def look(student, teacher, batch, step):
        jax.debug.callback(lambda x: dropped.append(np.asarray(x)), student.logits)
        return (student.logits**2).mean(-1), batch["mask"]

    one_step(DROPPING, twice, step=step_on(DROPPING, look, micro_batches=2))
    jax.effects_barrier()
    assert len({x.tobytes() for x in dropped}) == 2


def test_dropout_differs_by_step_and_repeats_by_seed():
    batch = make_batch(0, 8)
    step = jax.jit(train_step(DROPPING))
    teacher, fresh = live(MLP), start(DROPPING, batch)
    states = {
        "first": fresh,
        "again": start(DROPPING, batch),
        "later": fresh.replace(step=jnp.int32(1)),
        "other seed": fresh.replace(rng=jax.random.key(99)),
    }
    grads = {k: step(state, teacher, batch)[0].opt_state for k, state in states.items()}
    assert_identical(grads["first"], grads["again"])
    assert largest_difference(grads["later"], grads["first"]) > 0.01
    assert largest_difference(grads["other seed"], grads["first"]) > 0.01
    after, _ = step(fresh, teacher, batch)
    assert_identical(after.rng, fresh.rng)  # resume needs no moving key


def test_teacher_and_student_see_the_prepared_batch():
    """Prepared is as if the data had come so, and noise differs from step to step."""

    def augment(batch, rng):
        noise = jax.random.normal(rng, batch["inputs"].shape)
        return {**batch, "inputs": batch["inputs"] + noise}

    batch, student, teacher = make_batch(0, 8), models.student(MLP), live(MLP)
    plain = jax.jit(train_step(MLP))
    noisy = jax.jit(make_train_step(student, HARD_AND_SOFT, RECORDER, augment=augment))
    state = start(MLP, batch)
    losses = []
    for number in range(2):
        state = state.replace(step=jnp.int32(number))
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, number), steps.AUGMENT)
        expected = plain(state, teacher, augment(batch, rng))[1]
        found = noisy(state, teacher, batch)[1]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)
        losses.append(found["loss"][0])
    assert abs(losses[0] - losses[1]) > 1e-3


def test_scan_train_is_a_loop_of_steps():
    examples = make_batch(3, 20)
    resident = {key: examples[key] for key in ("inputs", "labels")}
    rng = np.random.default_rng(0)
    rows = {
        "index": rng.integers(0, 20, (4, 8)).astype(np.int32),
        "mask": (rng.random((4, 8)) < 0.7).astype(np.float32),
    }
    step, teacher = train_step(DROPPING), live(MLP)
    looped = start(DROPPING, examples)
    scanned, sums = jax.jit(train.scan_train(step))(looped, (teacher, resident), rows)
    single, all_metrics = jax.jit(step), []
    for i in range(4):
        row = {key: value[i] for key, value in rows.items()}
        batch = {k: v[row["index"]] for k, v in resident.items()} | row
        looped, metrics = single(looped, teacher, batch)
        all_metrics.append(metrics)
    assert scanned.step == 4
    stacked = jax.tree.map(lambda *xs: np.stack(xs), *all_metrics)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        (scanned.params, sums),
        (looped.params, stacked),
    )


def test_model_state_keeps_its_types():
    """A counter or a bfloat16 average must come out as it went in, or scans fail."""

    def init(rng, batch):
        return jnp.zeros(CLASSES), {
            "calls": jnp.int32(0),
            "average": jnp.zeros((), jnp.bfloat16),
        }

    def apply(params, model_state, batch, rng):
        logits = jnp.broadcast_to(params[None], (batch["mask"].shape[0], CLASSES))
        calls, average = model_state["calls"] + 1, model_state["average"] + 0.5
        return Outputs(logits), {"calls": calls, "average": average}

    student, batch = Student(init, apply), make_batch(0, 8)
    objective = combine({"hard": (1.0, hard_labels())})
    state = train.init_state(jax.random.key(0), student, RECORDER, batch)
    step = make_train_step(student, objective, RECORDER)
    rows = {
        "index": np.tile(np.arange(8, dtype=np.int32), (3, 1)),
        "mask": np.ones((3, 8), np.float32),
    }
    after, _ = jax.jit(train.scan_train(step))(state, (None, batch), rows)
    assert after.model_state["calls"] == 3
    assert after.model_state["calls"].dtype == jnp.int32
    assert after.model_state["average"].dtype == jnp.bfloat16


GOLDEN = {
    "loss": 0.923180,
    "hard": 5.791824,
    "soft": 1.872078,
    "kernel": 0.3463106,
    "bias": 0.005742682,
    "size": 6.092356,
}


def test_golden_step():
    """Three steps of SGD with dropout, a live teacher and padded rows."""
    batch = make_batch(0, 8, mask=MASK)
    state, step = start(DROPPING, batch), jax.jit(train_step(DROPPING))
    for _ in range(3):
        state, metrics = step(state, live(MLP), batch)
    found = {
        "loss": float(metrics["loss"][0]),
        "hard": float(metrics["hard"][0]),
        "soft": float(metrics["soft"][0]),
        "kernel": float(state.params["Dense_0"]["kernel"][2, 3]),
        "bias": float(state.params["Dense_1"]["bias"][1]),
        "size": float(optax.tree.norm(state.params)),
    }
    assert found == pytest.approx(GOLDEN, rel=1e-4), (
        f"the training step computes something else: {found}. If that was meant, put "
        "these numbers into GOLDEN and say in the commit why results change; if not, "
        "the change broke initialisation, keys, a loss, the reduction or the update"
    )
