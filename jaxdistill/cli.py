# SPDX-License-Identifier: Apache-2.0
"""`jaxdistill`: work on finished runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jaxdistill import report


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


Command = (
    Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Pages, tyro.conf.subcommand("pages")]
)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line's entry point."""
    command = tyro.cli(Command, args=argv, description=__doc__)  # type: ignore[call-overload]
    try:
        if isinstance(command, Report):
            print(report.write(command.run))
            if command.save is not None:
                report.save(command.run, command.save)
            return
        stale = [
            str(page)
            for page in command.pages
            if report.fill(page, command.results, write=not command.check)
        ]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if command.check and stale:
        sys.exit(f"error: run `jaxdistill pages`: {', '.join(stale)} not up to date")
    print(f"rebuilt: {', '.join(stale)}" if stale else "all pages are up to date")


if __name__ == "__main__":
    main()
