# SPDX-License-Identifier: Apache-2.0
"""Every loss against its formula in float64 NumPy. A new loss is a new row of CASES."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxdistill import losses

INF = np.inf


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    peak = logits.max(-1, keepdims=True)
    return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


def smoothed(labels, classes, label_smoothing):
    """Szegedy et al. 2016, section 7: (1 - e) onehot + e / C."""
    return (1 - label_smoothing) * np.eye(classes)[labels] + label_smoothing / classes


def numpy_cross_entropy(student, labels, *, label_smoothing=0.0):
    targets = smoothed(labels, student.shape[-1], label_smoothing)
    return -(targets * log_softmax(student)).sum(-1)


def numpy_forward_kl(student, teacher, *, temperature=1.0):
    """Hinton et al. 2015, section 2: T^2 sum p log(p / q)."""
    log_p = log_softmax(np.asarray(teacher) / temperature)
    log_q = log_softmax(np.asarray(student) / temperature)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def torch_cross_entropy(torch, student, labels, *, label_smoothing=0.0):
    return torch.nn.functional.cross_entropy(
        student.reshape(-1, student.shape[-1]),
        labels.reshape(-1).long(),
        label_smoothing=label_smoothing,
        reduction="none",
    ).reshape(labels.shape)


def torch_forward_kl(torch, student, teacher, *, temperature=1.0):
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    gap = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
    return gap.sum(-1) * temperature**2


def entropy_of_smoothed(labels, classes, *, label_smoothing=0.0):
    p = smoothed(labels, classes, label_smoothing)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def best_logits_for_labels(labels, classes, *, label_smoothing=0.0):
    return np.log(np.maximum(smoothed(labels, classes, label_smoothing), 1e-30))


class Case(NamedTuple):
    """A loss and what its formula promises.

    Attributes:
      loss: `(student, second, **settings) -> values`, second being labels or teacher.
      reference: the same in float64 NumPy, written from the formula.
      settings: hyperparameters.
      labels: whether the second argument is integer labels.
      torch: the same in PyTorch, `(torch, student, second, **settings)`, or None.
      best: `(second, classes, **settings) -> student logits` at the minimum.
      least: `(second, classes, **settings) -> values` at the minimum.
    """

    name: str
    loss: Callable
    reference: Callable
    settings: Mapping[str, Any]
    labels: bool = False
    torch: Callable | None = None
    best: Callable = lambda second, classes, **_: second
    least: Callable = lambda second, classes, **_: np.zeros(second.shape[:-1])

    def second(self, rng, shape, dtype=np.float32):
        if self.labels:
            return rng.integers(0, shape[-1], shape[:-1])
        return (3 * rng.normal(size=shape)).astype(dtype)

    def __call__(self, student, second):
        """Values, and the gradient in the student, on one compiled path."""
        return compiled(self.loss, **self.settings)(student, second)

    def expected(self, student, second):
        return self.reference(
            np.asarray(student, np.float64), np.asarray(second), **self.settings
        )


hard = partial(
    Case,
    loss=losses.cross_entropy,
    reference=numpy_cross_entropy,
    labels=True,
    torch=torch_cross_entropy,
    best=best_logits_for_labels,
    least=entropy_of_smoothed,
)
soft = partial(
    Case,
    loss=losses.forward_kl,
    reference=numpy_forward_kl,
    torch=torch_forward_kl,
)

CASES = [
    hard("cross_entropy", settings={}),
    hard("cross_entropy smoothed", settings={"label_smoothing": 0.2}),
    soft("forward_kl", settings={}),
    soft("forward_kl T=4", settings={"temperature": 4.0}),
    soft("forward_kl T=1/2", settings={"temperature": 0.5}),
]
TAUGHT = [case for case in CASES if not case.labels]
TUNED = [case for case in CASES if case.settings]

SHAPES = [(5,), (6, 5), (2, 3, 5), (3, 1)]

by_name = partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)
each = by_name(CASES)


def draw(case, shape=(6, 5), seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    student = (3 * rng.normal(size=shape)).astype(dtype)
    return student, case.second(rng, shape, dtype)


@lru_cache
def compiled(loss, **settings):
    """`(student, second) -> (values, gradient in the student)`."""
    loss = partial(loss, **settings)

    def both(student, second):
        slope = jax.grad(lambda z: loss(z, second).sum())(student)
        return loss(student, second), slope

    return jax.jit(both)


@each
@pytest.mark.parametrize("shape", SHAPES)
def test_golden_value_with_any_leading_axes(case, shape):
    student, second = draw(case, shape)
    values, _ = case(student, second)
    assert values.shape == shape[:-1]
    assert values.dtype == jnp.float32
    expected = case.expected(student, second)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=2e-6)


@each
def test_golden_value_of_torch(case):
    if case.torch is None:
        pytest.skip("the row names no PyTorch reference")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    student, second = draw(case)
    pair = torch.from_numpy(student), torch.from_numpy(second)
    expected = case.torch(torch, *pair, **case.settings).numpy()
    values, _ = case(student, second)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


@each
def test_gradient_is_the_references_slope(case):
    with jax.enable_x64(True):
        student, second = draw(case, dtype=np.float64)
        _, found = case(student, second)
    slope, h = np.zeros_like(student), 1e-5
    for i in range(student.shape[-1]):
        step = h * np.eye(student.shape[-1])[i]
        up, down = (case.expected(student + s * step, second) for s in (1, -1))
        slope[:, i] = (up - down) / (2 * h)
    np.testing.assert_allclose(found, slope, rtol=1e-7, atol=1e-8)


@each
def test_minimum(case):
    student, second = draw(case)
    best = case.best(second, 5, **case.settings)
    least = case.least(second, 5, **case.settings)
    values, slope = case(np.asarray(best, np.float32), second)
    np.testing.assert_allclose(values, least, atol=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert (np.asarray(case(student, second)[0]) > least).all()


@each
@pytest.mark.parametrize("shift", [-1000.0, 64.0])
def test_adding_a_constant_to_the_logits_changes_nothing(case, shift):
    student, second = draw(case)
    moved = second if case.labels else second - np.float32(shift)
    for found, expected in zip(
        case(student + np.float32(shift), moved), case(student, second), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-3)


@by_name(TAUGHT)
def test_no_gradient_reaches_the_teacher(case):
    student, teacher = draw(case)
    loss = partial(case.loss, **case.settings)
    assert not jax.jit(jax.grad(lambda t: loss(student, t).sum()))(teacher).any()


@each
def test_bfloat16_in_float32_out(case):
    student, second = (jnp.asarray(x) for x in draw(case))
    student = student.astype(jnp.bfloat16)
    second = second if case.labels else second.astype(jnp.bfloat16)
    values, slope = case(student, second)
    assert slope.dtype == jnp.bfloat16
    assert values.dtype == jnp.float32
    # The same numbers in float64: nothing is computed in bfloat16.
    second = second if case.labels else np.asarray(second, np.float64)
    np.testing.assert_allclose(values, case.expected(student, second), rtol=1e-5)


@by_name(TUNED)
def test_hyperparameters_may_be_traced(case):
    student, second = draw(case)
    (name, value), *rest = case.settings.items()
    grid = jnp.array([value, 0.5 * value, 0.9 * value])

    @jax.jit
    @jax.vmap
    def sweep(x):
        return case.loss(student, second, **{**dict(rest), name: x})

    for x, values in zip(grid, sweep(grid), strict=True):
        expected = case._replace(settings={**dict(rest), name: float(x)}).expected
        np.testing.assert_allclose(values, expected(student, second), rtol=1e-5)


@each
def test_a_masked_vocabulary_is_one_without_those_classes(case):
    """-inf in both: values and gradients are those of the classes that are left."""
    student, second = draw(case, (6, 4))
    small, small_slope = case(student, second)

    def widen(logits):
        return np.insert(logits, [0, 2], -INF, axis=-1)

    others = np.array([1, 2, 4, 5])[second] if case.labels else widen(second)
    wide, wide_slope = map(np.asarray, case(widen(student), others))
    np.testing.assert_allclose(wide, small, rtol=1e-6)
    np.testing.assert_allclose(wide_slope[:, [1, 2, 4, 5]], small_slope, atol=1e-6)
    np.testing.assert_array_equal(wide_slope[:, [0, 3]], 0)


@each
def test_ties(case):
    """Equal logits: the value is the formula's and the gradient is finite."""
    student = np.zeros((6, 5), np.float32)
    second = np.arange(6) % 5 if case.labels else np.ones((6, 5), np.float32)
    values, slope = case(student, second)
    np.testing.assert_allclose(values, case.expected(student, second), atol=1e-6)
    assert np.isfinite(slope).all()


@each
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_any_finite_logits(case, data, shape):
    """Close to the formula and no lower than the minimum, up to float32 rounding."""
    logits = hnp.arrays(np.float32, shape, elements=st.floats(-80, 80, width=32))
    student = data.draw(logits)
    classes = st.integers(0, shape[-1] - 1)
    second = data.draw(
        hnp.arrays(np.int64, shape[:-1], elements=classes) if case.labels else logits
    )
    values, slope = map(np.asarray, case(student, second))
    # Log-probabilities of up to 160 / T carry errors of 1e-5 / T, scaled by T^2.
    atol = 2e-5 * max(1.0, case.settings.get("temperature", 1.0))
    np.testing.assert_allclose(
        values, case.expected(student, second), rtol=1e-5, atol=atol
    )
    assert (values >= case.least(second, shape[-1], **case.settings) - atol).all()
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_forward_kl_gradient_is_temperature_times_the_gap(temperature):
    student, teacher = draw(TAUGHT[0])
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    _, found = compiled(losses.forward_kl, temperature=temperature)(student, teacher)
    np.testing.assert_allclose(found, temperature * (q - p), atol=1e-6)


def test_forward_kl_at_high_temperature_matches_logits():
    """Hinton et al. 2015, equation 4: the gradient tends to (z - v) / C, centred."""
    with jax.enable_x64(True):
        z, v = draw(TAUGHT[0], dtype=np.float64)
        _, found = compiled(losses.forward_kl, temperature=1e5)(z, v)
    gap = (z - v) / z.shape[-1]
    limit = gap - gap.mean(-1, keepdims=True)
    np.testing.assert_allclose(found, limit, atol=1e-4)


def test_a_class_the_teacher_excludes_adds_nothing():
    """p = 0 there, and 0 log 0 is 0: the gradient is still T (q - p)."""
    student = np.array([0.3, -1.0, 0.5], np.float32)
    teacher = np.array([1.0, 0.0, -INF], np.float32)
    p, log_q = softmax(teacher[:2]), log_softmax(student)
    value, slope = compiled(losses.forward_kl)(student, teacher)
    np.testing.assert_allclose(value, (p * (np.log(p) - log_q[:2])).sum(), rtol=1e-6)
    np.testing.assert_allclose(slope, np.exp(log_q) - [*p, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "second"),
    [
        (compiled(losses.forward_kl), np.zeros(3, np.float32)),
        (compiled(losses.forward_kl, temperature=3.0), np.zeros(3, np.float32)),
        (compiled(losses.cross_entropy), np.array(2)),
        (compiled(losses.cross_entropy, label_smoothing=0.1), np.array(2)),
    ],
)
def test_a_target_the_student_excludes_is_infinitely_bad(loss, second):
    student = jnp.array([0.3, -1.0, -INF])
    value, slope = loss(student, second)
    assert value == INF
    assert np.isfinite(slope).all()


PAIR = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: losses.forward_kl(PAIR, np.zeros((2, 4))),
            "the student has 3 classes, the teacher 4",
        ),
        (
            lambda: losses.forward_kl(PAIR, np.zeros((5, 3))),
            r"student logits of shape \(2, 3\) and teacher logits of shape \(5, 3\)",
        ),
        (
            lambda: losses.cross_entropy(PAIR, np.zeros((2, 1), int)),
            r"labels of shape \(2, 1\) do not fit .* \(2, 3\); expected \(2,\)",
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
    ],
)
def test_bad_input_gets_a_clear_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
