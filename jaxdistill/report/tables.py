# SPDX-License-Identifier: Apache-2.0
"""Logs to tables, figures and README blocks: every printed number comes from a file."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from jaxdistill.parallel.lock import folder_at
from jaxdistill.report import deployed, figures
from jaxdistill.report.figures import grid, words
from jaxdistill.report.statistics import MEASURES, holm, measure_of, paired, spread
from jaxdistill.train.run_dir import read_summary

COSTS = (
    ("parameters", "parameters", 1, 0),
    ("flops", "FLOPs", 1, 0),
    ("latency_us", "latency, us", 1, 0),
    ("bytes", "kB", 1e-3, 1),
    ("step_ms", "ms/step", 1, 2),
)
LISTED = 4
"""Comparisons beyond which they become a table, corrected for their number."""

KEPT = (".json", ".jsonl", ".md", ".png")
"""Ends of the names of what `save` copies."""

LEFT = "tokenizer.json"
"""Not of it: it may be another's work, and no table needs it."""

LARGEST = 500_000
"""Most bytes of such a file."""


def summarize(
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, float]],
    pairs: Mapping[str, Sequence[str]],
    measure: str = "accuracy",
) -> dict[str, Any]:
    """A run's summary: what `table` and the figures print and draw.

    Args:
      results: `{arm: [metrics of seed 0, of seed 1, ...]}`.
      costs: `{arm: cost.cost}`.
      pairs: `{arm: arms it is compared with, seed by seed}`.
      measure: the metric that is compared, one of `report.statistics.MEASURES`.
    """
    arms: dict[str, Any] = {}
    for name, seeds in results.items():
        keys = [key for key, *_ in MEASURES[measure].columns if key in seeds[0]]
        arms[name] = {key: spread([seed[key] for seed in seeds]) for key in keys}
        if "class_error" in seeds[0]:
            by_class = np.mean([seed["class_error"] for seed in seeds], axis=0)
            arms[name]["class_error"] = by_class.tolist()
        arms[name]["cost"] = dict(costs[name])
    found = {name: [seed[measure] for seed in seeds] for name, seeds in results.items()}
    compared = {
        name: {other: paired(found[name], found[other]) for other in others}
        for name, others in pairs.items()
    }
    return {
        "measure": measure,
        "arms": arms,
        "paired": compared,
        "seeds": {k: list(v) for k, v in results.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as Markdown: mean +- sample deviation over seeds, then pairs."""
    arms, measure = summary["arms"].values(), measure_of(summary)
    columns = [c for c in MEASURES[measure].columns if any(c[0] in arm for arm in arms)]
    costs = [
        column for column in COSTS if any(column[0] in arm["cost"] for arm in arms)
    ]
    head = ["", *(title for _, title, *_ in (*columns, *costs))]
    shown = []
    for name, arm in summary["arms"].items():
        cells = [words(name)]
        for key, _, scale, digits in columns:
            cells.append(_plus_minus(arm[key], scale, digits) if key in arm else "-")
        for key, _, unit, digits in costs:
            cost = arm["cost"].get(key)
            cells.append("-" if cost is None else f"{cost * unit:,.{digits}f}")
        shown.append(cells)
    lines = [*grid(head, shown), ""]
    if sum(map(len, summary["paired"].values())) > LISTED:
        lines += _many(summary["paired"], measure)
    else:
        for name, others in summary["paired"].items():
            for other, gap in others.items():
                lines.append(f"- {_sentence(name, other, gap, measure)}")
    return "\n".join(lines) + "\n"


def _many(pairs: Mapping[str, Mapping[str, Any]], measure: str) -> list[str]:
    """Many comparisons as a table; below it, those that hold after correction,
    the better ones first. As a list, where few of all pairs are compared."""
    found = {(a, b): gap for a, others in pairs.items() for b, gap in others.items()}
    corrected = holm({pair: gap["p"] for pair, gap in found.items()})
    against = list(dict.fromkeys(b for _, b in found))
    seeds = next(iter(found.values()))["n"]
    signs, told = [("above", 1), ("below", -1)], f"{MEASURES[measure].unit} above"
    if MEASURES[measure].lower_is_better:
        signs, told = signs[::-1], f"{told}, lower is better"
    told = f"{told} ({seeds} paired seeds)"
    shown = {
        pair: _interval(gap, measure) + ("\\*" if corrected[pair] < 0.05 else "")
        for pair, gap in found.items()
    }
    note = ["", "\\* p < 0.05 after Holm's correction for all comparisons here."]
    if 2 * len(found) < len(pairs) * len(against):  # most cells would be empty
        rows = [[words(a), words(b), cell] for (a, b), cell in shown.items()]
        return grid(["", "against", told], rows, (0, 1)) + note
    rows = [[words(a), *(shown.get((a, b), "-") for b in against)] for a in pairs]
    lines = [*grid([told, *map(words, against)], rows), *note, ""]
    for b in against:
        for word, sign in signs:
            names = [
                words(a)
                for (a, other), gap in found.items()
                if other == b and sign * gap["mean"] > 0 and corrected[a, b] < 0.05
            ]
            lines.append(f"- {word} {words(b)}: {', '.join(names) or 'none'}")
    return lines


def _interval(gap: Mapping[str, float], measure: str) -> str:
    mean, low, high = (_signed(gap[key], measure) for key in ("mean", "low", "high"))
    return mean if math.isnan(gap["low"]) else f"{mean} ({low} to {high})"


def _signed(value: float, measure: str) -> str:
    shown = MEASURES[measure]
    return f"{shown.scale * value:+.{shown.digits}f}"


def write(directory: Any) -> str:
    """Rebuilds table.md and the figures of a run, as its summary asks; returns the
    table.

    A summary of a script's own making has tables of its making: they are returned.

    Raises:
      ValueError: there is neither a table nor what makes one.
    """
    directory = folder_at(directory)
    summary = read_summary(directory)
    if "axes" in summary:
        text = figures.heatmap_table(summary)
        pictures = {"heatmap.png": figures.draw_heatmap(summary)}
    elif "series" in summary:
        text, pictures = figures.series_table(summary), figures.draw_series(summary)
    elif "deployed" in summary:
        text, pictures = deployed.table(summary), {}
    elif "arms" in summary:
        text, pictures = table(summary), figures.draw_run(directory)
    else:  # the script that wrote it has made its tables
        texts = [
            path.read_text(encoding="utf-8") for path in sorted(directory.glob("*.md"))
        ]
        if not texts:
            raise ValueError(
                f"{directory} has no table, and its summary.json no arms, axes, series "
                f"or deployed to make one of, but {', '.join(summary)}"
            )
        return "\n".join(texts)
    if "lines" in summary:
        pictures |= figures.draw_frontier(summary["arms"], summary["lines"])
    (directory / "table.md").write_text(text, encoding="utf-8")
    for name, png in pictures.items():
        (directory / name).write_bytes(png)
    return text


def save(directory: Any, destination: Path) -> None:
    """Copies a run's small files, and rebuilds its table and figures, to be committed.

    Raises:
      ValueError: a file is larger than `LARGEST`.
    """
    destination.mkdir(parents=True, exist_ok=True)
    for source in sorted(epath.Path(directory).iterdir()):
        if source.name.endswith(KEPT) and source.name != LEFT:
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
        table = source.read_text(encoding="utf-8").strip()
        return f"<!-- table: {match[1]} -->\n{table}\n<!-- end -->"

    old = page.read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (table|end)\b", old)
    if marks != ["table", "end"] * (len(marks) // 2):
        raise ValueError(f"{page}: each <!-- table: NAME --> needs its <!-- end -->")
    new = re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", block, old, flags=re.S)
    if write and new != old:
        page.write_text(new, encoding="utf-8")
    return new != old


def _plus_minus(value: Mapping[str, float], scale: float, digits: int) -> str:
    mean, std = (f"{value[key] * scale:.{digits}f}" for key in ("mean", "std"))
    return f"{mean} ± {std}" if value["n"] > 1 else mean


def _sentence(name: str, other: str, gap: Mapping[str, float], measure: str) -> str:
    mean, low, high = (_signed(gap[key], measure) for key in ("mean", "low", "high"))
    head = f"{words(name)} minus {words(other)}: {mean} {MEASURES[measure].unit}"
    if math.isnan(gap["low"]):
        return f"{head} (one seed: no interval)"
    return f"{head}, 95% interval {low} to {high} ({gap['n']} paired seeds)"
