# SPDX-License-Identifier: Apache-2.0
"""A batch in parts, micro-batches, and what is added up over them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill.types import Batch


def split(batch: Batch, parts: int) -> Batch:
    """A batch `[B, ...]` as `[parts, B / parts, ...]`.

    Part i takes the rows i, i + parts, ...: a batch that is sharded over devices stays
    sharded in every part.

    Raises:
      ValueError: B does not divide into so many.
    """
    size = batch["mask"].shape[0]
    if size % parts:
        raise ValueError(
            f"a batch of {size} does not divide into {parts} micro-batches"
        )
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1),
        dict(batch),
    )


def accumulate(
    function: Callable[[Any, Any, Batch], tuple[Any, Any]],
    carry: Any,
    parts: Batch,
    count: int,
) -> tuple[Any, Any]:
    """The last carry, and the sum of trees, of a function called on each part in turn.

    Args:
      function: `(carry, i, part) -> (carry, tree)`.
      carry: the first.
      parts: from `split`.
      count: how many; a single one is called without a loop.
    """
    if count == 1:
        return function(carry, 0, jax.tree.map(lambda x: x[0], parts))

    def body(loop, xs):
        carry, total = loop
        carry, tree = function(carry, *xs)
        return (carry, jax.tree.map(jnp.add, total, tree)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(function, carry, jnp.int32(0), first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    xs = (jnp.arange(count), parts)
    return jax.lax.scan(body, (carry, zeros), xs)[0]
