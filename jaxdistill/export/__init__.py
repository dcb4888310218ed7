# SPDX-License-Identifier: Apache-2.0
"""From a trained student to a device: StableHLO, ONNX and TFLite, each checked.

`subject`    a model with its inputs and its test, as every format takes it
`from_run`   the subject that a finished run holds
`artefact`   writes a file and the manifest beside it
`stablehlo`, `onnx`, `tflite`   one format each
`check`      reads a file again in a fresh process, and compares
`quantize`   weights and activations in eight bits while a student trains
`benchmark`  what a file costs in its runtime

    subject = export.from_run("runs/digits", "distilled")
    manifest = export.write(subject, "student.onnx", to="onnx")
    logits = runtimes.load("student.onnx")({"images": pixels})

What is written was read again in its own runtime, in a fresh process, and gave the
linen model's logits on the whole test; else nothing is left behind.
"""

from jaxdistill.export.artefact import FORMATS, Target, default_path, obtain, write
from jaxdistill.export.from_run import from_run, of_images
from jaxdistill.export.subject import ExportError, Int8, Pixels, Subject
