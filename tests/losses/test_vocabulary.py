# SPDX-License-Identifier: Apache-2.0
"""Losses a part of the vocabulary at a time are the dense ones, in little memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses, models, teachers
from jaxdistill.models import gpt_config
from jaxdistill.objectives import (
    combine,
    first_classes,
    hard_labels,
    mutual_targets,
    on_logits,
    soft_targets,
    teacher_labels,
)
from jaxdistill.train import init_state, make_train_step
from jaxdistill.train.step import masked_sum
from jaxdistill.types import Factored, Outputs, TopK
from tests.builders import RECORDER, largest_difference

TOKENS, CLASSES = (2, 5), 11


def head(seed, width, *, bias=True, scale=1.0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(*TOKENS, width))
    kernel, row = rng.normal(size=(CLASSES, width)), rng.normal(size=CLASSES)
    given = (hidden, kernel, row) if bias else (hidden, kernel)
    return Factored(*(jnp.asarray(x, dtype) for x in given))


LABELS = np.random.default_rng(7).integers(0, CLASSES, TOKENS)
STUDENT, TEACHER = head(0, 4), head(1, 6, bias=False)
WEIGHTS = np.random.default_rng(8).normal(size=TOKENS).astype(np.float32)


def chunked(student, teacher, chunk, temperature=2.0):
    hard = losses.chunked_cross_entropy(student, LABELS, chunk=chunk)
    soft = losses.chunked_forward_kl(
        student, teacher, temperature=temperature, chunk=chunk
    )
    return hard, soft


def dense(student, teacher, temperature=2.0):
    logits, theirs = student.multiply(), teacher.multiply()
    hard = losses.cross_entropy(logits, LABELS)
    return hard, losses.forward_kl(logits, theirs, temperature=temperature)


@pytest.mark.parametrize("wrong", [-100, -1, CLASSES, 400])
def test_a_label_that_is_no_class_has_no_loss(wrong):
    """A finite one would train what nobody asked for; a mask leaves it out whole."""
    labels = jnp.array(LABELS).at[0, 1].set(wrong)
    keep = jnp.ones(TOKENS).at[0, 1].set(0)

    def hard(student):
        return losses.chunked_cross_entropy(student, labels, chunk=3)

    def dense(student):
        return losses.cross_entropy(student.multiply(), labels)

    def decoupled(student):
        logits = student.multiply()
        return losses.decoupled_kl(logits, jnp.ones_like(logits), labels)

    for loss in (hard, dense, decoupled):
        missing = jnp.isnan(loss(STUDENT))
        np.testing.assert_array_equal(missing, keep == 0)
        slope = jax.grad(lambda x, loss=loss: masked_sum(loss(x), keep))(STUDENT)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))
        assert not slope.hidden[0, 1].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16])
def test_labels_may_be_of_a_narrow_type(dtype):
    """Of 256 bytes each has a number in eight bits, and 256 itself has not."""
    labels = np.array([0, 100], dtype)
    head = Factored(jnp.ones((2, 1)), jnp.linspace(0, 1, 256)[:, None])
    for loss, student in (
        (losses.chunked_cross_entropy, head),
        (losses.cross_entropy, head.multiply()),
    ):
        expected = loss(student, labels.astype(np.int32))
        np.testing.assert_array_equal(loss(student, labels), expected)
        assert np.isfinite(expected).all()


def both(function, *arguments):
    """Values, and the gradients of each in student and teacher."""
    found = []
    for which in (0, 1):

        def total(student, teacher, which=which):
            return (WEIGHTS * function(student, teacher, *arguments)[which]).sum()

        found.append(jax.grad(total, (0, 1))(STUDENT, TEACHER))
    return function(STUDENT, TEACHER, *arguments), found


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_values_and_gradients_are_the_dense_ones(chunk):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)  # noqa: E731
    jax.tree.map(close, both(chunked, chunk), both(dense))


def test_no_gradient_reaches_the_teacher():
    _, (_, (_, theirs)) = both(chunked, 4)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(theirs))


def test_far_logits_and_words_that_do_not_exist():
    far = head(0, 4, scale=300.0)
    masked = far.replace(bias=far.bias.at[jnp.array([0, 9, 10])].set(-jnp.inf))
    theirs = TEACHER.replace(bias=jnp.zeros(CLASSES).at[8:].set(-jnp.inf))
    theirs = theirs.replace(bias=theirs.bias.at[0].set(-jnp.inf))
    for found, expected in zip(
        chunked(masked, theirs, 3), dense(masked, theirs), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_word_that_only_the_student_rules_out_may_weigh_nothing():
    """The teacher's first word is e^-500 of its last, which comes in a later part."""
    mine = STUDENT.replace(bias=STUDENT.bias.at[0].set(-jnp.inf))
    theirs = TEACHER.replace(bias=jnp.zeros(CLASSES).at[-1].set(500.0))

    def value(loss, student):
        return loss(student, theirs).sum()

    found, expected = (
        jax.value_and_grad(value, argnums=1)(loss, mine)
        for loss in (
            lambda mine, theirs: losses.chunked_forward_kl(mine, theirs, chunk=4),
            lambda *heads: losses.forward_kl(*(x.multiply() for x in heads)),
        )
    )
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [None, np.float32, np.float64])
@pytest.mark.parametrize("temperature", [2.0, np.float64(2)])
def test_types_are_the_dense_ones_where_double_is_the_default(bias, temperature):
    with jax.enable_x64(True):
        mine = head(0, 4, bias=bias is not None)
        if bias is not None:
            mine = mine.replace(bias=mine.bias.astype(bias))
        for found, expected in zip(
            chunked(mine, TEACHER, 4, temperature),
            dense(mine, TEACHER, temperature),
            strict=True,
        ):
            assert found.dtype == expected.dtype
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_half_precision_is_multiplied_in_single():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (STUDENT, TEACHER))
    found, expected = chunked(*low, 4), dense(*low)
    assert found[0].dtype == found[1].dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_temperature_may_be_traced():
    kl = jax.jit(lambda t: losses.chunked_forward_kl(STUDENT, TEACHER, temperature=t))
    np.testing.assert_allclose(kl(3.0), dense(STUDENT, TEACHER, 3.0)[1], rtol=1e-5)


def test_memory_does_not_grow_with_the_vocabulary():
    """Temporaries of value and gradient, for 2,048 tokens."""

    def temporaries(loss, classes, **settings):
        def sides(width):
            return Factored(
                jax.ShapeDtypeStruct((2048, width), jnp.float32),
                jax.ShapeDtypeStruct((classes, width), jnp.float32),
            )

        def total(student, teacher):
            return loss(student, teacher, **settings).sum()

        step = jax.jit(jax.value_and_grad(total))
        compiled = step.lower(sides(16), sides(24)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def whole(student, teacher):
        return losses.forward_kl(student.multiply(), teacher.multiply())

    small, large = (
        temporaries(losses.chunked_forward_kl, v, chunk=512) for v in (2048, 16384)
    )
    kernels = 2 * (16384 - 2048) * (16 + 24) * 4
    assert large - small < 2 * kernels
    assert temporaries(whole, 16384) > 10 * large


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.chunked_cross_entropy(STUDENT, LABELS[0]),
            r"labels of shape \(5,\) do not fit logits of shape \(2, 5, 11\)",
        ),
        (
            lambda: losses.chunked_forward_kl(
                STUDENT, TEACHER.replace(kernel=TEACHER.kernel[:9])
            ),
            "the student has 11 classes, the teacher 9",
        ),
        (
            lambda: losses.chunked_forward_kl(STUDENT, TEACHER, temperature=0.0),
            "temperature must be above 0",
        ),
        (
            lambda: losses.chunked_cross_entropy(STUDENT, LABELS, chunk=0),
            "chunk must be at least 1, got 0",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


BATCH = {
    "labels": jnp.asarray(LABELS),
    "mask": jnp.ones(TOKENS[0]),
    "token_mask": jnp.asarray(np.random.default_rng(9).integers(0, 2, TOKENS), float),
}


def term_values(term, student, teacher):
    return term(Outputs(student), Outputs(teacher), BATCH, 0)


@pytest.mark.parametrize(
    "term",
    [hard_labels(), soft_targets(temperature=2.0), on_logits(losses.reverse_kl)]
    + [first_classes(9, soft_targets(temperature=2.0)), teacher_labels()],
    ids=str,
)
def test_terms_take_factored_logits(term):
    expected = term_values(term, STUDENT.multiply(), TEACHER.multiply())
    sides = [(STUDENT, TEACHER)]
    if "hard" not in str(term):
        sides.append((STUDENT, TEACHER.multiply()))
        sides.append((STUDENT.multiply(), TEACHER))
    for student, teacher in sides:
        found = term_values(term, student, teacher)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_a_padded_vocabulary_is_cut():
    term = first_classes(CLASSES, soft_targets())
    padded = jnp.pad(TEACHER.multiply(), ((0, 0), (0, 0), (0, 5)), constant_values=9.0)
    found = term_values(term, STUDENT.multiply(), padded)
    expected = term_values(soft_targets(), STUDENT.multiply(), TEACHER.multiply())
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="first_classes takes those"):
        term_values(soft_targets(), STUDENT.multiply(), padded)
    with pytest.raises(ValueError, match=r"first_classes\(12\): one side has only 11"):
        term_values(first_classes(12, soft_targets()), STUDENT.multiply(), padded)


def kept(teacher, count):
    log_probs, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), count)
    return TopK(ids, log_probs, jnp.zeros(TOKENS))


WIDER = jnp.pad(TEACHER.multiply(), ((0, 0), (0, 0), (0, 2)), constant_values=9.0)
WIDE = Factored(WIDER, jnp.eye(CLASSES + 2))
OTHER = "the student has 11 classes, the teacher 13; .*objectives.first_classes takes"


@pytest.mark.parametrize(
    ("term", "teacher", "message"),
    [
        (soft_targets(), WIDER, f"forward_kl: {OTHER}"),
        (soft_targets(), WIDE, f"forward_kl: {OTHER}"),
        (soft_targets(), jnp.stack([WIDER, WIDER]), f"forward_kl: {OTHER}"),
        (on_logits(losses.reverse_kl), WIDE, f"reverse_kl: {OTHER}"),
        (teacher_labels(), WIDER, f"teacher_labels: {OTHER}"),
        (teacher_labels(), WIDE, f"teacher_labels: {OTHER}"),
        (soft_targets(), kept(WIDER, 12), "keeps 12 classes, the student has only 11"),
        (soft_targets(), kept(WIDER, 3), "sparse_forward_kl: the teacher keeps class"),
        (teacher_labels(), kept(WIDER, 3), "keeps class 12, the student has only 11"),
    ],
)
@pytest.mark.parametrize("student", [STUDENT, STUDENT.multiply()], ids=["parts", "all"])
def test_another_vocabulary_is_named_with_the_way_out(student, term, teacher, message):
    with pytest.raises(ValueError, match=message):
        term_values(term, student, teacher)


def test_a_traced_class_the_student_has_not_is_no_number():
    """Nothing can be raised under jit: the value must not look like one."""

    def value(teacher):
        return term_values(soft_targets(), STUDENT.multiply(), teacher)[0]

    assert jnp.isnan(jax.jit(value)(kept(WIDER, 3))).all()


def test_teacher_labels_teach_factored_logits_as_whole():
    def total(student):
        return (WEIGHTS * term_values(teacher_labels(), student, TEACHER)[0]).sum()

    found = jax.grad(total)(STUDENT)
    expected = jax.grad(lambda student: total(student.multiply()))(STUDENT)
    assert largest_difference(found, expected) < 1e-5


def test_mutual_learning_of_one_factored_student_is_refused():
    with pytest.raises(
        ValueError, match=r"of two or more \(models.Peers\), got .*11\)"
    ):
        term_values(mutual_targets(), STUDENT, None)


@pytest.mark.parametrize("join", [teachers.ensemble, teachers.mean_logits])
def test_several_factored_models_are_multiplied_out(join):
    ids = jnp.asarray(np.random.default_rng(3).integers(0, 23, TOKENS))
    batch = {**BATCH, "inputs": {"input_ids": ids}, "labels": ids}
    found, trained = [], []
    for factored in (True, False):
        one = models.GPT(gpt_config(23, 8, 1, 2, dropout=0.0), factored=factored)
        peers = models.Peers((one, one))
        variables = peers.init(jax.random.key(0), batch["inputs"])
        outputs = peers.apply(variables, batch["inputs"])
        found.append(mutual_targets()(outputs, None, batch, 0)[0])
        mine = [{"params": variables["params"][f"peer_{i}"]} for i in range(2)]
        teacher = join([teachers.live(one, each) for each in mine])
        trained.append(
            soft_targets()(
                outputs.replace(logits=outputs.logits[0]), teacher(batch), batch, 0
            )[0]
        )
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*trained, rtol=1e-5, atol=1e-6)
    assert (found[0] > 0).all()
    assert (trained[0] > 0).all()


def test_smoothing_needs_whole_logits():
    with pytest.raises(ValueError, match="factored logits have no label smoothing"):
        term_values(hard_labels(label_smoothing=0.1), STUDENT, None)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("which", ["gpt", "bert"])
def test_a_language_model_trains_on_factored_logits_as_on_whole(which, tied):
    """One step of a student from its teacher, both ways."""

    def make(width, factored):
        if which == "gpt":
            size = gpt_config(23, width, 1, 2, tied=tied)
            return models.GPT(size, factored=factored)
        encoder = models.Encoder(models.TransformerConfig(23, width, 1, 2, tied=tied))
        return models.BertMaskedLM(encoder, factored=factored)

    ids = jnp.asarray(np.random.default_rng(3).integers(0, 23, TOKENS))
    batch = {**BATCH, "inputs": {"input_ids": ids}}
    objective = combine({"hard": (0.5, hard_labels()), "soft": (0.5, soft_targets())})
    found = []
    for factored in (False, True):
        student = models.student(make(8, factored))
        variables = jax.jit(make(12, factored).init)(jax.random.key(1), batch["inputs"])
        teacher = teachers.live(make(12, factored), variables)
        state = init_state(jax.random.key(0), student, RECORDER, batch)
        step = jax.jit(make_train_step(student, objective, RECORDER))
        found.append(step(state, teacher, batch)[0].opt_state)
    assert largest_difference(found[1], found[0]) < 1e-5
