# SPDX-License-Identifier: Apache-2.0
"""The optimizer of the text studies."""

from typing import Any

import jax
import optax


def clipped_adamw(
    rate: Any, weight_decay: float, **options: Any
) -> optax.GradientTransformation:
    """AdamW that decays matrices alone, of gradients clipped to a norm of 1.

    Args:
      rate: a number or a schedule.
      weight_decay: of the matrices; biases and scales have none.
      options: of `optax.adamw`.
    """
    options["mask"] = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    adamw = optax.adamw(rate, weight_decay=weight_decay, **options)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)
