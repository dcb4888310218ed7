# SPDX-License-Identifier: Apache-2.0
"""A transformer's parameters by layer: stacked for a scan, apart, or of some layers.

A student that starts as some of its teacher's layers (Sanh et al. 2019, DistilBERT, a
distilled version of BERT, section 3):

    small = module.clone(encoder=module.encoder.clone(size=replace(size, depth=3)))
    # A GPTClassifier's is its `decoder`; a GPT is cloned itself.
    params = take_layers(variables["params"], (0, 2, 4))
    state = init_state(rng, models.student(small), optimizer, batch)
    state = state.replace(params=params)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS, STACKED = "blocks", "layers"
"""Names of `transformer.Blocks` in a model, and of its stacked parameters."""


def take_layers(params: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Parameters of the same model with some of its layers, the rest as it is.

    Args:
      params: of a BERT or a GPT, scanned or not; the result is the same.
      layers: which layers, in the order they will have, counted from 0; negative ones
        from the end.

    Raises:
      ValueError: no layers, or one that is not there.
    """
    if not layers:
        raise ValueError("a student needs at least one of its teacher's layers")

    def take(blocks):
        apart = _apart(blocks)
        wrong = [i for i in layers if not -len(apart) <= i < len(apart)]
        if wrong:
            raise ValueError(
                f"there is no layer {wrong[0]}: the teacher has {len(apart)}, 0 to "
                f"{len(apart) - 1}"
            )
        every = list(apart.values())
        taken = {f"layer_{i}": every[at] for i, at in enumerate(layers)}
        return _stacked(taken) if STACKED in blocks else taken

    return _at_blocks(take, params)


def drop_types(params: Mapping[str, Any]) -> dict[str, Any]:
    """A BERT's parameters for the same model without token types (`Size(types=0)`).

    The embedding of type 0, which every token of a single text has, is added to the
    positions': nothing but rounding changes for such texts. DistilBERT has no types
    either, and leaves their embeddings out.

    Args:
      params: of a BERT that has types, alone or in a student with a projector.

    Raises:
      ValueError: it has none.

    References:
      Sanh et al. 2019, DistilBERT, section 3.
    """
    found, dropped = _without_types(params)
    if not dropped:
        raise ValueError("the parameters have no token types")
    return found


def _without_types(params: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Without types wherever there are some, and whether there were."""
    if "segments" in params and "places" in params:
        first = params["segments"]["embedding"][:1]
        places = {"embedding": params["places"]["embedding"] + first}
        rest = {name: tree for name, tree in params.items() if name != "segments"}
        return {**rest, "places": places}, True
    found, dropped = dict(params), False
    for name, tree in params.items():
        if isinstance(tree, Mapping):
            found[name], some = _without_types(tree)
            dropped |= some
    return found, dropped


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a model with `scan=True` has them."""
    return _at_blocks(_stacked, params)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a model without a scan has them."""
    return _at_blocks(_apart, params)


def _at_blocks(change: Callable, params: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: change(tree)
        if name == BLOCKS
        else _at_blocks(change, tree)
        if isinstance(tree, Mapping)
        else tree
        for name, tree in params.items()
    }


def _stacked(blocks: Mapping[str, Any]) -> dict[str, Any]:
    if STACKED in blocks:
        return dict(blocks)
    trees = [blocks[f"layer_{i}"] for i in range(len(blocks))]

    def stack(*leaves):  # what is on the host stays there, in its own precision
        on_host = isinstance(leaves[0], np.ndarray)
        return (np if on_host else jnp).stack(leaves)

    return {STACKED: jax.tree.map(stack, *trees)}


def _apart(blocks: Mapping[str, Any]) -> dict[str, Any]:
    if STACKED not in blocks:
        return {f"layer_{i}": blocks[f"layer_{i}"] for i in range(len(blocks))}
    depth = len(jax.tree.leaves(blocks[STACKED])[0])
    return {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], blocks[STACKED])
        for i in range(depth)
    }
