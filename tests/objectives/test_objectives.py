# SPDX-License-Identifier: Apache-2.0
"""Objectives: named, weighted terms over (student, teacher, batch)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses
from jaxdistill.objectives import (
    combine,
    hard_labels,
    mutual_targets,
    on_logits,
    real_tokens,
    soft_targets,
    teacher_labels,
)
from jaxdistill.objectives.schedules import anneal, warm_up
from jaxdistill.objectives.terms import loss_kwargs
from jaxdistill.types import Outputs, TopK, token_mask
from tests.builders import CLASSES, HARD_AND_SOFT, make_batch

BATCH = make_batch(0, 4, mask=[1, 1, 0, 1])
TOKENS = make_batch(1, 4, mask=[1, 1, 0, 1], tokens=3)


def outputs(seed, *shape):
    return Outputs(jax.random.normal(jax.random.key(seed), (*shape, CLASSES)))


STUDENT, TEACHER = outputs(1, 4), outputs(2, 4)


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "needs a term with a weight above 0"),
        ({"a": (0, hard_labels())}, "needs a term with a weight above 0"),
        ({"a": (0.0, hard_labels()), "b": (0, soft_targets())}, "a weight above 0"),
        ({"a": (-0.1, hard_labels())}, "the weight of 'a' must be 0 or more, got -0.1"),
        ({"a": (np.nan, hard_labels())}, "the weight of 'a' must be 0 or more"),
        ({"a": (np.inf, hard_labels())}, "the weight of 'a' must be 0 or more"),
    ],
)
def test_weights_are_validated(terms, message):
    with pytest.raises(ValueError, match=message):
        combine(terms)


def test_a_combination_is_its_terms_with_their_weights():
    found = HARD_AND_SOFT(STUDENT, TEACHER, BATCH, 0)
    assert list(found) == ["hard", "soft"]
    assert [weight for weight, _, _ in found.values()] == [0.7, 0.3]
    np.testing.assert_allclose(
        found["hard"][1], losses.cross_entropy(STUDENT.logits, BATCH["labels"])
    )
    np.testing.assert_allclose(
        found["soft"][1],
        losses.forward_kl(STUDENT.logits, TEACHER.logits, temperature=2.0),
    )
    for _, _, mask in found.values():
        np.testing.assert_array_equal(mask, BATCH["mask"])


@pytest.mark.parametrize("step", [0, 3])
def test_schedules_are_functions_of_the_step(step):
    scheduled = combine(
        {"soft": (lambda i: 0.1 * i, soft_targets(temperature=lambda i: 1.0 + i))}
    )
    weight, values, _ = scheduled(STUDENT, TEACHER, BATCH, step)["soft"]
    assert weight == 0.1 * step
    np.testing.assert_array_equal(
        values,
        losses.forward_kl(STUDENT.logits, TEACHER.logits, temperature=1.0 + step),
    )


def test_weights_and_temperatures_may_be_traced():
    def total(weight, temperature):
        traced = combine({"soft": (weight, soft_targets(temperature=temperature))})
        w, values, _ = traced(STUDENT, TEACHER, BATCH, 0)["soft"]
        return w * values.sum()

    weights, temperatures = jnp.array([0.0, 0.5]), jnp.array([1.0, 3.0])
    found = jax.jit(jax.vmap(total))(weights, temperatures)
    expected = [
        w * losses.forward_kl(STUDENT.logits, TEACHER.logits, temperature=t).sum()
        for w, t in zip(weights, temperatures, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_objective_prints_as_it_was_written():
    smoothed = combine({"hard": (1, hard_labels(label_smoothing=0.1))})
    assert repr(smoothed) == "combine({'hard': (1, hard_labels(label_smoothing=0.1))})"
    assert repr(HARD_AND_SOFT) == (
        "combine({'hard': (0.7, hard_labels()), "
        "'soft': (0.3, soft_targets(temperature=2.0))})"
    )


def test_hard_labels_use_only_labelled_examples():
    batch = {**BATCH, "labelled": np.array([1, 0, 1, 1], np.float32)}
    _, mask = hard_labels()(STUDENT, None, batch, 0)
    np.testing.assert_array_equal(mask, [1, 0, 0, 1])  # and the third is padding
    _, mask = soft_targets()(STUDENT, TEACHER, batch, 0)
    np.testing.assert_array_equal(mask, BATCH["mask"])


def test_hard_labels_spread_labelled_over_tokens():
    batch = {**TOKENS, "labelled": np.array([1, 0, 1, 1], np.float32)}
    _, mask = hard_labels()(outputs(1, 4, 3), None, batch, 0)
    np.testing.assert_array_equal(
        mask, TOKENS["token_mask"] * np.array([[1], [0], [0], [1]])
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_an_ensemble_teaches_the_mean_of_its_members_tempered_distributions(
    temperature,
):
    members = 3 * outputs(3, 3, 4).logits
    term = soft_targets(temperature=temperature)
    values, mask = term(STUDENT, Outputs(members), BATCH, 0)
    each = [
        losses.forward_kl(STUDENT.logits, m, temperature=temperature) for m in members
    ]
    np.testing.assert_allclose(values, np.mean(each, 0), rtol=1e-5)
    assert mask.shape == values.shape

    mean = temperature * jnp.log(jax.nn.softmax(members / temperature).mean(0))
    to_mean, to_members = (
        jax.grad(lambda z, t=t: term(Outputs(z), Outputs(t), BATCH, 0)[0].sum())(
            STUDENT.logits
        )
        for t in (mean, members)
    )
    np.testing.assert_allclose(to_members, to_mean, atol=2e-6)


def test_terms_per_example_and_per_token_live_in_one_objective():
    def brevity(student, teacher, batch, step):
        return (student.logits**2).mean((1, 2)), batch["mask"]

    mixed = combine({"tokens": (1.0, hard_labels()), "brevity": (0.1, brevity)})
    found = mixed(outputs(1, 4, 3), None, TOKENS, 0)
    assert [values.shape for _, values, _ in found.values()] == [(4, 3), (4,)]
    assert [mask.shape for _, _, mask in found.values()] == [(4, 3), (4,)]


def test_token_mask():
    np.testing.assert_array_equal(token_mask(TOKENS, (4,)), TOKENS["mask"])
    spread = TOKENS["mask"][:, None] * TOKENS["token_mask"]
    np.testing.assert_array_equal(token_mask(TOKENS, (4, 3)), spread)
    without = {"mask": TOKENS["mask"]}
    np.testing.assert_array_equal(
        token_mask(without, (4, 3)), np.repeat(TOKENS["mask"][:, None], 3, 1)
    )


def test_all_real_tokens_count_whichever_were_chosen():
    term = real_tokens(hard_labels())
    padding = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], np.float32)
    text = {**TOKENS, "inputs": {"attention_mask": padding}}
    real = TOKENS["mask"][:, None]
    for batch, expected in ((text, real * padding), (TOKENS, np.repeat(real, 3, 1))):
        values, mask = term(outputs(1, 4, 3), None, batch, 0)
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(
            values, hard_labels()(outputs(1, 4, 3), None, batch, 0)[0]
        )
    assert repr(term) == "real_tokens(hard_labels())"


def test_values_and_mask_must_have_one_shape():
    wrong = combine({"odd": (1.0, lambda s, t, b, i: (s.logits, b["mask"]))})
    with pytest.raises(
        ValueError,
        match=r"term 'odd' .* shape \(4, 5\) with a mask of shape \(4,\)",
    ):
        wrong(STUDENT, None, BATCH, 0)


def test_soft_targets_say_what_they_miss():
    with pytest.raises(ValueError, match="needs a teacher"):
        soft_targets()(STUDENT, None, BATCH, 0)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        soft_targets(temperature=0)


def test_loss_is_no_name_for_a_term():
    with pytest.raises(ValueError, match="a term cannot be named 'loss'"):
        combine({"loss": (1.0, hard_labels())})


ENSEMBLE = Outputs(3 * outputs(3, 3, 4).logits)
TAUGHT = [losses.reverse_kl, losses.logit_mse, losses.decoupled_kl, losses.dist]


@pytest.mark.parametrize("loss", TAUGHT)
def test_any_loss_on_logits_is_a_term(loss):
    values, mask = on_logits(loss)(STUDENT, TEACHER, BATCH, 0)
    given = loss_kwargs(loss, BATCH, BATCH["mask"])
    expected = loss(STUDENT.logits, TEACHER.logits, **given)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(mask, BATCH["mask"])
    values, _ = on_logits(loss)(STUDENT, ENSEMBLE, BATCH, 0)
    each = [loss(STUDENT.logits, member, **given) for member in ENSEMBLE.logits]
    np.testing.assert_allclose(values, np.mean(each, 0), rtol=1e-5)


def test_a_setting_the_loss_does_not_have():
    message = "reverse_kl has no setting 'beta'; it has: temperature"
    with pytest.raises(ValueError, match=message):
        on_logits(losses.reverse_kl, beta=0.5)


def test_terms_print_as_written():
    term = on_logits(losses.reverse_kl, temperature=anneal(8.0, 1.0, steps=9))
    expected = "on_logits(reverse_kl, temperature=anneal(8.0, 1.0, steps=9))"
    assert repr(term) == expected
    assert repr(teacher_labels("distillation")) == "teacher_labels('distillation')"


def test_teacher_labels_are_its_likeliest_classes():
    guess = TEACHER.logits.argmax(-1)
    values, mask = teacher_labels()(STUDENT, TEACHER, BATCH, 0)
    np.testing.assert_allclose(values, losses.cross_entropy(STUDENT.logits, guess))
    np.testing.assert_array_equal(mask, BATCH["mask"])
    two = STUDENT.replace(extras={"distillation": 2 * STUDENT.logits})
    values, _ = teacher_labels("distillation")(two, TEACHER, BATCH, 0)
    np.testing.assert_allclose(values, losses.cross_entropy(2 * two.logits, guess))


def test_mixed_images_count_both_labels():
    share = np.array([0.9, 0.5, 1.0, 0.6], np.float32)
    batch = {**BATCH, "partner": BATCH["labels"][::-1], "share": share}
    values, _ = hard_labels()(STUDENT, None, batch, 0)
    first, second = (
        losses.cross_entropy(STUDENT.logits, batch[k]) for k in ("labels", "partner")
    )
    np.testing.assert_allclose(values, share * first + (1 - share) * second, rtol=1e-6)


def test_schedules():
    line = anneal(1.0, 3.0, steps=4)
    assert [float(line(i)) for i in (0, 1, 4, 9)] == [1.0, 1.5, 3.0, 3.0]
    assert float(jax.jit(warm_up(8.0, steps=4))(jnp.int32(1))) == 2.0
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        warm_up(1.0, steps=0)


def test_soft_targets_need_no_labels():
    batch = {"mask": BATCH["mask"], "inputs": BATCH["inputs"]}
    values, _ = soft_targets()(STUDENT, TEACHER, batch, 0)
    np.testing.assert_array_equal(values, soft_targets()(STUDENT, TEACHER, BATCH, 0)[0])
    with pytest.raises(
        ValueError, match="decoupled_kl needs labels, and the batch has"
    ):
        on_logits(losses.decoupled_kl)(STUDENT, TEACHER, batch, 0)


def test_an_ensembles_likeliest_class_is_of_its_mean():
    mean = jax.nn.softmax(ENSEMBLE.logits).mean(0).argmax(-1)
    values, _ = teacher_labels()(STUDENT, ENSEMBLE, BATCH, 0)
    np.testing.assert_allclose(values, losses.cross_entropy(STUDENT.logits, mean))


def test_what_is_stored_of_a_teacher_limits_the_losses():
    log_probs = jax.nn.log_softmax(TEACHER.logits)
    kept, ids = jax.lax.top_k(log_probs, 2)
    stored = Outputs(TopK(ids, kept, jnp.zeros(4)))
    values, _ = teacher_labels()(STUDENT, stored, BATCH, 0)
    expected = losses.cross_entropy(STUDENT.logits, TEACHER.logits.argmax(-1))
    np.testing.assert_allclose(values, expected)
    message = "reverse_kl needs all of the teacher's logits.*sparse_forward_kl"
    with pytest.raises(ValueError, match=message):
        on_logits(losses.reverse_kl)(STUDENT, stored, BATCH, 0)


def test_mutual_learning_needs_two():
    with pytest.raises(
        ValueError, match=r"two or more \(models.Peers\), got .*\(4, 5\)"
    ):
        mutual_targets()(STUDENT, None, BATCH, 0)
