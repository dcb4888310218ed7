# SPDX-License-Identifier: Apache-2.0
"""What an exported model costs where it runs: each artefact in a fresh process.

found = deployment.measure("student.onnx", {"images": pixels}, threads=1)
summary = finished.from_run("runs/digits")  # from jaxdistill.deployment
"""

from jaxdistill.deployment.process import in_turns, measure

__all__ = ["in_turns", "measure"]
