# SPDX-License-Identifier: Apache-2.0
"""Is an artefact what it was made of? It is read in a fresh process and compared."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import runtimes
from jaxdistill.export.subject import ExportError

TOLERANCE = 1e-5
"""The largest difference of a float artefact's logits, over the largest logit, or 1."""


def run_fresh(path: Path, inputs: runtimes.Named) -> np.ndarray:
    """An artefact's logits, from a process that knows nothing but its two files.

    Raises:
      ExportError: it cannot be loaded or run.
    """
    stored, logits = path.with_name("inputs.npz"), path.with_name("logits.npy")
    np.savez(stored, **inputs)  # type: ignore[arg-type]
    files = map(str, (path, stored, logits))
    # -P: the package's folder holds a types.py, and would hide Python's own.
    command = [sys.executable, "-P", str(Path(runtimes.__file__)), *files]
    # The artefact is compared on the CPU, whatever trained the model.
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, capture_output=True, text=True, env=env)
    if ended.returncode:
        said = [line for line in ended.stderr.splitlines() if line.strip()]
        reason = said[-1].removeprefix("error: ") if said else "it says nothing"
        if ended.returncode < 0:
            reason = f"the runtime crashed (signal {-ended.returncode})"
        raise ExportError(f"{path.name} was written, and does not run: {reason}")
    return np.load(logits, allow_pickle=False)


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
    drop = -100 * result["accuracy_difference"]
    if not drop <= max_drop:
        raise ExportError(
            f"int8 loses {drop:.1f} points of accuracy "
            f"({100 * result['model_accuracy']:.1f}% to "
            f"{100 * result['accuracy']:.1f}%), {max_drop:g} are allowed"
        )
