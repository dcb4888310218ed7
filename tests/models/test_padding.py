# SPDX-License-Identifier: Apache-2.0
"""Tokens of padding change no loss, no gradient and no metric, whatever they are."""

import functools

import jax
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, teachers, train
from jaxdistill.data import Batches, DataError
from jaxdistill.objectives import (
    combine,
    hard_labels,
    last,
    on_hidden_states,
    on_logits,
    soft_targets,
    teacher_labels,
)
from jaxdistill.parallel import jit
from jaxdistill.train import Evaluator, language

VOCAB, LENGTHS = 23, np.array([3, 2, 3, 1])
SIZE = models.TransformerConfig(
    VOCAB, 12, 1, 3, positions=9, dropout=0.0, attention_dropout=0.0, epsilon=1e-5
)
MODULES = {
    "bert": models.BertMaskedLM(models.Encoder(SIZE)),
    "gpt": models.GPT(SIZE),
}
CLASSES = {
    "bert": models.BertClassifier(models.Encoder(SIZE), 3),
    "gpt": models.GPTClassifier(models.GPT(SIZE), 3),
}
OBJECTIVE = combine(
    {
        "soft": (1.0, soft_targets(temperature=2.0)),
        "reverse": (1.0, on_logits(losses.reverse_kl)),
        "hard": (1.0, hard_labels()),
        "pseudo": (1.0, teacher_labels()),
        "distances": (1.0, on_hidden_states(losses.relational_distance, last())),
        "angles": (1.0, on_hidden_states(losses.relational_angle, last())),
        "similarity": (1.0, on_hidden_states(losses.similarity_preserving, last())),
        "kernel": (1.0, on_hidden_states(losses.linear_cka, last())),
    }
)


def batch(length, garbage):
    """Four texts of up to three tokens, padded to a length."""
    keep = (np.arange(length) < LENGTHS[:, None]).astype(np.int32)

    def padded(seed):
        real = np.random.default_rng(seed).integers(1, VOCAB, (4, 3))
        wide = np.full((4, length), garbage)
        wide[:, :3] = real
        return np.where(keep > 0, wide, garbage).astype(np.int32)

    return {
        "inputs": {"input_ids": padded(0), "attention_mask": keep},
        "labels": padded(1),
        "mask": np.ones(4, np.float32),
    }


def classes(length, garbage):
    """The same texts, a class for each."""
    return {**batch(length, garbage), "labels": np.array([0, 2, 1, 1], np.int32)}


@functools.cache
def program(module):
    """A state, a teacher, and a step that is compiled once for each shape."""
    student = models.student(module)
    given = batch(3, 0)
    variables = jax.jit(module.init)(jax.random.key(1), given["inputs"])
    state = train.init_state(jax.random.key(0), student, optax.sgd(1.0), given)
    train_step = train.make_train_step(student, OBJECTIVE, optax.sgd(1.0))
    return state, teachers.live(module, variables), jax.jit(train_step)


def step(module, given):
    """Metrics and gradients of one step."""
    state, teacher, train_step = program(module)
    moved, metrics = train_step(state, teacher, given)
    return metrics, jax.tree.map(np.subtract, state.params, moved.params)


@pytest.mark.parametrize(
    ("modules", "given"),
    [(MODULES, batch), (CLASSES, classes)],
    ids=["tokens", "classes"],
)
@pytest.mark.parametrize("name", ["bert", "gpt"])
def test_a_step_is_the_same(name, modules, given):
    expected = step(modules[name], given(3, 0))
    assert all(total > 0 for total, _ in expected[0].values())
    for garbage in (0, 11, 400, -100):
        found = step(modules[name], given(7, garbage))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found,
            expected,
        )


@pytest.mark.parametrize("name", MODULES)
def test_an_evaluation_is_the_same(name):
    module = MODULES[name]
    student, teacher = (
        teachers.live(module, module.init(jax.random.key(i), batch(3, 0)["inputs"]))
        for i in (0, 1)
    )
    expected, found = (
        Evaluator(jit(), given, metrics=language)(student, teacher)
        for given in (batch(3, 0), batch(7, 400))
    )
    assert expected["kl"] > 0
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_text_that_is_all_padding_is_refused():
    given = batch(3, 0)
    given["inputs"]["attention_mask"][2] = 0
    teacher = teachers.live(MODULES["bert"], {})
    batches = Batches(4, 2)
    with pytest.raises(DataError, match="row 2 is all padding"):
        next(batches.iterate({"inputs": given["inputs"]}, 0))
    with pytest.raises(DataError, match="row 2 is all padding"):
        Evaluator(jit(), given)
    with pytest.raises(DataError, match="row 2 is all padding"):
        teachers.store.describe(teacher, given, data="", split="", transform="")
