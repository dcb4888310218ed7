# SPDX-License-Identifier: Apache-2.0
"""A finished sweep as a table and a heat map: from its summary alone.

The summary of a sweep is `{"axes": {name: [values]}, "validation": [...], "test":
[...]}`, accuracies of all cells in the order of `sweep.grid`, whose last axis is the
seed.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.report.figures import new_figure, to_png, words
from jaxdistill.report.statistics import spread


def best(summary: Mapping[str, Any]) -> dict[str, float]:
    """The settings with the highest mean validation accuracy over the seeds.

    Raises:
      ValueError: no setting's accuracies are all numbers.
    """
    settings, validation, _ = _by_settings(summary)
    means = validation.mean(1)
    if np.isnan(means).all():
        raise ValueError("no setting of the sweep has a validation accuracy, all NaN")
    return settings[int(np.nanargmax(means))]


def table(summary: Mapping[str, Any], most: int = 10) -> str:
    """The settings by validation accuracy, the best first, and the best one's test."""
    settings, validation, test = _by_settings(summary)
    order = np.argsort(-validation.mean(1), kind="stable")
    names = list(settings[0])
    head = [*map(words, names), "validation %", "test %"]
    lines = [head, ["--:"] * len(head)]
    for i in order[:most]:
        cells = [f"{settings[i][name]:g}" for name in names]
        lines.append([*cells, _percent(validation[i]), _percent(test[i])])
    rows = [f"| {' | '.join(line)} |" for line in lines]
    chosen = ", ".join(f"{words(k)} {v:g}" for k, v in settings[order[0]].items())
    return "\n".join(
        [
            *rows,
            "",
            f"The first {min(most, len(order))} of {len(order)} settings, chosen on "
            f"validation: {chosen}. Mean ± sample deviation over "
            f"{validation.shape[1]} seeds.",
            "",
        ]
    )


def draw(summary: Mapping[str, Any]) -> bytes:
    """Validation accuracy by the first two axes, the others at their best; a PNG.

    One axis alone is a row. Each field has the mean and the sample deviation over the
    seeds.
    """
    axes = [name for name in summary["axes"] if name != "seed"]
    settings, validation, _ = _by_settings(summary)
    chosen = best(summary)
    *down, across = axes[:2]
    columns = summary["axes"][across]
    rows = summary["axes"][down[0]] if down else [0.0]
    figure, axis = new_figure((1.5 + 1.1 * len(columns), 1.2 + 0.5 * len(rows)))
    field = np.full((len(rows), len(columns)), np.nan)
    for i, setting in enumerate(settings):
        if all(setting[name] == chosen[name] for name in axes[2:]):
            row = rows.index(setting[down[0]]) if down else 0
            at = row, columns.index(setting[across])
            field[at] = 100 * validation[i].mean()
            text = _percent(validation[i]).replace(" ± ", "\n± ")
            axis.text(at[1], at[0], text, ha="center", va="center", fontsize=8)
    axis.imshow(field, cmap="Blues", aspect="auto", alpha=0.6)
    axis.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
    axis.set_yticks(
        range(len(rows)), [f"{value:g}" for value in rows] if down else [""]
    )
    others = ", ".join(f"{words(name)} {chosen[name]:g}" for name in axes[2:])
    axis.set(
        xlabel=words(across),
        ylabel=words(down[0]) if down else "",
        title="validation accuracy, %" + (f" ({others})" if others else ""),
    )
    return to_png(figure)


def _by_settings(summary: Mapping[str, Any]):
    """The settings, and accuracies `[settings, seeds]` on validation and test."""
    axes = dict(summary["axes"])
    seeds = len(axes.pop("seed"))
    if not axes:
        raise ValueError("a sweep's table needs an axis besides the seed")
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    settings = [
        dict(zip(axes, (float(x) for x in values), strict=True))
        for values in zip(*(m.ravel() for m in mesh), strict=True)
    ]
    return settings, *(
        np.asarray(summary[split]).reshape(-1, seeds)
        for split in ("validation", "test")
    )


def _percent(values: np.ndarray) -> str:
    of = spread([100 * value for value in values.tolist()])
    return f"{of['mean']:.2f} ± {of['std']:.2f}"
