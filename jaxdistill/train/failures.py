# SPDX-License-Identifier: Apache-2.0
"""What a command ends with in one sentence, and what keeps its traceback."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@contextmanager
def in_a_sentence() -> Iterator[None]:
    """Ends the process with an error's message alone, where that says what to do.

    Such are the types that this package defines, `OSError`, and a `ValueError` that a
    `raise` made in this package or in the folder of the script. All else is a mistake
    in a program, as when JAX refuses two shapes: it passes, with its traceback.
    """
    try:
        yield
    except Exception as error:
        if not _explains_itself(error):
            raise
        sys.exit(f"error: {error}")


def _explains_itself(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.startswith("jaxdistill."):
        return True
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)  # the first is of `yield`
    script, last = frames[1], frames[-1]
    file = Path(last.filename)
    ours = file.is_relative_to(PACKAGE) or file.parent == Path(script.filename).parent
    # JAX takes its own frames out of a traceback: then the last is the call of it.
    return ours and (last.line or "").startswith("raise ")
