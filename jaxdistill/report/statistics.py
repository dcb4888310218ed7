# SPDX-License-Identifier: Apache-2.0
"""Means over seeds, paired differences, many comparisons at once; known metrics."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    array = np.asarray(values, np.float64)
    deviation = array.std(ddof=1) if len(array) > 1 else 0.0
    return {"mean": float(array.mean()), "std": float(deviation), "n": len(array)}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The mean of `a - b` over pairs (seeds), from Student's t.

    Returns:
      `mean`; `low` and `high`, its 95% interval; `p`, two-sided, of no difference; `n`.
      All but the mean are NaN for a single pair, `p` also where all pairs are alike.

    >>> paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])["mean"]
    2.0
    """
    from scipy import special

    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n, mean, half, p = len(gap), float(gap.mean()), math.nan, math.nan
    if n > 1:
        error = gap.std(ddof=1) / math.sqrt(n)
        half = float(special.stdtrit(n - 1, 0.975) * error)
        if error > 0:
            p = float(2 * special.stdtr(n - 1, -abs(mean) / error))
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": p, "n": n}


def holm(p: Mapping[Any, float]) -> dict[Any, float]:
    """P-values corrected for their number, so that any error at all stays below 5%.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may fall
    below the one before it, nor rise above 1. NaN counts as 1.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}

    References:
      Holm 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    known = {name: 1.0 if math.isnan(value) else value for name, value in p.items()}
    names = sorted(known, key=lambda name: known[name])
    times = [(len(names) - i) * known[name] for i, name in enumerate(names)]
    corrected = itertools.accumulate((min(1.0, value) for value in times), max)
    return dict(zip(names, corrected, strict=True))


class Measure(NamedTuple):
    """How a metric is shown, and what stands beside it.

    Attributes:
      title: with its unit.
      scale: from the metric to what is shown.
      unit: of a difference.
      digits: of a difference, behind the point.
      columns: of a table, `(metric, title, scale, digits)`.
      lower_is_better: as of a loss.
    """

    title: str
    scale: float
    unit: str
    digits: int
    columns: tuple[tuple[str, str, float, int], ...]
    lower_is_better: bool = False


MEASURES = {
    "accuracy": Measure(
        "accuracy, %",
        100,
        "points",
        2,
        (
            ("errors", "errors", 1, 1),
            ("accuracy", "accuracy %", 100, 2),
            ("validation", "validation accuracy %", 100, 2),
            ("agreement", "agreement %", 100, 2),
            ("nll", "NLL, nats", 1, 4),
            ("ece", "ECE %", 100, 2),
        ),
    ),
    "nll": Measure(
        "NLL, nats per token",
        1,
        "nats",
        4,
        (
            ("perplexity", "perplexity", 1, 3),
            ("nll", "NLL, nats", 1, 4),
            ("kl", "KL to teacher, nats", 1, 4),
            ("own_kl", "reverse KL on own text, nats", 1, 4),
            ("accuracy", "accuracy %", 100, 2),
            ("agreement", "agreement %", 100, 2),
        ),
        lower_is_better=True,
    ),
}


def measure_of(summary: Mapping[str, Any]) -> str:
    """The metric that a summary's arms are compared by."""
    return summary.get("measure", "accuracy")
