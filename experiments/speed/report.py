# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of benchmark's parts."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.speed.loops import LIVE, SCANNED, STORED, SWEPT
from jaxdistill import report
from jaxdistill.report.figures import new_figure, to_png
from jaxdistill.train import cost
from jaxdistill.train.cost import span


def tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """`{file name: Markdown}` of the parts there are."""
    makers = {"loops": _loops, "resnet": _loops, "scaling": _scaling, "cold": _cold}
    return {f"{k}.md": make(summary[k]) for k, make in makers.items() if k in summary}


def figures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """`{file name: PNG}` of the parts there are."""
    makers = {"loops": _bars, "resnet": _bars, "scaling": _lines}
    return {f"{k}.png": make(summary[k]) for k, make in makers.items() if k in summary}


def _loops(part: Mapping[str, Any]) -> str:
    seconds = part["seconds"]
    ours = [name for name in seconds if name.startswith("jaxdistill")]
    head = ["", "seconds per epoch", *(f"over {name.split(', ')[1]}" for name in ours)]
    lines = []
    for name, times in seconds.items():
        over = (cost.ratios(times, seconds[other]) for other in ours)
        cells = [span(ratio, ".2g") for ratio in over]
        if name in ours:
            cells[ours.index(name)] = "-"
        lines.append([name, span(times), *cells])
    dash = [" - "] * len(ours)
    lines += [[name, why, *dash] for name, why in part["skipped"].items()]
    rounds, swept = len(seconds[LIVE]), ""
    if "students" in part:
        swept = f"; of {part['students']} swept students each one's share"
    text = report.markdown_table(
        head,
        lines,
        f"Median (lowest to highest) of {rounds} rounds in turns; a ratio is how much "
        f"longer the row takes, pair by pair. {part['images']:,} images, batch "
        f"{part['batch_size']}{swept}. {machine_line(part['machine'])}",
    )
    return f"{text}\n{_programs(part) if 'programs' in part else ''}"


def _programs(part: Mapping[str, Any]) -> str:
    """What XLA counts of a step, and the share of the machine's peak it reaches."""
    lines = []
    # A swept student's step computes what a stored one's does.
    swept = {n: part["programs"][STORED] for n in part["seconds"] if SWEPT in n}
    for name, program in {**part["programs"], **swept}.items():
        epoch = statistics.median(part["seconds"][name])
        rate = program["flops"] * part["steps"] / epoch / 1e9
        counts = [f"{program[key] / 1e6:.2f}" for key in ("flops", "bytes")]
        share = f"{100 * rate / part['peak_gflops']:.0f}"
        lines.append([name, *counts, f"{rate:.0f}", share])
    by_hand, live = (part["programs"][name] for name in (SCANNED, LIVE))
    gaps = [100 * (live[key] / by_hand[key] - 1) for key in ("flops", "bytes")]
    slower = cost.ratios(part["seconds"][LIVE], part["seconds"][SCANNED])
    return report.markdown_table(
        ("a step", "MFLOP", "MB read and written", "GFLOP/s", "of the peak, %"),
        lines,
        f"The peak is that of a 2048 x 2048 product, {part['peak_gflops']:.0f} "
        f"GFLOP/s. Live against the scan by hand: FLOPs {gaps[0]:+.2f}%, bytes "
        f"{gaps[1]:+.2f}%, time {100 * (slower['median'] - 1):+.1f}% (median pair). "
        "Bytes are XLA's count, which has the whole data set in every step's gather.",
    )


def _scaling(part: Mapping[str, Any]) -> str:
    titles = {
        "teacher": "teacher's hidden widths",
        "batch": "examples in a batch",
        "students": "students in a sweep",
    }
    tables = []
    for key, title in titles.items():
        kinds = list(dict.fromkeys(name.split()[0] for name in part[key]))
        sizes = list(dict.fromkeys(name.split()[1] for name in part[key]))
        head = [title, *(f"{kind}, ms per step" for kind in kinds)]
        if key == "students":
            head[1] += " and student"
        times = part[key]
        lines = [[n, *(f"{times[f'{kind} {n}']:.3f}" for kind in kinds)] for n in sizes]
        tables.append(report.markdown_table(head, lines))
    return "\n".join([*tables, machine_line(part["machine"]), ""])


def _cold(part: Mapping[str, Any]) -> str:
    names = {"pytorch": "the article's script", "jaxdistill": "jaxdistill, live"}
    found = part["processes"]
    ours = [one["seconds"] for one in found["jaxdistill"]]
    lines = []
    for side, runs in found.items():
        times = [one["seconds"] for one in runs]
        ratio = "-" if side == "jaxdistill" else span(cost.ratios(times, ours))
        memory = f"{max(one['peak_bytes'] for one in runs) / 1e6:.0f}"
        accuracy = f"{100 * statistics.mean(one['accuracy'] for one in runs):.2f}"
        lines.append([names[side], span(times), ratio, memory, accuracy])
    return report.markdown_table(
        ("whole process", "seconds", "ours is faster by", "peak MB", "accuracy %"),
        lines,
        f"Import, read the teacher and the images, {part['epochs']} epochs, evaluate, "
        f"save; nothing compiled before. Median (lowest to highest) of {len(ours)} "
        f"processes each, in turns. {machine_line(part['machine'])}",
    )


def _bars(part: Mapping[str, Any]) -> bytes:
    """Seconds per epoch, with the range over the rounds."""
    seconds = part["seconds"]
    names = list(seconds)[::-1]
    medians = [statistics.median(seconds[name]) for name in names]
    low = [m - min(seconds[n]) for n, m in zip(names, medians, strict=True)]
    high = [max(seconds[n]) - m for n, m in zip(names, medians, strict=True)]
    picture, axis = new_figure((7, 0.8 + 0.4 * len(names)))
    axis.barh(names, medians, xerr=[low, high], capsize=3)
    axis.set(xlabel="seconds per epoch: median and range", xscale="log")
    axis.spines[["top", "right"]].set_visible(False)
    return to_png(picture)


def _lines(part: Mapping[str, Any]) -> bytes:
    """Milliseconds a step against each size."""
    picture, axes = new_figure((10, 3.2), 3)
    for axis, key in zip(axes, ("teacher", "batch", "students"), strict=True):
        for kind in dict.fromkeys(name.split()[0] for name in part[key]):
            points = [n.split()[1] for n in part[key] if n.startswith(f"{kind} ")]
            times = [part[key][f"{kind} {point}"] for point in points]
            axis.plot(points, times, "o-", label=kind)
        axis.set(xlabel=key, ylim=(0, None))
        axis.legend(frameon=False)
    axes[0].set(ylabel="ms per step")
    axes[2].set(ylabel="ms per step and student")
    return to_png(picture)


def machine_line(
    on: Mapping[str, Any], packages: Sequence[str] = ("jax", "torch", "keras")
) -> str:
    """What a part ran on, in words."""
    versions = ", ".join(f"{name} {on[name]}" for name in packages if on[name])
    device = f"{on['device']} beside " if on.get("device") else ""
    return f"{device}{on['threads']} threads of {on['cpu']}, {versions}."
