# SPDX-License-Identifier: Apache-2.0
"""What is wrong with data, in a sentence."""


class DataError(ValueError):
    """Data that is missing, damaged or not what was asked for; one sentence says so."""
