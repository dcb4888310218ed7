# SPDX-License-Identifier: Apache-2.0
"""Labels: whether they are a network's classes, and which of them may be used."""

import numpy as np

from jaxdistill.data.errors import DataError


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raise DataError unless every label is an integer in `[0, num_classes)`."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be integers, got {labels.dtype}")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"label {labels.flat[wrong[0]]} at position {wrong[0]} is out of range: "
            f"with {num_classes} classes, labels are 0 to {num_classes - 1}"
        )
