# SPDX-License-Identifier: Apache-2.0
"""Knowledge distillation in JAX: pure functions, proven losses, exact resume."""

__version__ = "0.3.0"
