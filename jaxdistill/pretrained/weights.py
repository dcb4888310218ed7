# SPDX-License-Identifier: Apache-2.0
"""BERT, DistilBERT and GPT-2 from Hugging Face folders to linen variables, and back.

A folder holds `config.json` and `model.safetensors`, or the shards that
`model.safetensors.index.json` names. Every tensor is accounted for: one without a
place, or a place without a tensor, is an error that names it. Left out are only BERT's
head for the next sentence in a masked LM's file, the pooler of a BertModel, and a
language model's end in a classifier's. Queries, keys and values are one product here;
nothing else changes but the order of axes, so both directions together are the
identity.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxdistill.models.apply import BoundModule
from jaxdistill.models.transformer import stack_layers, unstack_layers
from jaxdistill.pretrained.bert import BIAS, BIAS_AGAIN
from jaxdistill.pretrained.config import (
    CONFIG,
    architecture,
    family_of,
    is_tied,
    module_of,
    read_config,
    transformer_config,
)
from jaxdistill.pretrained.family import HEAD, LEAVES, OLDER, TURNED, Place
from jaxdistill.pretrained.files import WEIGHTS, find, read_weights

ParamPath = tuple[str, ...]
Placed = tuple[Place, list[str], ParamPath]
"""A place, the names of its tensors' layers, and its path in `params`."""

Tensors = dict[str, tuple[str, np.ndarray]]
"""Tensors by the names they have today, each with its name in the file."""


def load(
    folder: str | Path, *, scan: bool = False, remat: bool = False, maps: bool = True
) -> tuple[nn.Module, dict[str, Any]]:
    """A module and its variables from a folder, or by a hub's id.

    A BertModel or DistilBertModel is an `Encoder`; a GPT2Model is a `GPT`, whose logits
    take no weights of their own.

    Args:
      folder: with `config.json` and `model.safetensors`; where there is no such folder,
        a hub's id, which needs `huggingface_hub` and a network.
      scan: see `models.transformer.Blocks`.
      remat: likewise.
      maps: likewise.

    Raises:
      ValueError: an architecture that is not known, or a file that is missing, cut
        short, or does not fit the configuration.
    """
    folder = find(folder)
    config = read_config(folder)
    module = module_of(config, scan=scan, remat=remat, maps=maps)
    return module, to_linen(read_weights(folder / WEIGHTS), config, scan=scan)


def to_linen(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any], *, scan: bool = False
) -> dict[str, Any]:
    """Linen variables from tensors by their Hugging Face names.

    Args:
      state: `{name: array}`.
      config: the configuration's content.
      scan: stack the blocks' parameters, as `scan=True` has them.

    Raises:
      ValueError: a tensor without a place, a place without a tensor, or a shape that
        is not the module's, or of no float; it names the first.
    """
    beside = architecture(config).beside
    tensors = without_copies(by_todays_names(state, config), config)
    found = place(tensors, _places(config), module_of(config), beside)
    params = traverse_util.unflatten_dict(found)
    return {"params": stack_layers(params) if scan else params}


def place(
    tensors: Tensors,
    places: Iterable[Placed],
    module: nn.Module,
    beside: re.Pattern[str],
) -> dict[ParamPath, np.ndarray]:
    """Tensors at their places: `{path: array}`.

    Args:
      tensors: see `by_todays_names`.
      places: of the parameters that are read.
      module: which has them, not scanned.
      beside: how the names begin of what is left out.

    Raises:
      ValueError: a place without a tensor, a tensor without a place, or one of another
        shape or of no float; it names the first, as in the file.
    """
    left, found = dict(tensors), {}
    for where, names, path in places:
        for theirs, leaf in LEAVES[where.kind].items():
            keys = [f"{name}.{theirs}" for name in names]
            missing = [key for key in keys if key not in left]
            if missing:
                raise ValueError(f"the weights lack {missing[0]!r}")
            turned = where.kind in TURNED and leaf == "kernel"
            found[*path, leaf] = [left.pop(key) for key in keys], turned
    over = sorted(
        theirs for name, (theirs, _) in left.items() if not beside.match(name)
    )
    if over:
        raise ValueError(f"the weights hold {over[0]!r}, which has no place here")
    shapes = shapes_of(module)
    return {path: _joined(*parts, shapes[path]) for path, parts in found.items()}


def _joined(
    parts: list[tuple[str, np.ndarray]], turned: bool, shape: tuple[int, ...]
) -> np.ndarray:
    """Tensors side by side in an array of this shape, each an equal part of it."""
    *rows, columns = shape
    each = (*rows, columns // len(parts))
    each = each[::-1] if turned else each
    for name, array in parts:
        if array.shape != each:
            raise ValueError(
                f"the weights hold {name!r} of shape {array.shape}; config.json asks "
                f"for {each}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"the weights hold {name!r} of type {array.dtype}, which is no float"
            )
    # A copy: the module may train on, and a device may share the host's memory.
    return np.concatenate([x.T if turned else x for _, x in parts], axis=-1)


def from_linen(
    variables: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Tensors by their Hugging Face names, of variables scanned or not.

    Raises:
      ValueError: variables of another module; it names the first that does not fit.
    """
    params = unstack_layers(jax.tree.map(np.asarray, dict(variables["params"])))
    flat = traverse_util.flatten_dict(params)
    _check_shapes(flat, config)
    state = {}
    prefix = family_of(config).prefix if architecture(config).bare else ""
    for where, names, path in _places(config):
        for theirs, leaf in LEAVES[where.kind].items():
            parts = np.split(flat[(*path, leaf)], len(names), axis=-1)
            for name, part in zip(names, parts, strict=True):
                turned = where.kind in TURNED and leaf == "kernel"
                array = part.T if turned else part
                key = f"{name}.{theirs}".removeprefix(prefix)
                state[key] = np.array(array, order="C")
    if BIAS in state and not is_tied(config):
        state[BIAS_AGAIN] = state[BIAS]
    return state


def _places(config) -> Iterator[Placed]:
    """Every place of a model, its tensors' layer names, and its path in `params`."""
    made = architecture(config)
    yield from body_places(config, alone=made.alone)
    end = () if is_tied(config) or made.end is None else (made.end,)
    for where in (*made.head, *end):
        yield where, list(where.theirs), tuple(filter(None, (where.ours,)))


def body_places(config: Mapping[str, Any], *, alone=False) -> Iterator[Placed]:
    """The places of a model's body, below a head or alone."""
    family, size = family_of(config), transformer_config(config)
    root = () if alone else (family.root,)
    for where in family.body:
        if where.ours == "segments" and not size.types:
            continue
        for i in range(size.depth if "{}" in where.ours else 1):
            names = [family.prefix + name.format(i) for name in where.theirs]
            yield where, names, (*root, *where.ours.format(i).split("/"))


def shapes_of(module: nn.Module) -> dict[ParamPath, tuple[int, ...]]:
    """The shapes of a text model's parameters, by path; its layers are apart."""
    inputs = {"input_ids": jnp.zeros((1, 1), jnp.int32)}
    params = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    return {k: v.shape for k, v in traverse_util.flatten_dict(dict(params)).items()}


def _check_shapes(flat: Mapping[ParamPath, np.ndarray], config) -> None:
    expected = shapes_of(module_of(config))
    for path in sorted({*expected, *flat}):
        name = "/".join(path)
        if path not in flat or path not in expected:
            side = "lack" if path in expected else "hold"
            raise ValueError(f"the variables {side} {name!r}")
        if flat[path].shape != expected[path]:
            raise ValueError(
                f"{name!r} has the shape {flat[path].shape}, config.json asks for "
                f"{expected[path]}"
            )


def save(folder: str | Path, model: BoundModule, config: Mapping[str, Any]):
    """Writes a folder that Hugging Face's library loads.

    Args:
      folder: made where there is none.
      model: a module with its variables, scanned or not (`models.trained`,
        `teachers.live`).
      config: the configuration's content, as `read_config` gives it. The type of the
        weights that it names becomes theirs, or is left out where they have several.

    Raises:
      ValueError: a configuration of another module, or variables without theirs: what
        a configuration says of heads and activation is in no weight.
    """
    from safetensors.numpy import save_file

    if not isinstance(model, BoundModule):
        raise ValueError(
            "save takes a model, its module with its variables "
            f"(teachers.live(module, variables)), got {type(model).__name__}"
        )
    wrong = _differences(model.module, module_of(config))
    if wrong:
        raise ValueError(f"the configuration is of another model: {'; '.join(wrong)}")
    folder = Path(folder)
    state = from_linen(model.variables, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_with_type(config, state), indent=2)
    (folder / CONFIG).write_text(f"{text}\n", encoding="utf-8")


HOW = {"parent", "name", "scan", "maps", "remat", "factored"}
"""Fields of modules, besides rates of dropout, that say how they compute, not what."""


def _differences(module: Any, expected: Any, at: str = "") -> list[str]:
    """Fields in which a module is not the expected one, a phrase for each."""
    if type(module) is not type(expected):
        return [f"{at or 'the module'} is {module!r}, the configuration's {expected!r}"]
    if not dataclasses.is_dataclass(module):
        same = module == expected
        return [] if same else [f"{at} is {module!r}, the configuration's {expected!r}"]
    found = []
    for field in dataclasses.fields(module):
        if field.name not in HOW and "dropout" not in field.name:
            pair = _value(module, field.name), _value(expected, field.name)
            found += _differences(*pair, f"{at}.{field.name}".strip("."))
    return found


def _value(module: Any, name: str) -> Any:
    """A field's value; of a width that is left to the default the width."""
    value = getattr(module, name)
    return 4 * module.width if name == "inner" and value is None else value


def _with_type(config: Mapping[str, Any], state: Mapping[str, np.ndarray]):
    """The configuration with the type of these tensors, in which they are loaded."""
    names = {"dtype", "torch_dtype"} & {*config} or {"dtype"}
    rest = {name: value for name, value in config.items() if name not in names}
    types = {array.dtype.name for array in state.values()}
    return rest | dict.fromkeys(names, *types) if len(types) == 1 else rest


def by_todays_names(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Tensors:
    """Tensors by the names they have today in a whole model, each with its own name.

    Older files have other names, and constants beside the weights, which are left out;
    the names of a body without a prefix get it.
    """
    family = family_of(config)
    found = {name: (name, np.asarray(array)) for name, array in state.items()}
    for name in [*found]:
        for old, new in OLDER.items():
            today = name.removesuffix(old) + new
            if name.endswith(old) and today not in found:
                found[today] = found.pop(name)
    prefix = family.prefix
    if not any(name.startswith(prefix) for name in found):
        found = {k if HEAD.match(k) else prefix + k: v for k, v in found.items()}
    depth = min(transformer_config(config).depth, len(found))
    for name in family.buffers:
        for i in range(depth):
            found.pop(name.format(i), None)
    return found


def without_copies(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    """Without what a tied model's file holds twice, which must be equal.

    An untied one's has no matrix twice, and of two biases the one with which
    transformers computes is taken.

    Args:
      tensors: see `by_todays_names`.
      config: the configuration's content.

    Raises:
      ValueError: two that should be one differ.
    """
    kept = dict(tensors)
    if not is_tied(config):
        if BIAS_AGAIN in kept:
            kept[BIAS] = kept.pop(BIAS_AGAIN)
        return kept
    for copy, source in family_of(config).copies.items():
        if copy not in kept or architecture(config).beside.match(copy):
            continue
        theirs, array = kept.pop(copy)
        if source not in kept:
            kept[source] = theirs, array
        elif not np.array_equal(array, kept[source][1]):
            raise ValueError(
                f"the weights hold {theirs!r} other than {kept[source][0]!r}; here the "
                "two are one"
            )
    return kept
