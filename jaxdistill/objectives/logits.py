# SPDX-License-Identifier: Apache-2.0
"""Losses as terms over (student, teacher, batch), combined by name and weight.

    objective = combine({"hard": (0.7, hard_labels()),
                         "soft": (0.3, soft_targets(temperature=2.0))})

A weight or a hyperparameter is a number, a traced value, or a function of the step
(`schedules`). Any function `(student, teacher, batch, step) -> (values, mask)` is a
term; terms over hidden states and attention maps are in `layers`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.losses.logits import check_classes, mean_log_probs
from jaxdistill.losses.numerics import check_numbers
from jaxdistill.losses.vocabulary import check_ids
from jaxdistill.objectives.terms import (
    BoundTerm,
    at_step,
    check_settings,
    couples_batch,
    loss_kwargs,
    name_of,
    require_teacher,
)
from jaxdistill.types import (
    Array,
    Batch,
    Factored,
    Objective,
    Outputs,
    Term,
    TopK,
    broadcast_mask,
    token_mask,
    truth,
    whole_logits,
)


@dataclass(frozen=True, eq=False)
class _Combined:
    terms: Mapping[str, tuple[Any, Term]]

    @property
    def coupled(self) -> list[str]:
        """Names of the terms that compare the examples of a batch with each other."""
        return [name for name, (_, term) in self.terms.items() if couples_batch(term)]

    def __call__(self, student, teacher, batch, step):
        result = {}
        for name, (weight, term) in self.terms.items():
            values, mask = term(student, teacher, batch, step)
            if values.shape != mask.shape:
                raise ValueError(
                    f"term {name!r} returned values of shape {values.shape} with a "
                    f"mask of shape {mask.shape}; they must be equal"
                )
            weight = at_step(weight, step)
            check_numbers(f"term {name!r}", weight=weight)
            result[name] = (weight, values, mask)
        return result

    def __repr__(self) -> str:
        return f"combine({dict(self.terms)!r})"


def combine(terms: Mapping[str, tuple[Any, Term]]) -> Objective:
    """An objective: the weighted sum of each term's masked mean.

    Args:
      terms: `{name: (weight, term)}`; names appear in the metrics. A weight is a
        number, a traced value, or `step -> number`. Weights are not normalised.

    Returns:
      `(student, teacher, batch, step) -> {name: (weight, values, mask)}`.

    Raises:
      ValueError: no terms, a negative or non-finite weight or several in one, all
        weights 0, or a term named "loss", which is the sum's name in the metrics.

    >>> combine({"soft": (0.3, soft_targets(temperature=2.0))})
    combine({'soft': (0.3, soft_targets(temperature=2.0))})
    """
    if "loss" in terms:
        raise ValueError(
            "a term cannot be named 'loss': the metrics use it for the sum"
        )
    numbers = {
        name: weight
        for name, (weight, _) in terms.items()
        if not callable(weight) and not isinstance(weight, jax.core.Tracer)
    }
    for name, weight in numbers.items():
        check_numbers(f"term {name!r}", weight=weight)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} must be 0 or more, got {weight}")
    if len(numbers) == len(terms) and not any(numbers.values()):
        raise ValueError(
            f"an objective needs a term with a weight above 0, got {numbers}"
        )
    return _Combined(dict(terms))


def hard_labels(*, label_smoothing: Any = 0.0) -> Term:
    """Cross-entropy with the labels, on examples whose label may be used.

    Images mixed by `augment.mixup` count both their labels, by their shares. Several
    students in one (`models.Peers`) add up, each with its own cross-entropy. `Factored`
    logits are multiplied out a part at a time (`losses.chunked_cross_entropy`).

    Args:
      label_smoothing: see `losses.cross_entropy`; not of factored logits.
    """

    def function(student: Outputs, teacher, batch: Batch, *, label_smoothing=0.0):
        def loss(logits, labels):
            if isinstance(logits, Factored):
                return losses.chunked_cross_entropy(logits, labels)
            return losses.cross_entropy(logits, labels, label_smoothing=label_smoothing)

        if isinstance(student.logits, Factored) and not _is_zero(label_smoothing):
            raise ValueError("factored logits have no label smoothing: multiply them")
        if "labels" not in batch:
            raise ValueError("hard_labels needs labels, and the batch has none")
        labels = batch["labels"]
        mask = token_mask(batch, labels.shape)
        if "labelled" in batch:
            mask = mask * broadcast_mask(truth(batch["labelled"]), labels.shape)
        values = _each(loss, student.logits, labels)
        if "partner" in batch:
            share = broadcast_mask(batch["share"], labels.shape)
            mixed = _each(loss, student.logits, batch["partner"])
            values = share * values + (1 - share) * mixed
        return values, mask

    settings = {} if _is_zero(label_smoothing) else {"label_smoothing": label_smoothing}
    return BoundTerm("hard_labels", (), settings, function)


def soft_targets(*, temperature: Any = 1.0) -> Term:
    """Temperature-scaled KL to the teacher's distribution, times temperature squared.

    For an ensemble, whose logits carry a member axis, the mean of the members' KLs: its
    gradient is that of the KL to the mean of their tempered distributions. For stored
    top-k outputs, `losses.sparse_forward_kl`; where both sides' logits are `Factored`,
    `losses.chunked_forward_kl`.

    Args:
      temperature: a number above 0, a traced value, or `step -> number`.
    """
    if not callable(temperature):
        losses.logits.check_temperature(temperature)
    dense = on_logits(losses.forward_kl, temperature=temperature)
    sparse = on_logits(losses.sparse_forward_kl, temperature=temperature)

    def function(student: Outputs, teacher: Outputs | None, batch: Batch, **settings):
        kinds = [type(side.logits) for side in (student, teacher) if side is not None]
        if kinds == [Factored, Factored]:
            assert teacher is not None
            mask = token_mask(batch, student.logits.shape[:-1])
            loss = losses.chunked_forward_kl
            return loss(student.logits, teacher.logits, **settings), mask
        term = sparse if kinds[-1] is TopK else dense
        return term.function(student, teacher, batch, **settings)

    return BoundTerm("soft_targets", (), dense.settings, function)


def on_logits(loss: Callable, **settings: Any) -> BoundTerm:
    """Any loss between the student's and the teacher's logits, as a term.

    An ensemble's members are taken one by one, and the mean of their values. `Factored`
    logits are multiplied out.

    Args:
      loss: `(student, teacher, ...) -> values`; a parameter called `labels` or `mask`
        gets the batch's.
      settings: its hyperparameters: numbers, traced values, or `step -> number`.

    Raises:
      ValueError: a setting the loss does not have.

    >>> on_logits(losses.reverse_kl, temperature=2.0)
    on_logits(reverse_kl, temperature=2.0)
    """
    check_settings(loss, settings)

    def function(student: Outputs, teacher: Outputs | None, batch: Batch, **settings):
        sides = student.logits, require_teacher(loss, teacher).logits
        mine, theirs = (whole_logits(side) for side in sides)
        mask = token_mask(batch, mine.shape[:-1])
        given = loss_kwargs(loss, batch, mask)

        def compare(theirs):
            return loss(mine, theirs, **given, **settings)

        if isinstance(theirs, TopK):
            if loss is not losses.sparse_forward_kl:
                raise ValueError(
                    f"{name_of(loss)} needs all of the teacher's logits, and only the "
                    "largest are stored; losses.sparse_forward_kl takes those"
                )
            return compare(theirs), mask
        if theirs.ndim == mine.ndim:
            return compare(theirs), mask
        return jax.vmap(compare)(theirs).mean(0), mask

    return BoundTerm("on_logits", (loss,), settings, function)


def teacher_labels(head: str | None = None) -> BoundTerm:
    """Cross-entropy with the teacher's most likely class: hard distillation.

    An ensemble's is that of its mean probability. A student's `Factored` logits are
    multiplied out a part at a time (`losses.chunked_cross_entropy`), a teacher's whole.

    Args:
      head: which of the student's `extras` learns it, such as a ViT's "distillation";
        None is its logits.

    Raises:
      ValueError: when it is called, student and teacher have other classes; of top-k
        outputs see `losses.sparse_forward_kl`.

    References:
      Touvron et al. 2021, Training Data-Efficient Image Transformers (DeiT),
      equation 3.
    """

    def function(student: Outputs, teacher: Outputs | None, batch: Batch):
        logits = student.logits if head is None else student.extras[head]
        theirs = require_teacher(teacher_labels, teacher).logits
        if isinstance(theirs, TopK):
            best = theirs.log_probs.argmax(-1)[..., None]
            check_ids("teacher_labels", logits.shape[-1], theirs)
            guess = jnp.take_along_axis(theirs.ids, best, -1)[..., 0]
        else:
            check_classes("teacher_labels", logits, theirs)
            guess = mean_log_probs(theirs, logits.ndim).argmax(-1)
        factored = isinstance(logits, Factored)
        loss = losses.chunked_cross_entropy if factored else losses.cross_entropy
        return loss(logits, guess), token_mask(batch, guess.shape)

    return BoundTerm("teacher_labels", () if head is None else (head,), {}, function)


def mutual_targets(*, temperature: Any = 1.0) -> BoundTerm:
    """Mutual learning: each of several students learns from the others' present output.

    The sum over the students of the mean KL to each other one, none of whom gets a
    gradient for it: what each would minimise alone. `models.Peers` has multiplied out
    its members' `Factored` logits.

    Args:
      temperature: a number above 0, a traced value, or `step -> number`.

    Raises:
      ValueError: when it is called, logits are not those of two or more students.

    References:
      Zhang et al. 2018, Deep Mutual Learning, equations 5 to 9.
    """

    def function(student: Outputs, teacher, batch: Batch, *, temperature=1.0):
        members = student.logits
        single = isinstance(members, Factored) or members.ndim < 3
        if single or members.shape[0] < 2:
            raise ValueError(
                "mutual_targets needs a student of two or more (models.Peers), got "
                f"logits of shape {members.shape}"
            )
        mask = token_mask(batch, members.shape[1:-1])
        total = jnp.zeros(mask.shape)
        for i, mine in enumerate(members):
            for j, other in enumerate(members):
                if i != j:
                    total += losses.forward_kl(mine, other, temperature=temperature)
        return total / (len(members) - 1), mask

    return BoundTerm("mutual_targets", (), {"temperature": temperature}, function)


def _each(loss: Callable, logits: Array, labels: Array) -> Array:
    """The loss; summed over the students where logits have a member axis."""
    if logits.ndim == labels.ndim + 2:
        return jax.vmap(loss, (0, None))(logits, labels).sum(0)
    return loss(logits, labels)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0
