# SPDX-License-Identifier: Apache-2.0
"""Figures of a finished run, as PNG: learning curves and the comparison."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxdistill.report.measures import MEASURES, measure_of
from jaxdistill.train.run_dir import read_records


def draw(directory: Any) -> dict[str, bytes]:
    """`{file name: PNG}` of a run directory: the comparison and, where the trainings
    were logged, learning curves."""
    directory = epath.Path(directory)
    summary = json.loads((directory / "summary.json").read_text())
    records = read_records(directory / "metrics.jsonl")
    found = {"comparison.png": _comparison(summary)}
    if _by_row(records, summary["rows"], "loss"):
        measure = measure_of(summary)
        found["curves.png"] = _curves(records, summary["rows"], measure)
    return found


def _curves(records: Sequence[Mapping[str, Any]], rows: Any, measure: str) -> bytes:
    """Training loss and validation measure by step: mean and range over seeds.

    Trainings that are no rows of the table, a search's, are left out.
    """
    figure, (left, right) = new_figure((9, 3.2), 2)
    panels = (
        (left, "loss", "training loss"),
        (right, measure, f"validation {MEASURES[measure].title.split(',')[0]}"),
    )
    for axis, key, title in panels:
        for name, points in _by_row(records, rows, key).items():
            at = sorted(points)
            values = [points[step] for step in at]
            mean = [np.mean(v) for v in values]
            (line,) = axis.plot(at, mean, label=name)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(at, low, high, alpha=0.2, color=line.get_color())
        axis.set(title=title, xlabel="step")
    left.set_yscale("log")
    if right.has_data():
        right.legend(frameon=False)
    else:  # the names have the panel to themselves
        right.axis("off")
        lines, names = left.get_legend_handles_labels()
        right.legend(lines, names, frameon=False, loc="center", ncols=2)
    return to_png(figure)


def _comparison(summary: Mapping[str, Any]) -> bytes:
    """The test measure by row, a dot per seed."""
    names, measure = list(summary["rows"]), measure_of(summary)
    shown = MEASURES[measure]
    figure, axis = new_figure((7, max(2.8, 1.2 + 0.35 * len(names))))
    for y, name in enumerate(names):
        seeds = [shown.scale * seed[measure] for seed in summary["seeds"][name]]
        around = np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else [0]
        axis.plot(seeds, y + np.asarray(around), "o", alpha=0.5)
        axis.vlines(np.mean(seeds), y - 0.25, y + 0.25, color="black")
    axis.set_yticks(range(len(names)), [words(name) for name in names])
    axis.invert_yaxis()
    axis.set(xlabel=f"test {shown.title}", title="a dot per seed, a bar for the mean")
    return to_png(figure)


def _by_row(records, names, key) -> dict[str, dict[int, list[float]]]:
    rows: dict[str, dict[int, list[float]]] = {}
    for record in records:
        name = record["fit"].rsplit("-", 1)[0]
        if key in record and name in names:
            rows.setdefault(words(name), {}).setdefault(record["step"], []).append(
                record[key]
            )
    return rows


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def new_figure(size: tuple[float, float], columns: int = 1):
    """A Matplotlib figure of a size in inches, and its axes in a row."""
    return _pyplot().subplots(1, columns, figsize=size, layout="constrained")


def to_png(figure) -> bytes:
    """A figure as a PNG; it is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _pyplot().close(figure)
    return buffer.getvalue()


def words(name: str) -> str:
    """A row's name as it is shown."""
    return name.replace("_", " ")
