# SPDX-License-Identifier: Apache-2.0
"""The methods of method_table, one line each: what a student learns beside its labels.

A method is tried at its recipe's weight first, in our units, then around it. Weights
are those of the public recipes: RepDistiller's betas for hints, AT, SP, RKD, PKT (over
the batch size, 64: its loss is B times smaller than ours) and CRD; 0.1 cross-entropy +
0.9 KL for distillation, 0.1 and 9 for standardized logits; DKD's 1 and 2; DIST's 1, 2
and 2; born-again's and mutual learning's 1. Ours, for want of one: reverse KL as the
KL, JSD four times that (its curvature is a quarter), CKA 1.

CRD is taken in-batch: 63 negatives at most, and the student's side alone. The hints'
regressor is a 1x1 convolution alone; RepDistiller's has BatchNorm and ReLU behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jaxdistill import losses, models, objectives
from jaxdistill.objectives.schedules import warm_up
from jaxdistill.types import Term

Terms = dict[str, tuple[Any, Term]]


class Layers(NamedTuple):
    """Which of a network's hidden states are which, and the teacher's widths.

    Attributes:
      maps: the layers that are feature maps.
      hint: the map in the middle, `(layer, the teacher's channels)`.
      embedding: the vector before the classes, likewise.
    """

    maps: tuple[int, ...]
    hint: tuple[int, int]
    embedding: tuple[int, int]

    @classmethod
    def of(cls, teacher: nn.Module, example: Any) -> "Layers":
        """Reads them off the shapes of the teacher's outputs."""
        shapes = jax.eval_shape(
            lambda x: teacher.init_with_output(jax.random.key(0), x)[0].hidden_states,
            example,
        )
        maps = tuple(i for i, x in enumerate(shapes) if len(x.shape) == 4)
        middle, end = maps[len(maps) // 2], len(shapes) - 1
        widths = [x.shape[-1] for x in shapes]
        return cls(maps, (middle, widths[middle]), (end, widths[end]))


@dataclass(frozen=True)
class Method:
    """An arm of the table.

    Attributes:
      soft_terms: `(weight, layers, steps) -> terms`, of a training of so many steps.
      weight: the paper's, which the search tries first.
      hard: the weight of the labels' cross-entropy.
      teacher: who teaches, or None.
      projects: which of the student's layers is projected, a field of Layers.
      peers: how many students learn from each other; the first is the result.
      factor: between a weight and the next that the search tries.
    """

    soft_terms: Callable[[float, Layers, int], Terms]
    weight: float
    teacher: str | None = "teacher"
    hard: float = 1.0
    projects: str | None = None
    peers: int = 1
    factor: float = 3.0

    def terms(self, weight: float, layers: Layers, steps: int) -> Terms:
        """The objective's terms: labels, and the terms at a weight."""
        hard = {"hard": (self.hard, objectives.hard_labels())}
        return hard | self.soft_terms(weight, layers, steps)

    def module(self, student: nn.Module, layers: Layers) -> nn.Module:
        """The student, with a projection or with peers where the terms needs them."""
        if self.peers > 1:
            return models.Peers((student,) * self.peers)
        if self.projects is None:
            return student
        widths = (getattr(layers, self.projects),)
        return models.with_projector(student, models.Projector(widths))


def logits(loss: Callable, weight: float, hard: float, **settings: Any) -> Method:
    """A loss on logits beside the labels' cross-entropy."""
    term = objectives.on_logits(loss, **settings)
    return Method(lambda w, *_: {"soft": (w, term)}, weight, hard=hard)


def embeddings(loss: Callable, weight: float, **kwargs: Any) -> Method:
    """A loss between the vectors before the classes."""
    pair = ((-1, -1),)
    return Method(
        lambda w, *_: {"match": (w, objectives.on_hidden_states(loss, pair))},
        weight,
        **kwargs,
    )


def maps(loss: Callable, weight: float, which: str, **kwargs: Any) -> Method:
    """A loss between feature maps: all, the one in the middle, or the last."""

    def soft_terms(w, layers, _):
        chosen = {
            "all": layers.maps,
            "middle": (layers.hint[0],),
            "last": layers.maps[-1:],
        }[which]
        pairs = tuple((i, i) for i in chosen)
        return {"match": (w, objectives.on_hidden_states(loss, pairs))}

    return Method(soft_terms, weight, **kwargs)


def smoothed(amount, *_) -> Terms:
    """Label smoothing in place of the plain cross-entropy."""
    return {"hard": (1.0, objectives.hard_labels(label_smoothing=amount))}


def decoupled(w, _, steps) -> Terms:
    """DKD, warmed up over a twelfth of the training: 20 of the paper's 240 epochs."""
    term = objectives.on_logits(
        losses.decoupled_kl, nontarget_weight=2.0, temperature=4.0
    )
    return {"soft": (warm_up(w, steps=max(1, steps // 12)), term)}


def related(w, *_) -> Terms:
    """RKD: distances, and angles at twice their weight."""
    pair = ((-1, -1),)
    return {
        "distance": (w, objectives.on_hidden_states(losses.relational_distance, pair)),
        "angle": (2 * w, objectives.on_hidden_states(losses.relational_angle, pair)),
    }


def mutual(w, *_) -> Terms:
    """Two students of different weights, each taught by the other as it is."""
    return {"mutual": (w, objectives.mutual_targets())}


def standardized_kl(student, teacher, *, temperature):
    """KL between standardized logits (Sun et al. 2024)."""
    sides = losses.standardize(student), losses.standardize(teacher)
    return losses.forward_kl(*sides, temperature=temperature)


def soft(weight: float, hard: float, temperature: float, teacher: str) -> Method:
    """Plain distillation from some teacher."""
    term = objectives.soft_targets(temperature=temperature)
    return Method(lambda w, *_: {"soft": (w, term)}, weight, teacher, hard)


METHODS = {
    "scratch": Method(lambda *_: {}, 1.0, None),
    "label_smoothing": Method(smoothed, 0.1, None, factor=2.0),
    "kd": soft(0.9, 0.1, 4.0, "teacher"),
    "dkd": Method(decoupled, 1.0),
    "dist": logits(
        losses.dist, 1.0, 1.0, inter_weight=2.0, intra_weight=2.0, temperature=4.0
    ),
    "standardized_kd": logits(standardized_kl, 9.0, 0.1, temperature=2.0),
    "reverse_kl": logits(losses.reverse_kl, 0.9, 0.1, temperature=4.0),
    "jsd": logits(losses.generalized_jsd, 3.6, 0.1, temperature=4.0),
    "hints": maps(losses.hint_mse, 100.0, "middle", projects="hint"),
    "attention_transfer": maps(losses.attention_transfer, 1000.0, "all"),
    "sp": maps(losses.similarity_preserving, 3000.0, "last"),
    "rkd": Method(related, 25.0),
    "pkt": embeddings(losses.probabilistic_transfer, 30_000 / 64),
    "crd": embeddings(losses.contrastive, 0.8, projects="embedding"),
    "cka": embeddings(losses.linear_cka, 1.0),
    "ensemble": soft(0.9, 0.1, 4.0, "ensemble_teacher"),
    "assistant": soft(0.9, 0.1, 4.0, "assistant_teacher"),
    "born_again": soft(1.0, 1.0, 1.0, "first_generation"),
    "mutual": Method(mutual, 1.0, None, peers=2),
}
