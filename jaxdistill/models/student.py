# SPDX-License-Identifier: Apache-2.0
"""A linen module as the pure pair `(init, apply)` that the training step takes."""

from functools import lru_cache

from flax import linen as nn

from jaxdistill.types import Student


@lru_cache(maxsize=64)  # equal modules share functions, and with them compilations
def student(module: nn.Module) -> Student:
    """The module's `init` and its training-mode `apply`, as pure functions.

    Every collection but `params` is model state: it is updated by `apply` and returned.

    Args:
      module: called as `module(inputs, mask=None, train=False) -> Outputs`.
    """

    def init(rng, batch):
        variables = dict(module.init(rng, batch["inputs"], mask=batch["mask"]))
        return variables.pop("params"), variables

    def apply(params, model_state, batch, rng):
        outputs, updated = module.apply(
            {"params": params, **model_state},
            batch["inputs"],
            mask=batch["mask"],
            train=True,
            rngs={"dropout": rng},
            mutable=list(model_state),
        )
        return outputs, dict(updated)

    return Student(init, apply)
