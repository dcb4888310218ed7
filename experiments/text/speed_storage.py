# SPDX-License-Identifier: Apache-2.0
"""What of a language model's outputs must be stored? Bytes of a token against error."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.text.speed_jobs import Shape, draw, gpt
from jaxdistill import (
    data,
    losses,
    models,
    objectives,
    parallel,
    pretrained,
    teachers,
    train,
)
from jaxdistill.teachers.manifest import DTYPES
from jaxdistill.types import TopK


def drawn(shape: Shape, count: int, sharpness: float, seed: int):
    """A teacher, a student, and random tokens, nothing of it trained.

    Args:
      shape: the teacher's; the student has half its width and layers.
      count: sequences.
      sharpness: by how much the logits are multiplied: those of random weights say
        nothing.
      seed: of all draws.
    """
    examples = draw(shape, True, count, seed)
    del examples["teacher"]
    pair = []
    for i, one in enumerate((shape, smaller(shape))):
        module = pretrained.module_of(gpt(one, 0.0), maps=False)
        key = jax.random.key(2 * seed + i)
        params = dict(
            module.init(key, jax.tree.map(lambda x: x[:1], examples["inputs"]))
        )
        params = dict(params["params"])
        params["norm"] = jax.tree.map(lambda x: sharpness * x, params["norm"])
        pair.append(teachers.live(module, {"params": params}))
    return *pair, examples


def trained_pair(
    shape: Shape, corpus: data.Corpus, at_least: int, count: int, **training
):
    """Two models trained on a text, teacher and student, and windows of its validation.

    Args:
      shape: the teacher's, but for the vocabulary, which is the text's.
      corpus: the text.
      at_least: how often a token must occur in the training text.
      count: windows.
      training: see `train_model`.
    """
    vocabulary = data.Vocabulary.of(corpus.train, at_least)
    shape = replace(shape, vocab=len(vocabulary))
    text, held = (
        data.windows(vocabulary.encode(part), shape.length)
        for part in (corpus.train, corpus.validation)
    )
    teacher, student = (
        train_model(s, text, **training) for s in (shape, smaller(shape))
    )
    return teacher, student, jax.tree.map(lambda x: x[:count], held)


def train_model(
    shape: Shape, text: Mapping[str, Any], *, steps: int, rate: float, seed: int
):
    """A model of the text after so many steps of AdamW."""
    module = pretrained.module_of(gpt(shape, 0.0), maps=False)
    student, optimizer = models.student(module), optax.adamw(rate)
    partitioner = parallel.choose("jit")
    step = train.make_train_step(
        student,
        objectives.combine({"hard": (1.0, objectives.hard_labels())}),
        optimizer,
    )
    first = jax.tree.map(lambda x: x[:1], dict(text))
    first["mask"] = np.ones(1, np.float32)
    state = train.fit(
        train.init_state(jax.random.key(seed), student, optimizer, first),
        partitioner.compile(train.scan_train(step), batch_axis=1),
        partitioner=partitioner,
        examples=partitioner.replicate(text),
        batches=data.Batches(len(text["labels"]), shape.batch, seed=seed),
        steps=steps,
        progress=False,
    )
    return models.trained(module, state)


def smaller(shape: Shape) -> Shape:
    """A student's: half the width and half the layers."""
    heads = max(1, shape.heads // 2)
    return replace(
        shape, width=shape.width // 2, depth=max(1, shape.depth // 2), heads=heads
    )


def measure(
    teacher: Any,
    student: Any,
    examples: Mapping[str, Any],
    *,
    top_k: Sequence[int],
    temperatures: Sequence[float],
    name: str,
) -> dict[str, Any]:
    """Bytes of a token, and the error of the KL, for each way to store.

    Args:
      teacher: whose outputs are stored.
      student: of whom the KL is.
      examples: windows of tokens.
      top_k: how many classes a sparse store keeps.
      temperatures: at which the KL is taken.
      name: of the text.

    Returns:
      `stored`, by name: `arrays` and `disk`, bytes of a token as they are and written,
      and `error`, by temperature the mean distance of a token's KL from the dense one,
      in nats; `tokens`, `classes`, and `loss`, the mean KL by temperature.
    """
    count, length = examples["labels"].shape
    batch = {**examples, "mask": np.ones(count, np.float32)}
    logits = jax.jit(lambda model, batch: model(batch).logits)(student, batch)
    exact: dict[float, Any] = {}
    stored = {}
    for kept in (None, *top_k):
        for dtype in DTYPES:
            label = f"{'dense' if kept is None else f'top-{kept}'}, {dtype}"
            found, disk = written(teacher, examples, name, kept, dtype)
            kl = {t: divergence(logits, found, t) for t in temperatures}
            exact = exact or kl  # the first, dense in float32
            errors = {t: float(jnp.abs(kl[t] - exact[t]).mean()) for t in temperatures}
            size = sum(array.nbytes for array in found.values())
            stored[label] = {
                "arrays": size / (count * length),
                "disk": disk / (count * length),
                "error": {str(t): error for t, error in errors.items()},
            }
    return {
        "stored": stored,
        "tokens": count * length,
        "classes": logits.shape[-1],
        "loss": {str(t): float(kl.mean()) for t, kl in exact.items()},
        "text": name,
    }


def written(teacher: Any, examples: Any, name: str, top_k: int | None, dtype: str):
    """A teacher's outputs, stored and read back, and their bytes on disk."""
    manifest = teachers.store.describe(
        teacher,
        examples,
        data=name,
        split="held out",
        transform="none",
        top_k=top_k,
        dtype=dtype,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs"
        teachers.store.write(path, teacher, examples, manifest, progress=False)
        found = teachers.store.read(path, manifest)
        files = [f for f in path.rglob("*") if f.is_file() and f.suffix != ".json"]
        return found, sum(f.stat().st_size for f in files)


def divergence(logits: Any, stored: Mapping[str, np.ndarray], temperature: float):
    """The KL of each token against stored outputs of one view."""
    said = {name: jnp.asarray(array[:, 0]) for name, array in stored.items()}
    if "logits" in said:
        return losses.forward_kl(logits, said["logits"], temperature=temperature)
    kept = TopK(said["ids"], said["log_probs"], said["logsumexp"])
    return losses.sparse_forward_kl(logits, kept, temperature=temperature)
