# SPDX-License-Identifier: Apache-2.0
"""What single losses promise beyond the table: closed forms, siblings, messages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.losses import numerics
from jaxdistill.types import TopK
from tests.losses import references
from tests.losses.losses_table import CASES, compiled, wide
from tests.losses.references import log_softmax, softmax

INF = np.inf

SOFT = next(case for case in CASES if case.name == "forward_kl")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_gradient_is_temperature_times_the_gap(temperature):
    student, teacher = SOFT.arguments()
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    _, found = compiled(losses.forward_kl, temperature=temperature)(student, teacher)
    np.testing.assert_allclose(found, temperature * (q - p), atol=1e-6)


def test_forward_kl_at_high_temperature_matches_logits():
    """Hinton et al. 2015, equation 4: the gradient tends to (z - v) / C, centred."""
    with jax.enable_x64(True):
        z, v = SOFT.arguments(dtype=np.float64)
        _, found = compiled(losses.forward_kl, temperature=1e5)(z, v)
    gap = (z - v) / z.shape[-1]
    limit = gap - gap.mean(-1, keepdims=True)
    np.testing.assert_allclose(found, limit, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_forward_kl_is_its_decoupled_parts(temperature):
    """Zhao et al. 2022, equation 6: KL = TCKD + (1 - p[label]) NCKD."""
    z, v = SOFT.arguments()
    labels = np.arange(6) % 5
    target, other = (
        losses.decoupled_kl(
            z,
            v,
            labels,
            target_weight=a,
            nontarget_weight=b,
            temperature=temperature,
        )
        for a, b in ((1, 0), (0, 1))
    )
    rest = 1 - softmax(v / temperature)[np.arange(6), labels]
    whole = losses.forward_kl(z, v, temperature=temperature)
    np.testing.assert_allclose(target + rest * other, whole, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tail", [True, False])
def test_all_classes_kept_are_the_dense_loss(temperature, tail):
    z, v = SOFT.arguments()
    teacher = TopK(
        np.tile(np.arange(5)[::-1], (6, 1)), log_softmax(v)[:, ::-1], v[:, 0]
    )
    found, slope = compiled(
        losses.sparse_forward_kl, temperature=temperature, tail=tail
    )(z, teacher)
    dense, dense_slope = compiled(losses.forward_kl, temperature=temperature)(z, v)
    np.testing.assert_allclose(found, dense, rtol=1e-5)
    np.testing.assert_allclose(slope, dense_slope, atol=1e-6)


def test_a_student_off_the_kept_classes_is_seen_by_the_tail():
    """96% of its mass elsewhere: renormalised over the kept classes it scores 0."""
    student = np.log(np.array([0.02, 0.02, 0.48, 0.48], np.float32))
    teacher = TopK(np.array([0, 1]), np.log(np.float32([0.4, 0.4])), np.float32(0))
    kept = partial(losses.sparse_forward_kl, student, teacher)
    np.testing.assert_allclose(kept(tail=False), 0, atol=1e-6)
    expected = 0.8 * np.log(0.8 / 0.04) + 0.2 * np.log(0.2 / 0.96)
    np.testing.assert_allclose(kept(), expected, rtol=1e-5)


def test_generalized_jsd_tends_to_the_two_kls():
    """Agarwal et al. 2024, section 2: over beta, and over 1 - beta."""
    with jax.enable_x64(True):
        z, v = SOFT.arguments(dtype=np.float64)
        low = losses.generalized_jsd(z, v, beta=1e-6) / 1e-6
        high = losses.generalized_jsd(z, v, beta=1 - 1e-6) / 1e-6
        np.testing.assert_allclose(low, losses.forward_kl(z, v), rtol=1e-3)
        np.testing.assert_allclose(high, losses.reverse_kl(z, v), rtol=1e-3)


def test_reverse_kl_where_the_teacher_excludes_a_class():
    """+inf, with the gradient of the other classes' sum: q_j (f_j - sum_c q_c f_c)."""
    z, v = np.array([1.0, 2.0, -1.0]), np.array([-np.inf, 2.0, 0.5])
    value, slope = jax.value_and_grad(losses.reverse_kl)(*map(jnp.float32, (z, v)))
    q, p = np.exp(z) / np.exp(z).sum(), np.exp(v) / np.exp(v).sum()
    f = np.array([0.0, *(np.log(q[1:] / p[1:]) + 1)])
    assert value == np.inf
    np.testing.assert_allclose(slope, q * (f - (q * f).sum()), rtol=1e-5)


def test_standardize():
    z = SOFT.arguments()[0]
    found = losses.standardize(z)
    np.testing.assert_allclose(found, references.standardize(z), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.std(found, -1, ddof=1), 1, rtol=1e-5)
    assert not losses.standardize(jnp.ones(3)).any()
    masked = losses.standardize(jnp.array([1.0, -INF, 2.0, 3.0]))
    np.testing.assert_allclose(masked, [-1, -INF, 0, 1])


def test_attention_kl_is_least_at_equal_distributions():
    case = next(case for case in CASES if case.loss is losses.attention_kl)
    student, teacher = case.arguments()
    np.testing.assert_allclose(case(teacher, teacher)[0], 0, atol=1e-6)
    assert (np.asarray(case(student, teacher)[0]) > 0).all()


def test_attention_scores_of_masked_keys_may_be_infinite():
    case = next(case for case in CASES if case.loss is losses.attention_mse)
    student, teacher = case.arguments()
    causal = np.tril(np.ones((4, 5), bool))
    expected = [
        ((student - teacher) ** 2)[:, :, i, : i + 1].mean((1, 2)) for i in range(4)
    ]
    student, teacher = (np.where(causal, x, -INF) for x in (student, teacher))
    values, slope = case(student, teacher)
    np.testing.assert_allclose(values, np.stack(expected, 1), rtol=1e-5)
    assert np.isfinite(slope).all()


def test_contrastive_with_a_bank():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    bank, labels = rng.normal(size=(7, 3)), np.arange(4) % 2
    bank_labels = np.arange(7) % 3
    for extra in ({}, {"labels": labels, "bank_labels": bank_labels}):
        found = losses.contrastive(
            *map(jnp.asarray, (student, teacher)), bank=bank, dataset_size=50, **extra
        )
        expected = references.contrastive(
            student, teacher, bank=bank, dataset_size=50, **extra
        )
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_shift_tokens():
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 4, 5)), rng.integers(0, 5, (2, 4))
    mask = np.array([[0, 1, 1, 1], [1, 1, 0, 0]], np.float32)
    found = losses.shift_tokens(logits, tokens, mask)
    for ours, expected in zip(
        found, references.shift_tokens(logits, tokens, mask), strict=True
    ):
        np.testing.assert_array_equal(ours, expected)


def test_ctc_sums_over_every_alignment():
    case = next(case for case in CASES if case.loss is losses.ctc)
    args = case.arguments()
    expected = references.ctc_by_enumeration(*map(wide, args))
    np.testing.assert_allclose(case(*args)[0], expected, rtol=1e-5)


def test_stable_arithmetic_at_its_edges():
    nothing = jnp.zeros(3)
    assert numerics.log_sum(nothing, nothing > 1) == -INF
    for function in (
        numerics.normalize,
        numerics.root,
        lambda x: numerics.divide(1.0, x),
    ):
        value, slope = jax.value_and_grad(lambda x, f=function: f(x).sum())(nothing)
        assert value == 0
        np.testing.assert_array_equal(slope, 0)


def rare(seed):
    """Confident logits with one class that hardly exists, on both sides."""
    z = np.random.default_rng(seed).normal(size=(64, 10)).astype(np.float32)
    return z - 27.0 * np.eye(10, dtype=np.float32)[3]


def test_dist_with_a_rare_class_has_a_finite_gradient():
    """The product of two small deviations, squared in a division, overflowed."""
    values, slope = compiled(losses.dist)(rare(0), rare(1))
    assert np.isfinite(values).all()
    assert np.isfinite(slope).all()
    assert np.abs(slope).max() < 1


@pytest.mark.parametrize("value", [0.1, 3.3, -7.7])
@pytest.mark.parametrize("classes", [3, 7, 10])
def test_constants_have_no_spread_whatever_their_mean_rounds_to(value, classes):
    flat = np.full((6, classes), value, np.float32)
    teacher = np.random.default_rng(0).normal(size=flat.shape).astype(np.float32)
    assert not losses.standardize(flat).any()
    _, slope = compiled(losses.dist)(flat, teacher)
    assert np.abs(slope).max() < 10
    np.testing.assert_array_equal(losses.linear_cka(flat, flat), 1)


def test_classes_that_do_not_exist():
    labels, two = np.array([1]), np.array([[-INF, 0.5, -INF]], np.float32)
    value, slope = compiled(losses.decoupled_kl)(two, two, labels)
    assert value == 0
    assert np.isfinite(slope).all()
    logits = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
    masks = np.ones((1, 4), np.float32), np.ones((1, 1), np.float32)
    without, _ = compiled(losses.ctc)(logits, labels[None], *masks)
    wider = np.insert(logits, 3, -INF, axis=-1)
    value, slope = compiled(losses.ctc)(wider, labels[None], *masks)
    np.testing.assert_allclose(value, without, rtol=1e-6)
    assert np.isfinite(slope).all()
    teacher = TopK(np.array([[0, 2]]), np.log(np.float32([[0.5, 0.5]])), np.zeros(1))
    value, slope = compiled(losses.sparse_forward_kl, tail=False)(two, teacher)
    assert value == INF
    assert np.isfinite(slope).all()


def test_float64_maps_are_pooled_in_float64():
    with jax.enable_x64(True):
        maps = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
        found = losses.attention_transfer(maps, maps[:, :4, :4])
        assert found.dtype == np.float64
    expected = references.attention_transfer(maps, maps[:, :4, :4])
    np.testing.assert_allclose(found, expected, rtol=1e-12)


PAIR, MAP = np.zeros((2, 3)), np.zeros((2, 4, 4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.forward_kl(PAIR, np.zeros((2, 4))),
            "forward_kl: the student has 3 classes, the teacher 4",
        ),
        (
            lambda: losses.reverse_kl(PAIR, np.zeros((5, 3))),
            r"student logits of shape \(2, 3\) and teacher logits of shape \(5, 3\)",
        ),
        (
            lambda: losses.cross_entropy(PAIR, np.zeros((2, 1), int)),
            r"labels of shape \(2, 1\) do not fit .* \(2, 3\); expected \(2,\)",
        ),
        (
            lambda: losses.decoupled_kl(PAIR, PAIR, np.zeros(3, int)),
            r"decoupled_kl: labels of shape \(3,\) do not fit",
        ),
        (
            lambda: losses.decoupled_kl(PAIR[:, :2], PAIR[:, :2], np.zeros(2, int)),
            "decoupled_kl needs at least 3 classes, got 2: .* use forward_kl",
        ),
        *(
            (
                partial(losses.generalized_jsd, PAIR, PAIR, beta=bad),
                f"beta must lie between 0 and 1, got {bad}; .* use forward_kl or",
            )
            for bad in (0, 1.0, np.nan)
        ),
        *(
            (
                partial(losses.forward_kl, PAIR, PAIR, temperature=bad),
                f"temperature must be above 0, got {bad}",
            )
            for bad in (0, 0.0, -1.5, np.nan)
        ),
        *(
            (
                partial(
                    losses.cross_entropy, PAIR, np.zeros(2, int), label_smoothing=bad
                ),
                rf"label_smoothing must lie in \[0, 1\], got {bad}",
            )
            for bad in (-0.1, 1.5, np.nan)
        ),
        (
            lambda: losses.sparse_forward_kl(
                PAIR, TopK(np.zeros((3, 1), int), PAIR[:, :1], PAIR[:, 0])
            ),
            r"ids of shape \(3, 1\) and log_probs of shape \(2, 1\) do not fit",
        ),
        (
            lambda: losses.sparse_forward_kl(
                PAIR, TopK(np.zeros((2, 4), int), np.zeros((2, 4)), PAIR[:, 0])
            ),
            "the teacher keeps 4 classes, the student has only 3",
        ),
        (lambda: losses.hint_mse(PAIR, PAIR[:, :2]), "project the student's"),
        (lambda: losses.contrastive(PAIR, PAIR[:, :2]), "project the student's"),
        (
            lambda: losses.contrastive(PAIR, PAIR, temperature=0.0),
            "temperature must be above 0, got 0.0",
        ),
        (
            lambda: losses.contrastive(PAIR, PAIR, np.zeros(2, int), bank=PAIR),
            "a bank needs bank_labels",
        ),
        (lambda: losses.relation_kl(MAP[0], MAP[0], heads=0), "at least 1 relation"),
        (
            lambda: losses.attention_transfer(MAP, PAIR),
            r"attention_transfer takes feature maps \[B, H, W, C\] of one batch",
        ),
        (
            lambda: losses.attention_kl(MAP, MAP[:, :2]),
            "of other numbers of heads mean_heads=True",
        ),
        (
            lambda: losses.relation_kl(MAP[0], MAP[0], heads=2),
            "2 relation heads do not divide the student's width of 3",
        ),
        (
            lambda: losses.relation_kl(MAP[0], MAP[0][:1], heads=1),
            "are not of the same tokens",
        ),
        (
            lambda: losses.linear_cka(PAIR, PAIR[:1]),
            "linear_cka: a student batch of 2 and a teacher batch of 1",
        ),
        (
            lambda: losses.frame_kl(MAP[0], MAP[0][:, :3]),
            "the teacher's frames a multiple of the student's",
        ),
    ],
)
def test_bad_input_gets_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
