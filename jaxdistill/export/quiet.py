# SPDX-License-Identifier: Apache-2.0
"""Without what the exporters' libraries write about themselves on standard error."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, nothing logged below an error, no standard error of C++.

    What is raised is raised, and says what went wrong.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        for file in (kept, nowhere):
            os.close(file)
        logging.disable(before)
