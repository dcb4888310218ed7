# SPDX-License-Identifier: Apache-2.0
"""Writes an artefact and its manifest, and moves both into place once checked."""

import contextlib
import hashlib
import json
import re
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
from flax import linen as nn

from jaxdistill import runtimes
from jaxdistill.export import check, onnx, stablehlo, tflite
from jaxdistill.export.subject import (
    LOGITS,
    ExportError,
    Int8,
    Subject,
    logits_of,
    make_forward,
)
from jaxdistill.parallel.lock import folder_at
from jaxdistill.teachers import fingerprints
from jaxdistill.train import cost

Target = Literal["stablehlo", "onnx", "tflite"]
FORMATS: Mapping[str, Any] = {"stablehlo": stablehlo, "onnx": onnx, "tflite": tflite}
"""The modules that write each."""
OURS = ("jaxdistill", "jax", "jaxlib", "flax", "numpy")


def write(
    subject: Subject,
    output: str | Path,
    *,
    to: Target,
    int8: Int8 | None = None,
    batch_size: int | None = None,
    max_drop: float = 5.0,
) -> dict[str, Any]:
    """Exports a student, and checks it in a fresh process on the whole test.

    Args:
      subject: what is exported, and its test.
      output: where to; the manifest is beside it, see `runtimes.manifest_path`.
      to: the format.
      int8: quantise after training: weights, and activations as they come
        ("dynamic") or by their range on `subject.calibration` ("static").
      batch_size: the only number of examples the artefact takes; None is any, and in
        TFLite 1.
      max_drop: percentage points of test accuracy that int8 may cost.

    Returns:
      The manifest.

    Raises:
      ExportError: there is something at `output`, the model has what the format has
        not, or the artefact differs from the model: by more than 1e-5 of the largest
        logit (of 1 at least), by a decision that is no tie, or in int8 by its accuracy;
        or the model's accuracy is not `subject.accuracy`.
      ArtefactError: a package is missing; the sentence names the extra.
    """
    if "://" in str(output):
        raise ExportError(f"{output} is no local file: export to one, and copy it")
    output, exporter = Path(output), FORMATS[to]
    _check(output, subject, int8, batch_size, max_drop)
    batch_size = exporter.BATCH if batch_size is None else batch_size
    output.parent.mkdir(parents=True, exist_ok=True)
    # No runtime here has 64 bits: the fresh process would be asked for other types.
    with jax.enable_x64(False), _draft(output) as draft:
        expected = logits_of(subject)
        check.recorded(expected, subject)
        try:
            in_int8 = exporter.save(
                subject, draft, expected=expected, batch_size=batch_size, int8=int8
            )
        except (ExportError, runtimes.ArtefactError):
            raise
        except Exception as error:  # each exporter raises its own types
            raise ExportError(_unable(error, subject, to)) from error
        manifest = describe(subject, draft, to=to, int8=int8, batch_size=batch_size)
        manifest["int8_operations"] = in_int8
        _write_json(runtimes.manifest_path(draft), manifest)
        found = check.run_fresh(draft, subject.inputs)
        bound = None if int8 is None else max_drop
        manifest["check"] = check.compare(found, expected, subject.labels, bound)
        _write_json(runtimes.manifest_path(draft), manifest)
        _free(output)  # all this took its time
        _move(draft, output)
    return manifest


@contextlib.contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """Where to write what shall be at `output`; what is left there goes."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as folder:
        yield Path(folder) / output.name


def _move(draft: Path, output: Path) -> None:
    """Moves an artefact and its manifest, or neither."""
    # The artefact last: where it is, its manifest is.
    runtimes.manifest_path(draft).replace(runtimes.manifest_path(output))
    try:
        draft.replace(output)
    except OSError:
        runtimes.manifest_path(output).unlink()
        raise


def obtain(
    subject: Subject,
    places: Sequence[Path],
    *,
    to: Target,
    int8: Int8 | None = None,
    batch_size: int | None = None,
    max_drop: float = 5.0,
) -> Path:
    """Where a student's artefact is: written to the last of some places, or found.

    Args:
      subject: see `write`, as the others.
      places: looked at in turn. What is not of this student, not as it is wanted,
        damaged, or in int8 lost more, is passed over, and at the last place replaced
        once another is written.

    Raises:
      ExportError: see `write`.
    """
    size = FORMATS[to].BATCH if batch_size is None else batch_size
    wanted = {
        "to": to,
        "int8": int8,
        "fingerprint": fingerprints.of_model(subject.student),
        "batch": runtimes.OPEN if size is None else size,
    }
    for path in places:
        if _is(path, wanted, max_drop):
            return path
    own = places[-1]
    own.parent.mkdir(parents=True, exist_ok=True)
    with _draft(own) as draft:
        write(subject, draft, to=to, int8=int8, batch_size=size, max_drop=max_drop)
        _move(draft, own)
    return own


def _is(path: Path, wanted: Mapping[str, Any], max_drop: float) -> bool:
    """Whether there is the artefact that is wanted, undamaged."""
    try:
        manifest, _ = runtimes.read(path)
        found = {
            "to": manifest["to"],
            "int8": manifest["int8"],
            "fingerprint": manifest["student"]["fingerprint"],
            "batch": next(iter(manifest["inputs"].values()))["shape"][0],
        }
        drop = check.drop(manifest["check"])
    except (runtimes.ArtefactError, KeyError, TypeError):
        return False
    return found == wanted and (wanted["int8"] is None or drop <= max_drop)


def describe(
    subject: Subject, path: Path, *, to: Target, int8: Int8 | None, batch_size: Any
) -> dict[str, Any]:
    """The manifest of an artefact, all but its check."""
    exporter, content = FORMATS[to], path.read_bytes()
    first = runtimes.OPEN if batch_size is None else batch_size
    logits = jax.eval_shape(make_forward(subject), subject.shapes(2))[LOGITS]
    inputs = {
        name: {"shape": [first, *spec.shape[1:]], "dtype": str(spec.dtype)}
        for name, spec in subject.shapes(2).items()
    }
    pixels = subject.pixels
    raw = {"in_artefact": False, "formula": "none: the inputs are the model's own"}
    if pixels is not None:
        formula = "(images / peak - mean) / deviation"
        raw = {"in_artefact": True, "formula": formula, **pixels._asdict()}
    return {
        "format": runtimes.FORMAT,
        "to": to,
        "runtime": exporter.RUNTIME,
        "file": path.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "inputs": inputs,
        "outputs": {LOGITS: {"shape": [first, *logits.shape[1:]], "dtype": "float32"}},
        "classes": [str(i) for i in range(logits.shape[-1])],
        "preprocessing": raw,
        "int8": int8,
        "student": {
            "module": subject.name,
            "parameters": cost.parameters(subject.student.variables),
            "fingerprint": fingerprints.of_model(subject.student),
        },
        "teacher": None,
        "run": None,
        **subject.about,
        "versions": {
            name: runtimes.version(name) for name in (*OURS, *exporter.PACKAGES)
        },
    }


def default_path(run_dir: Any, arm: str, to: Target, int8: Int8 | None = None) -> Path:
    """Where a run's artefact goes where nobody says: `RUN/export/ARM.onnx`.

    Raises:
      ExportError: the run is in object storage.
    """
    if "://" in str(folder_at(run_dir)):
        raise ExportError(f"{run_dir} is no local folder: give an --output that is")
    kind = "" if int8 is None else f"-int8-{int8}"
    return Path(run_dir) / "export" / f"{arm}{kind}.{to}"


def _check(output: Path, subject: Subject, int8: Any, batch_size: Any, max_drop: float):
    """Raise ExportError where nothing can be written, before anything is computed."""
    _free(output)
    if batch_size is not None and batch_size < 1:
        raise ExportError(f"--batch-size must be at least 1, got {batch_size}")
    if not max_drop >= 0:
        raise ExportError(f"--max-drop must be 0 or more, got {max_drop}")
    needed = batch_size or onnx.AT_ONCE
    if int8 == "static" and subject.calibrations < needed:
        raise ExportError(
            f"int8 static needs the inputs of {needed} training examples or more for "
            f"its calibration, got {subject.calibrations}"
        )


def _free(output: Path) -> None:
    """Raise ExportError where there is something already."""
    for path in (output, runtimes.manifest_path(output)):
        if path.is_dir():
            raise ExportError(f"{path} is a folder: give an --output that is a file")
        if path.exists():
            raise ExportError(f"{path} exists: delete it, or give another --output")


REMEDIES = {
    "cannot be interpreted as an integer": "the number of examples is free, and len(x) "
    "wants it now: write x.shape[0], or -1, in reshape, or give --batch-size",
    "takes 1 positional argument": "its exporter takes settings by name alone, as "
    "nn.max_pool(x, window_shape=(2, 2), strides=(2, 2))",
}
"""What to do about what an exporter says, by a part of it."""


def _unable(error: Exception, subject: Subject, to: Target) -> str:
    """Which operation a format lacks, as far as its exporter says, and what has it."""
    name, said = subject.name, runtimes.first_line(error)
    named = re.search(r"primitive '(\w+)'", said)
    inner = _innermost(error)
    if (
        remedy := next((w for k, w in REMEDIES.items() if k in said), None)
    ) is not None:
        return f"{name} cannot be exported to {to}: {said}; {remedy}"
    if named:
        what = f"the format lacks its operation {named[1]}"
    elif inner is not None and type(inner).__name__ != name:
        what = f"its {type(inner).__name__} is not taken ({said})"
    else:
        what = said
    return f"{name} cannot be exported to {to}: {what}; {FORMATS[to].INSTEAD}"


def _innermost(error: Exception) -> nn.Module | None:
    """The linen module that was being traced, innermost."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    selves = [frame.f_locals.get("self") for frame in frames]
    modules = [each for each in selves if isinstance(each, nn.Module)]
    return modules[-1] if modules else None


def _write_json(path: Path, manifest: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(manifest))  # as it is read again
    sealed = {**plain, "checksum": runtimes.checksum(plain)}
    path.write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")
