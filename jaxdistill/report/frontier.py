# SPDX-License-Identifier: Apache-2.0
"""What accuracy costs: rows of a summary against the bytes and the time they take."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.report.figures import new_figure, to_png, words

PANELS = (
    ("bytes", 1e-3, "file, kB"),
    ("latency_us", 1.0, "latency of one example, us"),
)
TEACHER = "teacher"
MARKS = "osD^vP"
STAR = "*"

Rows = Mapping[str, Mapping[str, Any]]


def draw(rows: Rows, lines: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """`{"frontier.png": PNG}`: accuracy against size and against latency.

    The row "teacher" is a black star, the line "teacher" is black; a dotted line is the
    teacher's accuracy, the first row's where it has several.

    Args:
      rows: as `report.summarize` has them: `accuracy` with `mean` and `std`, `cost`
        with `bytes` and `latency_us`; a row without a cost is left out of its panel. A
        row may have a `kind`: all of a kind have a mark.
      lines: rows by family; a line joins them from the cheapest on. A row of none is
        a family by itself.

    Raises:
      ValueError: a line names what is no row.
    """
    named = [name for names in lines.values() for name in names]
    if unknown := sorted({*named} - {*rows}):
        raise ValueError(f"lines join what are no rows: {', '.join(unknown)}")
    alone = {name: [name] for name in rows if name not in named}
    families = {**alone, **lines}
    marks, colours = _marks(rows), _colours(families)
    figure, axes = new_figure((9, 3.6), 2)
    for axis, (key, unit, title) in zip(axes, PANELS, strict=True):
        for family, names in families.items():
            there = [n for n in names if rows[n]["cost"].get(key) is not None]
            there.sort(key=lambda name: rows[name]["cost"][key])
            at = [unit * rows[name]["cost"][key] for name in there]
            means = [100 * rows[name]["accuracy"]["mean"] for name in there]
            axis.plot(at, means, "-", color=colours[family], lw=1)
            for name, x, y in zip(there, at, means, strict=True):
                spread = 100 * rows[name]["accuracy"]["std"]
                colour = colours[name if name == TEACHER else family]
                axis.errorbar(
                    x,
                    y,
                    spread,
                    fmt=marks[name],
                    color=colour,
                    capsize=3,
                    markersize=10 if marks[name] == STAR else 6,
                )
        for name in lines.get(TEACHER, [TEACHER] if TEACHER in rows else [])[:1]:
            best = 100 * rows[name]["accuracy"]["mean"]
            axis.axhline(best, color="black", ls=":", lw=1)
        axis.set(xlabel=title, ylabel="test accuracy, %", xscale="log")
        _plain(axis)
    figure.legend(
        handles=_handles(axes[0], families, rows, marks),
        loc="outside right center",
        frameon=False,
    )
    return {"frontier.png": to_png(figure)}


def _plain(axis) -> None:
    """Plain numbers below a logarithmic axis, and few of them."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    low, high = axis.get_xlim()
    subs = (1, 2, 5) if high < 100 * low else (1, 3) if high < 5000 * low else (1,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _marks(rows: Rows) -> dict[str, str]:
    """Each row's: its kind's, but for the teacher's own."""
    kinds = list(dict.fromkeys(row.get("kind", "") for row in rows.values()))
    mark = {kind: MARKS[i % len(MARKS)] for i, kind in enumerate(kinds)}
    marks = {name: mark[row.get("kind", "")] for name, row in rows.items()}
    return marks | {TEACHER: STAR}


def _colours(families: Mapping[str, Any]) -> dict[str, str]:
    others = [name for name in families if name != TEACHER]
    return {TEACHER: "black"} | {name: f"C{i % 10}" for i, name in enumerate(others)}


def _handles(
    axis,
    families: Mapping[str, Sequence[str]],
    rows: Rows,
    marks: Mapping[str, str],
) -> list[Any]:
    """What the legend shows: a line for each family, a mark for each kind."""
    shown, colours = [], _colours(families)
    for family, names in families.items():
        mark = marks[names[0]] if len(names) == 1 else ""
        label = words(family)
        shown += axis.plot([], [], f"{mark}-", color=colours[family], label=label)
    kinds = {row["kind"]: marks[name] for name, row in rows.items() if "kind" in row}
    for kind, mark in kinds.items():
        shown += axis.plot([], [], mark, color="gray", label=words(kind))
    return shown
