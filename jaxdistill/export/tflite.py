# SPDX-License-Identifier: Apache-2.0
"""TFLite by jax2tf and TensorFlow's converter, of a fixed number of examples."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdistill.export import check
from jaxdistill.export.check import quiet
from jaxdistill.export.subject import ExportError, Int8, Subject, make_forward
from jaxdistill.models.convolution import direct
from jaxdistill.runtimes import need

RUNTIME, PACKAGES, BATCH = "ai-edge-litert", ("tensorflow", "ai-edge-litert"), 1
INSTEAD = "stablehlo takes it, and onnx may"
SIGNATURE = "serving_default"
START = (
    "import sys; from ai_edge_litert.interpreter import Interpreter; "
    "Interpreter(sys.argv[1]).allocate_tensors()"
)
PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


def save(
    subject: Subject, path: Path, *, batch_size: int | None, int8: Int8 | None, **_: Any
) -> str | None:
    """Writes an artefact.

    Args:
      subject: what is exported.
      path: where to.
      batch_size: B.
      int8: which quantisation, if any.

    Returns:
      Which operations are in int8: "all" whose types the format has in int8,
      "products" alone, or None.

    Raises:
      ExportError: no number of examples is given, or the runtime takes no int8.
      ArtefactError: a package is missing.
    """
    if batch_size is None:
        raise ExportError("TFLite takes a fixed number of examples")
    with quiet():
        for package in ("ai_edge_litert", "tensorflow"):
            need(package, "tflite")
        return _save(subject, path, batch_size, int8)


def _save(
    subject: Subject, path: Path, batch_size: int, int8: Int8 | None
) -> str | None:
    import tensorflow as tf
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
        if int8 == "static":
            return _save_static(tf, folder, path, lambda: subject.calibrate(batch_size))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        if int8 == "dynamic":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        path.write_bytes(converter.convert())
        return int8 and "products"


def _save_static(tf: Any, folder: str, path: Path, examples: Callable) -> str:
    """All operations in int8; where the runtime cannot take that, products alone.

    A norm or GELU in int8 ends LiteRT (2.3) with an abort, as it takes a transformer
    of TensorFlow 2.21.
    """

    def converter() -> Any:
        made = tf.lite.TFLiteConverter.from_saved_model(folder)
        made.optimizations = [tf.lite.Optimize.DEFAULT]
        made.representative_dataset = examples
        return made

    path.write_bytes(converter().convert())
    if not _crashes(path):
        return "all"
    from tensorflow.lite.python.schema_py_generated import BuiltinOperator

    others = sorted(name for name in vars(BuiltinOperator) if name.isupper())
    options = tf.lite.experimental.QuantizationDebugOptions(
        denylisted_ops=[name for name in others if name not in PRODUCTS]
    )
    debugger = tf.lite.experimental.QuantizationDebugger(
        converter=converter(), debug_dataset=examples, debug_options=options
    )
    path.write_bytes(debugger.get_nondebug_quantized_model())
    return "products"


def _crashes(path: Path) -> bool:
    """Whether a file ends its runtime, tried in a process of its own.

    Raises:
      ExportError: the runtime refuses it, or cannot be started.
    """
    command = [sys.executable, "-P", "-c", START, str(path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode > 0:
        raise ExportError(f"the runtime does not take static int8: {check.why(ended)}")
    return ended.returncode < 0
