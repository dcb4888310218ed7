# SPDX-License-Identifier: Apache-2.0
"""Trials: every combination of hyperparameters and seeds, and what each has alone."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxdistill.teachers.views import StoredOutputs

Trial = Mapping[str, Any]
"""One trial's numbers, traced, by their names."""


def grid(**axes: Iterable[Any]) -> dict[str, np.ndarray]:
    """Every combination of the values, as `{name: [trials]}`; the last varies fastest.

    Raises:
      ValueError: no axes, or one without values.

    >>> trials = grid(temperature=[1.0, 4.0], seed=range(2))
    >>> print(trials["temperature"], trials["seed"])
    [1. 1. 4. 4.] [0 1 0 1]
    """
    values = {name: list(axis) for name, axis in axes.items()}
    empty = [name for name, axis in values.items() if not axis]
    if empty or not values:
        raise ValueError(
            f"a grid needs values on every axis, none for {empty or 'any'}"
        )
    combinations = list(itertools.product(*values.values()))
    columns = zip(*combinations, strict=True)
    trials = {}
    for name, column in zip(values, columns, strict=True):
        array = np.array(column)
        trials[name] = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return trials


def size(trials: Mapping[str, Any]) -> int:
    """How many trials there are."""
    return len(next(iter(trials.values())))


@struct.dataclass
class PerTrial:
    """Arrays with an axis of trials first, one for each; others are shared by all."""

    tree: Any


def is_per_trial(node: Any) -> bool:
    """Whether a node of a tree is each trial's own."""
    return isinstance(node, PerTrial)


def has_per_trial(tree: Any) -> bool:
    """Whether anything in a tree is each trial's own."""
    return any(map(is_per_trial, jax.tree.leaves(tree, is_leaf=is_per_trial)))


def stack(trees: Sequence[Any]) -> Any:
    """The trials' trees as one: one object in all is shared, the rest is `PerTrial`.

    Args:
      trees: examples or teachers, of one structure, one for each trial.

    >>> one, two = np.zeros(2), np.ones(2)
    >>> both = stack([{"inputs": one, "labels": one}, {"inputs": one, "labels": two}])
    >>> print(both["inputs"].shape, both["labels"].tree.shape)
    (2,) (2, 2)
    """

    def alike(tree):
        # Each trial's outputs are of its own teacher, which static data cannot say.
        if isinstance(tree, StoredOutputs):
            return StoredOutputs(tree, view=tree.view)
        plain = isinstance(tree, Mapping)
        return {k: alike(x) for k, x in tree.items()} if plain else tree

    def leaf(*each):
        if all(x is each[0] for x in each):
            return each[0]
        return PerTrial(np.stack([np.asarray(x) for x in each]))

    return jax.tree.map(leaf, *map(alike, trees))


def axes_of(tree: Any, own: Any, shared: Any) -> Any:
    """A prefix of the tree: `own` at what is each trial's own, `shared` elsewhere."""
    return jax.tree.map(
        lambda x: own if is_per_trial(x) else shared, tree, is_leaf=is_per_trial
    )


def of_one(tree: Any) -> Any:
    """The tree as one trial has it, under vmap over `axes_of(tree, 0, None)`."""
    return jax.tree.map(
        lambda x: x.tree if is_per_trial(x) else x, tree, is_leaf=is_per_trial
    )


def of_trial(tree: Any, index: int) -> Any:
    """The tree as one trial has it, by its number."""

    def one(x):
        return jax.tree.map(lambda own: own[index], x.tree) if is_per_trial(x) else x

    return jax.tree.map(one, tree, is_leaf=is_per_trial)


def apart(tree: Any) -> tuple[Any, Any]:
    """Two trees, `(own, shared)`, with None for what the other has."""
    own = jax.tree.map(
        lambda x: x if is_per_trial(x) else None, tree, is_leaf=is_per_trial
    )
    shared = jax.tree.map(
        lambda x: None if is_per_trial(x) else x, tree, is_leaf=is_per_trial
    )
    return own, shared


def combine(own: Any, shared: Any) -> Any:
    """The tree that `apart` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        own,
        shared,
        is_leaf=lambda x: x is None or is_per_trial(x),
    )
