# SPDX-License-Identifier: Apache-2.0
"""Evaluation against NumPy on the whole set, whatever the batches and devices."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import struct

from jaxdistill import models, teachers
from jaxdistill.train import Evaluator, language
from jaxdistill.train.evaluation import summarize
from jaxdistill.types import Factored, Outputs
from tests.builders import CLASSES, live, make_batch
from tests.parallel.test_parallel import SOME, choose

MLP = models.MLP((8, CLASSES))
SIZE = 53
EXAMPLES = {k: make_batch(5, SIZE)[k] for k in ("inputs", "labels")}
# No example of the last class: its error must not be 0 / 0.
EXAMPLES["labels"] = EXAMPLES["labels"] % (CLASSES - 1)


def sharper(seed):
    """A model that is confident now and then: its last layer is three times larger."""
    teacher = live(MLP, seed)
    params = teacher.variables["params"]
    last = jax.tree.map(lambda x: 3 * x, params["Dense_1"])
    return teachers.live(MLP, {"params": {**params, "Dense_1": last}})


STUDENT, TEACHER = sharper(1), sharper(2)
ENSEMBLE = teachers.ensemble([TEACHER, sharper(3), sharper(4)])


def probabilities(model):
    """The network by hand, in float64; an ensemble's is the mean of its members'."""
    if isinstance(model, teachers.Ensemble):
        return np.mean([probabilities(member) for member in model.members], 0)
    first, second = (
        jax.tree.map(lambda x: np.asarray(x, np.float64), layer)
        for layer in (model.variables["params"][f"Dense_{i}"] for i in (0, 1))
    )
    hidden = np.maximum(EXAMPLES["inputs"] @ first["kernel"] + first["bias"], 0)
    odds = np.exp(hidden @ second["kernel"] + second["bias"])
    return odds / odds.sum(-1, keepdims=True)


def calibration_error(confidence, right):
    """Guo et al. 2017, equation 3, over 15 bins of equal width."""
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(right) * gap
    return total


def by_hand(student, teacher=None):
    labels, q = EXAMPLES["labels"], probabilities(student)
    guess, error = q.argmax(-1), np.zeros(CLASSES)
    for c in range(CLASSES - 1):
        error[c] = (guess[labels == c] != c).mean()
    result = {
        "accuracy": (guess == labels).mean(),
        "nll": -np.log(q[np.arange(SIZE), labels]).mean(),
        "ece": calibration_error(q.max(-1), guess == labels),
        "class_error": error,
    }
    if teacher is not None:
        p = probabilities(teacher)
        result["agreement"] = (guess == p.argmax(-1)).mean()
        result["kl"] = (p * np.log(p / q)).sum(-1).mean()
    return result


def assert_agrees(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "count"), SOME)
def test_every_metric_is_exact_over_padded_batches_and_devices(kind, count):
    partitioner = choose(kind, count)
    evaluate = Evaluator(partitioner, EXAMPLES, batch_size=16)
    student, teacher, ensemble = map(partitioner.place, (STUDENT, TEACHER, ENSEMBLE))
    assert_agrees(evaluate(student, teacher), by_hand(STUDENT, TEACHER))
    if count < 8:
        assert_agrees(evaluate(student, ensemble), by_hand(STUDENT, ENSEMBLE))


def test_an_ensemble_and_a_lone_student_are_evaluated_too():
    evaluate = Evaluator(choose("jit"), EXAMPLES)
    assert_agrees(evaluate(ENSEMBLE), by_hand(ENSEMBLE))
    found = evaluate(STUDENT, STUDENT)
    assert found["agreement"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("batch_size", [1, 7, 53, 512])
def test_the_batch_size_does_not_matter(batch_size):
    evaluate = Evaluator(choose("jit"), EXAMPLES, batch_size=batch_size)
    assert_agrees(evaluate(STUDENT, TEACHER), by_hand(STUDENT, TEACHER))


def test_tokens_of_which_none_counts_are_refused():
    """Their mean would be 0 and their perplexity 1, a perfect one."""
    padding = np.array([[0, 1], [0, 0]])
    examples = {
        "inputs": {"input_ids": np.ones((2, 2), int), "attention_mask": 1 - padding},
        "labels": np.ones((2, 2), int),
        "token_mask": padding,
    }
    with pytest.raises(ValueError, match="labelled and token_mask leave nothing"):
        Evaluator(choose("jit"), examples, metrics=language)


@struct.dataclass
class Counted:
    """A teacher that tells when it runs."""

    model: models.BoundModule
    tell: Any = struct.field(pytree_node=False)

    def __call__(self, batch):
        jax.debug.callback(self.tell)
        return self.model(batch)


def test_a_teacher_runs_once_for_all_its_students():
    runs = []
    counted = Counted(TEACHER, lambda: runs.append(1))
    evaluate = Evaluator(choose("jit"), EXAMPLES, batch_size=16)
    for student in (STUDENT, ENSEMBLE, STUDENT):
        assert_agrees(evaluate(student, counted), by_hand(student, TEACHER))
        jax.effects_barrier()
        assert len(runs) == 4  # batches of the 53 examples
    # Another teacher is asked, and then the first again.
    for teacher in (ENSEMBLE, TEACHER):
        assert_agrees(evaluate(STUDENT, teacher), by_hand(STUDENT, teacher))
    evaluate(STUDENT, counted)
    jax.effects_barrier()
    assert len(runs) == 8


def test_masked_classes_leave_the_kl_finite():
    """A class without teacher mass adds nothing, whatever the student gives it."""

    class Constant(models.MLP):
        def __call__(self, inputs, mask=None, train=False):
            row = np.array(self.features, np.float32)
            logits = np.broadcast_to(row, (inputs.shape[0], len(row)))
            return Outputs(jax.numpy.asarray(logits))

    def constant(*logits):
        return teachers.live(Constant(logits), {})

    evaluate = Evaluator(choose("jit"), EXAMPLES)
    none = -np.inf
    found = evaluate(constant(0.0, 0, 0, 0, 0), constant(0.0, 0, none, none, none))
    assert found["kl"] == pytest.approx(np.log(5 / 2), rel=1e-6)
    found = evaluate(constant(0.0, 0, none, none, none), constant(0.0, 0, 0, 0, 0))
    assert found["kl"] == np.inf


def test_summarize_adds_batches_up_exactly():
    """Beyond float32's integers: 2^24 + 1 is not one of them."""
    many = np.array([2.0**24, 1.0], np.float32)
    found = summarize({"accuracy": (np.float32([2.0**24, 0]), many)})
    assert found["accuracy"] == 2**24 / (2**24 + 1)
    assert summarize({"accuracy": (np.zeros(2), np.zeros(2))}) == {"accuracy": 0.0}


def test_a_language_models_metrics_are_by_token():
    """In float64; neither padded examples nor masked tokens count."""
    rng = np.random.default_rng(7)
    hidden = rng.normal(size=(4, 5, 3)).astype(np.float32)
    table = rng.normal(size=(11, 3)).astype(np.float32)
    student, teacher = 2 * hidden @ table.T, rng.normal(size=(4, 5, 11))
    labels = rng.integers(0, 11, (4, 5))
    mask = np.array([1, 1, 1, 0], np.float32)
    token_mask = (rng.random((4, 5)) < 0.7).astype(np.float32)
    batch = {"labels": labels, "mask": mask, "token_mask": token_mask}
    counts = (mask[:, None] * token_mask).astype(bool)
    log_q, log_p = (
        x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student, teacher)
    )
    nll = -np.take_along_axis(log_q, labels[..., None], -1)[..., 0][counts].mean()
    expected = {
        "nll": nll,
        "perplexity": np.exp(nll),
        "accuracy": (log_q.argmax(-1) == labels)[counts].mean(),
        "agreement": (log_q.argmax(-1) == log_p.argmax(-1))[counts].mean(),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1)[counts].mean(),
    }
    for logits in (student, Factored(2 * hidden, table)):
        found = summarize(language(Outputs(logits), Outputs(teacher), batch))
        assert found == pytest.approx(expected, rel=1e-5)
    alone = summarize(language(Outputs(student), None, batch))
    assert set(alone) == {"nll", "perplexity", "accuracy"}
