# SPDX-License-Identifier: Apache-2.0
"""A term on a part of what it sees: some of the classes, or all real tokens."""

from dataclasses import dataclass
from typing import Any

from jaxdistill.types import Batch, Factored, Term, TopK


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
