# SPDX-License-Identifier: Apache-2.0
"""The table of a benchmark of exported models, and how it was measured."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdistill.report.figures import markdown_table, words

Rounds = Sequence[Mapping[str, Any]]

COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "": lambda arm: words(arm["arm"]),
    "format": lambda arm: arm["kind"],
    "accuracy %": lambda arm: f"{100 * arm['accuracy']['mean']:.2f}",
    "parameters": lambda arm: f"{arm['cost']['parameters']:,}",
    "FLOPs": lambda arm: f"{arm['cost']['flops']:,.0f}",
    "kB": lambda arm: f"{arm['cost']['bytes'] / 1e3:,.1f}",
}
ONE_THREAD: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "cold start, s": lambda each: each["cold_start_s"],
    "of that load, ms": lambda each: 1e3 * each["load_s"],
    "peak MB": lambda each: each["memory"] and each["memory"] / 1e6,
}
BY_THREADS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "p50, us": lambda each: each["latency_us"]["p50"],
    "p95, us": lambda each: each["latency_us"]["p95"],
    "examples/s": lambda each: each["per_second"],
}
"""Columns by their titles: of an arm, of its rounds with one thread, and of its rounds
with each number of threads."""


def table(summary: Mapping[str, Any]) -> str:
    """A line for each artefact, as Markdown; below it what the numbers are.

    The summary is `export.benchmark.from_run`'s.
    """
    counts = summary["deployed"]["threads"]
    head = [*COLUMNS, *ONE_THREAD]
    head += [f"{name}, {_count(n, 'thread')}" for n in counts for name in BY_THREADS]
    rows = []
    for arm in summary["arms"].values():
        cells = [shown(arm) for shown in COLUMNS.values()]
        cells += [_span(arm["threads"]["1"], value) for value in ONE_THREAD.values()]
        for count in counts:
            found = arm["threads"][str(count)]
            cells += [_span(found, value) for value in BY_THREADS.values()]
        rows.append(cells)
    return markdown_table(head, rows, *_notes(summary), left=(0, 1))


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """How it was measured, from the summary alone."""
    how, arms = summary["deployed"], summary["arms"].values()
    on, batch = how["machine"], how["batch"]
    ones = [each for arm in arms for each in arm["threads"]["1"]]
    before = [each["memory_before"] for each in ones if each["memory_before"]]
    at_first = statistics.median(before) / 1e6 if before else None
    examples = sorted({arm["examples"] for arm in arms})
    named = " and ".join(f"{count:,}" for count in examples)
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    notes = [
        "Every line is the exported file in its runtime, on the CPU; accuracy is the "
        f"file's, on {named} test examples, of the model of the first seed alone. A "
        "value is the median (lowest to highest) "
        f"of {_count(how['rounds'], 'round')}: in each, every file has a fresh process "
        "for each number of threads, in turns, the order turning round; one round "
        "before them is not counted.",
        "Cold start is from the start of the process to its first answer, Python and "
        "imports included, nothing compiled before; load is what of it follows the "
        "runtime's import: to read the file, verify it, compile it and answer once. "
        f"Then come {how['warmup']} calls to warm up and {how['repeats']} that are "
        "timed, each of one example, NumPy in and NumPy out; p50 and p95 are those of "
        f"a round. Throughput is of batches of {batch}, {how['batches']:,} of them at "
        f"least, and for {how['seconds']:g} s.",
        "Peak memory is the whole process's with single examples and one thread, "
        "interpreter and libraries included"
        + (
            f"; before the runtime was imported it was {at_first:.1f} MB."
            if before
            else "."
        ),
        "Threads are set by the runtime's own option; JAX has none: its process is "
        "kept to so many cores. FLOPs are those of the float model for one example, as "
        "XLA counts them.",
    ]
    if any(arm["runtime"] == "ai-edge-litert" for arm in arms):
        notes.append(
            "A TFLite file takes a fixed number of examples: the throughput is that of "
            f"a second file, for {batch}, and the rest that of the one for 1."
        )
    quantised = any(" int8 " in arm["kind"] for arm in arms)
    if quantised and any(arm["runtime"] == "jax" for arm in arms):
        notes.append("StableHLO has floats alone: its export quantises nothing.")
    notes += [f"Left out: {name}: {why}." for name, why in how["left_out"].items()]
    notes.append(
        f"{_count(on['cores'], 'core')} of {on['cpu']}, {on['system']}, Python "
        f"{on['python']}, {versions}."
    )
    return [f"- {note}" for note in notes]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _span(rounds: Rounds, value: Callable[[Mapping[str, Any]], float | None]) -> str:
    """The median, and the lowest and highest where there are several rounds."""
    values = [each for each in map(value, rounds) if each is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return _number(values[0])
    low, high = _number(min(values)), _number(max(values))
    return f"{_number(statistics.median(values))} ({low} to {high})"


def _number(value: float) -> str:
    """Three digits, or all of a whole number that has more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
