# SPDX-License-Identifier: Apache-2.0
"""Losses as terms over (student, teacher, batch), combined by name and weight.

    objective = combine({"hard": (0.7, hard_labels()),
                         "soft": (0.3, soft_targets(temperature=2.0))})

A weight or a hyperparameter is a number, a traced value, or a function of the step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import losses
from jaxdistill.types import Array, Batch, Objective, Outputs, Term


@dataclass(frozen=True, eq=False)
class _Settled:
    """A term with its settings, so that an objective prints as it was written."""

    name: str
    settings: Mapping[str, Any]
    function: Callable[..., tuple[Array, Array]]

    def __call__(self, student, teacher, batch, step):
        settings = {k: at_step(v, step) for k, v in self.settings.items()}
        return self.function(student, teacher, batch, **settings)

    def __repr__(self) -> str:
        inside = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"{self.name}({inside})"


@dataclass(frozen=True, eq=False)
class _Combined:
    terms: Mapping[str, tuple[Any, Term]]

    def __call__(self, student, teacher, batch, step):
        result = {}
        for name, (weight, term) in self.terms.items():
            values, mask = term(student, teacher, batch, step)
            if values.shape != mask.shape:
                raise ValueError(
                    f"term {name!r} returned values of shape {values.shape} with a "
                    f"mask of shape {mask.shape}; they must be equal"
                )
            result[name] = (at_step(weight, step), values, mask)
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
      ValueError: no terms, a negative or non-finite weight, all weights 0, or a term
        named "loss", which is the sum's name in the metrics.

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
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of {name!r} must be 0 or more, got {weight}")
    if len(numbers) == len(terms) and not any(numbers.values()):
        raise ValueError(
            f"an objective needs a term with a weight above 0, got {numbers}"
        )
    return _Combined(dict(terms))


def hard_labels(*, label_smoothing: Any = 0.0) -> Term:
    """Cross-entropy with the labels, on examples whose label may be used.

    Args:
      label_smoothing: see `losses.cross_entropy`.
    """

    def function(student: Outputs, teacher, batch: Batch, *, label_smoothing=0.0):
        labels = batch["labels"]
        mask = token_mask(batch, labels.shape)
        if "labelled" in batch:
            mask = mask * _spread(batch["labelled"], labels.shape)
        values = losses.cross_entropy(
            student.logits, labels, label_smoothing=label_smoothing
        )
        return values, mask

    settings = {} if _is_zero(label_smoothing) else {"label_smoothing": label_smoothing}
    return _Settled("hard_labels", settings, function)


def soft_targets(*, temperature: Any = 1.0) -> Term:
    """Temperature-scaled KL to the teacher's distribution, times temperature squared.

    For an ensemble, whose logits carry a member axis, the mean of the members' KLs: its
    gradient is that of the KL to the mean of their tempered distributions.

    Args:
      temperature: a number above 0, a traced value, or `step -> number`.
    """
    if not callable(temperature):
        losses.logits.check_temperature(temperature)

    def function(student: Outputs, teacher: Outputs | None, batch, *, temperature):
        if teacher is None:
            raise ValueError(
                "soft_targets needs a teacher, and the step was given None"
            )
        mine, theirs = student.logits, teacher.logits
        if theirs.ndim == mine.ndim + 1:
            mine = jnp.broadcast_to(mine[None], (theirs.shape[0], *mine.shape))
        values = losses.forward_kl(mine, theirs, temperature=temperature)
        if theirs.ndim > student.logits.ndim:
            values = values.mean(0)
        return values, token_mask(batch, values.shape)

    return _Settled("soft_targets", {"temperature": temperature}, function)


def token_mask(batch: Batch, shape: tuple[int, ...]) -> Array:
    """The mask of a term whose values have `shape`: `[B]`, or `[B, L]` for tokens.

    A padded example masks all its tokens; a batch's own `token_mask` masks tokens of
    real examples.
    """
    mask = _spread(batch["mask"], shape)
    return (
        mask * batch["token_mask"] if len(shape) > 1 and "token_mask" in batch else mask
    )


def at_step(value: Any, step: Any) -> Any:
    """A schedule's value at `step`; numbers and arrays are themselves."""
    return value(step) if callable(value) else value


def _spread(mask: Array, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - 1)), shape)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and value == 0
