# SPDX-License-Identifier: Apache-2.0
"""What a store holds of a teacher: computed batch by batch, as a step computes it."""

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdistill.data import pad, tokens
from jaxdistill.data.augment import Augment, view_of
from jaxdistill.data.examples import some_of
from jaxdistill.losses.numerics import promote
from jaxdistill.models.apply import cast_to_compute
from jaxdistill.teachers.manifest import Manifest
from jaxdistill.types import Array, Batch, Outputs, TopK, whole_logits


def of_batch(
    teacher: Callable[[Batch], Outputs],
    batch: Batch,
    *,
    manifest: Manifest,
    augment: Augment | None,
) -> dict[str, Array]:
    """What is stored of a batch, by the arrays' names, each `[B, views, ...]`.

    Args:
      teacher: see `teachers`.
      batch: with `index` and `mask`, `[B]`.
      manifest: what is asked for.
      augment: augmentation that makes a view of an example, or None.
    """
    size = batch["mask"].shape[0]
    # Here, not before: compiled with the forward pass, as in a step, it rounds alike.
    teacher = cast_to_compute(teacher, manifest.compute)

    def view_outputs(number):
        view = batch
        if augment is not None:
            view = view_of(augment, manifest.seed, batch, jnp.full(size, number))
        return tokens.bucketed(of_view, manifest.bucket_lengths)(view)

    def of_view(view):
        outputs = teacher(
            {**view, "inputs": cast_to_compute(view["inputs"], manifest.compute)}
        )
        hidden_states = {
            f"hidden_{i}": outputs.hidden_states[i].astype(manifest.dtype)
            for i in manifest.layers
        }
        return _logits(whole_logits(outputs.logits), manifest) | hidden_states

    if manifest.views == 1:
        return jax.tree.map(lambda x: x[:, None], view_outputs(0))
    views = jax.lax.map(view_outputs, jnp.arange(manifest.views))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), views)


def of_examples(
    forward: Callable[[Any, Batch], dict[str, Array]],
    teacher: Any,
    examples: Mapping[str, Any],
    index: np.ndarray,
    manifest: Manifest,
) -> dict[str, np.ndarray]:
    """What is stored of the examples at `index`, in its order.

    Args:
      forward: `of_batch` with its options, compiled.
      teacher: see `teachers`.
      examples: all of them, `inputs` and what else a batch has.
      index: positions `[N]`.
      manifest: what is asked for.
    """
    if not manifest.bucket_lengths:
        return _in_turn(forward, teacher, examples, index, manifest)
    order = tokens.shortest_first(some_of(examples["inputs"], index))
    arrays = _in_turn(forward, teacher, examples, index[order], manifest)
    back = np.argsort(order)
    return {name: array[back] for name, array in arrays.items()}


def _logits(logits: Array, manifest: Manifest) -> dict[str, Array]:
    if manifest.top_k is None:
        return {"logits": logits.astype(manifest.dtype)}
    logits = promote(logits)
    kept, ids = jax.lax.top_k(logits, manifest.top_k)
    total = jax.nn.logsumexp(logits, axis=-1)
    return {
        "ids": ids.astype(jnp.int32),
        "log_probs": (kept - total[..., None]).astype(manifest.dtype),
        "logsumexp": total,
    }


def _in_turn(forward, teacher, examples, index, manifest) -> dict[str, np.ndarray]:
    """As many at once as one device has of a batch: it computes its part as alone."""
    rows = pad(index, manifest.batch_size // manifest.devices)
    examples, parts = jax.tree.map(np.asarray, dict(examples)), []
    for at, mask in zip(rows["index"], rows["mask"], strict=True):
        batch = jax.tree.map(itemgetter(at), examples)
        arrays = forward(teacher, {**batch, "index": at, "mask": mask})
        real = int(mask.sum())  # padding comes last
        parts.append({name: np.asarray(x)[:real] for name, x in arrays.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@struct.dataclass
class StoredTeacher:
    """Outputs that were computed before: the batch brings them (see `teachers.store`).

    `batch["teacher"]` holds `[B, views, ...]` arrays; of several views an `augment`
    (`augment.replay`) has chosen one. Hidden states are a mapping by layer, counted
    from
    0: how many the teacher has is not known, and no layer is the last.
    """

    def __call__(self, batch: Batch) -> Outputs:
        """The first view's outputs; an `augment.replay` has left one."""
        stored = {name: array[:, 0] for name, array in batch["teacher"].items()}
        if "logits" in stored:
            logits = stored["logits"]
        else:
            logits = TopK(stored["ids"], stored["log_probs"], stored["logsumexp"])
        names = [name for name in stored if name.startswith("hidden_")]
        return Outputs(logits, {int(name[7:]): stored[name] for name in names})
