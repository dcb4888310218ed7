# SPDX-License-Identifier: Apache-2.0
"""What a term is made of: a loss with its settings, on all it sees or a part of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxdistill.losses import BATCH_COUPLED
from jaxdistill.types import Array, Batch, Factored, Outputs, Term, TopK


@dataclass(frozen=True, eq=False)
class BoundTerm:
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


def require_teacher(term: Callable, teacher: Outputs | None) -> Outputs:
    """The teacher's outputs, or ValueError that the step was given none."""
    if teacher is None:
        raise ValueError(
            f"{name_of(term)} needs a teacher, and the step was given None"
        )
    return teacher


def loss_kwargs(loss: Callable, batch: Batch, mask: Array) -> dict[str, Any]:
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


@dataclass(frozen=True, eq=False)
class _FirstClasses:
    count: int
    term: Term

    def __call__(self, student, teacher, batch, step):
        return self.term(self.cut(student), self.cut(teacher), batch, step)

    def cut(self, outputs: Any) -> Any:
        if outputs is None or isinstance(outputs.logits, TopK):
            return outputs
        logits, count = outputs.logits, self.count
        if logits.shape[-1] < count:
            raise ValueError(
                f"first_classes({count}): one side has only {logits.shape[-1]} classes"
            )
        if not isinstance(logits, Factored):
            return outputs.replace(logits=logits[..., :count])
        bias = None if logits.bias is None else logits.bias[:count]
        kernel = logits.kernel[:count]
        return outputs.replace(logits=Factored(logits.hidden, kernel, bias))

    def __repr__(self) -> str:
        return f"first_classes({self.count}, {self.term!r})"


def first_classes(count: int, term: Term) -> Term:
    """A term on the first classes of both sides, whose numbers of classes may differ.

    For vocabularies padded to a round number: the words beyond `count` are no words.
    Stored top-k outputs are taken as they are: their ids must lie below `count`.

    Args:
      count: how many classes both sides have in common, in the same order.
      term: what looks at logits alone, such as `soft_targets()`.

    >>> from jaxdistill.objectives.logits import soft_targets
    >>> first_classes(50_257, soft_targets(temperature=2.0))
    first_classes(50257, soft_targets(temperature=2.0))
    """
    return _FirstClasses(count, term)


@dataclass(frozen=True, eq=False)
class _RealTokens:
    term: Term

    def __call__(self, student, teacher, batch: Batch, step):
        whole = {name: x for name, x in batch.items() if name != "token_mask"}
        return self.term(student, teacher, whole, step)

    def __repr__(self) -> str:
        return f"real_tokens({self.term!r})"


def real_tokens(term: Term) -> Term:
    """A term on all real tokens, whichever the batch's `token_mask` has chosen.

    Args:
      term: what looks at `token_mask`, such as `soft_targets()`.

    >>> from jaxdistill.objectives.logits import soft_targets
    >>> real_tokens(soft_targets(temperature=2.0))
    real_tokens(soft_targets(temperature=2.0))
    """
    return _RealTokens(term)
