# SPDX-License-Identifier: Apache-2.0
"""Linen modules that return `Outputs`, and how a module becomes a student.

A module is called as `module(inputs, mask=None, train=False)`: `mask` is the batch's
`[B]` mask, for layers whose statistics must not count padding.
"""

from jaxdistill.models.mlp import MLP
from jaxdistill.models.norm import BatchNorm
from jaxdistill.models.student import student

__all__ = ["MLP", "BatchNorm", "student"]
