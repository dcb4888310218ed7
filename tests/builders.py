# SPDX-License-Identifier: Apache-2.0
"""Tiny models, batches and comparisons that several test files share."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx, struct

from jaxdistill import models, teachers, train
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.teachers import fingerprints
from jaxdistill.types import Outputs

CLASSES, WIDTH = 5, 6

HARD_AND_SOFT = combine(
    {"hard": (0.7, hard_labels()), "soft": (0.3, soft_targets(temperature=2.0))}
)


class NormNet(nn.Module):
    """A network whose logits depend on the batch's statistics in training."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        x = nn.Dense(8)(inputs)
        x = models.BatchNorm(axis_name=self.axis_name)(x, mask, train)
        return Outputs(nn.Dense(CLASSES)(nn.relu(x)))


class TokenNet(nn.Module):
    """Logits `[B, L, C]` from inputs `[B, L, WIDTH]`."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        return Outputs(nn.Dense(CLASSES)(nn.tanh(nn.Dense(8)(inputs))))


def make_batch(seed: int, size: int, *, mask=None, tokens: int | None = None) -> dict:
    """Random inputs and labels; tokens of the second half of each row are masked."""
    rng = np.random.default_rng(seed)
    shape = (size,) if tokens is None else (size, tokens)
    batch = {
        "inputs": rng.normal(size=(*shape, WIDTH)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, shape).astype(np.int32),
        "mask": np.ones(size, np.float32)
        if mask is None
        else np.asarray(mask, np.float32),
        "index": np.arange(size, dtype=np.int32),
    }
    if tokens is not None:
        batch["token_mask"] = (rng.random(shape) < 0.6).astype(np.float32)
    return batch


@lru_cache
def live(module: nn.Module, seed: int = 7, *, tokens: int | None = None):
    """A teacher with random variables."""
    inputs = make_batch(0, 2, tokens=tokens)["inputs"]
    variables = jax.jit(module.init)(jax.random.key(seed), inputs)
    return teachers.live(module, variables)


def recorder(rate: float) -> optax.GradientTransformation:
    """SGD whose state is the last gradient: nothing is lost in the parameters' size."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda grads, state, params=None: (
            jax.tree.map(lambda g: -rate * g, grads),
            grads,
        ),
    )


RECORDER = recorder(0.1)


def start(module: nn.Module, batch, optimizer=RECORDER):
    """A fresh state of a module's student."""
    student = models.student(module)
    return train.init_state(jax.random.key(0), student, optimizer, batch)


@lru_cache
def train_step(module: nn.Module, optimizer=RECORDER, micro_batches: int = 1):
    """The step on labels and soft targets, the same function for every test."""
    student = models.student(module)
    return train.make_train_step(
        student, HARD_AND_SOFT, optimizer, micro_batches=micro_batches
    )


def largest_difference(tree, other) -> float:
    """The largest difference of two trees, over the largest entry of the second."""
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(np.shape(a), np.shape(b)), tree, other
    )
    pairs = list(zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True))
    gap = max(np.abs(np.asarray(a, np.float64) - b).max() for a, b in pairs)
    return gap / max(np.abs(np.asarray(b)).max() for _, b in pairs)


def assert_identical(tree, other) -> None:
    """Two trees of arrays (keys included) are equal to the bit."""
    assert fingerprints.by_leaf(tree) == fingerprints.by_leaf(other)


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
