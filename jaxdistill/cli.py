# SPDX-License-Identifier: Apache-2.0
"""`jaxdistill`: work on finished runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from jaxdistill import export
from jaxdistill.export.benchmark import measured
from jaxdistill.report import tables
from jaxdistill.teachers import store
from jaxdistill.train import run_dir, saved


@dataclass(frozen=True)
class Report:
    """Rebuild a run directory's table and figures from its logs; print the table."""

    run: tyro.conf.Positional[str]
    """a run directory, or committed results"""
    save: Path | None = None
    """also copy its small files, table and figures to this folder, to be committed"""


@dataclass(frozen=True)
class Pages:
    """Rebuild the generated tables of README pages from committed results."""

    pages: tyro.conf.Positional[tuple[Path, ...]] = (Path("README.md"),)
    """Markdown files with `<!-- table: NAME -->` blocks"""
    results: Path = Path("experiments/results")
    """where NAME.md lies, as digits_mlp/table.md"""
    check: bool = False
    """change nothing; fail if a page is not up to date"""


@dataclass(frozen=True)
class Store:
    """Store a trained model's outputs on its run's images, for students to learn from.

    The same command again goes on where a kill left it. A script reads them with
    `teacher, examples, manifest = saved.load_store_source(...)` and `store.read`.
    """

    run: tyro.conf.Positional[str]
    """a run directory"""
    to: str
    """the store: a folder for nothing else, or gs://..."""
    arm: str = "teacher"
    """which of the run's models, of its first seed"""
    split: Literal["train", "test"] = "train"
    """which images; of the training ones, those not held out for validation"""
    data_dir: str | None = None
    """a folder of original files, or TFDS's data folder"""
    top_k: int | None = None
    """keep only so many classes of each image; None is all"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """what the outputs are stored in"""
    batch_size: int | None = None
    """images in a forward pass; None is those of the run's steps, for equal bits"""
    verify: bool = False
    """compute random examples again, and tell the model's accuracy from the store"""
    progress: bool = True
    """show progress bars"""


@dataclass(frozen=True)
class Export:
    """Export a trained student for a device, compared with the model on the whole test.

    It takes raw pixels, or token ids with their attention mask. The manifest beside it,
    NAME.json, says what goes in and comes out; `jaxdistill.runtimes` runs it.
    """

    run: tyro.conf.Positional[str]
    """a run directory"""
    to: export.Target
    """stablehlo (jaxdistill[export]), onnx (jaxdistill[onnx]), tflite
    (jaxdistill[tflite])"""
    arm: str = "distilled"
    """which of the run's models, of its first seed"""
    int8: export.Int8 | None = None
    """quantise weights, and activations: dynamic is as they come, static by their range
    on 256 training examples"""
    batch_size: int | None = None
    """the only number of examples that it takes; None is any, and 1 in tflite"""
    max_drop: float = 5.0
    """percentage points of test accuracy that int8 may lose"""
    output: str | None = None
    """the file, a local one; None is RUN/export/ARM.FORMAT"""
    data_dir: str | None = None
    """a folder of original files, or TFDS's data folder"""


@dataclass(frozen=True)
class Benchmark:
    """Measure a run's models as they are deployed: accuracy, size, cold start, memory,
    latency and throughput of the exported files, each in its runtime on the CPU.

    RUN/deployment gets summary.json, table.md and frontier.png, and exports what is
    not exported yet; the table is printed.
    """

    run: tyro.conf.Positional[str]
    """a run directory"""
    arms: tuple[str, ...] = ()
    """which of the run's models, of its first seed; none is those of teacher, scratch
    and distilled that it has"""
    to: tuple[export.Target, ...] = ()
    """in which formats; none is those whose packages are installed"""
    int8: Literal["static", "dynamic", "none"] = "static"
    """which quantisation is measured beside floats, in onnx and tflite"""
    data_dir: str | None = None
    """a folder of original files, or TFDS's data folder"""
    rounds: int = 5
    """fresh processes of each file and number of threads, in turns"""
    repeats: int = 200
    """calls with one example that each process times"""
    save: Path | None = None
    """also copy the summary and the table to this folder, to be committed"""
    progress: bool = True
    """show progress bars"""


ROUNDING = 0.02
"""The largest difference that rounding may make, bfloat16 on other machines included,
over the largest output."""

Command = Report | Pages | Store | Export | Benchmark


def main(argv: Sequence[str] | None = None) -> None:
    """The command line's entry point."""
    command = tyro.cli(Command, args=argv, description=__doc__)  # type: ignore[call-overload]
    with run_dir.exit_with_message():
        print(run(command))


def run(command: Command) -> str:
    """Does what a command asks for; returns what it says.

    Raises:
      ValueError: pages that are not up to date, and see the other functions.
    """
    if isinstance(command, Report):
        table = tables.write(command.run)
        if command.save is not None:
            tables.save(command.run, command.save)
        return table
    if isinstance(command, Pages):
        return rebuild(command)
    if isinstance(command, Store):
        return write_store(command)
    if isinstance(command, Export):
        return convert(command)
    return measure(command)


def rebuild(command: Pages) -> str:
    """Fills the pages' tables, or checks them.

    Raises:
      ValueError: one that is checked is not up to date, or a block has no table.
    """
    stale = [
        str(page)
        for page in command.pages
        if tables.fill(page, command.results, write=not command.check)
    ]
    if command.check and stale:
        raise ValueError(f"run `jaxdistill pages`: {', '.join(stale)} not up to date")
    return f"rebuilt: {', '.join(stale)}" if stale else "all pages are up to date"


def write_store(command: Store) -> str:
    """Writes what a command asks for, or finds it written; says what is there.

    Raises:
      StoreError: the store holds something else, or differs from the model's outputs.
    """
    source = saved.load_store_source(
        command.run,
        command.arm,
        split=command.split,
        data_dir=command.data_dir,
        batch_size=command.batch_size,
        top_k=command.top_k,
        dtype=command.dtype,
    )
    store.write(command.to, *source, progress=command.progress)
    manifest = source.manifest
    said = (
        f"{command.to}: {command.arm}'s outputs on {manifest.size} images "
        f"({manifest.data}, {manifest.split})"
    )
    if not command.verify:
        return said
    found = store.verify(command.to, *source)
    if not found["difference"] <= ROUNDING:
        raise store.StoreError(
            f"{command.to} differs from what {command.arm} says by "
            f"{found['difference']:.2g} of the largest; delete it and write it again"
        )
    return (
        f"{said}; recomputed examples differ by {found['difference']:.2g} of the "
        f"largest, accuracy {100 * found['accuracy']:.2f}%"
    )


def convert(command: Export) -> str:
    """Exports what a command asks for; says what it measured.

    Raises:
      ExportError: see `export.write`.
    """
    output: str | Path | None = command.output
    if output is None:
        output = export.default_path(command.run, command.arm, command.to, command.int8)
    subject = export.from_run(command.run, command.arm, data_dir=command.data_dir)
    manifest = export.write(
        subject,
        output,
        to=command.to,
        int8=command.int8,
        batch_size=command.batch_size,
        max_drop=command.max_drop,
    )
    found = manifest["check"]
    accuracy, before = 100 * found["accuracy"], 100 * found["model_accuracy"]
    return (
        f"{output}: {command.arm} in {manifest['bytes']:,} bytes; in "
        f"{manifest['runtime']} on {found['examples']} test examples accuracy "
        f"{accuracy:.2f}% (the model {before:.2f}%), "
        f"logits differ by {found['largest_difference']:.2g} at most, decisions on "
        f"{found['disagreements']}"
    )


def measure(command: Benchmark) -> str:
    """Measures what a command asks for; returns the table, and says where it is."""
    measured.from_run(
        command.run,
        command.arms,
        to=command.to,
        int8=None if command.int8 == "none" else command.int8,
        data_dir=command.data_dir,
        rounds=command.rounds,
        repeats=command.repeats,
        progress=command.progress,
    )
    folder = Path(command.run) / measured.FOLDER
    if command.save is not None:
        tables.save(folder, command.save)
    return f"{(folder / 'table.md').read_text(encoding='utf-8')}\nin {folder}"


if __name__ == "__main__":
    main()
