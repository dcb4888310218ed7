# SPDX-License-Identifier: Apache-2.0
"""The table of losses: a new row, and a new loss is tested by `test_losses`."""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdistill import losses
from jaxdistill.types import TopK
from tests.losses import references
from tests.losses.references import log_softmax, softmax


class Case(NamedTuple):
    """A loss and what its formula promises.

    Attributes:
      name: the loss's, and what is special about this row.
      loss: takes student, second (a teacher or labels), and what else `draw` gives.
      reference: the same in float64 NumPy (`references`).
      draw: `(rng, dtype) -> arguments`, the student's first.
      settings: hyperparameters.
      best: `(*arguments, **settings) -> student` at the minimum; None if there is none
        to name.
      least: `(*arguments, **settings) -> values` at the minimum.
      same: `{what: (*arguments) -> arguments}` that must leave the values as they are.
      drop: `(arguments, kept) -> arguments` with the indices `kept` of what a mask
        marks, for losses that take one.
      anchors: whether a masked entry takes its value with it.
    """

    name: str
    loss: Callable
    reference: Callable
    draw: Callable
    settings: Mapping[str, Any] = {}
    best: Callable | None = lambda student, second, *_, **__: second
    least: Callable = lambda *_, **__: 0.0
    same: Mapping[str, Callable] = {}
    drop: Callable | None = None
    anchors: bool = False

    def arguments(self, seed=0, dtype=np.float32):
        return self.draw(np.random.default_rng(seed), dtype)

    def __call__(self, *arguments):
        """Values, and the gradient in the student, on one compiled path."""
        return compiled(self.loss, **self.settings)(*arguments)

    def expected(self, *arguments):
        return self.reference(*map(wide, arguments), **self.settings)


def wide(x):
    """In float64, whatever holds it."""
    if isinstance(x, TopK):
        return TopK(*map(wide, x))
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)


@lru_cache
def compiled(loss, **settings):
    """`(student, ...) -> (values, gradient in the student)`."""
    loss = partial(loss, **settings)

    def both(student, *rest):
        slope = jax.grad(lambda x: loss(x, *rest).sum())(student)
        return loss(student, *rest), slope

    return jax.jit(both)


def normal(*shape, scale=3.0):
    def draw(rng, dtype):
        return (scale * rng.normal(size=shape)).astype(dtype)

    return draw


def whole(high, *shape):
    return lambda rng, dtype: rng.integers(0, high, shape)


def shares(*shape):
    """Probabilities over the last axis."""
    return lambda rng, dtype: softmax(rng.normal(size=shape)).astype(dtype)


def top(count, *shape):
    def draw(rng, dtype):
        log_probs = log_softmax(3 * rng.normal(size=shape))
        ids = np.argsort(-log_probs, -1)[..., :count]
        kept = np.take_along_axis(log_probs, ids, -1).astype(dtype)
        return TopK(ids, kept, np.zeros(shape[:-1], dtype))

    return draw


def arguments(*draws):
    return lambda rng, dtype: tuple(draw(rng, dtype) for draw in draws)


LOGITS = arguments(normal(6, 5), normal(6, 5))
LABELLED = arguments(normal(6, 5), whole(5, 6))
STATES = arguments(normal(2, 3, 4), normal(2, 3, 4))
MAPS = arguments(normal(2, 4, 3, 3), normal(2, 2, 2, 4))
TOKENS = arguments(normal(2, 4, 4, scale=1.0), normal(2, 4, 6, scale=1.0))
ROWS = arguments(normal(6, 3, scale=1.0), normal(6, 4, scale=1.0))


def rotation(width):
    return np.linalg.qr(np.random.default_rng(9).normal(size=(width, width)))[0]


def moved(student, teacher, *rest):
    """A constant more on one side, less on the other."""
    if np.issubdtype(teacher.dtype, np.integer):
        return student + 64, teacher, *rest
    return student + 64, teacher - 64, *rest


def scaled(student, *rest):
    return 3 * student, *rest


def turned(student, *rest):
    return student @ rotation(student.shape[-1]).astype(student.dtype), *rest


def shifted(student, *rest):
    return student + student.dtype.type(0.5), *rest


def reordered(student, teacher, *rest):
    return student[..., ::-1], teacher, *rest


def equal_heads(student, teacher, *_, **__):
    """As many heads as the student's, each the mean of the teacher's."""
    return np.broadcast_to(teacher.mean(1, keepdims=True), student.shape)


def equal_widths(student, teacher, *_, **__):
    """A student that is its teacher: of the teacher's width."""
    return teacher


def some_examples(args, kept):
    return tuple(x[kept] for x in args)


def some_keys(args, kept):
    return tuple(x[..., kept] for x in args)


def some_tokens(args, kept):
    return tuple(x[:, kept] for x in args)


def best_logits_for_labels(student, labels, *, label_smoothing=0.0):
    p = references.smoothed(labels, student.shape[-1], label_smoothing)
    return np.log(np.maximum(p, 1e-30))


def entropy_of_smoothed(student, labels, *, label_smoothing=0.0):
    p = references.smoothed(labels, student.shape[-1], label_smoothing)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1)


def entropy(student, teacher, *, temperature=1.0):
    log_p = log_softmax(teacher / temperature)
    return -(temperature**2) * (np.exp(log_p) * log_p).sum(-1)


def standardized_kl(student, teacher, *, temperature=1.0):
    sides = losses.standardize(student), losses.standardize(teacher)
    return losses.forward_kl(*sides, temperature=temperature)


def numpy_standardized_kl(student, teacher, *, temperature=1.0):
    sides = references.standardize(student), references.standardize(teacher)
    return references.forward_kl(*sides, temperature=temperature)


def case(loss, draw, note="", settings=None, **promises):
    name = loss.__name__
    reference = promises.pop("reference", None) or getattr(references, name)
    return Case(
        f"{name} {note}".strip(), loss, reference, draw, settings or {}, **promises
    )


on_logits = partial(case, draw=LOGITS, same={"a constant": moved})
on_labels = partial(
    case,
    draw=LABELLED,
    same={"a constant": moved},
    best=best_logits_for_labels,
    least=entropy_of_smoothed,
)
on_states = partial(case, draw=STATES)
on_maps = partial(case, draw=MAPS, best=equal_widths, same={"channels": reordered})
on_rows = partial(case, draw=ROWS, best=equal_widths, drop=some_examples, anchors=True)
SHAPE = {"scale": scaled, "rotation": turned, "shift": shifted}

LOGIT_CASES = [
    on_labels(losses.cross_entropy),
    on_labels(losses.cross_entropy, note="smoothed", settings={"label_smoothing": 0.2}),
    on_logits(losses.forward_kl),
    on_logits(losses.forward_kl, note="T=4", settings={"temperature": 4.0}),
    on_logits(losses.forward_kl, note="T=1/2", settings={"temperature": 0.5}),
    on_logits(losses.reverse_kl, settings={"temperature": 2.0}),
    on_logits(losses.generalized_jsd, settings={"beta": 0.1, "temperature": 2.0}),
    on_logits(losses.generalized_jsd, note="even"),
    on_logits(losses.total_variation, settings={"temperature": 2.0}),
    on_logits(losses.soft_cross_entropy, settings={"temperature": 2.0}, least=entropy),
    on_logits(losses.logit_mse, same={}),
    on_logits(
        standardized_kl,
        settings={"temperature": 2.0},
        reference=numpy_standardized_kl,
        same={"a constant": moved, "scale": scaled},
    ),
]
CASES = [
    *LOGIT_CASES,
    case(
        losses.decoupled_kl,
        arguments(normal(6, 5), normal(6, 5), whole(5, 6)),
        settings={"target_weight": 0.5, "nontarget_weight": 3.0, "temperature": 2.0},
        same={"a constant": moved},
    ),
    case(
        losses.dist,
        LOGITS,
        settings={"inter_weight": 0.5, "intra_weight": 3.0, "temperature": 2.0},
        same={"a constant": moved},
        drop=some_examples,
        anchors=True,
    ),
    case(
        losses.sparse_forward_kl,
        arguments(normal(4, 7), top(3, 4, 7)),
        settings={"temperature": 2.0},
        best=None,
    ),
    case(
        losses.sparse_forward_kl,
        arguments(normal(4, 7), top(3, 4, 7)),
        note="without the tail",
        settings={"tail": False},
        best=None,
    ),
    on_states(losses.hint_mse),
    on_states(losses.cosine_distance, same={"scale": scaled}),
    on_states(losses.patient_mse, same={"scale": scaled}),
    on_maps(
        losses.attention_transfer,
        same={"channels": reordered, "scale": scaled},
    ),
    on_maps(losses.attention_transfer, note="power 4", settings={"power": 4.0}),
    on_maps(losses.neuron_selectivity),
    case(
        losses.attention_mse,
        arguments(normal(2, 3, 4, 5), normal(2, 3, 4, 5)),
        drop=some_keys,
    ),
    case(
        losses.attention_kl,
        arguments(shares(2, 3, 4, 5), shares(2, 3, 4, 5)),
        best=None,  # over free numbers; over distributions it is 0, tested below
        drop=some_keys,
    ),
    case(
        losses.attention_mse,
        arguments(normal(2, 3, 4, 5), normal(2, 2, 4, 5)),
        note="of other heads",
        settings={"mean_heads": True},
        best=equal_heads,
        drop=some_keys,
    ),
    case(
        losses.attention_kl,
        arguments(shares(2, 3, 4, 5), shares(2, 2, 4, 5)),
        note="of other heads",
        settings={"mean_heads": True},
        best=None,
        drop=some_keys,
    ),
    case(
        losses.relation_kl,
        TOKENS,
        settings={"heads": 2},
        best=equal_widths,
        drop=some_tokens,
        anchors=True,
    ),
    on_rows(losses.relational_distance, same=SHAPE),
    on_rows(losses.relational_angle, same=SHAPE),
    on_rows(losses.similarity_preserving, same={"scale": scaled, "rotation": turned}),
    on_rows(losses.probabilistic_transfer, same={"scale": scaled, "rotation": turned}),
    on_rows(
        losses.correlation_congruence,
        settings={"gamma": 0.3},
        same={"scale": scaled, "rotation": turned},
    ),
    on_rows(losses.linear_cka, same=SHAPE),
    on_rows(
        losses.contrastive,
        draw=arguments(normal(6, 3), normal(6, 3)),
        settings={"temperature": 0.5},
        best=None,
        same={"scale": scaled},
    ),
    on_rows(
        losses.contrastive,
        draw=arguments(normal(6, 3), normal(6, 3), lambda rng, _: np.arange(6) % 3),
        note="other labels",
        settings={"dataset_size": 50},
        best=None,
    ),
    case(
        losses.ctc,
        arguments(
            normal(2, 6, 4),
            lambda rng, _: rng.integers(1, 4, (2, 2)),
            lambda *_: np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
            lambda *_: np.array([[1, 1], [1, 0]]),
        ),
        best=None,
        same={"a constant": moved},
    ),
    case(
        losses.frame_kl,
        arguments(normal(2, 3, 4), normal(2, 6, 4)),
        settings={"temperature": 2.0},
        best=None,
        same={"a constant": moved},
    ),
]
