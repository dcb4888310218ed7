# SPDX-License-Identifier: Apache-2.0
"""Figures of a finished run, as PNG, and the tables beside them.

A run has learning curves and a comparison. A summary with `series` is a measure by row
and column, `{"measure": "test errors", "across": "temperature", "series": {row:
{column: [one value a seed]}}}`, with a "note" below the table if there is one. A
sweep's has `{"axes": {name: [values]}, "validation": [...], "test": [...]}`,
accuracies of all trials in the order of `sweep.grid`, whose last axis is the seed. A
frontier is what accuracy costs: arms of a summary against their bytes and their time.
"""

import io
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxdistill.report.statistics import MEASURES, measure_of, spread
from jaxdistill.train.run_dir import read_records, read_summary


def draw_run(directory: Any) -> dict[str, bytes]:
    """`{file name: PNG}` of a run directory: the comparison and, where the trainings
    were logged, learning curves."""
    directory = epath.Path(directory)
    summary = read_summary(directory)
    records = read_records(directory / "metrics.jsonl")
    found = {"comparison.png": _comparison(summary)}
    if _by_arm(records, summary["arms"], "loss"):
        measure = measure_of(summary)
        found["curves.png"] = _curves(records, summary["arms"], measure)
    return found


def _curves(records: Sequence[Mapping[str, Any]], arms: Any, measure: str) -> bytes:
    """Training loss and validation measure by step: mean and range over seeds.

    Trainings that are no arms of the table, a search's, are left out.
    """
    figure, (left, right) = new_figure((9, 3.2), 2)
    panels = (
        (left, "loss", "training loss"),
        (right, measure, f"validation {MEASURES[measure].title.split(',')[0]}"),
    )
    for axis, key, title in panels:
        for name, points in _by_arm(records, arms, key).items():
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
    """The test measure by arm, a dot per seed."""
    names, measure = list(summary["arms"]), measure_of(summary)
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


def _by_arm(records, names, key) -> dict[str, dict[int, list[float]]]:
    arms: dict[str, dict[int, list[float]]] = {}
    for record in records:
        name = record["fit"].rsplit("-", 1)[0]
        if key in record and name in names:
            steps = arms.setdefault(words(name), {})
            steps.setdefault(record["step"], []).append(record[key])
    return arms


def new_figure(size: tuple[float, float], columns: int = 1):
    """A Matplotlib figure of a size in inches, and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(1, columns)


def to_png(figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)
) -> list[str]:
    """The lines of a Markdown table; all columns but those at `left` stand right."""
    rule = ["---" if at in left else "--:" for at in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def markdown_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *notes: str,
    left: Collection[int] = (0,),
) -> str:
    """Columns stand to the right, but for those at `left`; below stand the notes.

    >>> print(markdown_table(["", "accuracy %"], [["teacher", "93.1"]]), end="")
    |  | accuracy % |
    | --- | --: |
    | teacher | 93.1 |
    """
    below = ["", *notes] if notes else []
    return "\n".join([*grid(head, rows, left), *below, ""])


def words(name: str) -> str:
    """An arm's name as it is shown."""
    return name.replace("_", " ")


def series_table(summary: Mapping[str, Any]) -> str:
    """Mean and sample deviation over the seeds, a line for each row, as Markdown."""
    series = summary["series"]
    columns = list(dict.fromkeys(name for row in series.values() for name in row))
    rows = [
        [words(name), *(_cell(row.get(column)) for column in columns)]
        for name, row in series.items()
    ]
    counts = sorted({len(v) for row in series.values() for v in row.values()})
    seeds = " or ".join(map(str, counts))
    said = f"{summary['measure'].capitalize()}: mean ± sample deviation over {seeds}"
    note = f"{said} seeds. {summary.get('note', '')}".rstrip()
    head = [summary["across"], *map(words, columns)]
    return markdown_table(head, rows, note)


def draw_series(summary: Mapping[str, Any]) -> dict[str, bytes]:
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


def best_settings(summary: Mapping[str, Any]) -> dict[str, float]:
    """The settings with the highest mean validation accuracy over the seeds.

    Raises:
      ValueError: no setting's accuracies are all numbers.
    """
    settings, validation, _ = _by_settings(summary)
    means = validation.mean(1)
    if np.isnan(means).all():
        raise ValueError("no setting of the sweep has a validation accuracy, all NaN")
    return settings[int(np.nanargmax(means))]


def heatmap_table(summary: Mapping[str, Any], most: int = 10) -> str:
    """The settings by validation accuracy, the best first, and the best one's test."""
    settings, validation, test = _by_settings(summary)
    order = np.argsort(-validation.mean(1), kind="stable")
    names = list(settings[0])
    head = [*map(words, names), "validation %", "test %"]
    rows = []
    for i in order[:most]:
        cells = [f"{settings[i][name]:g}" for name in names]
        rows.append([*cells, _percent(validation[i]), _percent(test[i])])
    chosen = ", ".join(f"{words(k)} {v:g}" for k, v in settings[order[0]].items())
    note = (
        f"The first {min(most, len(order))} of {len(order)} settings, chosen on "
        f"validation: {chosen}. Mean ± sample deviation over {validation.shape[1]} "
        "seeds."
    )
    return markdown_table(head, rows, note, left=())


def draw_heatmap(summary: Mapping[str, Any]) -> bytes:
    """Validation accuracy by the first two axes, the others at their best; a PNG.

    One axis alone is a row. Each field has the mean and the sample deviation over the
    seeds.
    """
    axes = [name for name in summary["axes"] if name != "seed"]
    settings, validation, _ = _by_settings(summary)
    chosen = best_settings(summary)
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
    settings = [
        dict(zip(axes, map(float, values), strict=True))
        for values in itertools.product(*axes.values())
    ]
    return settings, *(
        np.asarray(summary[split]).reshape(-1, seeds)
        for split in ("validation", "test")
    )


def _percent(values: np.ndarray) -> str:
    of = spread([100 * value for value in values.tolist()])
    return f"{of['mean']:.2f} ± {of['std']:.2f}"


PANELS = (
    ("bytes", 1e-3, "file, kB"),
    ("latency_us", 1.0, "latency of one example, us"),
)
TEACHER = "teacher"
MARKS = "osD^vP"
STAR = "*"

Arms = Mapping[str, Mapping[str, Any]]


def draw_frontier(arms: Arms, lines: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """`{"frontier.png": PNG}`: accuracy against size and against latency.

    The arm "teacher" is a black star, the line "teacher" is black; a dotted line is the
    teacher's accuracy, the first arm's where it has several.

    Args:
      arms: as `report.summarize` has them: `accuracy` with `mean` and `std`, `cost`
        with `bytes` and `latency_us`; a arm without a cost is left out of its panel. A
        arm may have a `kind`: all of a kind have a mark.
      lines: arms by family; a line joins them from the cheapest on. A arm of none is
        a family by itself.

    Raises:
      ValueError: a line names what is no arm.
    """
    named = [name for names in lines.values() for name in names]
    if unknown := sorted({*named} - {*arms}):
        raise ValueError(f"lines join what are no arms: {', '.join(unknown)}")
    alone = {name: [name] for name in arms if name not in named}
    families = {**alone, **lines}
    marks, colours = _marks(arms), _colours(families)
    figure, axes = new_figure((9, 3.6), 2)
    for axis, (key, unit, title) in zip(axes, PANELS, strict=True):
        for family, names in families.items():
            there = [n for n in names if arms[n]["cost"].get(key) is not None]
            there.sort(key=lambda name: arms[name]["cost"][key])
            at = [unit * arms[name]["cost"][key] for name in there]
            means = [100 * arms[name]["accuracy"]["mean"] for name in there]
            axis.plot(at, means, "-", color=colours[family], lw=1)
            for name, x, y in zip(there, at, means, strict=True):
                spread = 100 * arms[name]["accuracy"]["std"]
                colour = colours[name if name == TEACHER else family]
                size = 10 if marks[name] == STAR else 6
                style = {"fmt": marks[name], "color": colour, "markersize": size}
                axis.errorbar(x, y, spread, capsize=3, **style)
        for name in lines.get(TEACHER, [TEACHER] if TEACHER in arms else [])[:1]:
            best = 100 * arms[name]["accuracy"]["mean"]
            axis.axhline(best, color="black", ls=":", lw=1)
        axis.set(xlabel=title, ylabel="test accuracy, %", xscale="log")
        _plain(axis)
    shown = _handles(axes[0], families, arms, marks)
    figure.legend(handles=shown, loc="outside right center", frameon=False)
    return {"frontier.png": to_png(figure)}


def _plain(axis) -> None:
    """Plain numbers below a logarithmic axis, and few of them."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_xlim()
    subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 5000 * low else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _marks(arms: Arms) -> dict[str, str]:
    """Each arm's: its kind's, but for the teacher's own."""
    kinds = list(dict.fromkeys(arm.get("kind", "") for arm in arms.values()))
    mark = {kind: MARKS[i % len(MARKS)] for i, kind in enumerate(kinds)}
    marks = {name: mark[arm.get("kind", "")] for name, arm in arms.items()}
    return marks | {TEACHER: STAR}


def _colours(families: Mapping[str, Any]) -> dict[str, str]:
    others = [name for name in families if name != TEACHER]
    return {TEACHER: "black"} | {name: f"C{i % 10}" for i, name in enumerate(others)}


def _handles(
    axis, families: Mapping[str, Sequence[str]], arms: Arms, marks: Mapping[str, str]
) -> list[Any]:
    """What the legend shows: a line for each family, a mark for each kind."""
    shown, colours = [], _colours(families)
    for family, names in families.items():
        mark = marks[names[0]] if len(names) == 1 else ""
        label = words(family)
        shown += axis.plot([], [], f"{mark}-", color=colours[family], label=label)
    kinds = {arm["kind"]: marks[name] for name, arm in arms.items() if "kind" in arm}
    for kind, mark in kinds.items():
        shown += axis.plot([], [], mark, color="gray", label=words(kind))
    return shown
