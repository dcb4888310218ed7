# SPDX-License-Identifier: Apache-2.0
"""What each cell has for itself, in trees of what all cells share."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import struct


@struct.dataclass
class Own:
    """Arrays with an axis of cells first, each cell's own; others are shared by all."""

    tree: Any


def is_own(node: Any) -> bool:
    """Whether a node of a tree is each cell's own."""
    return isinstance(node, Own)


def has_own(tree: Any) -> bool:
    """Whether anything in a tree is each cell's own."""
    return any(map(is_own, jax.tree.leaves(tree, is_leaf=is_own)))


def stack(trees: Sequence[Any]) -> Any:
    """The cells' trees as one: what is one object in all is shared, the rest `Own`.

    Args:
      trees: examples or teachers, of one structure, one for each cell.

    >>> one, two = np.zeros(2), np.ones(2)
    >>> both = stack([{"inputs": one, "labels": one}, {"inputs": one, "labels": two}])
    >>> print(both["inputs"].shape, both["labels"].tree.shape)
    (2,) (2, 2)
    """

    def leaf(*each):
        if all(x is each[0] for x in each):
            return each[0]
        return Own(np.stack([np.asarray(x) for x in each]))

    return jax.tree.map(leaf, *trees)


def axes(tree: Any, own: Any, shared: Any) -> Any:
    """A prefix of the tree: `own` at what is each cell's own, `shared` elsewhere."""
    return jax.tree.map(lambda x: own if is_own(x) else shared, tree, is_leaf=is_own)


def of_a_cell(tree: Any) -> Any:
    """The tree as one cell has it, under vmap over `axes(tree, 0, None)`."""
    return jax.tree.map(lambda x: x.tree if is_own(x) else x, tree, is_leaf=is_own)


def apart(tree: Any) -> tuple[Any, Any]:
    """Two trees, `(own, shared)`, with None for what the other has."""
    own = jax.tree.map(lambda x: x if is_own(x) else None, tree, is_leaf=is_own)
    shared = jax.tree.map(lambda x: None if is_own(x) else x, tree, is_leaf=is_own)
    return own, shared


def combine(own: Any, shared: Any) -> Any:
    """The tree that `apart` took apart."""
    return jax.tree.map(
        lambda a, b: b if a is None else a,
        own,
        shared,
        is_leaf=lambda x: x is None or is_own(x),
    )
