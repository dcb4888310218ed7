# SPDX-License-Identifier: Apache-2.0
"""Batches of texts cut behind their longest one: padding of all of them costs nothing.

It pays where a batch's texts are of like length, see `data.Batches`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.types import Array, Batch


def trimmed(function: Callable[[Batch], Any], to: Sequence[int]) -> Callable:
    """The function, of its batch cut to the shortest length that holds all its texts.

    Each length is compiled, and one of them runs. Over a vmapped batch all would.

    Args:
      function: its result's shapes are the same at each length, and padding does not
        matter to it, but for the draws of dropout.
      to: lengths in tokens, from 1 up; beside them there is always the whole. Without
        any the function is returned as it is.

    Returns:
      `batch -> result`; `batch["inputs"]` has `attention_mask` `[B, L]`.

    Raises:
      ValueError: a length below 1, or inputs without such a mask.
    """
    if not to:
        return function
    if min(to) < 1:
        raise ValueError(f"lengths to cut batches to start at 1, got {min(to)}")

    def call(batch: Batch) -> Any:
        mask = mask_of(batch["inputs"])
        whole = mask.shape[1]
        sizes = [*sorted(size for size in set(to) if size < whole), whole]
        which = jnp.searchsorted(jnp.array(sizes), lengths(mask).max())
        branches = [
            lambda batch, size=size: function(cut(batch, size)) for size in sizes
        ]
        return jax.lax.switch(which, branches, batch)

    return call


def mask_of(inputs: Any) -> Any:
    """The inputs' `attention_mask` `[B, L]`.

    Raises:
      ValueError: they have none.
    """
    if not isinstance(inputs, Mapping) or "attention_mask" not in inputs:
        raise ValueError("trim_to needs inputs with an attention_mask")
    return inputs["attention_mask"]


def lengths(mask: Any) -> Any:
    """Tokens of each text up to its last one, `[B]`, of a mask `[B, L]`.

    >>> lengths(np.array([[1, 0, 0, 0], [0, 1, 0, 0]]))
    array([1, 2])
    """
    return ((mask > 0) * np.arange(1, mask.shape[1] + 1)[None]).max(1)


def shortest_first(inputs: Any) -> np.ndarray:
    """The order of texts by their length; those of equal length stay as they are.

    Raises:
      ValueError: see `mask_of`.
    """
    return np.argsort(lengths(np.asarray(mask_of(inputs))), kind="stable")


def cut(batch: Batch, length: int) -> Batch:
    """A batch's first tokens, of whatever it has by token.

    These are inputs `[B, L, ...]`, labels and masks `[B, L]`, and what is stored of a
    teacher's outputs on tokens, `[B, views, L, ...]`.
    """
    whole = mask_of(batch["inputs"]).shape[1]

    def first(x: Array, axis: int) -> Array:
        by_token = x.ndim > axis and x.shape[axis] == whole
        return jax.lax.slice_in_dim(x, 0, length, axis=axis) if by_token else x

    parts = dict(batch)
    for name in {"inputs", "labels", "token_mask"} & set(batch):
        parts[name] = jax.tree.map(lambda x: first(x, 1), batch[name])
    stored = batch.get("teacher", {})
    # [B, views, C] of a text is one axis less than [B, views, L, C] of its tokens.
    if any(x.ndim > 3 for x in stored.values()):
        parts["teacher"] = {name: first(x, 2) for name, x in stored.items()}
    return parts
