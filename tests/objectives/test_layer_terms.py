# SPDX-License-Identifier: Apache-2.0
"""Terms over hidden states and attention maps, projections, several students."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, teachers
from jaxdistill.objectives import (
    combine,
    hard_labels,
    last,
    mutual_targets,
    on_attentions,
    on_extras,
    on_hidden_states,
    on_scores,
    uniform,
)
from jaxdistill.train import init_state, make_train_step
from jaxdistill.types import Outputs, padding_mask
from tests.builders import CLASSES, make_batch

BATCH = make_batch(0, 4, mask=[1, 1, 0, 1])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def outputs(seed, *shapes, **more):
    hidden_states = tuple(normal(seed + i, *shape) for i, shape in enumerate(shapes))
    return Outputs(normal(seed, 4, CLASSES), hidden_states, **more)


STATES = [(4, 6), (4, 6), (4, 6)]
STUDENT, TEACHER = outputs(0, *STATES[:2]), outputs(10, *STATES)
STORED = TEACHER.replace(hidden_states={1: TEACHER.hidden_states[1]})


@pytest.mark.parametrize(
    ("student", "teacher", "layers"),
    [(1, 3, ((0, 2),)), (3, 12, ((0, 3), (1, 7), (2, 11))), (2, 2, ((0, 0), (1, 1)))],
)
def test_uniform_ends_at_the_last_layer(student, teacher, layers):
    assert uniform(student, teacher) == layers


def test_hidden_states_add_up_over_the_layer_map():
    term = on_hidden_states(losses.hint_mse, ((0, 1), (-1, -1)))
    values, mask = term(STUDENT, TEACHER, BATCH, 0)
    mine, theirs = STUDENT.hidden_states, TEACHER.hidden_states
    expected = losses.hint_mse(mine[0], theirs[1]) + losses.hint_mse(mine[1], theirs[2])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(mask, BATCH["mask"])


def test_a_stored_layer_teaches_as_a_live_one():
    term = on_hidden_states(losses.hint_mse, ((0, 1),))
    found, expected = (term(STUDENT, x, BATCH, 0)[0] for x in (STORED, TEACHER))
    np.testing.assert_array_equal(found, expected)


def test_relations_get_the_batchs_mask_and_labels():
    values, _ = on_hidden_states(losses.linear_cka, last())(STUDENT, TEACHER, BATCH, 0)
    pair = STUDENT.hidden_states[-1], TEACHER.hidden_states[-1]
    np.testing.assert_allclose(values, losses.linear_cka(*pair, BATCH["mask"]))
    values, _ = on_hidden_states(losses.contrastive, last())(STUDENT, TEACHER, BATCH, 0)
    expected = losses.contrastive(*pair, BATCH["labels"], BATCH["mask"])
    np.testing.assert_allclose(values, expected)


def test_feature_maps_count_once_an_example():
    student, teacher = outputs(0, (4, 3, 3, 5)), outputs(1, (4, 3, 3, 5))
    values, mask = on_hidden_states(losses.hint_mse, last())(student, teacher, BATCH, 0)
    assert values.shape == mask.shape == (4,)
    expected = ((student.hidden_states[0] - teacher.hidden_states[0]) ** 2).mean(
        (1, 2, 3)
    )
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_padded_tokens_do_not_count():
    padding = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], np.float32)
    batch = {**BATCH, "inputs": {"attention_mask": padding}}
    student, teacher = outputs(0, (4, 3, 5)), outputs(1, (4, 3, 5))
    values, mask = on_hidden_states(losses.hint_mse, last())(student, teacher, batch, 0)
    assert values.shape == (4, 3)
    np.testing.assert_array_equal(mask, padding * BATCH["mask"][:, None])
    maps = [jax.nn.softmax(normal(i, 4, 2, 3, 3)) for i in range(2)]
    student, teacher = (Outputs(None, attentions=(m,)) for m in maps)
    term = on_attentions(losses.attention_kl, last())
    values, mask = term(student, teacher, batch, 0)
    np.testing.assert_array_equal(mask, padding_mask(batch, (4, 3)))
    expected = losses.attention_kl(*maps, padding)
    np.testing.assert_allclose(values[0], expected[0], rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.attention_mse, losses.attention_kl])
def test_attention_of_another_number_of_heads_is_matched_by_the_means(loss):
    padding = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], np.float32)
    batch = {**BATCH, "inputs": {"attention_mask": padding}}
    maps = [
        jax.nn.softmax(jnp.where(padding[:, None, None] > 0, x, -jnp.inf))
        for x in (normal(0, 4, 2, 3, 3), normal(1, 4, 3, 3, 3))
    ]
    student, teacher = (Outputs(None, attentions=(m,)) for m in maps)
    values, _ = on_attentions(loss, last(), mean_heads=True)(student, teacher, batch, 0)
    means = (m.mean(1, keepdims=True) for m in maps)
    expected = loss(*means, padding * BATCH["mask"][:, None])
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="other numbers of heads mean_heads=True"):
        on_attentions(loss, last())(student, teacher, batch, 0)


def test_relations_of_queries_keys_and_values():
    padding = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], np.float32)
    batch = {**BATCH, "inputs": {"attention_mask": padding}}
    student = Outputs(None, extras={"values": (normal(0, 4, 3, 4), normal(1, 4, 3, 4))})
    teacher = Outputs(None, extras={"values": (normal(2, 4, 3, 6),)})
    term = on_extras(losses.relation_kl, "values", last(), heads=2)
    values, mask = term(student, teacher, batch, 0)
    pair = student.extras["values"][1], teacher.extras["values"][0]
    expected = losses.relation_kl(*pair, padding * BATCH["mask"][:, None], heads=2)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_array_equal(mask, padding * BATCH["mask"][:, None])
    assert repr(term) == "on_extras(relation_kl, 'values', ((-1, -1),), heads=2)"
    with pytest.raises(ValueError, match="layer -1 of the student, which returns 0"):
        on_extras(losses.relation_kl, "keys", last(), heads=2)(
            student, teacher, batch, 0
        )


def test_scores_are_those_whose_softmax_is_the_attention():
    ids = np.random.default_rng(0).integers(0, 9, (4, 3))
    padding = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]], np.float32)
    inputs = {"input_ids": ids, "attention_mask": padding}
    model = models.BertClassifier(
        models.Encoder(models.TransformerConfig(9, 6, 2, 3)), CLASSES
    )
    found = model.init_with_output(jax.random.key(0), inputs)[0]

    def compare(student, teacher, mask):
        np.testing.assert_array_equal(student, teacher)
        real = mask[:, None, None] > 0
        maps = jax.nn.softmax(jnp.where(real, student, -1e30))
        return jnp.abs(maps - found.attentions[0]).sum((1, 3))

    term = on_scores(compare, ((0, 0),))
    batch = {**BATCH, "inputs": inputs}
    values, mask = term(found, found, batch, 0)
    np.testing.assert_array_equal(mask, padding * BATCH["mask"][:, None])
    np.testing.assert_allclose(values * mask, 0, atol=1e-6)
    assert repr(term) == "on_scores(compare, ((0, 0),))"


def test_a_projection_is_of_a_layer_that_is_there():
    for layer in (2, -3):
        with pytest.raises(ValueError, match=f"of layer {layer} of the student, which"):
            models.Projector(((layer, 5),)).init(
                jax.random.key(0), STUDENT.hidden_states
            )


def test_a_layer_has_one_projection():
    projector = models.Projector(((-1, 5), (1, 5)))
    with pytest.raises(ValueError, match="layer 1 of the student has two projections"):
        projector.init(jax.random.key(0), STUDENT.hidden_states)


def test_projected_embeddings_are_compared_in_place_of_narrow_ones():
    student, teacher = (
        Outputs(None, extras={"embeddings": (normal(seed, 4, 3, width),)})
        for seed, width in ((0, 5), (1, 7))
    )
    mine = {**student.extras, "projected_embeddings": (normal(2, 4, 3, 7),)}
    term = on_extras(losses.hint_mse, "embeddings", ((0, 0),))
    values, _ = term(student.replace(extras=mine), teacher, BATCH, 0)
    expected = losses.hint_mse(normal(2, 4, 3, 7), normal(1, 4, 3, 7))
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_settings_may_be_schedules_and_print_as_written():
    term = on_hidden_states(
        losses.correlation_congruence, last(), gamma=lambda i: 0.1 * i
    )
    values, _ = term(STUDENT, TEACHER, BATCH, 3)
    expected = losses.correlation_congruence(
        STUDENT.hidden_states[-1],
        TEACHER.hidden_states[-1],
        BATCH["mask"],
        gamma=0.1 * 3,
    )
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert repr(on_hidden_states(losses.hint_mse, uniform(1, 3))) == (
        "on_hidden_states(hint_mse, ((0, 2),))"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: on_hidden_states(losses.hint_mse, ((5, 0),))(
                STUDENT, TEACHER, BATCH, 0
            ),
            "layer 5 of the student, which returns 2 layers",
        ),
        (
            lambda: on_hidden_states(losses.hint_mse, ((0, -4),))(
                STUDENT, TEACHER, BATCH, 0
            ),
            "layer -4 of the teacher, which returns 3 layers",
        ),
        (
            lambda: on_attentions(losses.attention_mse, last())(
                STUDENT, TEACHER, BATCH, 0
            ),
            "layer -1 of the student, which returns 0 layers",
        ),
        (
            lambda: on_hidden_states(losses.hint_mse, last())(
                STUDENT, STORED, BATCH, 0
            ),
            r"layer -1 of the teacher, whose .* stored of layers \[1\], counted from 0",
        ),
        (
            lambda: on_hidden_states(losses.hint_mse, last())(STUDENT, None, BATCH, 0),
            "hint_mse needs a teacher",
        ),
        (lambda: on_hidden_states(losses.hint_mse, ()), "at least one"),
        (
            lambda: on_hidden_states(losses.hint_mse, last(), gamma=1.0),
            "hint_mse has no setting 'gamma'; it has: none",
        ),
        (lambda: uniform(4, 3), "needs 1 to 3 student layers, got 4"),
    ],
)
def test_bad_maps_get_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_projector_trains_beside_its_student_and_is_left_behind():
    narrow, wide = models.MLP((4, CLASSES)), models.MLP((7, CLASSES))
    module = models.with_projector(narrow, models.Projector(((0, 7),)))
    student, optimizer = models.student(module), optax.sgd(0.1)
    state = init_state(jax.random.key(0), student, optimizer, BATCH)
    assert set(state.params) == {"student", "projector"}
    teacher = teachers.live(wide, wide.init(jax.random.key(1), BATCH["inputs"]))
    objective = combine({"hint": (1.0, on_hidden_states(losses.hint_mse, last()))})
    step = jax.jit(make_train_step(student, objective, optimizer))
    moved, metrics = step(state, teacher, BATCH)
    kernel = state.params["projector"]["layer_0"]["kernel"]
    assert kernel.shape == (4, 7)
    assert (moved.params["projector"]["layer_0"]["kernel"] != kernel).any()
    alone = narrow.apply({"params": state.params["student"]}, BATCH["inputs"])
    dense = state.params["projector"]["layer_0"]
    projected = alone.hidden_states[0] @ dense["kernel"] + dense["bias"][None]
    expected = losses.hint_mse(projected, teacher(BATCH).hidden_states[0])
    total, count = metrics["hint"]
    np.testing.assert_allclose(total, expected @ BATCH["mask"], rtol=1e-5)
    finished = models.trained(module, state)
    assert finished.module == narrow
    np.testing.assert_array_equal(finished(BATCH).logits, alone.logits)


def test_embeddings_that_are_not_there_cannot_be_projected():
    projector = models.Projector(((0, 7),))
    module = models.with_projector(models.MLP((4, CLASSES)), projector, projector)
    with pytest.raises(ValueError, match="an? MLP returns no embeddings to project"):
        module.init(jax.random.key(0), BATCH["inputs"])


def test_one_module_twice_is_two_students():
    module = models.MLP((3, CLASSES))
    peers = models.Peers((module, module))
    variables = peers.init(jax.random.key(0), BATCH["inputs"])
    first, second = peers.apply(variables, BATCH["inputs"]).logits
    assert set(variables["params"]) == {"peer_0", "peer_1"}
    assert np.abs(first - second).max() > 0.1


def test_the_first_of_several_peers_is_what_is_left():
    modules = (models.MLP((3, CLASSES)), models.MLP((4, CLASSES)))
    student, optimizer = models.student(models.Peers(modules)), optax.sgd(0.1)
    state = init_state(jax.random.key(0), student, optimizer, BATCH)
    finished = models.trained(models.Peers(modules), state)
    assert finished.module == modules[0]
    expected = modules[0].apply({"params": state.params["peer_0"]}, BATCH["inputs"])
    np.testing.assert_array_equal(finished(BATCH).logits, expected.logits)


def test_stripping_leaves_other_modules_alone():
    module, variables = models.MLP((3,)), {"params": {"student": 1}}
    assert models.apply.strip(module, variables) == (module, variables)


@pytest.mark.parametrize("members", [2, 3])
def test_peers_learn_from_each_other_as_each_would_alone(members):
    """The gradient of one of them is that of its own loss, the others fixed."""
    modules = tuple(models.MLP((3 + i, CLASSES)) for i in range(members))
    peers = models.Peers(modules)
    variables = peers.init(jax.random.key(0), BATCH["inputs"])["params"]
    both = combine({"hard": (1.0, hard_labels()), "mutual": (0.5, mutual_targets())})

    def total(params):
        terms = both(peers.apply({"params": params}, BATCH["inputs"]), None, BATCH, 0)
        return sum(w * (values * mask).sum() for w, values, mask in terms.values())

    fixed = peers.apply({"params": variables}, BATCH["inputs"]).logits

    def alone(params, i):
        logits = modules[i].apply({"params": params}, BATCH["inputs"]).logits
        others = [fixed[j] for j in range(members) if j != i]
        soft = sum(losses.forward_kl(logits, other) for other in others)
        hard = losses.cross_entropy(logits, BATCH["labels"])
        return ((hard + 0.5 * soft / (members - 1)) * BATCH["mask"]).sum()

    found = jax.grad(total)(variables)
    for i in range(members):
        expected = jax.grad(alone)(variables[f"peer_{i}"], i)
        for ours, theirs in zip(
            jax.tree.leaves(found[f"peer_{i}"]),
            jax.tree.leaves(expected),
            strict=True,
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_mean_logits_are_one_teacher():
    module = models.MLP((CLASSES,))
    members = [
        teachers.live(module, module.init(jax.random.key(i), BATCH["inputs"]))
        for i in range(3)
    ]
    found = teachers.mean_logits(members)(BATCH).logits
    expected = jnp.stack([member(BATCH).logits for member in members]).mean(0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least one teacher"):
        teachers.mean_logits([])
