# SPDX-License-Identifier: Apache-2.0
"""A module bound to its variables: what is evaluated, exported, or teaches."""

from typing import Any

from flax import linen as nn
from flax import struct

from jaxdistill.models.adapters import strip
from jaxdistill.types import (
    Batch,
    Outputs,
    TrainState,
)


@struct.dataclass
class Live:
    """A linen module with its variables. The module is static: it is hashed by its
    fields, where a bound method would retrace the step at every construction."""

    variables: Any
    module: Any = struct.field(pytree_node=False)

    def __call__(self, batch: Batch) -> Outputs:
        return self.module.apply(
            self.variables, batch["inputs"], mask=batch["mask"], train=False
        )


def live(module: nn.Module, variables: Any) -> Live:
    """A teacher that runs its forward pass in the student's step.

    Args:
      module: called as `module(inputs, mask=None, train=False) -> Outputs`.
      variables: `{"params": ..., "batch_stats": ...}`.
    """
    return Live(variables, module)


def trained(module: nn.Module, state: TrainState) -> Live:
    """A trained state as a model in evaluation mode: to evaluate, or to teach.

    A student trained with a projector comes without it.
    """
    module, variables = strip(module, {"params": state.params, **state.model_state})
    return Live(variables, module)
