# SPDX-License-Identifier: Apache-2.0
"""Fingerprints change with anything that counts, and with nothing else."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.core import freeze

from jaxdistill import models, teachers
from jaxdistill.teachers import fingerprints
from tests.builders import assert_identical, nnx_teacher

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
def test_of_tree_changes_with_anything(other):
    assert fingerprints.of_tree(other) != fingerprints.of_tree(TREE)


def test_of_tree_tells_eight_bit_floats_apart():
    a, b = (
        {"x": jnp.zeros(3, dtype)} for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2)
    )
    assert fingerprints.of_tree(a) != fingerprints.of_tree(b)


def test_of_tree_is_the_same_for_equal_trees():
    copy = jax.tree.map(jnp.array, dict(reversed(TREE.items())))
    assert fingerprints.of_tree(copy) == fingerprints.of_tree(TREE)
    transposed = {**TREE, "w": np.asfortranarray(TREE["w"])}
    assert_identical(transposed, TREE)
    keys = [{"rng": jax.random.key(seed)} for seed in (0, 0, 1)]
    digests = [fingerprints.of_tree(tree) for tree in keys]
    assert digests[0] == digests[1] != digests[2]


def test_of_tree_tells_a_scalar_from_one_element():
    scalar, one = jnp.zeros(()), jnp.zeros((1,))
    assert fingerprints.of_tree({"a": scalar}) != fingerprints.of_tree({"a": one})


IMAGES = np.random.default_rng(0).normal(size=(1, 4, 4)).astype(np.float32)


def vit(heads: int = 2, **options):
    module = models.ViT(3, 8, 1, heads, patch=2, **options)
    variables = models.ViT(3, 8, 1, 2, patch=2).init(jax.random.key(0), IMAGES)
    return teachers.live(module, variables)


def test_of_model_knows_what_the_weights_do_not():
    found = [
        vit(),
        vit(heads=4),
        teachers.ensemble([vit()]),
        teachers.mean_logits([vit()]),
        teachers.mean_logits([vit(heads=4)]),
    ]
    assert len({fingerprints.of_tree(teacher) for teacher in found[:2]}) == 1
    assert len({fingerprints.of_model(teacher) for teacher in found}) == len(found)


def test_of_model_is_the_same_for_equal_teachers():
    frozen = teachers.live(vit().module, freeze(vit().variables))
    named = teachers.live(vit().module.copy(name="other"), vit().variables)
    default = vit(remat=False)
    same = {fingerprints.of_model(teacher) for teacher in (vit(), frozen, named)}
    assert same == {fingerprints.of_model(default)}


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


def of_all():
    odd = Odd(np.zeros(1), ODD)
    return [fingerprints.of_model(teacher) for teacher in (nnx_teacher(), odd, vit())]


def test_of_model_is_the_same_in_every_process():
    """Neither hashes of strings nor addresses are in it."""
    code = "from tests.teachers.test_fingerprints import of_all; print(*of_all())"
    here = {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONHASHSEED": "12345"}
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **here, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == of_all()


@pytest.mark.parametrize(
    "static", [1, "1", None, activation, partial(activation, x=3), {"a": 1}, (1, 2)]
)
def test_of_model_changes_with_a_static_value(static):
    one, other = Odd(np.zeros(1), static), Odd(np.zeros(1), ODD)
    assert fingerprints.of_tree(one) == fingerprints.of_tree(other)
    assert fingerprints.of_model(one) != fingerprints.of_model(other)
