# SPDX-License-Identifier: Apache-2.0
"""Mixed precision, in one place: what the forward and backward passes compute in.

The step lowers parameters, teacher and inputs on their way into the forward pass. All
else stays as it is: the parameters that are updated, the optimizer's state, running
statistics, masks; and losses promote what they get to float32. So a bfloat16 run has
float32 checkpoints, and its student is evaluated and exported in float32.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

Precision = Literal["float32", "bfloat16"]
"""What a run computes in, as a script's flag. No loss scaling: bfloat16 has float32's
range."""

STATISTICS = "batch_stats"


def lower(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves in `dtype`, but for running statistics.

    Args:
      tree: any pytree: parameters, a teacher, inputs.
      dtype: a floating type, or None for the tree as it is.

    >>> lower({"ids": jnp.arange(2), "x": jnp.ones(2)}, jnp.bfloat16)["x"].dtype
    dtype(bfloat16)
    """
    if dtype is None:
        return tree

    def cast(path, leaf):
        kept = any(getattr(key, "key", None) == STATISTICS for key in path)
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return leaf.astype(dtype) if floating and not kept else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)
