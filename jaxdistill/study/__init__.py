# SPDX-License-Identifier: Apache-2.0
"""A table of trainings: arms by seeds; many students in one program."""
