# SPDX-License-Identifier: Apache-2.0
"""What every term is made with: its settings, its mask, and what its loss asks for."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxdistill.losses import BATCH_COUPLED
from jaxdistill.types import Array, Batch, Outputs, Term


@dataclass(frozen=True, eq=False)
class Settled:
    """A term with its settings, so that an objective prints as it was written.

    Attributes:
      name: of the function that made it.
      given: what that function got by position, for printing.
      settings: hyperparameters, numbers or functions of the step.
      function: `(student, teacher, batch, **settings) -> (values, mask)`.
    """

    name: str
    given: tuple[Any, ...]
    settings: Mapping[str, Any]
    function: Callable[..., tuple[Array, Array]]

    def __call__(self, student, teacher, batch, step):
        settings = {k: at_step(v, step) for k, v in self.settings.items()}
        return self.function(student, teacher, batch, **settings)

    def __repr__(self) -> str:
        given = [name_of(x) for x in self.given]
        inside = [*given, *(f"{k}={v!r}" for k, v in self.settings.items())]
        return f"{self.name}({', '.join(inside)})"


def couples_batch(term: Term) -> bool:
    """Whether a term made here, or one inside it, compares the examples of a batch."""
    inner = getattr(term, "term", None)
    given = getattr(term, "given", ())
    coupled = any(loss is x for loss in BATCH_COUPLED for x in given)
    return coupled or (inner is not None and couples_batch(inner))


def taught(term: Callable, teacher: Outputs | None) -> Outputs:
    """The teacher's outputs, or ValueError that the step was given none."""
    if teacher is None:
        raise ValueError(
            f"{name_of(term)} needs a teacher, and the step was given None"
        )
    return teacher


def wanted(loss: Callable, batch: Batch, mask: Array) -> dict[str, Any]:
    """Labels and mask, where the loss takes them."""
    names = inspect.signature(loss).parameters
    given = {"mask": mask} if "mask" in names else {}
    if "labels" not in names:
        return given
    if "labels" not in batch and names["labels"].default is inspect.Parameter.empty:
        raise ValueError(f"{name_of(loss)} needs labels, and the batch has none")
    return {**given, "labels": batch.get("labels")}


def name_of(function: Callable) -> str:
    """How a function is called in a message or in print."""
    return getattr(function, "__name__", repr(function))


def check_settings(loss: Callable, settings: Mapping[str, Any]) -> None:
    """Raise ValueError at a setting that is no hyperparameter of the loss."""
    parameters = inspect.signature(loss).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise ValueError(
                f"{name_of(loss)} has no setting {name!r}; it has: "
                f"{', '.join(known) or 'none'}"
            )


def at_step(value: Any, step: Any) -> Any:
    """A schedule's value at `step`; numbers and arrays are themselves."""
    return value(step) if callable(value) else value
