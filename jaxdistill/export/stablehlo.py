# SPDX-License-Identifier: Apache-2.0
"""StableHLO by `jax.export`: any number of examples, on CPU, GPU and TPU."""

from pathlib import Path
from typing import Any

import jax

from jaxdistill.export.subject import ExportError, Int8, Subject, make_forward
from jaxdistill.runtimes import OPEN, need

RUNTIME, PACKAGES, BATCH = "jax", ("flatbuffers",), None
INSTEAD = "a model of operations that XLA compiles by itself is taken"
PLATFORMS = ("cpu", "cuda", "tpu")


def save(
    subject: Subject, path: Path, *, batch_size: int | None, int8: Int8 | None, **_: Any
) -> None:
    """Writes an artefact, no operation of it in int8.

    Args:
      subject: what is exported.
      path: where to.
      batch_size: None for any.
      int8: must be None.

    Raises:
      ExportError: int8 was asked for.
      ArtefactError: a package is missing.
    """
    if int8 is not None:
        raise ExportError("StableHLO has no int8 here: export to onnx or tflite for it")
    need("flatbuffers", "export")
    from jax import export

    batch = export.symbolic_shape(OPEN)[0] if batch_size is None else batch_size
    function = jax.jit(make_forward(subject))
    exported = export.export(function, platforms=PLATFORMS)(subject.shapes(batch))
    path.write_bytes(exported.serialize())
