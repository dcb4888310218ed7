# SPDX-License-Identifier: Apache-2.0
"""BERT: published sizes, padding that changes nothing, and a teacher layer by layer."""

import jax
import numpy as np
import pytest

from jaxdistill import losses, models, objectives, teachers, train
from jaxdistill.objectives import combine, hard_labels, soft_targets
from tests.builders import recorder

TEACHER = models.BertClassifier(
    models.Encoder(models.TransformerConfig(23, 12, 4, 4)), 3
)
STUDENT = models.BertClassifier(
    models.Encoder(models.TransformerConfig(23, 6, 2, 3)), 3
)


def batch(garbage=0, length=7):
    """Four examples, the last all padding; what lies in the padding may be anything."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 23, (4, length)).astype(np.int32)
    keep = (np.arange(length)[None] < np.array([[7], [4], [5], [3]])).astype(np.int32)
    return {
        "inputs": {
            "input_ids": np.where(keep > 0, ids, garbage).astype(np.int32),
            "attention_mask": keep,
        },
        "labels": np.array([0, 2, 1, 1], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (models.BERT_TINY, 4_385_920),
        (models.BERT_MINI, 11_170_560),
        (models.BERT_SMALL, 28_763_648),
        (models.BERT_MEDIUM, 41_373_184),
        (models.BERT_BASE, 109_482_240),
    ],
)
def test_published_parameter_counts(size, count):
    """With the pooler, without a head: less the 3 D + 3 of the classifier."""
    model = models.BertClassifier(models.Encoder(size, scan=True), 3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch()["inputs"])
    found = sum(x.size for x in jax.tree.leaves(shapes))
    assert found - 3 * size.width - 3 == count


def objective():
    """Classes, hidden states through a projection, attention relations."""
    pairs = objectives.uniform(2, 4)
    return combine(
        {
            "hard": (1.0, hard_labels()),
            "soft": (1.0, soft_targets(temperature=2.0)),
            "hidden": (1.0, objectives.on_hidden_states(losses.hint_mse, pairs)),
            "values": (
                1.0,
                objectives.on_extras(losses.relation_kl, "values", pairs, heads=2),
            ),
        }
    )


def step(given, rate=0.1):
    """A step of the student, and its gradient."""
    projector = models.Projector(((0, 12), (1, 12)))
    student = models.student(models.with_projector(STUDENT, projector))
    optimizer = recorder(rate)
    state = train.init_state(jax.random.key(1), student, optimizer, given)
    variables = jax.jit(TEACHER.init)(jax.random.key(2), given["inputs"])
    teacher = teachers.live(TEACHER, jax.tree.map(lambda x: 3 * x, variables))
    train_step = train.make_train_step(student, objective(), optimizer)
    return jax.jit(train_step)(state, teacher, given)


@pytest.fixture(scope="module")
def plain():
    return step(batch())


def test_every_term_teaches(plain):
    state, metrics = plain
    assert set(metrics) == {"hard", "soft", "hidden", "values", "loss"}
    assert all(total > 0 for total, _ in metrics.values())
    counts = {name: int(count) for name, (_, count) in metrics.items()}
    assert counts == {"hard": 3, "soft": 3, "hidden": 16, "values": 16, "loss": 1}
    gradient = state.opt_state["student"]["encoder"]["blocks"]["layer_0"]
    assert all((x != 0).any() for x in jax.tree.leaves(gradient["attention"]["out"]))


@pytest.mark.parametrize("garbage", [5, 22, 400, -100])
def test_padding_changes_nothing(plain, garbage):
    """Loss and gradient, whatever the padded tokens are."""
    for a, b in zip(
        *(jax.tree.leaves(found) for found in (plain, step(batch(garbage)))),
        strict=True,
    ):
        if not jax.numpy.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_layer_beyond_the_depth_is_named():
    given = batch()
    outputs = [
        jax.eval_shape(m.init_with_output, jax.random.key(0), given["inputs"])[0]
        for m in (STUDENT, TEACHER)
    ]
    term = objectives.on_hidden_states(losses.hint_mse, ((1, 4),))
    with pytest.raises(ValueError, match="layer 4 of the teacher, which returns 4"):
        term(*outputs, given, 0)


def test_a_sequence_beyond_the_positions_is_refused():
    size = models.TransformerConfig(23, 6, 1, 3, positions=5)
    model = models.BertClassifier(models.Encoder(size), 3)
    given = batch()["inputs"]
    with pytest.raises(ValueError, match="a sequence of 7 tokens is longer than the"):
        model.init(jax.random.key(0), given)
