# SPDX-License-Identifier: Apache-2.0
"""What of a language model's outputs must be stored? Bytes of a token against error."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import optax

from experiments.stored import forms
from experiments.text.speed_jobs import Shape, draw, gpt
from jaxdistill import data, models, objectives, parallel, pretrained, teachers, train


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
        one_text = jax.tree.map(lambda x: x[:1], examples["inputs"])
        params = dict(module.init(key, one_text)["params"])
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
    partitioner = parallel.choose("jit")
    state, step = train.begin(
        module,
        objectives.combine({"hard": (1.0, objectives.hard_labels())}),
        optax.adamw(rate),
        partitioner=partitioner,
        examples=text,
        seed=seed,
    )
    state = train.fit(
        state,
        step,
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
    exact: dict[float, Any] = {}
    stored = {}
    with tempfile.TemporaryDirectory() as folder:
        for label, found, disk, kl in forms(
            teacher,
            student,
            examples,
            top_k=top_k,
            temperatures=temperatures,
            folder=Path(folder),
            data=name,
            split="held out",
            transform="none",
        ):
            exact = exact or kl  # the first, dense in float32
            size = sum(array.nbytes for array in found.values())
            stored[label] = {
                "arrays": size / (count * length),
                "disk": disk / (count * length),
                "error": {str(t): float(abs(kl[t] - exact[t]).mean()) for t in kl},
            }
    return {
        "stored": stored,
        "tokens": count * length,
        "classes": teacher.module.size.vocab,
        "loss": {str(t): float(kl.mean()) for t, kl in exact.items()},
        "text": name,
    }
