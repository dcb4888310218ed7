# SPDX-License-Identifier: Apache-2.0
"""Distillation losses: arrays in, one value per example or token out, in nats.

Argument order is student, teacher, labels, mask, then keyword-only hyperparameters.
Nothing here reduces over the batch; `jaxdistill.steps` does, in one place.
"""

from jaxdistill.losses.logits import cross_entropy, forward_kl

__all__ = ["cross_entropy", "forward_kl"]
