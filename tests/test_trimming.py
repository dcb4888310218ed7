# SPDX-License-Identifier: Apache-2.0
"""A batch cut behind its longest text trains as the whole batch does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel, teachers
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.steps import init_state, make_train_step, scan_train
from jaxdistill.trimming import cut, lengths, trimmed

SIZE, LENGTH, BATCH = 24, 12, 8
TRIM_TO = (5,)


@pytest.fixture
def examples():
    """Texts of 1 to 12 tokens in order, with garbage in their padding."""
    rng = np.random.default_rng(0)
    longest = np.sort(rng.integers(1, LENGTH + 1, SIZE))
    mask = (np.arange(LENGTH) < longest[:, None]).astype(np.int32)
    ids = rng.integers(1, 20, (SIZE, LENGTH)).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    labels = rng.integers(0, 3, SIZE).astype(np.int32)
    return {"inputs": inputs, "labels": labels}


def bert():
    """A network whose every token sees all others."""
    size = models.Size(
        20, 8, 1, 2, positions=LENGTH, dropout=0.0, attention_dropout=0.0
    )
    return models.BertClassifier(models.Encoder(size), 3)


def by_token(length):
    """A batch that has everything by token, and stored outputs by class."""
    tokens = np.arange(2 * length).reshape(2, length)
    return {
        "inputs": {"attention_mask": np.ones((2, length))},
        "labels": tokens,
        "token_mask": np.ones((2, length)),
        "teacher": np.ones((2, length, 5)),
        "mask": np.ones(2),
        "index": np.arange(2),
    }


def test_everything_by_token_is_cut():
    shapes = jax.tree.map(np.shape, cut(by_token(6), 4))
    assert shapes == jax.tree.map(np.shape, by_token(4))


def test_what_is_by_example_stays_though_it_is_as_long():
    batch = {"labels": np.arange(6), "teacher": np.ones((6, 6)), "mask": np.ones(6)}
    assert jax.tree.map(np.shape, cut(batch, 2)) == jax.tree.map(np.shape, batch)


def test_lengths_count_up_to_the_last_token():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(lengths(mask), [2, 3, 0, 4])


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 3), (3, 3), (4, 6), (6, 6), (7, 8), (8, 8)]
)
def test_the_shortest_length_that_holds_the_batch_is_taken(longest, expected):
    mask = (np.arange(8) < longest).astype(np.int32)[None]
    # 8 and 11 are not shorter than the whole, which is there anyhow.
    of = trimmed(
        lambda batch: batch["inputs"]["attention_mask"].shape[1], (6, 11, 3, 8)
    )
    assert jax.jit(of)({"inputs": {"attention_mask": mask}}) == expected


def test_inputs_without_a_mask_are_refused():
    with pytest.raises(ValueError, match="need inputs with an attention_mask"):
        trimmed(lambda batch: 0, (3,))({"inputs": np.ones((2, 4))})


@pytest.mark.parametrize(
    ("kind", "micro_batches"), [("jit", 2), ("mesh", 1), ("fsdp", 1), ("pmap", 1)]
)
def test_a_training_is_the_same(examples, kind, micro_batches):
    run = parallel.choose(kind)
    # On eight devices a network that compiles faster.
    module = bert() if kind == "jit" else models.BagOfEmbeddings(20, 8, 3)
    optimizer = optax.sgd(0.1)
    batch = {**jax.tree.map(lambda x: x[:1], examples), "mask": np.ones(1)}
    student = models.student(module)
    start = init_state(jax.random.key(0), student, optimizer, batch)
    teacher = teachers.live(
        module, {"params": student.init(jax.random.key(1), batch)[0]}
    )
    objective = combine({"soft": (0.5, soft_targets()), "hard": (0.5, hard_labels())})
    rows = {
        "index": np.arange(SIZE).reshape(-1, BATCH),
        "mask": np.ones((SIZE // BATCH, BATCH), np.float32),
    }

    def train(trim_to):
        step = make_train_step(
            student, objective, optimizer, micro_batches=micro_batches, trim_to=trim_to
        )
        step = run.compile(scan_train(step), batch_axis=1)
        resident = (run.place(teacher), run.replicate(examples))
        state, metrics = step(run.place(start), resident, run.split(rows, 1))
        return run.fetch((state.params, metrics))

    whole, trimmed_too = train(()), train(TRIM_TO)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(close, whole, trimmed_too)


def test_a_short_batch_computes_only_its_tokens(examples):
    ids, seen = examples["inputs"], []

    def count(batch):
        jax.debug.callback(
            lambda x: seen.append(x.shape[1]), batch["inputs"]["input_ids"]
        )
        return jnp.zeros(())

    step = jax.jit(trimmed(count, TRIM_TO))
    step({"inputs": {name: x[:2] for name, x in ids.items()}})
    jax.effects_barrier()
    assert seen == [5]
