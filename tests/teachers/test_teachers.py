# SPDX-License-Identifier: Apache-2.0
"""Teachers: any pytree from a batch to outputs, in evaluation mode, never trained."""

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, teachers
from jaxdistill.losses.logits import mean_log_probs
from jaxdistill.objectives import combine, soft_targets
from jaxdistill.teachers import fingerprints
from jaxdistill.train import init_state, make_train_step
from jaxdistill.types import Outputs, Student
from tests.builders import (
    CLASSES,
    HARD_AND_SOFT,
    NormNet,
    live,
    make_batch,
    nnx_teacher,
    start,
)

MLP = models.MLP((8, CLASSES))
BATCH = make_batch(0, 8, mask=[1, 1, 1, 1, 1, 1, 0, 0])


def norm_teacher():
    """A BatchNorm network with running statistics that are not the initial ones."""
    teacher = live(NormNet())
    stats = jax.tree.map(lambda x: x + 0.5, teacher.variables["batch_stats"])
    return teachers.live(NormNet(), {**teacher.variables, "batch_stats": stats})


TEACHERS = {
    "live": lambda: live(MLP),
    "batch norm": norm_teacher,
    "ensemble": lambda: teachers.ensemble([live(MLP, 1), norm_teacher()]),
    "nnx": nnx_teacher,
}
each = pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS.keys())


def test_live_is_the_module_in_evaluation_mode():
    teacher = norm_teacher()
    expected = NormNet().apply(teacher.variables, BATCH["inputs"], train=False)
    np.testing.assert_allclose(teacher(BATCH).logits, expected.logits, atol=1e-6)
    alone = jax.tree.map(lambda x: x[:1], BATCH)
    # Neighbours have no say: nothing is normalised with the batch.
    np.testing.assert_allclose(
        teacher(alone).logits, teacher(BATCH).logits[:1], atol=1e-6
    )


def test_a_trained_state_is_a_teacher():
    state = start(NormNet(), BATCH)
    found = models.trained(NormNet(), state)(BATCH)
    variables = {"params": state.params, **state.model_state}
    expected = NormNet().apply(variables, BATCH["inputs"])
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_an_ensemble_keeps_its_members_apart():
    members = [live(MLP, 1), live(MLP, 2), norm_teacher()]
    found = teachers.ensemble(members)(BATCH).logits
    assert found.shape == (3, 8, CLASSES)
    for logits, member in zip(found, members, strict=True):
        np.testing.assert_array_equal(logits, member(BATCH).logits)


def test_an_ensemble_of_nobody_is_an_error():
    with pytest.raises(ValueError, match="at least one teacher, got none"):
        teachers.ensemble([])


def test_mean_log_probs_are_of_the_mean_probability():
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 2, 3))
    found = mean_log_probs(logits, 2)
    np.testing.assert_allclose(found, np.log(jax.nn.softmax(logits).mean(0)), atol=1e-6)
    single = mean_log_probs(logits[0], 2)
    np.testing.assert_allclose(single, jax.nn.log_softmax(logits[0]), atol=1e-6)


@each
def test_any_teacher_teaches_and_nothing_of_it_moves(make):
    """The loss falls, the teacher gets no gradient, and all its variables stay."""
    teacher, optimizer = make(), optax.sgd(0.1)
    before = fingerprints.of_tree(teacher)
    objective = combine({"soft": (1.0, soft_targets(temperature=2.0))})
    step = make_train_step(models.student(MLP), objective, optimizer)

    def loss_of(variables, state):
        rebuilt = jax.tree.unflatten(structure, variables)
        return step(state, rebuilt, BATCH)[1]["soft"][0]

    state = start(MLP, BATCH, optimizer)
    variables, structure = jax.tree.flatten(teacher)
    slope = jax.jit(jax.grad(loss_of))(variables, state)
    assert slope
    assert not any(np.any(leaf) for leaf in slope)

    jitted, losses = jax.jit(step, donate_argnums=0), []
    for _ in range(5):
        state, metrics = jitted(state, teacher, BATCH)
        losses.append(metrics["soft"][0])
    assert losses[-1] < losses[0]
    assert fingerprints.of_tree(teacher) == before


@each
def test_constructing_a_teacher_anew_does_not_retrace(make):
    traces = []

    @jax.jit
    def step(teacher):
        traces.append(1)
        return teacher(BATCH).logits

    for _ in range(3):
        step(make())
    assert len(traces) == 1


def test_a_plain_function_is_a_student():
    def init(rng, batch):
        shape = (batch["inputs"].shape[-1], CLASSES)
        return {"w": 0.1 * jax.random.normal(rng, shape)}, {}

    def apply(params, model_state, batch, rng):
        return Outputs(batch["inputs"] @ params["w"]), model_state

    plain, optimizer = Student(init, apply), optax.sgd(0.3)
    state = init_state(jax.random.key(0), plain, optimizer, BATCH)
    step = jax.jit(make_train_step(plain, HARD_AND_SOFT, optimizer))
    losses = []
    for _ in range(10):
        state, metrics = step(state, nnx_teacher(), BATCH)
        losses.append(metrics["loss"][0])
    assert losses[-1] < 0.8 * losses[0]
