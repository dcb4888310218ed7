# SPDX-License-Identifier: Apache-2.0
"""What teaches: a model, several, or outputs that were computed before."""
