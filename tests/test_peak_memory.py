# SPDX-License-Identifier: Apache-2.0
"""A process's peak memory: what it took itself, and nothing of its parent's."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from jaxdistill.runtimes import peak_memory

MB = 1_000_000
SCRIPT = """
from jaxdistill.runtimes import peak_memory
before = peak_memory()
taken = bytearray(60_000_000)
print(before, peak_memory())
"""


def test_a_child_does_not_count_what_its_parent_has():
    held = np.ones(200 * MB, np.uint8)
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    before, after = map(int, ended.stdout.split())
    assert 1 * MB < before < 100 * MB < held.nbytes
    assert 60 * MB <= after - before < 90 * MB


def test_a_system_that_tells_no_memory(monkeypatch):
    """As Windows: no /proc, and no `resource`."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() is None
