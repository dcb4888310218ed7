# SPDX-License-Identifier: Apache-2.0
"""Which arrays, and which model: the same in every process, and on every machine.

Checkpoints, stored outputs and exported files know by these what they belong to.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdistill.parallel.sharding import whole


def of_model(model: Any) -> str:
    """SHA-256 over a model's arrays and what is static in it: what it computes.

    Classes and functions count by their names and fields, not by their code; fields of
    a module at their defaults are left out, so that a new one changes nothing. It is
    the same in every process.
    """
    static = _spell_structure(jax.tree.structure(model))
    return hashlib.sha256(f"{of_tree(model)}\n{static}".encode()).hexdigest()


def of_tree(tree: Any) -> str:
    """SHA-256 over paths, types, shapes and bytes of a pytree's arrays."""
    total = hashlib.sha256()
    for name, leaf in sorted(by_leaf(tree).items()):
        total.update(f"{name}={leaf}\n".encode())
    return total.hexdigest()


def by_leaf(tree: Any) -> dict[str, str]:
    """SHA-256 of each leaf, by its path."""
    result = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(whole(leaf) if isinstance(leaf, jax.Array) else leaf)
        # The same bytes in another shape or type are another array.
        header = f"{array.dtype.str}{array.shape}".encode()
        result[jax.tree_util.keystr(path)] = hashlib.sha256(
            header + array.tobytes()
        ).hexdigest()
    return result


def of_data(examples: Any) -> dict[str, str]:
    """A digest of each array of a data set, by its path: its type, shape and bytes.

    Parts of large arrays are hashed on all cores at once, so that a digest differs from
    `by_leaf`'s.
    """
    result = {}
    with ThreadPoolExecutor() as pool:
        for path, leaf in jax.tree_util.tree_leaves_with_path(examples):
            array = np.asarray(whole(leaf) if isinstance(leaf, jax.Array) else leaf)
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            parts = np.split(content, range(PART, len(content), PART))
            digests = pool.map(lambda part: hashlib.sha256(part).digest(), parts)
            header = f"{array.dtype.str}{array.shape}".encode()
            digest = hashlib.sha256(header + b"".join(digests)).hexdigest()
            result[jax.tree_util.keystr(path)] = digest[:16]
    return result


PART = 1 << 24
"""Bytes of an array that one core hashes at a time."""


def described(value: Any) -> str:
    """How a value prints, without the addresses that differ in every process.

    >>> described([len, lambda: 0])
    '[<built-in function len>, <function <lambda>>]'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _spell_structure(structure: Any) -> str:
    node = structure.node_data()
    if node is None:
        return "*"
    kind, static = node
    inner = ", ".join(_spell_structure(child) for child in structure.children())
    if issubclass(kind, Mapping):  # its keys are in the digest
        return f"({inner})"
    return f"{kind.__qualname__}[{_spell(static)}]({inner})"


def _spell(value: Any) -> str:
    """A static value in words, without addresses and in a fixed order."""
    if isinstance(value, functools.partial):
        return f"partial({_spell((value.func, value.args, value.keywords))})"
    if hasattr(value, "__qualname__"):  # a class or a function
        return value.__qualname__
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(map(_spell, value.items())))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_spell, value)))}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_spell, value))})"
    if dataclasses.is_dataclass(value):
        fields = {
            field.name: _spell(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (isinstance(value, nn.Module) and field.name in ("parent", "name"))
            and _spell(getattr(value, field.name)) != _spell(field.default)
        }
        return f"{type(value).__qualname__}{_spell(fields)}"
    return described(value)
