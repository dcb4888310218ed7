# SPDX-License-Identifier: Apache-2.0
"""TFLite by jax2tf and TensorFlow's converter, of a fixed number of examples."""

import os
import tempfile
from pathlib import Path

import numpy as np

from jaxdistill.export.subject import ExportError, Int8, Subject, make_forward
from jaxdistill.models.conv import direct
from jaxdistill.runtimes import need

RUNTIME, PACKAGES, BATCH = "ai-edge-litert", ("tensorflow", "ai-edge-litert"), 1
INSTEAD = "stablehlo takes it, and onnx may"
SIGNATURE = "serving_default"


def save(
    subject: Subject,
    path: Path,
    *,
    expected: np.ndarray,
    batch_size: int | None,
    int8: Int8 | None,
) -> None:
    """Writes an artefact.

    Args:
      subject: what is exported.
      path: where to.
      expected: not looked at; ONNX's is.
      batch_size: B.
      int8: which quantisation, if any; "static" computes in it all that it can.

    Raises:
      ExportError: the examples have a number without a limit.
      ArtefactError: a package is missing.
    """
    del expected
    if batch_size is None:
        raise ExportError("TFLite takes a fixed number of examples")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for package in ("ai_edge_litert", "tensorflow"):
        tf = need(package, "tflite")
    from jax.experimental import jax2tf

    with direct(), tempfile.TemporaryDirectory() as folder:
        forward = jax2tf.convert(
            make_forward(subject),
            with_gradient=False,
            native_serialization_platforms=["cpu"],
        )
        specs = {
            name: tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), name=name)
            for name, spec in subject.shapes(batch_size).items()
        }
        module = tf.Module()
        module.forward = tf.function(lambda **named: forward(named), autograph=False)
        signature = module.forward.get_concrete_function(**specs)
        tf.saved_model.save(module, folder, signatures={SIGNATURE: signature})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if int8 is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if int8 == "static":
            converter.representative_dataset = lambda: subject.calibrate(batch_size)
        path.write_bytes(converter.convert())
