# SPDX-License-Identifier: Apache-2.0
"""Models larger than a device: cut over a width, gathered only where they are used."""

import math
import re
from functools import lru_cache

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from jaxdistill import models, parallel, teachers
from jaxdistill.data import Batches
from jaxdistill.parallel.sharding import FSDP, cut_width
from jaxdistill.train import (
    Checkpoints,
    cost,
    fit,
    init_state,
    make_train_step,
    scan_train,
)
from jaxdistill.types import Outputs
from tests.builders import CLASSES, HARD_AND_SOFT, assert_identical, largest_difference

pytestmark = pytest.mark.usefixtures("any_teacher")

WIDTH, LAYERS, BATCH = 128, 6, 16
SMALLEST = 2**10


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        inner = nn.relu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(inner), None


class Stack(nn.Module):
    """Equal layers under `nn.scan`: their parameters are `[LAYERS, ...]`."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = scanned(name="layers")(nn.Dense(WIDTH)(inputs), None)
        return Outputs(nn.Dense(CLASSES)(x))


STACK, STUDENT = Stack(), models.MLP((8 * WIDTH, CLASSES))
OPTIMIZER = optax.sgd(0.05, momentum=0.9)


def batch(seed: int = 0) -> dict:
    draw = np.random.default_rng(seed)
    return {
        "inputs": draw.normal(size=(BATCH, WIDTH)).astype(np.float32),
        "labels": draw.integers(0, CLASSES, BATCH).astype(np.int32),
        "mask": np.ones(BATCH, np.float32),
    }


@lru_cache
def fsdp(shards: int = 8, devices: int = 8) -> parallel.Partitioner:
    rule = cut_width(shards, smallest=SMALLEST)
    return parallel.fsdp(jax.devices()[:devices], shards, rule)


@lru_cache
def fresh(module):
    return init_state(jax.random.key(0), models.student(module), OPTIMIZER, batch())


def teacher():
    return teachers.live(STACK, {"params": fresh(STACK).params})


def step(module):
    return make_train_step(models.student(module), HARD_AND_SOFT, OPTIMIZER)


def trained(partitioner, module, steps: int = 5):
    state, placed = partitioner.place(fresh(module)), partitioner.place(teacher())
    compiled = partitioner.compile(step(module))
    for seed in range(steps):
        state, metrics = compiled(state, placed, partitioner.split(batch(seed)))
    return state, metrics


@lru_cache
def program(shards: int, devices: int = 8):
    """The compiled step of a scanned student under a scanned teacher."""
    partitioner = fsdp(shards, devices)
    arguments = (
        partitioner.place(fresh(STACK)),
        partitioner.place(teacher()),
        partitioner.split(batch()),
    )
    return partitioner.compile(step(STACK)).lower(*arguments).compile()


@pytest.mark.parametrize("module", [STACK, STUDENT], ids=["scanned", "mlp"])
@pytest.mark.parametrize("shards", [4, 8])
def test_equals_one_device(module, shards):
    partitioner = fsdp(shards)
    state, metrics = trained(partitioner, module)
    expected, expected_metrics = trained(parallel.jit(), module)
    assert largest_difference(partitioner.fetch(state.params), expected.params) <= 2e-6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        partitioner.fetch(metrics),
        expected_metrics,
    )


def test_nothing_large_is_copied_before_or_after_steps():
    partitioner = fsdp()
    state, _ = trained(partitioner, STACK)
    for tree in (partitioner.place(fresh(STACK)), partitioner.place(teacher()), state):
        leaves = [x for x in jax.tree.leaves(tree) if x.size >= SMALLEST]
        assert len(leaves) >= 3
        for leaf in leaves:
            assert leaf.addressable_shards[0].data.size == leaf.size // 8
            # Whole layers on a device would all be gathered to run one.
            assert leaf.addressable_shards[0].data.shape[0] == leaf.shape[0] or (
                leaf.ndim == 2
            )


def test_memory_of_arguments_falls_with_the_shards():
    whole = cost.memory(program(1, 1))["arguments"]
    for shards in (2, 8):
        part = cost.memory(program(shards))["arguments"]
        assert part == pytest.approx(whole / shards, rel=0.05)


def test_one_layer_is_gathered_at_a_time():
    """Of student and teacher; neither the stack nor the batch ever lies on a device."""
    text = program(8).as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather\(", text)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in gathered]
    assert max(sizes) == 4 * WIDTH * WIDTH  # a layer's larger kernels
    assert sizes.count(4 * WIDTH * WIDTH) >= 4  # two of the student's, of the teacher's
    # What every device holds at once beside its arguments is less than one stack.
    stack = LAYERS * 8 * WIDTH * WIDTH * 4
    assert cost.memory(program(8))["temporaries"] < stack
    assert cost.memory(program(1, 1))["temporaries"] > stack


@pytest.mark.parametrize(("devices", "kind"), [(8, "fsdp"), (4, "fsdp"), (1, "jit")])
def test_a_checkpoint_is_read_where_it_is_needed(devices, kind, tmp_path):
    state, _ = trained(fsdp(), STACK, 1)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {"epoch": 1})
    checkpoints.wait()
    partitioner = fsdp(devices, devices) if kind == "fsdp" else parallel.jit()
    places = partitioner.shardings(fresh(STACK))
    found, position = checkpoints.restore(fresh(STACK), shardings=places)
    assert position == {"epoch": 1}
    assert_identical(partitioner.fetch(found), fsdp().fetch(state))
    for leaf, place in zip(*map(jax.tree.leaves, (found, places)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    checkpoints.close()


def test_a_finished_training_comes_back_whole(tmp_path):
    """Trained now, or found as it was, and not in parts on the devices."""
    found = []
    partitioner, examples = fsdp(), {k: v for k, v in batch().items() if k != "mask"}
    size = len(examples["labels"])
    for _ in range(2):
        checkpoints = Checkpoints(tmp_path)
        state = fit(
            fresh(STUDENT),
            partitioner.compile(scan_train(step(STUDENT)), batch_axis=1),
            partitioner=partitioner,
            examples=partitioner.replicate(examples),
            batches=Batches(size, size),
            steps=2,
            teacher=partitioner.place(teacher()),
            checkpoints=checkpoints,
            progress=False,
        )
        checkpoints.close()
        found.append(state)
    assert_identical(*found)
    kinds = [[type(x) for x in jax.tree.leaves(state)] for state in found]
    assert kinds[0] == kinds[1]


def test_a_state_is_drawn_in_parts():
    """For what no device could hold; the numbers are those drawn on one."""
    partitioner = fsdp()

    def draw():
        return init_state(jax.random.key(0), models.student(STACK), OPTIMIZER, batch())

    places = partitioner.shardings(jax.eval_shape(draw))
    state = jax.jit(draw, out_shardings=places)()
    expected = partitioner.fetch(fresh(STACK))
    assert largest_difference(partitioner.fetch(state.params), expected.params) <= 1e-6
    kernel = state.params["layers"]["Dense_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("head", (8, 64), P(None, FSDP)),
        ("head", (64, 8), P(FSDP)),
        ("head", (64, 64), P(None, FSDP)),
        ("head", (3, 3, 6, 64), P(None, None, None, FSDP)),
        ("head", (7, 9), P()),
        ("head", (4, 4), P()),  # small
        ("layers", (64, 8, 16), P(None, None, FSDP)),
        ("layers", (64, 6, 6), P()),  # only the layers would divide
        ("blocks", (64, 6, 6), P(FSDP)),
    ],
)
def test_the_longest_axis_that_divides_is_cut(path, shape, expected):
    rule = cut_width(8, smallest=20)
    tree = {"params": {path: {"kernel": np.zeros(shape)}}}
    ((found, _),), _ = jax.tree_util.tree_flatten_with_path(tree)
    assert rule(found, shape) == expected


def test_shards_must_divide_the_devices():
    assert parallel.choose("fsdp").name == "fsdp"
    with pytest.raises(ValueError, match="3 shards do not divide 8 devices"):
        parallel.fsdp(shards=3)
