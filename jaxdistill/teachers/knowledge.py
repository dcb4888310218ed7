# SPDX-License-Identifier: Apache-2.0
"""Whether a teacher knows the labels: one that does not gives plausible students.

Classes in another order, another normalisation of the inputs, a head that was never
trained: the student learns from such a teacher without any sign of it. So its score on
the labels is told before it teaches, and one that cannot be told from chance is
refused, unless it is meant as a control.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxdistill.losses.logits import mean_log_probs
from jaxdistill.parallel import processes
from jaxdistill.parallel.sharding import whole
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.types import Batch, Outputs, TopK, token_mask

BATCH, MOST = 128, 8192
"""Examples that are looked at at once, and at most; fewer where they say enough."""
SURE, DOUBT = 6.0, 3.0
"""Standard deviations above chance: with so many it stops looking, below so many a
teacher is refused."""
LEAST = 0.2
"""Agreement beyond chance (Cohen's kappa) that a teacher of few classes must have: a
network as it is drawn has some of it by luck."""
FEW, MANY = 5, 1000
"""Classes: below, a random order of them is too often right; above, it is not tried."""


class TeacherError(ValueError):
    """A teacher that cannot teach; one sentence says why."""


@struct.dataclass
class Control:
    """A teacher that need not know the labels (`control`)."""

    teacher: Any

    def __call__(self, batch: Batch) -> Outputs:
        return self.teacher(batch)


def control(teacher: Any) -> Control:
    """Declares a teacher a control: untrained, or wrong, on purpose.

    It teaches as it is, and its score is not asked for.
    """
    return teacher if isinstance(teacher, Control) else Control(teacher)


def unwrap(teacher: Any) -> Any:
    """The teacher that a control is of; others as they are."""
    return teacher.teacher if isinstance(teacher, Control) else teacher


def check_knowledge(
    teacher: Any, examples: Mapping[str, Any], *, progress: bool = True
) -> float | None:
    """A teacher's accuracy on some labelled examples, printed to the error stream.

    Args:
      teacher: see `teachers`, or None; of a `StoredTeacher` the examples have the
        outputs.
      examples: `inputs`, `labels` and what else a batch has.
      progress: whether to print.

    Returns:
      The share of labels that are its most likely class, or None where that says
      nothing: there are no labels, they are no classes, or it is a `control`.

    Raises:
      TeacherError: the score cannot be told from chance. Chance is a teacher that
        answers as often with each class, whatever the input, and one whose classes are
        in a random order.

    References:
      Cohen 1960, A Coefficient of Agreement for Nominal Scales (agreement beyond
      chance); Hoeffding 1951, A Combinatorial Central Limit Theorem, theorem 2 (the
      variance over all orders of the classes).
    """
    labels = examples.get("labels")
    if teacher is None or isinstance(teacher, Control) or labels is None:
        return None
    if not np.issubdtype(labels.dtype, np.integer):
        return None
    guesses, truth = np.zeros(0, int), np.zeros(0, int)
    for guess, label in _answers(teacher, examples):
        if guess is None:
            return None
        guesses, truth = np.append(guesses, guess), np.append(truth, label)
        if beyond_chance(guesses, truth) >= SURE:
            break
    if not len(truth):
        return None
    accuracy = float((guesses == truth).mean())
    said = f"{accuracy:.1%} of {len(truth):,} labels"
    if (reason := doubt(guesses, truth)) is not None:
        raise TeacherError(
            f"the teacher is right on {said}, {reason}: are its classes in the labels' "
            "order, its inputs normalised as in its training, its head trained? Say "
            "teachers.control(teacher) where that is meant"
        )
    if progress and processes.is_first() and said not in _SAID:
        _SAID.add(said)
        print(f"teacher: right on {said}", file=sys.stderr)
    return accuracy


_SAID: set[str] = set()
"""What was printed: a study asks before each of its trainings."""


def beyond_chance(guesses: np.ndarray, labels: np.ndarray) -> float:
    """Standard deviations by which guesses agree more with labels than chance does."""
    agreed, chance, count = _agreement(guesses, labels)
    if not 0 < chance < 1:
        return 0.0
    return float((agreed - chance) / (chance * (1 - chance) / count) ** 0.5)


def doubt(guesses: np.ndarray, labels: np.ndarray) -> str | None:
    """Why a teacher's guesses cannot be told from chance; None where they can."""
    agreed, chance, _ = _agreement(guesses, labels)
    if len(np.unique(labels)) < 2:
        return "which are all of one class: nothing can be learned from them"
    if beyond_chance(guesses, labels) < DOUBT:
        return f"no more than chance, {chance:.1%}"
    classes = np.unique(np.append(guesses, labels))
    if len(classes) < FEW and agreed - chance < LEAST * (1 - chance):
        return f"hardly more than chance, {chance:.1%}"
    if len(classes) <= MANY:
        table = np.zeros((len(classes),) * 2)
        np.add.at(
            table,
            (np.searchsorted(classes, guesses), np.searchsorted(classes, labels)),
            1 / len(labels),
        )
        gap = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
        spread = (gap**2).sum() / (len(classes) - 1)
        most = len(classes) - 1  # standard deviations of one without an error
        if np.trace(gap) < min(DOUBT, most / 2) * spread**0.5:
            return "no more than with its classes in a random order"
    return None


def _agreement(guesses: np.ndarray, labels: np.ndarray) -> tuple[float, float, int]:
    """The share of equal ones, that expected of independent ones, and their number."""
    classes, count = np.unique(np.append(guesses, labels)), len(labels)
    shares = [
        np.bincount(np.searchsorted(classes, x), minlength=len(classes)) / count
        for x in (guesses, labels)
    ]
    return float((guesses == labels).mean()), float(shares[0] @ shares[1]), count


def _answers(teacher: Any, examples: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """`(guesses, labels)` that count, some examples at a time; None of no classes."""
    count = len(examples["labels"])
    known = np.arange(count)
    if "labelled" in examples:
        known = np.flatnonzero(np.asarray(examples["labelled"]))
    if not len(known):
        return
    # Spread over the set: files are often in the order of their classes.
    known = known[np.random.default_rng(0).permutation(len(known))[:MOST]]
    size = min(BATCH, len(known))
    ask: Callable = partial(_forward, np.ndim(examples["labels"]), teacher)
    for start in range(0, len(known), size):
        rows = known[start : start + size]
        some = _on_host(examples, np.resize(rows, size))
        some = {**some, "mask": np.ones(size, np.float32)}
        some["index"] = np.resize(rows, size).astype(np.int32)
        labels = some["labels"]
        if isinstance(teacher, StoredTeacher):
            guesses = _guesses(labels.ndim, teacher, some)
        else:
            guesses = ask({k: x for k, x in some.items() if k != "teacher"})
        if guesses.shape != labels.shape:
            yield None, None
            return
        counts = np.asarray(token_mask(some, labels.shape)) > 0
        counts[len(rows) :] = False
        yield np.asarray(guesses)[counts], labels[counts]


def _on_host(examples: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """Some examples as NumPy arrays, of those on devices these rows alone."""

    def take(x):
        return np.asarray(whole(x[rows]) if isinstance(x, jax.Array) else x[rows])

    return jax.tree.map(take, dict(examples))


def _guesses(ndim: int, teacher: Any, batch: Batch) -> Any:
    """The most likely class at each label's place, an ensemble's of its mean."""
    logits = teacher(batch).logits
    if isinstance(logits, TopK):
        best = jnp.asarray(logits.log_probs).argmax(-1)[..., None]
        return jnp.take_along_axis(jnp.asarray(logits.ids), best, -1)[..., 0]
    return mean_log_probs(logits, ndim + 1).argmax(-1)


_forward = jax.jit(_guesses, static_argnums=0)  # once: a study asks again and again
