# SPDX-License-Identifier: Apache-2.0
"""ONNX by jax2onnx, any number of examples; int8 by onnxruntime's quantisation."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdistill.export import check
from jaxdistill.export.check import quiet
from jaxdistill.export.subject import LOGITS, ExportError, Int8, Subject, make_forward
from jaxdistill.models.convolution import direct
from jaxdistill.runtimes import OPEN, first_line, need

RUNTIME, PACKAGES, BATCH = "onnxruntime", ("jax2onnx", "onnx", "onnxruntime"), None
INSTEAD = "stablehlo takes it, and tflite may"
OPSET = 18
"""Old enough for most runtimes, and the last whose static int8 onnxruntime reads back:
its quantisation (1.32) writes no valid file of a later one."""
TRIES = 8
"""jax2onnx (0.17) gives another file from time to time, one that does not load: of tanh
GELU before a pool, at most tries."""
AT_ONCE = 8
"""Examples in a check or a calibration, where the file takes any number."""
IN_INT8 = ["Conv", "Gemm", "MatMul", "Gather"]
"""What static int8 has in it: products and embeddings. Norms and attention lose too
much: an untrained DeiT's logits of 0.18 were off by 0.21, and by 0.004 without them."""


def save(
    subject: Subject,
    path: Path,
    *,
    expected: np.ndarray,
    batch_size: int | None,
    int8: Int8 | None,
) -> str | None:
    """Writes an artefact.

    Args:
      subject: what is exported.
      path: where to.
      expected: the linen model's logits on the test, for a first look; for the whole
        check of the float file that int8 is made from.
      batch_size: None for any.
      int8: which quantisation, if any.

    Returns:
      Which operations are in int8: "products", with embeddings, or None.

    Raises:
      ExportError: in `TRIES` conversions there was no file that is right.
      ArtefactError: a package is missing.
    """
    reason = ""
    with quiet():
        for package in PACKAGES:
            need(package, "onnx")
        for _ in range(TRIES):
            content = _convert(subject, batch_size)
            size = batch_size or min(AT_ONCE, len(expected))
            count = size if int8 is None else len(expected)
            reason = _wrong(content, subject, expected[:count], size)
            if not reason:
                break
        else:
            raise ExportError(
                f"jax2onnx gave no right file in {TRIES} conversions: {reason}; "
                f"{INSTEAD}"
            )
        if int8 is None:
            path.write_bytes(content)
            return None
        _quantise(content, subject, path, int8, batch_size)
        return "products"


def _convert(subject: Subject, batch_size: int | None) -> bytes:
    import jax2onnx
    from jax import export

    batch = export.symbolic_shape(OPEN)[0] if batch_size is None else batch_size
    shapes, forward = subject.shapes(batch), make_forward(subject)

    def positional(*arrays: jax.Array) -> jax.Array:
        return forward(dict(zip(shapes, arrays, strict=True)))[LOGITS]

    # jax2onnx adds the bias of a convolution in its own way.
    with direct(), jax.numpy_rank_promotion("allow"):
        model: Any = jax2onnx.to_onnx(
            positional,
            list(shapes.values()),
            model_name=subject.name,
            opset=OPSET,
            input_names=list(shapes),
            output_names=[LOGITS],
        )
    return model.SerializeToString()


def _wrong(content: bytes, subject: Subject, expected: np.ndarray, size: int) -> str:
    """Why a file is not what was asked for, by its first examples; else nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    inputs, largest = subject.inputs, float(np.abs(expected).max())
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"]
        )
        for start in range(0, len(expected), size):
            rows = np.arange(start, start + size) % len(expected)
            some = {name: array[rows] for name, array in inputs.items()}
            found = session.run([LOGITS], some)[0]
            if found.shape != expected[rows].shape:
                return f"its logits have the shape {found.shape}"
            if not check.close(found, expected[rows], largest):
                difference = np.abs(found - expected[rows]).max()
                return f"its logits differ by {difference:.2g} from the model's"
    except Exception as error:  # its errors have no common type
        return first_line(error)
    return ""


def _quantise(
    content: bytes, subject: Subject, path: Path, int8: Int8, batch_size: int | None
) -> None:
    from onnxruntime import quantization

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "float.onnx"
        whole.write_bytes(content)
        if int8 == "dynamic":
            # Unsigned: the runtime has no convolution of signed weights.
            kind = quantization.QuantType.QUInt8
            quantization.quantize_dynamic(whole, path, weight_type=kind)
            return
        batches = iter(list(subject.calibrate(batch_size or AT_ONCE)))

        class Reader(quantization.CalibrationDataReader):
            def get_next(self):
                return next(batches, None)

        quantization.quantize_static(
            whole, path, Reader(), per_channel=True, op_types_to_quantize=IN_INT8
        )
