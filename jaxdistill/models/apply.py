# SPDX-License-Identifier: Apache-2.0
"""What surrounds a module: its variables, a student's two functions, projectors.

Mixed precision is here too: what the forward and backward passes compute in. The step
casts parameters, teacher and inputs on their way into the forward pass. All else stays
as it is: the parameters that are updated, the optimizer's state, running statistics,
masks; and losses promote what they get to float32. So a bfloat16 run has float32
checkpoints, and its student is evaluated and exported in float32.
"""

from functools import lru_cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import errors, struct
from flax import linen as nn

from jaxdistill.types import Batch, Outputs, Student, TrainState, whole_logits


class WrongInputs(ValueError):
    """Inputs of other shapes than a model's variables are for."""


@struct.dataclass
class BoundModule:
    """A linen module with its variables. The module is static: it is hashed by its
    fields, where a bound method would retrace the step at every construction."""

    variables: Any
    module: Any = struct.field(pytree_node=False)

    def __call__(self, batch: Batch) -> Outputs:
        given = self.variables, batch["inputs"]
        try:
            outputs = self.module.apply(*given, mask=batch["mask"], train=False)
        except errors.ScopeParamShapeError as error:
            raise WrongInputs(
                f"a {type(self.module).__name__} does not take inputs of shapes "
                f"{jax.tree.map(jnp.shape, batch['inputs'])}: its variables are of "
                f"others ({str(error).partition(' (https')[0]})"
            ) from error
        return check_outputs(self.module, outputs)


def check_outputs(module: Any, outputs: Any) -> Outputs:
    """A model's outputs.

    Raises:
      ValueError: they are something else, such as an array of logits.
    """
    if not hasattr(outputs, "logits"):
        raise ValueError(
            f"a {type(module).__name__} returns {type(outputs).__name__}, and must "
            "return jaxdistill.types.Outputs(logits)"
        )
    return outputs


def trained(module: nn.Module, state: TrainState) -> BoundModule:
    """A trained state as a model in evaluation mode: to evaluate, or to teach.

    A student trained with a projector comes without it.
    """
    module, variables = strip(module, {"params": state.params, **state.model_state})
    return BoundModule(variables, module)


class Projector(nn.Module):
    """A learned linear map for some layers, from the student's to another width.

    On a feature map `[B, H, W, D]` it is a 1x1 convolution.

    Attributes:
      widths: `((layer, width), ...)`.
    """

    widths: tuple[tuple[int, int], ...]

    @nn.compact
    def __call__(self, hidden_states) -> tuple[Any, ...]:
        """The projected states by layer, None where there is no projection.

        Raises:
          ValueError: a layer that the student does not return, or one twice.
        """
        projected: list[Any] = [None] * len(hidden_states)
        for layer, width in self.widths:
            if not -len(hidden_states) <= layer < len(hidden_states):
                raise ValueError(
                    f"a projection is of layer {layer} of the student, which returns "
                    f"{len(hidden_states)} layers"
                )
            at = layer % len(hidden_states)
            if projected[at] is not None:
                raise ValueError(f"layer {at} of the student has two projections")
            projected[at] = nn.Dense(width, name=f"layer_{at}")(hidden_states[at])
        return tuple(projected)


class Projected(nn.Module):
    """A student that also returns projected hidden states while it trains.

    Its parameters are `{"student": ..., "projector": ...}`, and `"embeddings"` where
    those are projected; in evaluation mode it is the student.
    """

    student: nn.Module
    projector: nn.Module
    embeddings: nn.Module | None = None

    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """The student's outputs, with `projected` in training mode.

        Projected embeddings are `extras["projected_embeddings"]`.
        """
        outputs = self.student(inputs, mask=mask, train=train)
        if not train and not self.is_initializing():
            return outputs
        outputs = outputs.replace(projected=self.projector(outputs.hidden_states))
        if self.embeddings is None:
            return outputs
        if "embeddings" not in outputs.extras:
            raise ValueError(
                f"a {type(self.student).__name__} returns no embeddings to project"
            )
        found = {"projected_embeddings": self.embeddings(outputs.extras["embeddings"])}
        return outputs.replace(extras={**outputs.extras, **found})


class Peers(nn.Module):
    """Several students trained as one, to learn from each other.

    Member i's parameters are `params["peer_i"]`; the first is what `strip` leaves.

    Attributes:
      members: modules of the same classes; the same one twice is two students.
    """

    members: tuple[nn.Module, ...]

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        """Logits `[M, B, C]`; a member's `Factored` ones are multiplied out."""
        logits = []
        for i, member in enumerate(self.members):
            # A copy: linen would share the parameters of one module given twice.
            peer = member.copy(parent=self, name=f"peer_{i}")
            logits.append(whole_logits(peer(inputs, mask=mask, train=train).logits))
        return Outputs(jnp.stack(logits))


def with_projector(
    student: nn.Module, projector: nn.Module, embeddings: nn.Module | None = None
) -> Projected:
    """The student with learned projections `hidden_states -> projected` beside it.

    Args:
      student: the module.
      projector: of hidden states, such as `Projector(((0, 12), (1, 12)))`.
      embeddings: of a text model's embeddings, its only layer: `Projector(((0, 12),))`.

    Raises:
      ValueError: when it is called, embeddings are projected that are not there.
    """
    return Projected(student, projector, embeddings)


def strip(module: nn.Module, variables: Any) -> tuple[nn.Module, Any]:
    """The student alone and its variables: what is evaluated, exported, or teaches."""
    if isinstance(module, Projected):
        student, name = module.student, "student"
    elif isinstance(module, Peers):
        student, name = module.members[0], "peer_0"
    else:
        return module, variables
    return student, {k: tree[name] for k, tree in variables.items() if name in tree}


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
        return check_outputs(module, outputs), dict(updated)

    return Student(init, apply)


Precision = Literal["float32", "bfloat16"]
"""What a run computes in, as a script's flag. No loss scaling: bfloat16 has float32's
range."""

STATISTICS = "batch_stats"


def cast_to_compute(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves in `dtype`, but for running statistics.

    Args:
      tree: any pytree: parameters, a teacher, inputs.
      dtype: a floating type, or None for the tree as it is.

    >>> tree = {"ids": jnp.arange(2), "x": jnp.ones(2)}
    >>> cast_to_compute(tree, jnp.bfloat16)["x"].dtype
    dtype(bfloat16)
    """
    if dtype is None:
        return tree

    def cast(path, leaf):
        kept = any(getattr(key, "key", None) == STATISTICS for key in path)
        floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return leaf.astype(dtype) if floating and not kept else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)
