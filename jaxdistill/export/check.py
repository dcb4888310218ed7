# SPDX-License-Identifier: Apache-2.0
"""Is an artefact what it was made of? It is read in a fresh process and compared.

The exporters' libraries write about themselves on standard error; `quiet` hides it.
"""

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import runtimes
from jaxdistill.export.subject import ExportError, Subject

TOLERANCE = 1e-5
"""The largest difference of a float artefact's logits, over the largest logit, or 1."""
ROUNDING = 0.01
"""What other devices may change of a model's accuracy, bfloat16 included."""


def run_fresh(path: Path, inputs: runtimes.Named) -> np.ndarray:
    """An artefact's logits, from a process that knows nothing but its two files.

    Raises:
      ExportError: it cannot be loaded or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        stored, logits = Path(folder) / "inputs.npz", Path(folder) / "logits.npy"
        np.savez(stored, **inputs)  # type: ignore[arg-type]
        files = map(str, (path, stored, logits))
        # -P: the package's folder holds a types.py, and would hide Python's own.
        command = [sys.executable, "-P", str(Path(runtimes.__file__)), *files]
        # The artefact is compared on the CPU, whatever trained the model.
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        ended = subprocess.run(command, capture_output=True, text=True, env=env)
        if ended.returncode:
            reason = why(ended)
            raise ExportError(f"{path.name} was written, and does not run: {reason}")
        return np.load(logits, allow_pickle=False)


def why(ended: subprocess.CompletedProcess[str]) -> str:
    """Why a process with an artefact failed, by what it said last."""
    if ended.returncode < 0:
        return f"the runtime crashed (signal {-ended.returncode})"
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    # Libraries may write more as the process ends.
    said = [line for line in lines if line.startswith("error: ")] or lines
    return said[-1].removeprefix("error: ") if said else "it says nothing"


def close(found: np.ndarray, expected: np.ndarray, largest: float) -> bool:
    """Whether logits of floats agree, finite ones, of a model with such a largest."""
    return bool(np.abs(found - expected).max() <= TOLERANCE * max(1.0, largest))


def drop(result: Mapping[str, Any]) -> float:
    """Percentage points of accuracy that an artefact lost, of what `compare` says."""
    return -100 * result["accuracy_difference"]


def recorded(expected: np.ndarray, subject: Subject) -> None:
    """Raise ExportError where a model has not the accuracy that its run recorded."""
    accuracy = float((expected.argmax(-1) == subject.labels).mean())
    if subject.accuracy is not None and abs(accuracy - subject.accuracy) > ROUNDING:
        raise ExportError(
            f"the model's accuracy on the test is {100 * accuracy:.1f}%, its run "
            f"recorded {100 * subject.accuracy:.1f}%: the run has another test, or "
            "prepares its inputs otherwise"
        )


def compare(
    found: np.ndarray,
    expected: np.ndarray,
    labels: np.ndarray,
    max_drop: float | None = None,
) -> dict[str, Any]:
    """What an artefact's logits differ by from the model's.

    Args:
      found: the artefact's, `[N, ..., C]`.
      expected: the linen model's.
      labels: `[N, ...]`.
      max_drop: None for floats, which must agree; of int8 the percentage points of
        accuracy that may be lost.

    Returns:
      `examples`; `largest_difference` of logits and `largest_logit`; `disagreements`,
      other most likely classes, and how many of them are `ties`, whose two largest
      logits differ by less than the tolerance; `agreement`; `accuracy` of the artefact
      and `model_accuracy`, and their `accuracy_difference`, in shares of 1.

    Raises:
      ExportError: they differ by more, or in int8 by nothing.
    """
    if found.shape != expected.shape:
        raise ExportError(
            f"the artefact's logits have the shape {found.shape}, the model's "
            f"{expected.shape}"
        )
    difference = float(np.abs(found.astype(np.float64) - expected).max())
    largest = float(np.abs(expected).max())
    bound = TOLERANCE * max(1.0, largest)
    mine, theirs = found.argmax(-1), expected.argmax(-1)
    second, first = np.moveaxis(np.sort(expected, axis=-1)[..., -2:], -1, 0)
    changed, tied = mine != theirs, first - second < bound
    accuracy, before = (float((guess == labels).mean()) for guess in (mine, theirs))
    result = {
        "examples": len(expected),
        "largest_difference": difference,
        "largest_logit": largest,
        "tolerance": bound if max_drop is None else None,
        "disagreements": int(changed.sum()),
        "ties": int((changed & tied).sum()),
        "agreement": float((~changed).mean()),
        "accuracy": accuracy,
        "model_accuracy": before,
        "accuracy_difference": accuracy - before,
    }
    _refuse(result, max_drop)
    return result


def _refuse(result: dict[str, Any], max_drop: float | None) -> None:
    difference = result["largest_difference"]
    if not np.isfinite(difference):
        raise ExportError(
            "the artefact's logits are not finite, or the model's are not"
        )
    if max_drop is None:
        if not difference <= result["tolerance"]:
            raise ExportError(
                f"the artefact's logits differ by {difference:.2g} from the model's, "
                f"which are {result['largest_logit']:.2g} at most; "
                f"{result['tolerance']:.2g} is allowed"
            )
        changed = result["disagreements"] - result["ties"]
        if changed:
            raise ExportError(
                f"the artefact decides otherwise than the model on {changed} of "
                f"{result['examples']} examples, which are no ties"
            )
        return
    if difference <= TOLERANCE * max(1.0, result["largest_logit"]):
        raise ExportError(
            "int8 changed nothing: the format leaves matrices this small as they are; "
            "export without it"
        )
    lost = drop(result)
    if not lost <= max_drop:
        raise ExportError(
            f"int8 loses {lost:.1f} points of accuracy "
            f"({100 * result['model_accuracy']:.1f}% to "
            f"{100 * result['accuracy']:.1f}%), {max_drop:g} are allowed"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, nothing logged below an error, no standard error of C++.

    What is raised is raised, and says what went wrong.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        for file in (kept, nowhere):
            os.close(file)
        logging.disable(before)
