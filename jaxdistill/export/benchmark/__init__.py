# SPDX-License-Identifier: Apache-2.0
"""What an exported model costs where it runs: each artefact in a fresh process.

found = deployment.measure("student.onnx", {"images": pixels}, threads=1)
summary = from_run.from_run("runs/digits")  # from jaxdistill.export.benchmark
"""

from jaxdistill.export.benchmark.process import in_turns, measure

__all__ = ["in_turns", "measure"]
