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

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm.auto import tqdm

from jaxdistill.data import check_examples
from jaxdistill.data.augment import Augment
from jaxdistill.parallel.lock import Lock, folder_at
from jaxdistill.parallel.sealed import unseal
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.knowledge import check_knowledge, unwrap
from jaxdistill.teachers.manifest import (
    Manifest,
    StoreError,
    check_outputs,
    compare,
    is_marked,
    save,
)
from jaxdistill.teachers.outputs import of_batch, of_examples
from jaxdistill.teachers.programs import batch_of, of_teacher
from jaxdistill.teachers.views import StoredOutputs, View
from jaxdistill.types import Batch, Outputs, token_mask


def describe(
    teacher: Any,
    examples: Mapping[str, Any],
    *,
    data: str,
    split: str,
    transform: str,
    augment: Augment | None = None,
    check_finite: bool = True,
    **options: Any,
) -> Manifest:
    """The manifest of a teacher's outputs on these examples.

    Args:
      teacher: a pytree of variables, see `teachers`.
      examples: `inputs` of all examples, and what else a batch has.
      data: the data set's name.
      split: which part of it.
      transform: what was done to the inputs, in words, such as their normalisation.
      augment: the augmentation of the views; where it is given to `write` alone, a
        reader is told of it and not asked.
      check_finite: see `data.check_examples`.
      options: `top_k`, `dtype`, `views`, `seed`, `layers`, `batch_size`, `devices`,
        `bucket_lengths`, `compute`.

    Raises:
      StoreError: K is larger than the number of classes, a layer is not there, the
        teacher is an ensemble, or an option is senseless.
      DataError: as `data.check_examples`.
    """
    check_examples(examples, check_finite=check_finite)
    teacher = unwrap(teacher)
    inputs = jax.tree.map(np.asarray, examples["inputs"])
    manifest = Manifest(
        teacher=fingerprints.of_model(teacher),
        data=data,
        split=split,
        size=len(jax.tree.leaves(inputs)[0]),
        content=fingerprints.of_tree(inputs),
        transform=transform,
        classes=0,
        program=of_teacher(teacher, examples),
        **options,
    )
    if augment is not None:
        manifest = _with_view(manifest, augment, examples)
    size = manifest.batch_size
    batch = batch_of(examples, size)
    outputs = jax.eval_shape(teacher, batch)
    check_outputs(outputs, teacher, manifest)
    # Only shapes are asked for, and one plain view has them.
    one_view = partial(of_batch, manifest=replace(manifest, views=1), augment=None)
    return replace(
        manifest,
        classes=outputs.logits.shape[-1],
        arrays={
            name: {"shape": [manifest.views, *x.shape[2:]], "dtype": x.dtype.name}
            for name, x in jax.eval_shape(one_view, teacher, batch).items()
        },
    )


def write(
    path: Any,
    teacher: Callable[[Batch], Outputs],
    examples: Mapping[str, np.ndarray],
    manifest: Manifest,
    *,
    augment: Augment | None = None,
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
      augment: augmentation (`augment`) that makes a view of an example.
      progress: whether to show a bar on what takes longer than two seconds.

    Raises:
      StoreError: `path` holds other outputs or a run, `augment` is another than the
        manifest's, there are several views and no augmentation, or the teacher knows
        nothing of the labels (`teachers.check_knowledge`).
      DataError: as `data.check_examples`.
      InUse: another process writes it.
    """
    folder = folder_at(path)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "manifest.json").exists():
        check(folder, manifest)
    manifest = _with_view(manifest, augment, examples)
    if (folder / "manifest.json").exists():
        check(folder, manifest)  # also of another augmentation
        return
    if manifest.views > 1 and augment is None:
        raise StoreError(
            f"{manifest.views} views were asked for, and no augmentation makes them"
        )
    for of_run in ("config.json", "metrics.jsonl", "summary.json"):
        if (folder / of_run).exists():
            raise StoreError(
                f"{folder} is a run directory; give a store its own folder"
            )
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            stack.enter_context(Lock(folder, "store"))
        _write(folder, teacher, examples, manifest, augment, progress)


def _write(folder: epath.Path, teacher, examples, manifest, augment, progress) -> None:
    """Computes and stores what is not there; the folder is this run's."""
    if (folder / "begun.json").exists():
        compare(folder / "begun.json", manifest)
    check_knowledge(teacher, examples, progress=progress)
    teacher = unwrap(teacher)
    # Before the first shard: another command is refused here from now on.
    save(folder / "begun.json", asdict(manifest))
    forward = jax.jit(partial(of_batch, manifest=manifest, augment=augment))
    shards = range(0, manifest.size, SHARD)
    # Which shards are whose depends on their number alone: after a restart the same.
    mine = shards[jax.process_index() :: jax.process_count()]
    bar = tqdm(
        mine, desc="teacher outputs", unit="shard", delay=2, disable=not progress
    )
    for start in bar:
        stop = min(start + SHARD, manifest.size)
        mark, shapes = folder / f"shard_{start}.json", manifest.shapes(stop - start)
        if is_marked(mark, shapes):
            continue
        index = np.arange(start, stop, dtype=np.int32)
        arrays = of_examples(forward, teacher, examples, index, manifest)
        for name, array in arrays.items():
            shape = (manifest.size, *array.shape[1:])
            store = open_array(folder / name, shape, array.dtype, create=True)
            store[start:stop].write(array).result()
        save(mark, shapes)
    if jax.process_index() == 0:
        _wait([folder / f"shard_{start}.json" for start in shards])
        save(folder / "manifest.json", asdict(manifest))


def _with_view(
    manifest: Manifest, augment: Augment | None, examples: Mapping[str, Any]
) -> Manifest:
    """The manifest of views that this augmentation makes."""
    view = None
    if augment is not None:
        view = View.of(augment, manifest.seed, manifest.views, examples)
    if manifest.view is not None and view != manifest.view:
        raise StoreError(
            f"the manifest is of views of {manifest.view}, and they are to be made by "
            f"{view or 'no augmentation'}"
        )
    return replace(manifest, view=view)


def read(path: Any, manifest: Manifest) -> StoredOutputs:
    """Stored outputs, for the examples of a run: `{**examples, "teacher": read(...)}`.

    A step's batch then holds the rows of its examples, however they are shuffled, and
    the teacher is `teachers.StoredTeacher()`.

    Args:
      path: the store's folder.
      manifest: what the run expects, from `describe`.

    Returns:
      `logits` `[N, views, C]`, or `ids`, `log_probs`, `logsumexp`; `hidden_i`. They
      know of which views and whose they are.

    Raises:
      StoreError: an unfinished store, one of something else, or a damaged one.
    """
    folder = folder_at(path)
    check(folder, manifest)
    for start in range(0, manifest.size, SHARD):
        rows = min(SHARD, manifest.size - start)
        mark = folder / f"shard_{start}.json"
        if not is_marked(mark, manifest.shapes(rows)):
            raise StoreError(
                f"{folder} is damaged: {mark.name} is missing, cut short or changed"
            )
    arrays = {}
    for name, shape in manifest.shapes(manifest.size).items():
        dtype = manifest.arrays[name]["dtype"]
        arrays[name] = read_array(folder / name, shape, dtype)
    stored = unseal((folder / "manifest.json").read_bytes())
    view = stored["view"] and View(**stored["view"])
    teacher = {"model": stored["teacher"], "program": stored["program"]}
    return StoredOutputs(arrays, view=view, teacher=json.dumps(teacher))


def check(path: Any, manifest: Manifest) -> None:
    """Raise StoreError unless a store is finished and is what a run expects."""
    stored = folder_at(path) / "manifest.json"
    if not stored.exists():
        raise StoreError(
            f"{path} holds no finished teacher outputs; write them (again), the same "
            "command goes on where it stopped"
        )
    compare(stored, manifest)


def verify(
    path: Any,
    teacher: Callable[[Batch], Outputs],
    examples: Mapping[str, np.ndarray],
    manifest: Manifest,
    *,
    augment: Augment | None = None,
    rows: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Computes random rows again, and the teacher's accuracy from what is stored.

    Returns:
      `difference`, the largest of a logit (or kept log-probability) over the largest,
      both of those that are finite, or infinity where others are; `accuracy` of the
      first view.

    Raises:
      StoreError: as `read`.
    """
    stored, teacher = read(path, manifest), unwrap(teacher)
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(manifest.size)[:rows]).astype(np.int32)
    forward = jax.jit(partial(of_batch, manifest=manifest, augment=augment))
    again = of_examples(forward, teacher, examples, chosen, manifest)
    if manifest.top_k is None:
        name, guess = "logits", stored["logits"][:, 0].argmax(-1)
    else:
        name, guess = "log_probs", stored["ids"][:, 0, ..., 0]
    found = np.asarray(stored[name][chosen], np.float32)
    expected = np.asarray(again[name], np.float32)
    right = guess == np.asarray(examples["labels"])
    real = {**examples, "mask": np.ones(len(right))}
    return {
        "difference": _difference(found, expected),
        "accuracy": float(np.average(right, weights=token_mask(real, right.shape))),
    }


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value; a class may be ruled out, -inf."""
    finite = np.isfinite(expected)
    if not np.array_equal(found[~finite], expected[~finite]):
        return np.inf
    found, expected = (np.where(finite, x, 0) for x in (found, expected))
    gap = abs(found - expected).max()
    return float(gap / abs(expected).max()) if gap else 0.0


def _wait(files: Sequence[epath.Path]) -> None:
    """Until the other processes have written theirs."""
    until = time.monotonic() + LONGEST_WAIT
    while missing := [file for file in files if not file.exists()]:
        if time.monotonic() > until:
            raise StoreError(f"{missing[0]} was not written within {LONGEST_WAIT} s")
        time.sleep(0.2)


LONGEST_WAIT = 3600
"""Seconds that the first process gives the others to write their shards."""
SHARD, CHUNK = 4096, 512
"""Examples in a file, the unit that is written and resumed, and in a part of it that is
compressed and has a checksum."""


def read_array(path: epath.Path, shape: Sequence[int], dtype: Any) -> np.ndarray:
    """A whole array, whose first axis is the example.

    Raises:
      StoreError: a file is missing, cut short or has a flipped bit, or the array is
        another one.
    """
    check_files(path, shape)
    array = open_array(path, shape, dtype)
    with _damage(path):
        return np.asarray(array.read().result())


def open_array(
    path: epath.Path, shape: Sequence[int], dtype: Any, *, create: bool = False
) -> Any:
    """A zarr3 array, which must be as it would be made; made where there is none.

    Raises:
      StoreError: there is none or another one.
    """
    import tensorstore

    inner = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "zstd", "configuration": {"level": 3}},
        {"name": "crc32c"},  # a flipped bit is an error when it is read
    ]
    sharding = {"chunk_shape": [CHUNK, *shape[1:]], "codecs": inner}
    spec = {
        "driver": "zarr3",
        "kvstore": _kvstore(path),
        "metadata": {
            "shape": list(shape),
            "data_type": np.dtype(dtype).name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [SHARD, *shape[1:]]},
            },
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
        # Otherwise a file of zeros is left out, and one that is lost reads as zeros.
        "store_data_equal_to_fill_value": True,
    }
    with _damage(path):
        return tensorstore.open(spec, create=create, open=True).result()


@contextlib.contextmanager
def _damage(path: epath.Path):
    """TensorStore's errors as one sentence."""
    try:
        yield
    except ValueError as error:
        reason = str(error).split(" [")[0]
        raise StoreError(f"{path} is damaged: {reason}") from error


def _kvstore(path: epath.Path) -> Any:
    text = str(path)
    return f"{text}/" if "://" in text else {"driver": "file", "path": f"{text}/"}


def check_files(path: epath.Path, shape: Sequence[int]) -> None:
    """Raise StoreError unless an array has all its files.

    TensorStore reads what is not there as zeros.
    """
    for number in range(-(-shape[0] // SHARD)):
        file = path.joinpath("c", str(number), *["0"] * (len(shape) - 1))
        if not file.exists():
            raise StoreError(f"{path} is damaged: {file.relative_to(path)} is missing")
