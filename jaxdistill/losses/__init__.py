# SPDX-License-Identifier: Apache-2.0
"""Distillation losses: arrays in, one value per example or token out.

`logits`      labels, soft targets, divergences
`structure`   what is decoupled, correlated or standardized among the logits
`features`    hidden states and feature maps
`attention`   attention maps, and relations of queries, keys and values
`relations`   the geometry between the examples of a batch
`sequences`   frames, and tokens that are shifted
`vocabulary`  large vocabularies, in parts, or of a teacher's largest probabilities
`numerics`    arithmetic that stays finite

Argument order is student, teacher, labels, mask, then keyword-only hyperparameters.
Nothing here reduces over the batch; `train.step` does, in one place.
"""

from jaxdistill.losses.attention import attention_kl, attention_mse, relation_kl
from jaxdistill.losses.features import (
    attention_transfer,
    cosine_distance,
    hint_mse,
    neuron_selectivity,
    patient_mse,
)
from jaxdistill.losses.logits import (
    cross_entropy,
    forward_kl,
    generalized_jsd,
    logit_mse,
    reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from jaxdistill.losses.relations import (
    contrastive,
    correlation_congruence,
    linear_cka,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from jaxdistill.losses.sequences import ctc, frame_kl, shift_tokens
from jaxdistill.losses.structure import decoupled_kl, dist, standardize
from jaxdistill.losses.vocabulary import (
    chunked_cross_entropy,
    chunked_forward_kl,
    sparse_forward_kl,
)

BATCH_COUPLED = (
    contrastive,
    correlation_congruence,
    dist,
    linear_cka,
    probabilistic_transfer,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
"""Losses whose value at an example depends on the other examples of its batch."""
