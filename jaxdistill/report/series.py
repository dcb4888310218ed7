# SPDX-License-Identifier: Apache-2.0
"""A measure by row and column, with its spread over seeds: as a table and as lines.

The summary is `{"measure": "test errors", "across": "temperature", "series": {row:
{column: [one value a seed]}}}`, and may have a "note" to stand below the table.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.report.figures import new_figure, to_png, words
from jaxdistill.report.statistics import spread


def table(summary: Mapping[str, Any]) -> str:
    """Mean and sample deviation over the seeds, a line for each row, as Markdown."""
    series = summary["series"]
    columns = list(dict.fromkeys(name for row in series.values() for name in row))
    lines = [
        [summary["across"], *map(words, columns)],
        ["---", *["--:"] * len(columns)],
    ]
    for name, row in series.items():
        lines.append([words(name), *(_cell(row.get(column)) for column in columns)])
    counts = sorted({len(v) for row in series.values() for v in row.values()})
    seeds = " or ".join(map(str, counts))
    return "\n".join(
        [
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
            f"{summary['measure'].capitalize()}: mean ± sample deviation over {seeds} "
            f"seeds. {summary.get('note', '')}".rstrip(),
            "",
        ]
    )


def draw(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """`{"series.png": PNG}`: a line with its spread for each row; empty where the
    columns are no numbers."""
    series = summary["series"]
    if not all(_is_number(column) for row in series.values() for column in row):
        return {}
    figure, axes = new_figure((3.4 * len(series), 3.2), len(series))
    for axis, (name, row) in zip(np.atleast_1d(axes), series.items(), strict=True):
        at = [float(column) for column in row]
        found = [spread(values) for values in row.values()]
        mean = [value["mean"] for value in found]
        axis.errorbar(at, mean, [value["std"] for value in found], fmt="o-", capsize=3)
        for x, values in zip(at, row.values(), strict=True):
            axis.plot([x] * len(values), values, ".", color="gray", alpha=0.5)
        axis.set(title=words(name), xlabel=summary["across"], xscale="log")
        axis.set_xticks(at, [f"{x:g}" for x in at], minor=False)
        axis.minorticks_off()
    np.atleast_1d(axes)[0].set(ylabel=summary["measure"])
    return {"series.png": to_png(figure)}


def _cell(values: Any) -> str:
    if values is None:
        return "-"
    found = spread(values)
    return f"{found['mean']:.1f} ± {found['std']:.1f}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
