# SPDX-License-Identifier: Apache-2.0
"""bfloat16 where the work is, float32 where the numbers are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, teachers
from jaxdistill.models import cast_to_compute
from jaxdistill.train import make_train_step
from tests.builders import (
    CLASSES,
    HARD_AND_SOFT,
    RECORDER,
    NormNet,
    assert_identical,
    largest_difference,
    live,
    make_batch,
    start,
    train_step,
)

MLP = models.MLP((32, CLASSES))
CONV = models.ConvNet((4,), 8, CLASSES, norm="batch")
MODULES = {"mlp": MLP, "batch_norm": NormNet(), "conv": CONV}


def bfloat16_step(module, **options):
    student = models.student(module)
    return make_train_step(
        student, HARD_AND_SOFT, RECORDER, dtype=jnp.bfloat16, **options
    )


def batch_for(module, seed=0):
    batch = make_batch(seed, 8, mask=[1, 1, 0, 1, 1, 1, 0, 1])
    if module is not CONV:
        return batch
    images = np.random.default_rng(seed).normal(size=(8, 6, 6)).astype(np.float32)
    return {**batch, "inputs": images}


def teacher_for(module, batch):
    variables = module.init(jax.random.key(7), batch["inputs"])
    return teachers.live(module, variables)


def products(jaxpr) -> list:
    """The types of both operands of every matrix product, nested ones included."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            found += [v.aval.dtype for v in equation.invars]
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += products(inner)
    return found


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_products_are_bfloat16_and_what_is_kept_float32(name, micro_batches):
    module = MODULES[name]
    batch = batch_for(module)
    state, teacher = start(module, batch), teacher_for(module, batch)
    step = bfloat16_step(module, micro_batches=micro_batches)
    traced = jax.make_jaxpr(step, return_shape=True)(state, teacher, batch)
    jaxpr, (moved, metrics) = traced
    assert set(products(jaxpr.jaxpr)) == {jnp.dtype(jnp.bfloat16)}
    types = lambda tree: jax.tree.map(lambda x: x.dtype, tree)  # noqa: E731
    assert types(moved) == types(state)
    assert {x.dtype for x in jax.tree.leaves(metrics)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", MODULES)
def test_the_gradient_is_float32s_to_bfloat16s_rounding(name):
    module = MODULES[name]
    exact, rounded = jax.jit(train_step(module)), jax.jit(bfloat16_step(module))
    gaps = []
    for seed in range(5):
        batch = batch_for(module, seed)
        arguments = start(module, batch), teacher_for(module, batch), batch
        gradients = [step(*arguments)[0].opt_state for step in (rounded, exact)]
        gaps.append(largest_difference(*gradients))
    # 8 bits of mantissa, a few layers deep; and not float32 in disguise. The median:
    # where a ReLU flips by rounding, a unit's gradient is another.
    assert 1e-4 < np.median(gaps) < 0.05


def test_float32_is_the_step_as_it_was():
    batch = make_batch(0, 8)
    student = models.student(MLP)
    step = make_train_step(student, HARD_AND_SOFT, RECORDER, dtype=None)
    default = train_step(MLP)
    arguments = (start(MLP, batch), live(MLP), batch)
    assert str(jax.make_jaxpr(step)(*arguments)) == str(
        jax.make_jaxpr(default)(*arguments)
    )


def test_only_floating_leaves_that_are_no_statistics_are_lowered():
    tree = {
        "params": {"kernel": jnp.ones(2), "ids": jnp.arange(2)},
        "batch_stats": {"norm": {"var": jnp.ones(2)}},
        "rng": jax.random.key(0),
    }
    low = cast_to_compute(tree, jnp.bfloat16)
    assert low["params"]["kernel"].dtype == jnp.bfloat16
    assert low["params"]["ids"].dtype == jnp.int32
    assert low["batch_stats"]["norm"]["var"].dtype == jnp.float32
    assert_identical(low["rng"], tree["rng"])
    assert cast_to_compute(tree, None) is tree
