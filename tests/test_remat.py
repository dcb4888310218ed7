# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing: the same parameters and gradients in less memory."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from builders import largest_difference

from jaxdistill import models
from jaxdistill.objectives import combine, hard_labels
from jaxdistill.steps import init_state, make_train_step

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
    """On every backend; how XLA then uses it is the next test's."""

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


ON_A_CHIP = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from test_remat import MODELS, STEP, batch, both
from jaxdistill import benchmark, models, parallel
from jaxdistill.steps import init_state, make_train_step

chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[:1]
run, (objective, optimizer) = parallel.mesh(chip), STEP

def temporaries(module):
    student = models.student(module)
    # So many images that what is kept does not fit beside the arithmetic.
    shapes = {k: jax.ShapeDtypeStruct((8192, *x.shape[1:]), x.dtype)
              for k, x in batch().items()}
    start = lambda b: init_state(jax.random.key(0), student, optimizer, b)
    step = run.compile(make_train_step(student, objective, optimizer))
    lowered = step.lower(jax.eval_shape(start, shapes), None, shapes)
    return benchmark.memory(lowered.compile())["temporaries"]

print(json.dumps({name: [temporaries(m) for m in both(name)] for name in ("vit", "resnet")}))
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'jaxdistill[tpu]')",
)
def test_remat_takes_less_memory_on_a_tpu():
    """XLA's CPU backend computes the block once all the same, and keeps it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(
            map(str, [*Path(__file__).parents[:2], *sys.path])
        ),
        "TPU_SKIP_MDS_QUERY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_CHIP],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (plain, remat) in json.loads(done.stdout.splitlines()[-1]).items():
        print(name, plain, remat)
        assert remat < 0.6 * plain, name
