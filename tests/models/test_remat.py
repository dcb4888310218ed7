# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: the same parameters and gradients, less kept for them."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models
from jaxdistill.objectives import combine, hard_labels
from jaxdistill.train import init_state, make_train_step
from tests.builders import largest_difference

MODELS = {
    "vit": models.ViT(5, width=32, depth=3, heads=2, patch=4),
    "resnet": models.ResNet(5, stages=(2, 1), widths=(8, 8, 8)),
    "group norm": models.ResNet(5, stages=(3,), widths=(8, 8), norm="group"),
}
STEP = combine({"hard": (1.0, hard_labels())}), optax.sgd(1.0)


def batch() -> dict:
    draw = np.random.default_rng(0)
    return {
        "inputs": draw.normal(size=(16, 16, 16)).astype(np.float32),
        "labels": draw.integers(0, 5, 16).astype(np.int32),
        "mask": np.ones(16, np.float32),
    }


def both(name):
    """The model, and the same with remat."""
    return MODELS[name], dataclasses.replace(MODELS[name], remat=True)


@pytest.mark.parametrize("name", MODELS)
def test_remat_changes_nothing(name):
    objective, optimizer = STEP
    states = []
    for module in both(name):
        student = models.student(module)
        state = init_state(jax.random.key(0), student, optimizer, batch())
        step = jax.jit(make_train_step(student, objective, optimizer))
        # At rate 1 the step is the gradient.
        states.append((state, step(state, None, batch())[0]))
    (before, after), (same, equal) = states
    assert jax.tree.structure(before) == jax.tree.structure(same)
    assert largest_difference(same.params, before.params) == 0
    assert largest_difference(equal.params, after.params) <= 1e-6
    if after.model_state:
        assert largest_difference(equal.model_state, after.model_state) <= 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_remat_keeps_less_for_the_backward_pass(name):
    """Counted before XLA: its CPU backend undoes the second computation, and its
    `memory_analysis` shows no difference there."""

    def kept(module):
        variables = jax.eval_shape(module.init, jax.random.key(0), batch()["inputs"])

        def backward(variables, inputs):
            def logits(variables):
                outputs = module.apply(
                    variables, inputs, train=True, mutable=["batch_stats"]
                )
                return outputs[0].logits

            return jax.vjp(logits, variables)[1]

        shapes = jax.eval_shape(backward, variables, batch()["inputs"])
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

    plain, remat = (kept(module) for module in both(name))
    assert remat < 0.35 * plain
