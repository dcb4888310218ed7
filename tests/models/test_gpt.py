# SPDX-License-Identifier: Apache-2.0
"""GPT's cache and generation: the same tokens and draws as without a cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import models, teachers
from jaxdistill.models import empty_cache, generate, gpt_config, stack_layers
from jaxdistill.models.generation import first_of_largest

SIZE = gpt_config(19, 12, 2, 3, positions=16)


def drawn(scan):
    """Weights ten times as large as they start: its choices are not all alike."""
    module = models.GPT(SIZE, scan=scan)
    variables = jax.jit(module.init)(jax.random.key(0), prompt())
    return teachers.live(module, jax.tree.map(lambda x: 10 * x, variables))


@pytest.fixture(scope="module")
def model():
    return drawn(scan=False)


def prompt(rows=3, length=5):
    ids = np.random.default_rng(0).integers(1, 19, (rows, length)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones((rows, length), np.int32)}


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_a_cache_changes_nothing(scan):
    model = drawn(scan)
    inputs = prompt(length=9)
    whole = jax.jit(model.module.apply)(model.variables, inputs)
    cache, found = empty_cache(SIZE, 3, 12), []
    step = jax.jit(lambda v, x, cache: model.module.apply(v, x, cache=cache))
    for cut in (slice(0, 5), slice(5, 6), slice(6, 9)):
        part = step(model.variables, {"input_ids": inputs["input_ids"][:, cut]}, cache)
        cache = part.extras["cache"]
        found.append(part.logits)
    np.testing.assert_allclose(
        jnp.concatenate(found, 1), whole.logits, rtol=1e-4, atol=1e-4
    )
    assert cache.layers.length == 9
    np.testing.assert_array_equal(cache.mask.sum(1), 9)


def test_a_cache_without_room_gives_no_logits(model):
    """A slice beyond its end would be moved, and write over what is there."""
    cache = empty_cache(SIZE, 3, 6)
    step = jax.jit(lambda v, x, cache: model.module.apply(v, x, cache=cache))
    part = step(model.variables, prompt(length=4), cache)
    again = step(model.variables, prompt(length=2), part.extras["cache"])
    assert np.isfinite(again.logits).all()
    over = step(model.variables, prompt(length=2), again.extras["cache"])
    assert np.isnan(over.logits).all()


def test_the_most_likely_tokens_are_those_without_a_cache(model):
    ids = prompt()["input_ids"]
    found = generate(
        model, {"input_ids": ids}, jax.random.key(0), steps=6, temperature=0
    )["input_ids"]
    # A token's logits do not depend on what comes behind it.
    logits = model.module.apply(model.variables, {"input_ids": found[:, :-1]}).logits
    np.testing.assert_array_equal(found[:, :5], ids)
    np.testing.assert_array_equal(found[:, 5:], logits[:, 4:].argmax(-1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_of_equals_the_first_is_the_largest(dtype):
    x = np.random.default_rng(0).integers(-3, 4, (50, 9)).astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(first_of_largest(jnp.asarray(x)), x.argmax(-1))
    rows = jnp.array([[-jnp.inf, -jnp.inf], [-jnp.inf, jnp.inf], [jnp.inf, jnp.inf]])
    np.testing.assert_array_equal(first_of_largest(rows), [0, 1, 0])


def test_64_bits_write_the_same(model):
    ids = prompt()["input_ids"]
    found = []
    for wide in (False, True):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            variables = jax.tree.map(lambda x, t=dtype: x.astype(t), model.variables)
            one = teachers.live(model.module, variables)
            found.append(
                generate(
                    one, {"input_ids": ids}, jax.random.key(0), steps=6, temperature=0
                )
            )
    np.testing.assert_array_equal(*(x["input_ids"] for x in found))


def test_scanned_layers_write_the_same(model):
    params = stack_layers(model.variables["params"])
    scanned = teachers.live(models.GPT(SIZE, scan=True), {"params": params})
    a, b = (
        generate(x, prompt(), jax.random.key(1), steps=6)["input_ids"]
        for x in (model, scanned)
    )
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("garbage", [(7, 3), (400, -100)])
def test_padding_before_a_prompt_changes_nothing(model, garbage):
    alone = prompt(rows=1, length=4)
    ids = np.concatenate([[garbage], alone["input_ids"]], 1).astype(np.int32)
    mask = np.concatenate([[[0, 0]], alone["attention_mask"]], 1).astype(np.float32)
    padded = {"input_ids": ids, "attention_mask": mask}
    for temperature in (0, 1.0):
        a, b = (
            generate(model, x, jax.random.key(3), steps=5, temperature=temperature)
            for x in (alone, padded)
        )
        np.testing.assert_array_equal(a["input_ids"], b["input_ids"][:, 2:])


def test_draws_have_the_models_distribution(model):
    """A chi-square statistic of 19 tokens in 4,000 draws."""
    one = prompt(rows=1, length=3)["input_ids"]
    many = {"input_ids": np.repeat(one, 4000, 0)}
    found = generate(model, many, jax.random.key(1), steps=1, temperature=2.0)
    logits = model.module.apply(model.variables, {"input_ids": one}).logits[0, -1]
    expected = 4000 * jax.nn.softmax(logits / 2.0)
    counts = np.bincount(found["input_ids"][:, -1], minlength=19)
    assert (((counts - expected) ** 2) / np.maximum(expected, 1)).sum() < 50


def test_behind_an_end_all_is_padding(model):
    found = generate(model, prompt(), jax.random.key(2), steps=11, end=5)
    tokens, mask = (
        np.asarray(found[k])[:, 5:] for k in ("input_ids", "attention_mask")
    )
    for row, real in zip(tokens, mask, strict=True):
        ends = np.flatnonzero(row == 5)
        first = ends[0] if len(ends) else len(row)
        np.testing.assert_array_equal(real, np.arange(len(row)) <= first)
        assert (row[first:] == 5).all()


def test_nothing_to_draw_is_refused(model):
    with pytest.raises(ValueError, match="steps is at least 1 token to draw, got 0"):
        generate(model, prompt(), jax.random.key(0), steps=0)


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"attention_mask": np.eye(3, 5)[::-1]}, {}, "a prompt ends in padding, which"),
        ({"attention_mask": np.ones(5)}, {}, r"attention_mask has the shape \(5,\)"),
        ({"input_ids": np.ones((3, 0), int)}, {}, r"of at least 1 token, got \(3, 0\)"),
        ({"input_ids": np.ones(5, int)}, {}, r"are \[B, L\] .*, got \(5,\)"),
        ({}, {"temperature": -1.0}, "a temperature of draws is 0 or more, got -1.0"),
    ],
)
def test_a_prompt_that_cannot_go_on_is_refused(model, changed, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, {**prompt(), **changed}, jax.random.key(0), steps=1, **options)


def test_only_a_gpt_writes():
    other = teachers.live(models.MLP((3,)), {})
    with pytest.raises(ValueError, match="generate takes a models.GPT, got a MLP"):
        generate(other, prompt(), jax.random.key(0), steps=1)


def test_lengths_beyond_the_positions_are_refused(model):
    with pytest.raises(ValueError, match="a cache of 17 tokens is longer"):
        generate(model, prompt(), jax.random.key(0), steps=13)
    with pytest.raises(ValueError, match="a sequence of 17 tokens is longer"):
        model.module.apply(model.variables, prompt(length=17))


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "position_ids"])
def test_inputs_of_other_shapes_are_refused(model, name):
    given = {**prompt(), name: np.ones((3, 1), np.int32)}
    with pytest.raises(ValueError, match=rf"{name} has the shape \(3, 1\)"):
        model.module.apply(model.variables, given)


def test_tokens_without_a_batch_are_refused(model):
    with pytest.raises(
        ValueError, match=r"input_ids are \[B, L\], got the shape \(4,\)"
    ):
        model.module.apply(model.variables, {"input_ids": np.ones(4, np.int32)})


def test_positions_may_be_the_same_for_all(model):
    given, apply = prompt(), jax.jit(model.module.apply)
    places = np.arange(3, 8)[None]
    one, other = (
        apply(model.variables, {**given, "position_ids": x}).logits
        for x in (places, np.repeat(places, 3, 0))
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("which", [-1, 19])
def test_a_token_that_is_none_gives_no_logits(model, which):
    given = prompt()
    given["input_ids"][1, 2] = which
    for inputs in (given, {"input_ids": given["input_ids"]}):
        logits = model.module.apply(model.variables, inputs).logits
        assert np.isnan(logits[1, 2:]).all()
        assert np.isfinite(logits[0]).all()


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"heads": 0}, "heads is at least 1, got 0"),
        ({"inner": 0}, "inner is at least 1, got 0"),
        ({"types": -1}, "types is at least 0, got -1"),
        ({"dropout": 1.5}, r"dropout lies in \[0, 1\], got 1.5"),
        ({"embedding_dropout": -1.0}, r"embedding_dropout lies in \[0, 1\], got -1"),
    ],
)
def test_numbers_of_no_model_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        replace(SIZE, **numbers)


def test_published_parameter_counts():
    for size, count in ((models.GPT2, 124_439_808), (models.DISTILGPT2, 81_912_576)):
        shapes = jax.eval_shape(
            models.GPT(size, scan=True).init, jax.random.key(0), prompt()
        )
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_remat_changes_no_gradient(model):
    inputs = prompt()

    def gradient(module):
        def loss(variables):
            return module.apply(variables, inputs).logits.std()

        return jax.jit(jax.grad(loss))(model.variables)

    for changed in (
        replace(model.module, remat=True),
        replace(model.module, maps=False),
    ):
        for a, b in zip(
            *(jax.tree.leaves(gradient(m)) for m in (model.module, changed)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
