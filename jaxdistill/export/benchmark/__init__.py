# SPDX-License-Identifier: Apache-2.0
"""What an exported model costs where it runs: each artefact in a fresh process.

`measured`   the models of a finished run, each in its runtimes, as a table
`artefacts`  a model's files: those that were exported, else exported now
`process`    starts a process for each measurement, in turns
`child`      what that process does

found = benchmark.measure("student.onnx", {"images": pixels}, threads=1)
summary = benchmark.from_run("runs/digits")
"""

from jaxdistill.export.benchmark.measured import from_run
from jaxdistill.export.benchmark.process import in_turns, measure
