# SPDX-License-Identifier: Apache-2.0
"""PyTorch weights to linen variables and back, with nothing left over.

Layouts: a Linear weight is `[out, in]` there and `[in, out]` here; a Conv2d weight
OIHW there and HWIO here, 1d and 3d alike; BatchNorm's `weight, running_mean,
running_var` are `scale, mean, var`. Values are never changed, so both directions
together are the identity.
"""

import pickle
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util


def from_torch(
    state_dict: Mapping[str, Any], like: Any, names: Mapping[str, str] | None = None
) -> Any:
    """Linen variables from a PyTorch `state_dict`.

    Args:
      state_dict: `{"layer.weight": array or tensor}`.
      like: variables of the linen module, for names and shapes (`jax.eval_shape` does).
      names: `{torch layer: linen module path}`, as `{"backbone.fc": "Dense_0"}`;
        layers that are not among them are paired `in_order`.

    Returns:
      Variables like `like`, as NumPy arrays.

    Raises:
      ValueError: a layer without a partner, a weight left over, a shape that differs,
        two layers of one module whose weights are not equal, or an order that names
        here do not tell.
    """
    names = in_order(state_dict, like, names or {})
    expected = traverse_util.flatten_dict(_as_dict(like))
    found: dict[tuple[str, ...], np.ndarray] = {}
    keys: dict[tuple[str, ...], str] = {}
    for key, value in _weights(state_dict).items():
        layer, _, kind = key.rpartition(".")
        if layer not in names:
            raise ValueError(f"PyTorch weight {key!r} has no partner among {names}")
        array = _array(value)
        collection, leaf = _leaf(kind, array.ndim)
        path = (collection, *names[layer].split("/"), leaf)
        if path not in expected:
            raise ValueError(
                f"PyTorch weight {key!r} has no place {'/'.join(path)} here"
            )
        array = _to_linen(array) if leaf == "kernel" else array
        if array.shape != expected[path].shape:
            raise ValueError(
                f"PyTorch weight {key!r} gives {'/'.join(path)} the shape "
                f"{array.shape}, the module needs {expected[path].shape}"
            )
        if path in found and not np.array_equal(found[path], array):
            raise ValueError(
                f"PyTorch weights {keys[path]!r} and {key!r} differ, and both go to "
                f"{'/'.join(path)}"
            )
        keys[path] = key
        # A copy: the module may train on, and a device may share the host's memory.
        found[path] = np.array(array, order="C")
    missing = ["/".join(path) for path in expected if path not in found]
    if missing:
        raise ValueError(f"no PyTorch weight for {', '.join(missing)}")
    return traverse_util.unflatten_dict(found)


def to_torch(
    variables: Any, like: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> dict[str, np.ndarray]:
    """The reverse: a state dict of arrays for `torch_module.load_state_dict`.

    Args:
      variables: linen variables.
      like: the PyTorch module's `state_dict()`, for names and shapes.
      names: as in `from_torch`.

    Returns:
      `{"layer.weight": array}`; give each to `torch.from_numpy`.

    Raises:
      ValueError: as in `from_torch`.
    """
    names = in_order(like, variables, names or {})
    flat = traverse_util.flatten_dict(_as_dict(variables))
    result, used = {}, set()
    for key, value in like.items():
        layer, _, kind = key.rpartition(".")
        if kind == "num_batches_tracked":
            # load_state_dict wants every key, and nothing here counts batches.
            result[key] = np.zeros((), np.int64)
            continue
        ndim = len(value.shape)
        collection, leaf = _leaf(kind, ndim)
        path = (collection, *names.get(layer, "?").split("/"), leaf)
        if path not in flat:
            raise ValueError(
                f"no weight here for PyTorch's {key!r}: no {'/'.join(path)}"
            )
        array = np.asarray(flat[path])
        array = _to_torch(array) if leaf == "kernel" else array
        if array.shape != tuple(value.shape):
            raise ValueError(
                f"{'/'.join(path)} gives PyTorch's {key!r} the shape {array.shape}, it "
                f"needs {tuple(value.shape)}"
            )
        result[key] = np.array(array, order="C")
        used.add(path)
    left = ["/".join(path) for path in flat if path not in used]
    if left:
        raise ValueError(f"nothing in PyTorch takes {', '.join(left)}")
    return result


def in_order(
    state_dict: Mapping[str, Any], like: Any, names: Mapping[str, str]
) -> dict[str, str]:
    """Pairs PyTorch layers with linen modules: by name, or of a kind each in order.

    By name where all are called the same there and here. Else PyTorch's are in the
    order of their definition, and linen's in that of their names, `Dense_2` before
    `Dense_10` and capitals first: a linen module's variables do not keep another.

    Args:
      state_dict: see `from_torch`.
      like: likewise.
      names: those that are paired already.

    Returns:
      `{torch layer: linen module path}`, with those of `names`.

    Raises:
      ValueError: the numbers of layers of a kind differ, or names of two of one kind,
        shape and depth differ by more than their numbers, as `key` and `query`.
    """
    theirs: dict[str, list[str]] = {}
    for key, value in _weights(state_dict).items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and layer not in names:
            leaf = _leaf(kind, len(value.shape))[1]
            theirs.setdefault(_kind(leaf, value), []).append(layer)
    ours: dict[str, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    flat = traverse_util.flatten_dict(_as_dict(like)["params"])
    for path in sorted(flat, key=_natural):
        if path[-1] in ("kernel", "scale"):
            layer, value = "/".join(path[:-1]), flat[path]
            if layer in names.values():
                continue
            ours.setdefault(_kind(path[-1], value), []).append(layer)
            shapes[layer] = tuple(value.shape)
    same = {x: x.replace(".", "/") for layers in theirs.values() for x in layers}
    if {*same.values()} == {*shapes}:
        return {**same, **names}
    found = dict(names)
    for kind in {*theirs, *ours}:
        a, b = theirs.get(kind, []), ours.get(kind, [])
        if len(a) != len(b):
            raise ValueError(
                f"{len(a)} PyTorch layers of kind {kind} ({', '.join(a)}) against "
                f"{len(b)} here ({', '.join(b)}); pair them by name"
            )
        for one, other in combinations(b, 2):
            if shapes[one] == shapes[other] and _unordered(one, other):
                raise ValueError(
                    f"{one} and {other} have one shape, and their names do not tell "
                    "which comes first; pair layers by name"
                )
        found.update(zip(a, b, strict=True))
    return found


def load_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """A state dict from a `.safetensors` or PyTorch file, never running its code.

    Raises:
      ValueError: the file is missing, damaged, or not a flat mapping of names to
        tensors, or the package that reads it is missing.
    """
    path = Path(path)
    tensors = path.suffix == ".safetensors"
    extra = "huggingface" if tensors else "torch"
    try:
        if tensors:
            from safetensors.numpy import load_file
        else:
            import torch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {path} needs {error.name}: pip install 'jaxdistill[{extra}]'"
        ) from error
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        if tensors:
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of tensors alone, and reading any other could run code "
            "in it; save model.state_dict()"
        ) from error
    except Exception as error:  # the readers raise types of their own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged: {first}") from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise ValueError(f"{path} does not hold a state_dict: names to tensors")
    return {key: _array(value) for key, value in loaded.items()}


def _weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    # PyTorch counts BatchNorm's batches only for a mode without momentum.
    return {
        k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")
    }


def _array(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu()
    if str(value.dtype) == "torch.bfloat16":  # which NumPy has not of its own
        return value.float().numpy().astype(jnp.bfloat16)
    return value.numpy()


def _as_dict(variables: Any) -> dict:
    return {k: dict(v) for k, v in variables.items() if v}


def _leaf(kind: str, ndim: int) -> tuple[str, str]:
    if kind in ("running_mean", "running_var"):
        return "batch_stats", kind.removeprefix("running_")
    if kind == "weight":
        return "params", "kernel" if ndim > 1 else "scale"
    return "params", kind


def _kind(leaf: str, value: Any) -> str:
    return "norm" if leaf == "scale" else f"{len(value.shape)}-dimensional weight"


def _to_linen(weight: np.ndarray) -> np.ndarray:
    return weight.transpose(*range(2, weight.ndim), 1, 0)


def _to_torch(kernel: np.ndarray) -> np.ndarray:
    last = kernel.ndim - 1
    return kernel.transpose(last, last - 1, *range(last - 1))


def _unordered(one: str, other: str) -> bool:
    """Whether two paths of one depth differ by more than their numbers."""
    stems = {re.sub(r"\d+", "", path) for path in (one, other)}
    return one.count("/") == other.count("/") and len(stems) > 1


def _natural(path: tuple[str, ...]) -> list:
    return [
        int(part) if part.isdigit() else part
        for part in re.split(r"(\d+)", "/".join(path))
    ]
