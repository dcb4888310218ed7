# SPDX-License-Identifier: Apache-2.0
"""The metrics that rows are compared by, and how they are shown."""

from collections.abc import Mapping
from typing import Any, NamedTuple


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
    """The metric that a summary's rows are compared by."""
    return summary.get("measure", "accuracy")
