# SPDX-License-Identifier: Apache-2.0
"""Every loss against its formula in float64 NumPy; the rows are in `losses_table`."""

import inspect
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jaxtyping import TypeCheckError, jaxtyped

from jaxdistill import losses
from jaxdistill.types import TopK
from tests.losses.losses_table import CASES, LOGIT_CASES, arguments, normal

INF = np.inf


def has_teacher(case):
    second = case.arguments()[1]
    return isinstance(second, TopK) or np.issubdtype(second.dtype, np.floating)


def hyperparameters(case):
    """What may be traced: every number among the settings that is no integer."""
    return [k for k, v in case.settings.items() if isinstance(v, float)]


by_name = partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)
each = by_name(CASES)
on_each_logits = by_name(LOGIT_CASES)


@each
def test_golden_values_and_gradients(case):
    """In float64 as exact as that; the gradient against the reference's slopes."""
    with jax.enable_x64(True):
        args = case.arguments(dtype=np.float64)
        values, found = map(np.asarray, case(*args))
    expected = case.expected(*args)
    assert values.dtype == np.float64
    assert values.shape == expected.shape
    np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-10)
    student, *rest = args
    slope, h = np.zeros_like(student), 1e-5
    for i in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[i] += h
        down[i] -= h
        gap = case.expected(up, *rest) - case.expected(down, *rest)
        slope[i] = gap.sum() / (2 * h)
    error = np.abs(found - slope).max() / np.abs(slope).max()
    assert error < 1e-6


@each
def test_what_pairs_examples_is_listed(case):
    """An example's value moves where another one is replaced, or does not."""

    def replaced(x):
        return np.concatenate([x[1:2], x[1:]])

    args = case.arguments(dtype=np.float64)
    before = case.expected(*args)
    after = case.expected(*jax.tree.map(replaced, args))
    coupled = not np.allclose(before[1:], after[1:], rtol=1e-12)
    assert coupled == (case.loss in losses.BATCH_COUPLED)


@each
def test_float32(case):
    args = case.arguments(1)
    values, slope = case(*args)
    assert values.dtype == slope.dtype == jnp.float32
    expected = case.expected(*args)
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-5)


@each
def test_bfloat16_in_float32_out(case):
    """The same numbers in float64: nothing is computed in bfloat16."""

    def half(x):
        if isinstance(x, TopK):
            return x
        x = jnp.asarray(x)
        return x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x

    args = tuple(map(half, case.arguments()))
    values, slope = case(*args)
    assert slope.dtype == jnp.bfloat16
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, case.expected(*args), rtol=3e-5, atol=1e-5)


@by_name([case for case in CASES if case.best])
def test_minimum(case):
    student, *rest = case.arguments()
    best = case.best(student, *rest, **case.settings).astype(np.float32)
    least = case.least(student, *rest, **case.settings)
    values, slope = case(best, *rest)
    np.testing.assert_allclose(values, least + np.zeros(values.shape), atol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=2e-6)
    assert (np.asarray(case(student, *rest)[0]) > least).all()


@pytest.mark.parametrize(
    ("case", "what"),
    [(case, what) for case in CASES for what in case.same],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_what_changes_nothing(case, what):
    with jax.enable_x64(True):
        args = case.arguments(dtype=np.float64)
        values, _ = case(*args)
        again, _ = case(*case.same[what](*args))
    np.testing.assert_allclose(again, values, rtol=1e-9, atol=1e-10)


@by_name([case for case in CASES if has_teacher(case)])
def test_no_gradient_reaches_the_teacher(case):
    student, teacher, *rest = case.arguments()
    loss = partial(case.loss, **case.settings)
    floats, build = teacher, lambda x: x
    if isinstance(teacher, TopK):
        floats, build = teacher.log_probs, lambda x: teacher._replace(log_probs=x)
    slope = jax.grad(lambda x: loss(student, build(x), *rest).sum())
    assert not jax.jit(slope)(floats).any()


@by_name([case for case in CASES if hyperparameters(case)])
def test_hyperparameters_may_be_traced(case):
    args = case.arguments()
    for name in hyperparameters(case):
        others = {k: v for k, v in case.settings.items() if k != name}
        grid = case.settings[name] * jnp.array([1.0, 0.5, 0.9])

        @jax.jit
        @jax.vmap
        def sweep(x, others=others, name=name):
            return case.loss(*args, **others, **{name: x})

        for x, values in zip(grid, sweep(grid), strict=True):
            again = case._replace(settings={**others, name: float(x)})
            np.testing.assert_allclose(values, again.expected(*args), rtol=2e-5)


@by_name([case for case in CASES if case.drop])
def test_a_mask_means_dropping(case):
    """What is masked may hold anything; neither values nor gradients know of it."""
    args = case.arguments()
    size = case.drop(args, slice(None))[0].shape
    axis = [i for i, n in enumerate(case.drop(args, [0])[0].shape) if n != size[i]][0]
    kept = np.array([0, 1, 3])
    lost = np.setdiff1d(np.arange(size[axis]), kept)
    spoilt = tuple(x.copy() for x in args)
    for x in spoilt:
        if np.issubdtype(x.dtype, np.floating):
            np.moveaxis(x, axis, 0)[lost] = 50.0
    mask = np.isin(np.arange(size[axis]), kept).astype(np.float32)
    if axis:  # of tokens: one for each example
        mask = np.tile(mask, (size[0], 1))
    loss = partial(case.loss, **case.settings)

    def total(student, rest, mask):
        values = loss(student, *rest, mask=mask)
        queries = values[:, kept] if case.anchors and axis else values
        return queries.sum(), values

    with_mask = jax.jit(jax.value_and_grad(total, has_aux=True))

    def run(args, mask):
        student, *rest = args
        (_, values), slope = with_mask(student, rest, mask)
        return np.asarray(values), np.asarray(slope)

    values, slope = run(spoilt, mask)
    expected, expected_slope = case(*case.drop(args, kept))
    if case.anchors:
        if not axis:
            assert not values[lost].any()
        values = np.moveaxis(values, axis, 0)[kept]
        expected = np.moveaxis(expected, axis, 0)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    slope = np.moveaxis(slope, axis, 0)
    np.testing.assert_allclose(
        slope[kept], np.moveaxis(expected_slope, axis, 0), rtol=1e-4, atol=1e-6
    )
    assert not slope[lost].any()
    nothing, flat = run(args, np.zeros_like(mask))
    assert np.isfinite(flat).all()
    if case.anchors and not axis:
        assert not nothing.any()


@each
def test_degenerate_inputs_have_finite_gradients(case):
    """Zero vectors, equal rows, ties."""
    student, *rest = case.arguments()
    for flat in (np.zeros_like(student), np.ones_like(student)):
        _, slope = case(flat, *rest)
        assert np.isfinite(slope).all()
        if has_teacher(case) and not isinstance(rest[0], TopK):
            values, slope = case(flat, np.zeros_like(rest[0]), *rest[1:])
            assert np.isfinite(slope).all()
            assert not np.isnan(values).any()


@each
@settings(
    max_examples=int(os.environ.get("JAXDISTILL_DRAWN", "25")),
    deadline=None,
    derandomize=True,
    database=None,
)
@given(data=st.data())
def test_any_finite_student(case, data):
    """Close to the formula and no lower than the minimum, up to float32 rounding."""
    student, *rest = case.arguments(2)
    if case.loss is losses.attention_kl:
        elements = st.floats(2**-10, 1, width=32)
    else:
        elements = st.sampled_from([0.0, 1.0, -1.0]) | st.floats(-30, 30, width=32)
    student = data.draw(hnp.arrays(np.float32, student.shape, elements=elements))
    if has_teacher(case) and not isinstance(rest[0], TopK):
        rest[0] = data.draw(hnp.arrays(np.float32, rest[0].shape, elements=elements))
    values, slope = map(np.asarray, case(student, *rest))
    if case.best is not None:
        least = case.least(student, *rest, **case.settings)
        assert (values >= least - 2e-4).all()
    assert np.isfinite(slope).all()
    # Two student rows exactly opposite each other: PKT's formula is infinite there.
    infinite = case.loss is losses.probabilistic_transfer
    assert infinite or np.isfinite(values).all()


@each
def test_shapes_are_as_annotated(case):
    """jaxtyping reads the annotations of every loss, and rejects other shapes."""
    loss = getattr(losses, case.loss.__name__, None)
    if loss is None:
        pytest.skip("a composition, not a loss of the package")
    checked = partial(jaxtyped(loss, typechecker=beartype), **case.settings)
    student, *rest = jax.tree.map(jnp.asarray, case.arguments())
    jax.eval_shape(checked, student, *rest)
    with pytest.raises((TypeCheckError, ValueError)):
        jax.eval_shape(checked, student.reshape(-1, 1)[1:], *rest)
    assert "References:" in inspect.getdoc(loss)


def reshape(case, shape):
    """The case's arguments, logits of this shape."""
    student, second, *_ = arguments(normal(*shape), normal(*shape))(
        np.random.default_rng(0), np.float32
    )
    if not has_teacher(case):
        second = np.random.default_rng(1).integers(0, shape[-1], shape[:-1])
    return student, second


@on_each_logits
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (3, 2)])
def test_any_leading_axes(case, shape):
    args = reshape(case, shape)
    values, _ = case(*args)
    assert values.shape == shape[:-1]
    np.testing.assert_allclose(values, case.expected(*args), rtol=1e-5, atol=5e-6)


@on_each_logits
def test_a_masked_vocabulary_is_one_without_those_classes(case):
    """-inf in both: values and gradients are those of the classes that are left."""
    student, second = reshape(case, (6, 4))
    small, small_slope = case(student, second)

    def widen(logits):
        return np.insert(logits, [0, 2], -INF, axis=-1)

    others = widen(second) if has_teacher(case) else np.array([1, 2, 4, 5])[second]
    wide, wide_slope = map(np.asarray, case(widen(student), others))
    np.testing.assert_allclose(wide, small, rtol=1e-5)
    np.testing.assert_allclose(wide_slope[:, [1, 2, 4, 5]], small_slope, atol=1e-6)
    np.testing.assert_array_equal(wide_slope[:, [0, 3]], 0)


@on_each_logits
def test_a_class_one_side_excludes(case):
    """The true value, +inf where that is it, with a finite gradient but for squares."""
    student = np.array([[0.3, -1.0, 0.5]], np.float32)
    second = np.array([2]) if not has_teacher(case) else 2 * student
    for where in ("student", "second"):
        args = [student.copy(), second.copy()]
        if where == "second" and not has_teacher(case):
            continue
        args[where == "second"][0, 2] = -INF
        values, slope = case(*args)
        if case.loss in (losses.logit_mse,):
            assert values == INF
            continue
        assert not np.isnan(values).any()
        assert np.isfinite(slope).all()


def test_every_public_loss_has_a_row():
    tested = {case.loss.__name__ for case in CASES}
    elsewhere = {"chunked_cross_entropy", "chunked_forward_kl"}  # test_vocabulary
    public = {name for name, value in vars(losses).items() if callable(value)}
    missing = public - tested - {"shift_tokens", "standardize"} - elsewhere
    where = "CASES of tests/losses/losses_table.py"
    assert not missing, f"no row in {where}: {', '.join(missing)}"
