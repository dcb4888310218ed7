# SPDX-License-Identifier: Apache-2.0
"""What scripts share: flags that all have, how they begin, what they end with.

@dataclass(frozen=True)
class Config(script.Flags):
    run_dir: str = "runs/mine"

def execute(config: Config):
    ...
    script.show(experiment.run_dir)

main = script.command(execute, {"": Config()}, __doc__)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdistill import data, report
from jaxdistill.models import Precision
from jaxdistill.parallel import Kind, processes
from jaxdistill.train.run_dir import RunDir, exit_with_message, parse

OPTIONS: tuple[str, ...] = ("batch_size", "evaluations", "stored")
OPTIONS += ("precision", "bucket_lengths", "progress")
"""Options of `Study` that a flag of the same name gives."""


@dataclass(frozen=True)
class Flags:
    """Of every script: where data and compiled programs lie, and what is shown."""

    data_dir: str | None = None
    """a folder of original IDX files, or TFDS's data folder"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""
    progress: bool = True
    """show progress bars"""


@dataclass(frozen=True)
class SharedFlags(Flags):
    """Of a script whose run several processes may share."""

    distributed: bool = False
    """one of several, see parallel.processes; SLURM and TPU pods need no flag"""


@dataclass(frozen=True)
class StepFlags(SharedFlags):
    """Of a script whose every step devices share."""

    precision: Precision = "float32"
    """what the steps compute in; parameters and losses are float32 either way"""
    parallel: Kind = "auto"
    """how a step runs: a mesh where there are several devices, else jit"""


def with_flags(config: Any, flags: str) -> Any:
    """A configuration with more flags, written as on a command line."""
    import tyro

    return tyro.cli(type(config), args=flags.split(), default=config)


def command(
    execute: Callable[[Any], Any],
    presets: Mapping[str, Any],
    description: Any,
    *,
    smoke: str = "",
    before: Callable[[], Any] = lambda: None,
    begin: Callable[[Any], Any] = lambda config: None,
) -> Callable[..., Any]:
    """A script's `main(argv=None)`: its flags read, `execute(config)`, its errors told.

    Args:
      execute: what the script does; a ValueError that its folder or its package raises
        ends the process in a sentence (`train.exit_with_message`).
      presets: see `train.parse`.
      description: likewise.
      smoke: the flags that `--smoke` stands for.
      before: called before the flags are read, which may touch devices.
      begin: called with the configuration; its errors have their traceback.
    """

    def main(argv: Sequence[str] | None = None) -> Any:
        before()
        config = parse(presets, argv, description)
        begin(config)
        with exit_with_message(execute):
            small = smoke and config.smoke
            return execute(with_flags(config, smoke) if small else config)

    return main


def study_options(config: Any, **given: Any) -> dict[str, Any]:
    """Options of `Study`: those given, and of the others what the flags say."""
    flags = {name: getattr(config, name) for name in OPTIONS if hasattr(config, name)}
    # In a smoke test nobody knows anything yet.
    return {**flags, "untrained": getattr(config, "smoke", False), **given}


def steps_of(epochs: int, examples: Mapping[str, Any], batch_size: int) -> int:
    """Optimizer steps of so many passes over examples."""
    size = len(examples["labels"])
    return epochs * data.Batches(size, batch_size).steps_per_epoch


def show(run_dir: RunDir, *more: str) -> None:
    """Builds a run's table and figures anew, and prints the table, what more is to be
    said, and where the run is; of several processes the first does."""
    text = processes.on_first(lambda: report.write(run_dir.path))
    if processes.is_first():
        print(text, *more, run_dir, sep="\n")
