# SPDX-License-Identifier: Apache-2.0
"""Losses as terms over student, teacher and batch, and what combines them."""
