# SPDX-License-Identifier: Apache-2.0
"""The artefacts of a run's arm: those that were exported, else exported now."""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill import export, runtimes
from jaxdistill.export import Int8, Subject, Target
from jaxdistill.export.artefact import FORMATS
from jaxdistill.runtimes import ArtefactError

FOLDER = "artefacts"
"""Below the benchmark's folder: they are large."""
ANY_LOSS = 100.0
"""Percentage points that int8 may cost: here it is a result."""


class Artefact(NamedTuple):
    """An exported arm.

    Attributes:
      arm: whose it is.
      kind: the format, and how it is quantised.
      path: of the file that takes one example, or any number.
      many: of the one that takes a batch, where the first does not.
      manifest: the first one's.
    """

    arm: str
    kind: str
    path: Path
    many: Path | None
    manifest: dict[str, Any]


def targets(given: Sequence[Target] | None) -> tuple[list[Target], dict[str, str]]:
    """The formats whose packages are installed, or all that are given.

    Returns:
      They, and of each that is left out which command would bring it.

    Raises:
      ArtefactError: a package is missing of a format that is given, or of all.
    """
    missing = {name: _missing(name) for name in FORMATS}
    if given:
        for name in given:
            for package in missing[name]:
                runtimes.need(package, _extra(name))
        return list(dict.fromkeys(given)), {}
    out = {
        name: f"{', '.join(packages)} is not installed: "
        f"pip install 'jaxdistill[{_extra(name)}]'"
        for name, packages in missing.items()
        if packages
    }
    there: list[Any] = [name for name in FORMATS if name not in out]
    if not there:
        extras = ", ".join(f"'jaxdistill[{_extra(name)}]'" for name in FORMATS)
        raise ArtefactError(f"no runtime is installed: pip install one of {extras}")
    return there, out


def _missing(to: str) -> list[str]:
    modules = [package.replace("-", "_") for package in FORMATS[to].PACKAGES]
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _extra(to: str) -> str:
    return runtimes.RUNTIMES[FORMATS[to].RUNTIME][1]


def obtain(
    subject: Subject,
    run_dir: Path,
    folder: Path,
    arm: str,
    to: Target,
    int8: Int8 | None,
    batch: int,
) -> Artefact:
    """An arm's artefact in a format.

    One that is there is taken where it is of this student, in this format, and is what
    its manifest says. Of the export command's none is written over.

    Args:
      subject: the arm's, see `export.from_run`.
      run_dir: where `jaxdistill export` leaves its own.
      folder: where to export what is not there.
      arm: its name.
      to: the format.
      int8: which quantisation, if any.
      batch: of the second artefact, where the format takes a fixed number.

    Raises:
      ExportError: see `export.write`; whatever int8 costs is no error.
    """
    size = FORMATS[to].BATCH
    exported = export.default_path(run_dir, arm, to, int8)
    own = folder / FOLDER / exported.name
    options: dict[str, Any] = {"to": to, "int8": int8, "max_drop": ANY_LOSS}
    path = export.obtain(subject, [exported, own], batch_size=size, **options)
    many = None
    if size is not None:
        wide = own.with_stem(f"{own.stem}-batch{batch}")
        many = export.obtain(subject, [wide], batch_size=batch, **options)
    return Artefact(arm, kind(to, int8), path, many, runtimes.read_manifest(path))


def kind(to: Target, int8: Int8 | None) -> str:
    """A format, and how it is quantised, in words."""
    return to if int8 is None else f"{to} int8 {int8}"


def plan(
    arms: Iterable[str], formats: Iterable[Target], int8: Int8 | None
) -> list[tuple[str, Target, Int8 | None]]:
    """Which artefacts a table has: each arm in each format, as floats and in int8."""
    return [
        (arm, to, quantised)
        for arm in arms
        for to in formats
        for quantised in (
            (None,) if to == "stablehlo" or int8 is None else (None, int8)
        )
    ]
