# SPDX-License-Identifier: Apache-2.0
"""A student that starts as some of its teacher's layers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.models import (
    drop_types,
    gpt_config,
    stack_layers,
    take_layers,
    unstack_layers,
)
from tests.builders import assert_identical

SIZE = models.TransformerConfig(17, 8, 4, 2)
IDS = {"input_ids": jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 5)))}


def bert(depth, scan=False):
    encoder = models.Encoder(replace(SIZE, depth=depth), scan=scan)
    return models.BertMaskedLM(encoder)


PARAMS = jax.jit(bert(4).init)(jax.random.key(0), IDS)["params"]


def run(module, params):
    return jax.jit(module.apply)({"params": params}, IDS)


@pytest.mark.parametrize("scan", [False, True])
def test_the_first_layers_give_the_teachers_first_states(scan):
    given = stack_layers(PARAMS) if scan else PARAMS
    student = run(bert(2, scan), take_layers(given, (0, 1)))
    teacher = run(bert(4), PARAMS)
    for mine, theirs in zip(
        student.hidden_states, teacher.hidden_states[:2], strict=True
    ):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_layers_are_taken_in_the_order_asked_for():
    taken = take_layers(PARAMS, (2, -4))
    blocks, every = taken["encoder"]["blocks"], PARAMS["encoder"]["blocks"]
    assert_identical(blocks, {"layer_0": every["layer_2"], "layer_1": every["layer_0"]})
    for name in ("words", "places", "norm"):
        assert_identical(taken["encoder"][name], PARAMS["encoder"][name])
    assert_identical(taken["transform"], PARAMS["transform"])
    stacked = take_layers(stack_layers(PARAMS), (2, -4))
    assert_identical(unstack_layers(stacked), taken)


def test_a_gpt_has_layers_too():
    sizes = [gpt_config(17, 8, depth, 2) for depth in (3, 1)]
    teacher, student = (models.GPT(size) for size in sizes)
    params = jax.jit(teacher.init)(jax.random.key(0), IDS)["params"]
    assert run(student, take_layers(params, (2,))).logits.shape == (2, 5, 17)


def test_types_can_be_dropped():
    """A DistilBERT has none: of single texts its teacher's states stay as they are."""
    size = replace(SIZE, types=0, depth=2)
    student = models.BertMaskedLM(models.Encoder(size))
    params = drop_types(take_layers(PARAMS, (0, 3)))
    assert "segments" not in params["encoder"]
    expected = run(bert(2), take_layers(PARAMS, (0, 3)))
    found = run(student, params)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-6)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)
    beside = {"student": PARAMS, "projector": {}}
    assert "segments" not in drop_types(beside)["student"]["encoder"]
    with pytest.raises(ValueError, match="the parameters have no token types"):
        drop_types(params)


def test_what_is_on_the_host_keeps_its_precision():
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
    stacked = stack_layers(wide)
    assert {x.dtype for x in jax.tree.leaves(stacked)} == {np.dtype(np.float64)}
    assert_identical(unstack_layers(stacked), wide)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "at least one of its teacher's layers"),
        ((0, 4), "there is no layer 4: the"),
    ],
)
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(ValueError, match=message):
        take_layers(PARAMS, layers)
