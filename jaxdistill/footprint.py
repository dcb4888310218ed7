# SPDX-License-Identifier: Apache-2.0
"""How much memory a process has needed; nothing but Python is imported."""

import sys
from pathlib import Path


def peak_memory() -> int | None:
    """Most bytes that this process had in memory so far; None if the system tells none.

    Linux counts a process's parent in `ru_maxrss`: what it had when it started the
    child, before the child was another program. VmHWM is the program's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    # Bytes on macOS, kilobytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
