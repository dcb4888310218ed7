# SPDX-License-Identifier: Apache-2.0
"""Teachers: any pytree from a batch to outputs, in evaluation mode, never trained."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from builders import (
    CLASSES,
    HARD_AND_SOFT,
    WIDTH,
    NormNet,
    assert_identical,
    live,
    make_batch,
    start,
)
from flax import nnx, struct
from flax.core import freeze

from jaxdistill import models, teachers
from jaxdistill.objectives import combine, soft_targets
from jaxdistill.steps import init_state, make_train_step
from jaxdistill.types import Outputs, Student

MLP = models.MLP((8, CLASSES))
BATCH = make_batch(0, 8, mask=[1, 1, 1, 1, 1, 1, 0, 0])


@struct.dataclass
class NnxTeacher:
    """What a user writes to let an NNX model teach."""

    state: Any
    graph: Any = struct.field(pytree_node=False)

    def __call__(self, batch) -> Outputs:
        return Outputs(nnx.merge(self.graph, self.state)(batch["inputs"]))


def nnx_teacher():
    graph, state = nnx.split(nnx.Linear(WIDTH, CLASSES, rngs=nnx.Rngs(0)))
    return NnxTeacher(state, graph)


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
    found = teachers.trained(NormNet(), state)(BATCH)
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
    found = teachers.mean_log_probs(logits, 2)
    np.testing.assert_allclose(found, np.log(jax.nn.softmax(logits).mean(0)), atol=1e-6)
    single = teachers.mean_log_probs(logits[0], 2)
    np.testing.assert_allclose(single, jax.nn.log_softmax(logits[0]), atol=1e-6)


@each
def test_any_teacher_teaches_and_nothing_of_it_moves(make):
    """The loss falls, the teacher gets no gradient, and all its variables stay."""
    teacher, optimizer = make(), optax.sgd(0.1)
    before = teachers.digest(teacher)
    objective = combine({"soft": (1.0, soft_targets(temperature=2.0))})
    step = make_train_step(models.student(MLP), objective, optimizer)

    def loss_of(variables, state):
        taught = jax.tree.unflatten(structure, variables)
        return step(state, taught, BATCH)[1]["soft"][0]

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
    assert teachers.digest(teacher) == before


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


TREE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int32(3)}


@pytest.mark.parametrize(
    "other",
    [
        {**TREE, "w": TREE["w"] + np.eye(2, 3, dtype=np.float32) * 1e-6},
        {**TREE, "n": np.int32(4)},
        {**TREE, "w": TREE["w"].reshape(3, 2)},
        {**TREE, "w": TREE["w"].view(np.int32)},
        {"w": TREE["w"], "m": TREE["n"]},
        {**TREE, "more": np.zeros(0, np.float32)},
    ],
    ids=["bit", "number", "shape", "type", "name", "leaf"],
)
def test_digest_changes_with_anything(other):
    assert teachers.digest(other) != teachers.digest(TREE)


def test_digest_tells_eight_bit_floats_apart():
    a, b = (
        {"x": jnp.zeros(3, dtype)} for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    )
    assert teachers.digest(a) != teachers.digest(b)


def test_digest_is_the_same_for_equal_trees():
    copy = jax.tree.map(jnp.array, dict(reversed(TREE.items())))
    assert teachers.digest(copy) == teachers.digest(TREE)
    transposed = {**TREE, "w": np.asfortranarray(TREE["w"])}
    assert_identical(transposed, TREE)
    keys = [{"rng": jax.random.key(seed)} for seed in (0, 0, 1)]
    digests = [teachers.digest(tree) for tree in keys]
    assert digests[0] == digests[1] != digests[2]


def test_digests_tell_a_scalar_from_one_element():
    scalar, one = jnp.zeros(()), jnp.zeros((1,))
    assert teachers.digest({"a": scalar}) != teachers.digest({"a": one})


IMAGES = np.random.default_rng(0).normal(size=(1, 4, 4)).astype(np.float32)


def vit(heads: int = 2, **options):
    module = models.ViT(3, 8, 1, heads, patch=2, **options)
    variables = models.ViT(3, 8, 1, 2, patch=2).init(jax.random.key(0), IMAGES)
    return teachers.live(module, variables)


def test_fingerprint_knows_what_the_weights_do_not():
    found = [
        vit(),
        vit(heads=4),
        teachers.ensemble([vit()]),
        teachers.mean_logits([vit()]),
        teachers.mean_logits([vit(heads=4)]),
    ]
    assert len({teachers.digest(teacher) for teacher in found[:2]}) == 1
    assert len({teachers.fingerprint(teacher) for teacher in found}) == len(found)


def test_fingerprint_is_the_same_for_equal_teachers():
    frozen = teachers.live(vit().module, freeze(vit().variables))
    named = teachers.live(vit().module.copy(name="other"), vit().variables)
    default = vit(remat=False)
    same = {teachers.fingerprint(teacher) for teacher in (vit(), frozen, named)}
    assert same == {teachers.fingerprint(default)}


def activation(x):
    return x


@struct.dataclass
class Odd:
    """Static values of every kind."""

    w: Any
    static: Any = struct.field(pytree_node=False)


ODD = (
    {"b": 1, "a": frozenset("xyz")},
    (activation, partial(activation, x=2), jnp.float32, np.dtype("int8")),
    object(),
)


def fingerprints():
    odd = Odd(np.zeros(1), ODD)
    return [teachers.fingerprint(teacher) for teacher in (nnx_teacher(), odd, vit())]


def test_fingerprint_is_the_same_in_every_process():
    """Neither hashes of strings nor addresses are in it."""
    code = "import test_teachers; print(*test_teachers.fingerprints())"
    here = {"PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "12345"}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **here, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == fingerprints()


@pytest.mark.parametrize(
    "static", [1, "1", None, activation, partial(activation, x=3), {"a": 1}, (1, 2)]
)
def test_fingerprint_changes_with_a_static_value(static):
    one, other = Odd(np.zeros(1), static), Odd(np.zeros(1), ODD)
    assert teachers.digest(one) == teachers.digest(other)
    assert teachers.fingerprint(one) != teachers.fingerprint(other)
