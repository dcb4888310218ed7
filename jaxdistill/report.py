# SPDX-License-Identifier: Apache-2.0
"""Logs to tables, figures and README blocks: every printed number comes from a file."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxdistill.runs import read_records

COLUMNS = (
    ("accuracy", "accuracy %", 100, 2),
    ("agreement", "agreement %", 100, 2),
    ("nll", "NLL, nats", 1, 4),
    ("ece", "ECE %", 100, 2),
)
COSTS = (
    ("parameters", "parameters", 1, 0),
    ("flops", "FLOPs", 1, 0),
    ("latency_us", "latency, us", 1, 0),
    ("bytes", "kB", 1e-3, 1),
)


LARGEST = 500_000
"""Bytes of a file that `save` copies."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    array = np.asarray(values, np.float64)
    deviation = array.std(ddof=1) if len(array) > 1 else 0.0
    return {"mean": float(array.mean()), "std": float(deviation), "n": len(array)}


def paired(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """The mean of `a - b` over pairs (seeds) with its 95% interval (Student's t).

    >>> paired([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])["mean"]
    2.0
    """
    from scipy import special

    gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mean = float(gap.mean())
    if len(gap) < 2:
        return {"mean": mean, "low": math.nan, "high": math.nan, "n": len(gap)}
    half = special.stdtrit(len(gap) - 1, 0.975) * gap.std(ddof=1) / math.sqrt(len(gap))
    return {
        "mean": mean,
        "low": float(mean - half),
        "high": float(mean + half),
        "n": len(gap),
    }


def summarize(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, float]],
    against: Sequence[str],
    of: str = "distilled",
) -> dict[str, Any]:
    """A run's summary: what `table` and `comparison` print and draw.

    Args:
      results: `{row: [metrics of seed 0, of seed 1, ...]}`.
      costs: `{row: benchmark.cost}`.
      against: rows that row `of` is compared with, seed by seed.
    """
    rows: dict[str, Any] = {}
    for name, seeds in results.items():
        keys = [key for key, *_ in COLUMNS if key in seeds[0]]
        rows[name] = {
            **{key: spread([seed[key] for seed in seeds]) for key in keys},
            "class_error": np.mean([s["class_error"] for s in seeds], axis=0).tolist(),
            "cost": dict(costs[name]),
        }
    pairs = {
        other: paired(
            [seed["accuracy"] for seed in results[of]],
            [seed["accuracy"] for seed in results[other]],
        )
        for other in against
    }
    return {
        "rows": rows,
        "paired": {of: pairs},
        "seeds": {k: list(v) for k, v in results.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as Markdown: mean +- sample deviation over seeds, then pairs."""
    head = ["", *(title for _, title, *_ in COLUMNS + COSTS)]
    lines = [_row(head), _row(["---"] + ["--:"] * (len(head) - 1))]
    for name, row in summary["rows"].items():
        cells = [_words(name)]
        for key, _, scale, digits in COLUMNS:
            cells.append(_plus_minus(row[key], scale, digits) if key in row else "-")
        for key, _, unit, digits in COSTS:
            cells.append(f"{row['cost'][key] * unit:,.{digits}f}")
        lines.append(_row(cells))
    lines.append("")
    for name, others in summary["paired"].items():
        for other, gap in others.items():
            lines.append(f"- {_sentence(name, other, gap)}")
    return "\n".join(lines) + "\n"


def figures(directory: Any) -> dict[str, bytes]:
    """`{file name: PNG}` of a run directory: learning curves and the comparison."""
    directory = epath.Path(directory)
    summary = json.loads((directory / "summary.json").read_text())
    records = read_records(directory / "metrics.jsonl")
    return {
        "curves.png": _curves(records, summary["rows"]),
        "comparison.png": _comparison(summary),
    }


def write(directory: Any) -> str:
    """Rebuilds table.md and the figures of a run directory; returns the table."""
    directory = epath.Path(directory)
    text = table(json.loads((directory / "summary.json").read_text()))
    (directory / "table.md").write_text(text)
    for name, png in figures(directory).items():
        (directory / name).write_bytes(png)
    return text


def save(directory: Any, destination: Path) -> None:
    """Copies a run's small files, and rebuilds its table and figures, to be committed.

    Raises:
      ValueError: a file is larger than `LARGEST`.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for source in sorted(epath.Path(directory).iterdir()):
        if source.name.endswith((".json", ".jsonl", ".md")):
            content = source.read_bytes()
            if len(content) > LARGEST:
                raise ValueError(f"{source} has {len(content)} bytes, too many to keep")
            (destination / source.name).write_bytes(content)
    write(destination)


def fill(page: Path, results: Path, write: bool = True) -> bool:
    """Rebuilds a page's generated blocks from results; whether anything changed.

    A block stands between `<!-- table: NAME -->` and `<!-- end -->`, and becomes
    `results/NAME.md`; the table of an experiment is `EXPERIMENT/table`.

    Raises:
      ValueError: a block names a file that is not there, or is never closed.
    """

    def block(match: re.Match) -> str:
        source = results / f"{match[1]}.md"
        if not source.is_file():
            raise ValueError(f"{page} asks for {source}, which does not exist")
        return f"<!-- table: {match[1]} -->\n{source.read_text().strip()}\n<!-- end -->"

    old = page.read_text()
    marks = re.findall(r"<!-- (table|end)\b", old)
    if marks != ["table", "end"] * (len(marks) // 2):
        raise ValueError(f"{page}: each <!-- table: NAME --> needs its <!-- end -->")
    new = re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", block, old, flags=re.S)
    if write and new != old:
        page.write_text(new)
    return new != old


def _curves(records: Sequence[Mapping[str, Any]], rows: Any) -> bytes:
    """Training loss and validation accuracy by step: mean and range over seeds.

    Trainings that are no rows of the table, a search's, are left out.
    """
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    panels = (
        (left, "loss", "training loss"),
        (right, "accuracy", "validation accuracy"),
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
    (right if right.has_data() else left).legend(frameon=False)
    return _png(figure)


def _comparison(summary: Mapping[str, Any]) -> bytes:
    """Test accuracy by row, a dot per seed."""
    plt = _pyplot()
    names = list(summary["rows"])
    figure, axis = plt.subplots(
        figsize=(1.6 + 1.3 * len(names), 3.2), layout="constrained"
    )
    for x, name in enumerate(names):
        seeds = [100 * seed["accuracy"] for seed in summary["seeds"][name]]
        around = np.linspace(-0.12, 0.12, len(seeds)) if len(seeds) > 1 else [0]
        axis.plot(x + np.asarray(around), seeds, "o", alpha=0.5)
        axis.hlines(np.mean(seeds), x - 0.25, x + 0.25, color="black")
    axis.set_xticks(
        range(len(names)), [_words(name).replace(" ", "\n") for name in names]
    )
    axis.set(ylabel="test accuracy, %", title="a dot per seed, a bar for the mean")
    return _png(figure)


def _by_row(records, names, key) -> dict[str, dict[int, list[float]]]:
    rows: dict[str, dict[int, list[float]]] = {}
    for record in records:
        name = record["fit"].rsplit("-", 1)[0]
        if key in record and name in names:
            rows.setdefault(_words(name), {}).setdefault(record["step"], []).append(
                record[key]
            )
    return rows


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _pyplot().close(figure)
    return buffer.getvalue()


def _words(name: str) -> str:
    return name.replace("_", " ")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _plus_minus(value: Mapping[str, float], scale: float, digits: int) -> str:
    mean, std = value["mean"] * scale, value["std"] * scale
    return (
        f"{mean:.{digits}f} ± {std:.{digits}f}"
        if value["n"] > 1
        else f"{mean:.{digits}f}"
    )


def _sentence(name: str, other: str, gap: Mapping[str, float]) -> str:
    head = f"{_words(name)} minus {_words(other)}: {100 * gap['mean']:+.2f} points"
    if math.isnan(gap["low"]):
        return f"{head} (one seed: no interval)"
    low, high = 100 * gap["low"], 100 * gap["high"]
    return f"{head}, 95% interval {low:+.2f} to {high:+.2f} ({gap['n']} paired seeds)"
