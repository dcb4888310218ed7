# SPDX-License-Identifier: Apache-2.0
"""How far from its teacher a model's own text is: by NumPy, and by enumeration."""

from itertools import product

import jax
import numpy as np
import pytest

from experiments.text.written import continued, own_kl
from jaxdistill import models, teachers
from jaxdistill.models import gpt_config

pytestmark = pytest.mark.slow

VOCAB, PROMPT, STEPS = 3, 2, 3
KEY = jax.random.key(4)


def drawn(seed, width, factored=False):
    """A tiny model whose choices are not all alike."""
    plain = {"dropout": 0.0, "attention_dropout": 0.0, "positions": PROMPT + STEPS}
    module = models.GPT(gpt_config(VOCAB, width, 1, 2, **plain), factored=factored)
    ids = {"input_ids": np.zeros((1, 2), np.int32)}
    variables = jax.jit(module.init)(jax.random.key(seed), ids)
    return teachers.live(module, jax.tree.map(lambda x: 5 * x, variables))


@pytest.fixture(scope="module")
def pair():
    return drawn(0, 4), drawn(1, 8)


def prompts(count):
    rng = np.random.default_rng(0)
    return rng.integers(0, VOCAB, (count, PROMPT)).astype(np.int32)


def log_probs(model, ids):
    """`[N, L, V]` in float64."""
    inputs = {"input_ids": np.asarray(ids, np.int32)}
    logits = np.asarray(model.module.apply(model.variables, inputs).logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("size", [64, 4])
def test_it_is_the_kl_at_the_tokens_that_were_written(pair, size):
    """Also in parts that do not divide, whose last is filled up."""
    student, teacher = pair
    ids = continued(student, prompts(7), STEPS, KEY)
    log_q, log_p = (log_probs(model, ids[:, :-1]) for model in pair)
    values = (np.exp(log_q) * (log_q - log_p)).sum(-1)[:, PROMPT - 1 :]
    assert values.shape == (7, STEPS)
    found = own_kl(student, teacher, prompts(7), STEPS, KEY, size=size)
    assert found == pytest.approx(values.mean(), rel=1e-4)


def test_it_expects_the_divergence_over_all_continuations(pair):
    """By enumeration: `sum_y q(y) log q(y) / p(y)`, a token."""
    prompt = prompts(1)
    tails = np.array(list(product(range(VOCAB), repeat=STEPS)))
    ids = np.concatenate([np.tile(prompt, (len(tails), 1)), tails], 1)
    by_model = []
    for model in pair:
        steps = log_probs(model, ids[:, :-1])[:, PROMPT - 1 :]
        by_model.append(np.take_along_axis(steps, tails[..., None], -1).sum((1, 2)))
    log_q, log_p = by_model
    assert np.exp(log_q).sum() == pytest.approx(1)
    expected = (np.exp(log_q) * (log_q - log_p)).sum() / STEPS
    many = np.tile(prompt, (8192, 1))
    found = own_kl(*pair, many, STEPS, KEY, size=2048)
    assert found == pytest.approx(expected, rel=0.03)
    # Not the other direction, nor the mean over the teacher's text.
    other = (np.exp(log_p) * (log_p - log_q)).sum() / STEPS
    assert other != pytest.approx(expected, rel=0.1)


def test_a_key_decides_and_a_model_is_its_own_equal(pair):
    student, teacher = pair
    first = own_kl(student, teacher, prompts(9), STEPS, KEY)
    assert own_kl(student, teacher, prompts(9), STEPS, KEY) == first
    assert own_kl(student, teacher, prompts(9), STEPS, jax.random.key(5)) != first
    assert own_kl(student, student, prompts(9), STEPS, KEY) == pytest.approx(
        0, abs=1e-6
    )


def test_factored_logits_are_multiplied_out(pair):
    factored = (drawn(0, 4, factored=True), drawn(1, 8, factored=True))
    found = own_kl(*factored, prompts(5), STEPS, KEY)
    assert found == pytest.approx(own_kl(*pair, prompts(5), STEPS, KEY), rel=1e-4)


def test_a_model_that_cannot_write_is_an_error(pair):
    student, teacher = pair
    broken = teachers.live(
        student.module, jax.tree.map(lambda x: np.nan * x, student.variables)
    )
    said = "cannot write: its logits are not finite"
    with pytest.raises(ValueError, match=said):
        continued(broken, prompts(3), 2, KEY)
    with pytest.raises(ValueError, match=said):
        own_kl(broken, teacher, prompts(3), 2, KEY)
