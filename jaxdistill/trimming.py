# SPDX-License-Identifier: Apache-2.0
"""Batches of texts cut behind their longest one: padding of all of them costs nothing.

It pays where a batch's texts are of like length, see `data.Batches`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.types import Batch

BY_TOKEN = {"inputs": 2, "labels": 2, "token_mask": 2, "teacher": 3}
"""Parts of a batch, and how many axes they have at least where the second is tokens"""


def trimmed(function: Callable[[Batch], Any], to: Sequence[int]) -> Callable:
    """The function, of its batch cut to the shortest length that holds all its texts.

    Each length is compiled, and one of them runs. Over a vmapped batch all would.

    Args:
      function: its result's shapes are the same at each length.
      to: lengths in tokens; beside them there is always the whole.

    Returns:
      `batch -> result`; `batch["inputs"]` has `attention_mask` `[B, L]`.

    Raises:
      ValueError: the inputs have no such mask.
    """

    def call(batch: Batch) -> Any:
        inputs = batch["inputs"]
        if not isinstance(inputs, dict) or "attention_mask" not in inputs:
            raise ValueError(
                "lengths to cut a batch to need inputs with an attention_mask"
            )
        mask = inputs["attention_mask"]
        whole = mask.shape[1]
        sizes = [*sorted(size for size in set(to) if size < whole), whole]
        which = jnp.searchsorted(jnp.array(sizes), lengths(mask).max())
        branches = [
            lambda batch, size=size: function(cut(batch, size)) for size in sizes
        ]
        return jax.lax.switch(which, branches, batch)

    return call if to else function


def lengths(mask: Any) -> Any:
    """Tokens of each text up to its last one, `[B]`, of a mask `[B, L]`.

    >>> lengths(np.array([[1, 0, 0, 0], [0, 1, 0, 0]]))
    array([1, 2])
    """
    return ((mask > 0) * np.arange(1, mask.shape[1] + 1)[None]).max(1)


def cut(batch: Batch, length: int) -> Batch:
    """A batch's first tokens, of whatever it has by token.

    These are its inputs, its labels and masks `[B, L]`, and outputs `[B, L, ...]` that
    are stored of it.
    """

    def first(name: str, value: Any) -> Any:
        axes = BY_TOKEN.get(name)
        whole = lambda x: axes is None or x.ndim < axes  # noqa: E731
        return jax.tree.map(lambda x: x if whole(x) else x[:, :length], value)

    return {name: first(name, value) for name, value in batch.items()}
