# SPDX-License-Identifier: Apache-2.0
"""Teacher outputs on disk: computed once, verified, read by the example's index.

A store is a folder of zarr3 arrays (local disk or object storage) of N examples in one
or several augmented views (`views`):

    manifest.json                         written last: a store without it is unfinished
    logits [N, views, C]                  dense, or
    ids, log_probs [N, views, K], logsumexp [N, views]
    hidden_0 [N, views, ...]              layers asked for

What is stored is free of temperature.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm.auto import tqdm

from jaxdistill.augment import Prepare
from jaxdistill.data import pad
from jaxdistill.losses.stable import promote
from jaxdistill.teachers import digest
from jaxdistill.types import Array, Batch, Outputs
from jaxdistill.views import view_of
from jaxdistill.zarr import SHARD, DamagedError, open_array, read_array

FORMAT = 1
DTYPES = ("float32", "float16", "bfloat16")


class CacheError(ValueError):
    """Stored outputs that cannot be used; one sentence says why."""


@dataclass(frozen=True)
class Manifest:
    """What stored outputs are of; all of it is compared when a store is opened.

    Attributes:
      teacher: `teachers.digest` of its variables.
      data: the data set's name.
      split: which part of it.
      size: examples.
      content: `teachers.digest` of the inputs.
      transform: what was done to the inputs, in words.
      classes: C or V.
      top_k: K, or None for dense logits.
      dtype: of the stored floats.
      views: augmented views of each example.
      seed: of the views.
      layers: which hidden states.
      batch_size: of the teacher's forward pass; a step of another one differs from a
        live teacher's by rounding.
      format: of the store.
    """

    teacher: str
    data: str
    split: str
    size: int
    content: str
    transform: str
    classes: int
    top_k: int | None = None
    dtype: str = "float32"
    views: int = 1
    seed: int = 0
    layers: tuple[int, ...] = ()
    batch_size: int = 512
    format: int = FORMAT


def describe(
    teacher: Any,
    examples: Mapping[str, np.ndarray],
    *,
    data: str,
    split: str,
    transform: str,
    **options: Any,
) -> Manifest:
    """The manifest of a teacher's outputs on these examples.

    Args:
      teacher: a pytree of variables, see `teachers`.
      examples: `inputs` of all examples, and what else a batch has.
      data: the data set's name.
      split: which part of it.
      transform: what was done to the inputs, in words: normalisation, augmentation.
      options: `top_k`, `dtype`, `views`, `seed`, `layers`, `batch_size`.

    Raises:
      CacheError: K is larger than the number of classes, or an option is senseless.
    """
    one = {name: value[:1] for name, value in examples.items()}
    logits = jax.eval_shape(teacher, {**one, "mask": jnp.ones(1)}).logits
    manifest = Manifest(
        teacher=digest(teacher),
        data=data,
        split=split,
        size=len(examples["inputs"]),
        content=digest(np.asarray(examples["inputs"])),
        transform=transform,
        classes=logits.shape[-1],
        **options,
    )
    if manifest.top_k is not None and not 0 < manifest.top_k <= manifest.classes:
        raise CacheError(
            f"top_k must lie between 1 and the {manifest.classes} classes, got "
            f"{manifest.top_k}"
        )
    if manifest.dtype not in DTYPES:
        raise CacheError(f"dtype must be one of {DTYPES}, got {manifest.dtype!r}")
    if manifest.views < 1:
        raise CacheError(f"a store has at least 1 view, got {manifest.views}")
    return manifest


def write(
    path: Any,
    teacher: Callable[[Batch], Outputs],
    examples: Mapping[str, np.ndarray],
    manifest: Manifest,
    *,
    prepare: Prepare | None = None,
    progress: bool = True,
) -> None:
    """Computes and stores a teacher's outputs; goes on where a kill left it.

    Several processes share the work by `jax.process_index`; the first writes the
    manifest when all shards are there.

    Args:
      path: a folder for nothing else; object storage works.
      teacher: see `teachers`.
      examples: as for `describe`.
      manifest: from `describe`.
      prepare: augmentation (`augment`) that makes a view of an example.
      progress: whether to show a bar on what takes longer than two seconds.

    Raises:
      CacheError: `path` holds other outputs.
    """
    folder = epath.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "manifest.json").exists():
        check(folder, manifest)
        return
    begun = folder / "begun.json"
    if begun.exists():
        _compare(folder, json.loads(begun.read_text()), manifest)
    # Another process may be reading it: it must never be half there.
    partial_begun = folder / f"begun_{jax.process_index()}.json"
    partial_begun.write_text(json.dumps(asdict(manifest)))
    partial_begun.replace(begun)
    forward = jax.jit(partial(_outputs, manifest=manifest, prepare=prepare))
    shards = range(0, manifest.size, SHARD)
    mine = shards[jax.process_index() :: jax.process_count()]
    bar = tqdm(
        mine, desc="teacher outputs", unit="shard", delay=2, disable=not progress
    )
    for start in bar:
        done = folder / f"shard_{start}.json"
        if done.exists():
            continue
        stop = min(start + SHARD, manifest.size)
        index = np.arange(start, stop, dtype=np.int32)
        arrays = _compute(forward, teacher, examples, index, manifest.batch_size)
        for name, array in arrays.items():
            shape = (manifest.size, *array.shape[1:])
            store = open_array(folder / name, shape, array.dtype)
            store[start:stop].write(array).result()
        done.write_text(
            json.dumps({name: array.shape for name, array in arrays.items()})
        )
    if jax.process_index() == 0:
        _wait([folder / f"shard_{start}.json" for start in shards])
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))


def read(path: Any, manifest: Manifest) -> dict[str, np.ndarray]:
    """Stored outputs, for the examples of a run: `{**examples, "teacher": read(...)}`.

    A step's batch then holds the rows of its examples, however they are shuffled, and
    the teacher is `teachers.Stored`.

    Args:
      path: the store's folder.
      manifest: what the run expects, from `describe`.

    Returns:
      `logits` `[N, views, C]`, or `ids`, `log_probs`, `logsumexp`; `hidden_i`.

    Raises:
      CacheError: an unfinished store, one of something else, or a damaged one.
    """
    folder = epath.Path(path)
    check(folder, manifest)
    arrays = {}
    for start in range(0, manifest.size, SHARD):
        if not (folder / f"shard_{start}.json").exists():
            raise CacheError(f"{folder} is damaged: shard_{start}.json is missing")
    for name in json.loads((folder / "shard_0.json").read_text()):
        try:
            arrays[name] = read_array(folder / name, manifest.size)
        except DamagedError as error:
            raise CacheError(str(error)) from error
    return arrays


def check(path: Any, manifest: Manifest) -> None:
    """Raise CacheError unless a store is finished and is what a run expects."""
    stored = epath.Path(path) / "manifest.json"
    if not stored.exists():
        raise CacheError(
            f"{path} holds no finished teacher outputs; write them (again), the same "
            "command goes on where it stopped"
        )
    _compare(path, json.loads(stored.read_text()), manifest)


def verify(
    path: Any,
    teacher: Callable[[Batch], Outputs],
    examples: Mapping[str, np.ndarray],
    manifest: Manifest,
    *,
    prepare: Prepare | None = None,
    rows: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Computes random rows again, and the teacher's accuracy from what is stored.

    Returns:
      `difference`, the largest of a logit (or kept log-probability) over the largest;
      `accuracy` of the first view.

    Raises:
      CacheError: as `read`.
    """
    stored = read(path, manifest)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(manifest.size)[:rows]).astype(np.int32)
    forward = jax.jit(partial(_outputs, manifest=manifest, prepare=prepare))
    again = _compute(forward, teacher, examples, chosen, manifest.batch_size)
    name = "logits" if manifest.top_k is None else "log_probs"
    found = np.asarray(stored[name][chosen], np.float32)
    expected = np.asarray(again[name], np.float32)
    guess = (
        stored["logits"][:, 0].argmax(-1)
        if manifest.top_k is None
        else stored["ids"][:, 0, 0]
    )
    return {
        "difference": float(abs(found - expected).max() / abs(expected).max()),
        "accuracy": float((guess == examples["labels"]).mean()),
    }


def _outputs(teacher, batch: Batch, *, manifest: Manifest, prepare) -> dict[str, Array]:
    """What is stored of a batch, `[B, views, ...]`."""
    size = batch["mask"].shape[0]
    views = []
    for number in range(manifest.views):
        view = batch
        if prepare is not None:
            view = view_of(prepare, manifest.seed, batch, jnp.full(size, number))
        outputs = teacher(view)
        arrays = _logits(outputs.logits, manifest)
        arrays |= {
            f"hidden_{i}": outputs.hiddens[i].astype(manifest.dtype)
            for i in manifest.layers
        }
        views.append(arrays)
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *views)


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


def _compute(forward, teacher, examples, index, batch_size) -> dict[str, np.ndarray]:
    """What is stored of the examples at `index`, in its order."""
    rows = pad(index, batch_size)
    parts = []
    for at, mask in zip(rows["index"], rows["mask"], strict=True):
        batch = {name: np.asarray(value)[at] for name, value in examples.items()}
        arrays = forward(teacher, {**batch, "index": at, "mask": mask})
        real = int(mask.sum())  # padding comes last
        parts.append({name: np.asarray(x)[:real] for name, x in arrays.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare(path: Any, stored: Mapping[str, Any], manifest: Manifest) -> None:
    expected = json.loads(json.dumps(asdict(manifest)))
    for name in sorted({*stored, *expected}):
        if stored.get(name) != expected.get(name):
            raise CacheError(
                f"{path} holds outputs of another {name}: {stored.get(name)!r} is "
                f"stored, {expected.get(name)!r} was expected"
            )


def _wait(files: Sequence[epath.Path], seconds: float = 3600.0) -> None:
    """Until the other processes have written theirs."""
    until = time.monotonic() + seconds
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > until:
            raise CacheError(f"{missing[0]} was not written within {seconds:.0f} s")
        time.sleep(0.2)
