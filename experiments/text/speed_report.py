# SPDX-License-Identifier: Apache-2.0
"""Tables of text_speed's parts."""

from collections.abc import Mapping
from typing import Any

from experiments.speed.report import machine_line
from experiments.text.speed_jobs import OURS, THEIRS
from jaxdistill import report
from jaxdistill.train import cost
from jaxdistill.train.cost import span


def tables(summary: Mapping[str, Any]) -> dict[str, str]:
    """`{file name: Markdown}` of the parts there are."""
    makers = {
        "train": _speed,
        "distill": _speed,
        "lengths": _speed,
        "stages": _stages,
        "generate": _speed,
        "storage": _storage,
    }
    return {f"{k}.md": make(summary[k]) for k, make in makers.items() if k in summary}


def _speed(part: Mapping[str, Any]) -> str:
    """Tokens per second of every job, and how many times those of transformers."""
    lines, rounds = [], 0
    for name, job in part["jobs"].items():
        theirs = job["seconds"][THEIRS]
        rounds = len(theirs)
        lines.append([f"**{name}**, {job['about']}", " ", " "])
        for side, times in job["seconds"].items():
            rates = [job["tokens"] / seconds for seconds in times]
            share = "-" if side == THEIRS else span(cost.ratios(theirs, times))
            lines.append([side, span(rates, ",.0f"), share])
    return report.markdown_table(
        ("", "tokens per second", "of transformers'"),
        lines,
        f"Median (lowest to highest) of {rounds} rounds in turns; shares are taken "
        f"pair by pair. {part['note']} {_machine(part['machine'])}",
    )


def _stages(part: Mapping[str, Any]) -> str:
    """Milliseconds of a step so far, stage by stage, of both sides."""
    lines = []
    for name, job in part["jobs"].items():
        for stage, sides in job["seconds"].items():
            times = [[1e3 * s for s in sides[side]] for side in (THEIRS, OURS)]
            ratio = span(cost.ratios(*times))
            lines.append([name, stage, *map(span, times), ratio])
    return report.markdown_table(
        ("", "stage", f"{THEIRS}, ms", f"{OURS}, ms", "theirs over ours"),
        lines,
        "Each stage has those before it: the loss, its gradient, the gradient with "
        f"dropout, the optimizer's step. {_machine(part['machine'])}",
        left=(0, 1),
    )


def _storage(part: Mapping[str, Any]) -> str:
    """Bytes of a token against the KL's error."""
    temperatures, lines = list(part["loss"]), []
    for name, found in part["stored"].items():
        sizes = [f"{found[key]:.1f}" for key in ("arrays", "disk")]
        errors = [f"{found['error'][t]:.1e}" for t in temperatures]
        lines.append([name, *sizes, *errors])
    head = [f"error of the KL at T = {t}, nats" for t in temperatures]
    means = ", ".join(f"{x:.3f} at T = {t}" for t, x in part["loss"].items())
    return report.markdown_table(
        ["stored", "bytes per token", "on disk", *head],
        lines,
        "Error: mean distance of a token's KL from that of the dense float32 "
        f"outputs, which is on average {means}; {part['tokens']:,} tokens of "
        f"{part['text']}, {part['classes']:,} classes; on disk, compressed.",
    )


def _machine(on: Mapping[str, Any]) -> str:
    return machine_line(on, ("jax", "torch", "transformers"))
