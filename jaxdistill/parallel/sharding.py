# SPDX-License-Identifier: Apache-2.0
"""Arrays on the devices of one or several processes, and which axis of one is cut."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

FSDP = "fsdp"
"""The name of the mesh axis over which parameters are cut."""
STACKED = "layers"
"""The name of modules whose parameters `nn.scan` stacks, the layer first."""

Rule = Callable[[Sequence[Any], tuple[int, ...]], PartitionSpec]
"""`(path, shape) -> PartitionSpec` of a leaf; paths as `jax.tree_util` gives them."""


def cut_width(shards: int, *, smallest: int = 2**14) -> Rule:
    """Cuts the longest axis that divides; small arrays are copied.

    Never the layer axis of a scanned module: a device would hold whole layers, and to
    run any of them, all would be gathered.

    Args:
      shards: in how many parts.
      smallest: arrays with fewer entries are copied.

    >>> rule = cut_width(4, smallest=1)
    >>> tuple(rule([jax.tree_util.DictKey("layers")], (8, 6, 4)))
    (None, None, 'fsdp')
    """

    def rule(path, shape):
        names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
        first = 1 if STACKED in names else 0
        axes = [i for i in range(first, len(shape)) if shape[i] % shards == 0]
        if math.prod(shape) < smallest or not axes:
            return PartitionSpec()
        longest = max(axes, key=lambda i: (shape[i], i))
        return PartitionSpec(*(None,) * longest, FSDP)

    return rule


def numbers(tree: Any) -> Any:
    """The tree, whose leaves can be placed on a device.

    Raises:
      ValueError: one holds texts or objects; it is named.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(getattr(leaf, "dtype", None), "kind", "") in ("O", "U", "S"):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} holds {leaf.dtype} and no numbers: a "
                "device has no place for it"
            )
    return tree


def put(x: Any, sharding: NamedSharding) -> jax.Array:
    """A copy of an array where a sharding says; each process fills its own devices.

    Args:
      x: the whole array, on the host or a device, the same in every process; or a part
        of it on each device already.
      sharding: over devices of any processes.

    Raises:
      ValueError: it holds no numbers.
    """
    numbers(x)
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            return jax.jit(jnp.copy, out_shardings=sharding)(x)
        # A copy first: on its way to several devices, device_put keeps the buffer of
        # the one that has it, may_alias or not, and donation would eat the caller's.
        x = jnp.copy(x)
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=False)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    # Not device_put: it would send the array round to compare it in all processes.
    x = np.asarray(x)
    places = sharding.addressable_devices_indices_map(x.shape)
    parts = [
        jax.device_put(x[index], device, may_alias=False)
        for device, index in places.items()
    ]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)


def whole(x: jax.Array) -> Any:
    """An array in one piece: on one device where it lies whole, else on the host."""
    if x.is_fully_replicated:
        return x.addressable_data(0)
    if x.is_fully_addressable:
        return jax.device_get(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = whole(jax.random.key_data(x))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    return multihost_utils.process_allgather(x, tiled=True)
