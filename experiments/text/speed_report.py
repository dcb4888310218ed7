# SPDX-License-Identifier: Apache-2.0
"""Tables of text_speed's parts."""

import statistics
from collections.abc import Mapping
from typing import Any

from experiments.speed.report import machine_line, row, span
from experiments.text.speed_jobs import OURS, THEIRS
from jaxdistill.train import cost


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
    lines = [
        row(["", "tokens per second", "of transformers'"]),
        row(["---", "--:", "--:"]),
    ]
    rounds = 0
    for name, job in part["jobs"].items():
        theirs = job["seconds"][THEIRS]
        rounds = len(theirs)
        lines.append(row([f"**{name}**, {job['about']}", " ", " "]))
        for side, times in job["seconds"].items():
            rates = [job["tokens"] / seconds for seconds in times]
            ratio = cost.ratios(theirs, times)
            share = "-" if side == THEIRS else span(ratio, digits=3)
            lines.append(row([side, _rates(rates), share]))
    return "\n".join(
        [
            *lines,
            "",
            f"Median (lowest to highest) of {rounds} rounds in turns; shares are taken "
            f"pair by pair. {part['note']} {_machine(part['machine'])}",
            "",
        ]
    )


def _stages(part: Mapping[str, Any]) -> str:
    """Milliseconds of a step so far, stage by stage, of both sides."""
    head = ["", "stage", f"{THEIRS}, ms", f"{OURS}, ms", "theirs over ours"]
    lines = [row(head), row(["---", "---", "--:", "--:", "--:"])]
    for name, job in part["jobs"].items():
        for stage, sides in job["seconds"].items():
            times = [[1e3 * s for s in sides[side]] for side in (THEIRS, OURS)]
            ratio = span(cost.ratios(*times), digits=3)
            lines.append(row([name, stage, *map(span, times), ratio]))
    return "\n".join(
        [
            *lines,
            "",
            "Each stage has those before it: the loss, its gradient, the gradient with "
            f"dropout, the optimizer's step. {_machine(part['machine'])}",
            "",
        ]
    )


def _storage(part: Mapping[str, Any]) -> str:
    """Bytes of a token against the KL's error."""
    temperatures = list(part["loss"])
    head = ["stored", "bytes per token", "on disk"]
    head += [f"error of the KL at T = {t}, nats" for t in temperatures]
    lines = [row(head), row(["---"] + ["--:"] * (len(head) - 1))]
    for name, found in part["stored"].items():
        errors = [f"{found['error'][t]:.1e}" for t in temperatures]
        lines.append(
            row([name, f"{found['arrays']:.1f}", f"{found['disk']:.1f}", *errors])
        )
    means = ", ".join(f"{x:.3f} at T = {t}" for t, x in part["loss"].items())
    return "\n".join(
        [
            *lines,
            "",
            "Error: mean distance of a token's KL from that of the dense float32 "
            f"outputs, which is on average {means}; {part['tokens']:,} tokens of "
            f"{part['text']}, {part['classes']:,} classes; on disk, compressed.",
            "",
        ]
    )


def _rates(rates: list[float]) -> str:
    middle, low, high = statistics.median(rates), min(rates), max(rates)
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _machine(on: Mapping[str, Any]) -> str:
    line = machine_line({**on, "keras": None})
    return f"{line[:-1]}, transformers {on['transformers']}."
