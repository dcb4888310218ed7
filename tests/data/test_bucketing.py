# SPDX-License-Identifier: Apache-2.0
"""A batch cut behind its longest text trains as the whole batch does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel, teachers
from jaxdistill.data.tokens import bucketed, cut_to, real_lengths
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.train import Evaluator, init_state, make_train_step, scan_train

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
    size = models.TransformerConfig(
        20, 8, 1, 2, positions=LENGTH, dropout=0.0, attention_dropout=0.0
    )
    return models.BertClassifier(models.Encoder(size), 3)


def by_token(length):
    """A batch that has everything by token."""
    tokens = np.ones((2, length))
    stored = {"logits": np.ones((2, 1, length, 5)), "logsumexp": tokens[:, None]}
    inputs = {"attention_mask": tokens, "vectors": np.ones((2, length, 3))}
    alone = {"mask": np.ones(2), "index": np.arange(2)}
    masks = {"labels": tokens, "token_mask": tokens}
    return {"inputs": inputs, "teacher": stored, **masks, **alone}


def test_everything_by_token_is_cut():
    shapes = jax.tree.map(np.shape, cut_to(by_token(6), 4))
    assert shapes == jax.tree.map(np.shape, by_token(4))


def test_what_is_by_text_stays_though_it_is_as_long():
    stored = {"logits": np.ones((6, 6, 6)), "logsumexp": np.ones((6, 6))}
    text = {"labels": np.arange(6), "mask": np.ones(6), "teacher": stored}
    batch = {"inputs": {"attention_mask": np.ones((6, 6))}, **text}
    shapes = jax.tree.map(np.shape, cut_to(batch, 2))
    assert shapes == {
        **jax.tree.map(np.shape, batch),
        "inputs": {"attention_mask": (6, 2)},
    }


def test_lengths_count_up_to_the_last_token():
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(real_lengths(mask), [2, 3, 0, 4])


@pytest.mark.parametrize(
    ("longest", "expected"), [(1, 3), (3, 3), (4, 6), (6, 6), (7, 8), (8, 8)]
)
def test_the_shortest_length_that_holds_the_batch_is_taken(longest, expected):
    mask = (np.arange(8) < longest).astype(np.int32)[None]
    # 8 and 11 are not shorter than the whole, which is there anyhow.
    of = bucketed(
        lambda batch: batch["inputs"]["attention_mask"].shape[1], (6, 11, 3, 8)
    )
    assert jax.jit(of)({"inputs": {"attention_mask": mask}}) == expected


def test_senseless_cuts_are_refused():
    with pytest.raises(ValueError, match="needs inputs with an attention_mask"):
        bucketed(lambda batch: 0, (3,))({"inputs": np.ones((2, 4))})
    with pytest.raises(ValueError, match="start at 1, got 0"):
        bucketed(lambda batch: 0, (3, 0))


@pytest.mark.parametrize(
    ("kind", "micro_batches"), [("jit", 2), ("mesh", 1), ("fsdp", 1), ("pmap", 1)]
)
def test_a_training_is_the_same(examples, kind, micro_batches):
    partitioner = parallel.choose(kind)
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

    def train(bucket_lengths):
        step = make_train_step(
            student,
            objective,
            optimizer,
            micro_batches=micro_batches,
            bucket_lengths=bucket_lengths,
        )
        step = partitioner.compile(scan_train(step), batch_axis=1)
        resident = (partitioner.place(teacher), partitioner.replicate(examples))
        state, metrics = step(
            partitioner.place(start), resident, partitioner.split(rows, 1)
        )
        return partitioner.fetch((state.params, metrics))

    whole, trimmed_too = train(()), train(TRIM_TO)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(close, whole, trimmed_too)


@pytest.mark.parametrize(
    ("masked", "top_k"),
    [(True, 4)]
    + [pytest.param(*x, marks=pytest.mark.slow) for x in ((True, None), (False, 4))]
    + [pytest.param(False, None, marks=pytest.mark.slow)],
)
def test_a_language_models_loss_is_the_same(examples, masked, top_k):
    """With stored outputs of every token, and padding that counts or does not."""
    size = models.TransformerConfig(
        20, 8, 1, 2, positions=LENGTH, dropout=0.0, attention_dropout=0.0
    )
    student = models.student(models.BertMaskedLM(models.Encoder(size)))
    ids = examples["inputs"]["input_ids"]
    logits = np.random.default_rng(1).normal(size=(SIZE, 1, LENGTH, 20))
    stored = {"logits": logits.astype(np.float32)}
    if top_k:
        kept, chosen = jax.lax.top_k(logits, top_k)
        total = jax.nn.logsumexp(logits, axis=-1)
        stored = {"ids": chosen, "log_probs": kept - total[..., None]}
        stored["logsumexp"] = total
    batch = {**examples, "labels": ids, "mask": np.ones(SIZE), "teacher": stored}
    if masked:
        batch["token_mask"] = examples["inputs"]["attention_mask"]
    batch = jax.tree.map(lambda x: x[:4], batch)  # short ones
    optimizer = optax.sgd(0.1)
    soft = soft_targets()  # sparse where what is stored is
    objective = combine({"soft": (0.5, soft), "hard": (0.5, hard_labels())})
    state = init_state(jax.random.key(0), student, optimizer, batch)

    def step(bucket_lengths):
        train = make_train_step(
            student, objective, optimizer, bucket_lengths=bucket_lengths
        )
        state_, metrics = jax.jit(train)(state, teachers.StoredTeacher(), batch)
        return state_.params, metrics

    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(close, step(()), step(TRIM_TO))


def test_a_short_batch_computes_only_its_tokens(examples):
    ids, seen = examples["inputs"], []

    def count(batch):
        jax.debug.callback(
            lambda x: seen.append(x.shape[1]), batch["inputs"]["input_ids"]
        )
        return jnp.zeros(())

    step = jax.jit(bucketed(count, TRIM_TO))
    step({"inputs": {name: x[:2] for name, x in ids.items()}})
    jax.effects_barrier()
    assert seen == [5]


@pytest.mark.parametrize("kind", ["jit", "pmap"])
def test_evaluation_of_cut_batches_is_the_same(examples, kind):
    """In another order too: the texts are not sorted here as they come."""
    order = np.random.default_rng(1).permutation(SIZE)
    examples = jax.tree.map(lambda x: x[order], examples)
    partitioner = parallel.choose(kind)
    batch = {**examples, "mask": np.ones(SIZE, np.float32)}
    variables = [bert().init(jax.random.key(i), batch["inputs"]) for i in (0, 1)]
    student, teacher = (partitioner.place(teachers.live(bert(), v)) for v in variables)
    whole, parts = (
        Evaluator(partitioner, examples, batch_size=BATCH, bucket_lengths=to)
        for to in ((), TRIM_TO)
    )
    expected = whole(student, teacher)
    assert expected["kl"] > 0
    found = parts(student, teacher)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
