# SPDX-License-Identifier: Apache-2.0
"""Published objectives, most for transformers, made of the losses and terms here.

Each is an objective for `train.make_train_step`. A term's value is its mean over the
real tokens of the batch, where papers average each sentence first: long sentences count
more here. Patient knowledge distillation is `losses.patient_mse` through
`objectives.on_hidden_states`.
"""

from typing import Any

from jaxdistill import losses
from jaxdistill.objectives.layers import (
    LayerMap,
    last,
    on_attentions,
    on_extras,
    on_hidden_states,
    on_scores,
)
from jaxdistill.objectives.logits import combine, hard_labels, on_logits, soft_targets
from jaxdistill.objectives.terms import BoundTerm, real_tokens
from jaxdistill.types import Batch, Objective, Outputs

EMBEDDINGS = ((0, 0),)
"""The layer map of embeddings, of which there is one on either side."""


def hinton(
    temperature: Any = 4.0, soft_weight: Any = 0.9, hard_weight: Any = None
) -> Objective:
    """Labels and soft targets, the latter times the temperature squared.

    Args:
      temperature: see `soft_targets`.
      soft_weight: of the KL to the teacher; a traced value too.
      hard_weight: of the cross-entropy with labels, `1 - soft_weight` if None.

    >>> for name, (weight, term) in hinton(2.0, 0.75).terms.items():
    ...     print(name, weight, term)
    hard 0.25 hard_labels()
    soft 0.75 soft_targets(temperature=2.0)

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network,
      section 2.
    """
    if hard_weight is None:
        hard_weight = 1 - soft_weight
    soft = soft_targets(temperature=temperature)
    return combine({"hard": (hard_weight, hard_labels()), "soft": (soft_weight, soft)})


def tinybert_intermediate(layers: LayerMap) -> Objective:
    """TinyBERT's first stage: attention scores, hidden states and embeddings.

    The mean squared differences of the scores before softmax, of the hidden states and
    of the embeddings, each with weight 1; the first two are summed over the layers. A
    student narrower than its teacher needs learned projections of the last two: here
    one for each layer, with a bias, where the paper's has none.

        width, depth = 312, 4
        projector = models.Projector(tuple((i, 768) for i in range(depth)))
        module = models.with_projector(small, projector, models.Projector(((0, 768),)))

    Args:
      layers: which layers, `((student, teacher), ...)`; the paper's is
        `objectives.uniform(student_layers, teacher_layers)`. Heads must be as many on
        either side.

    >>> for name, (weight, term) in tinybert_intermediate(((0, 2),)).terms.items():
    ...     print(name, weight, term)
    attention 1.0 on_scores(attention_mse, ((0, 2),))
    hidden 1.0 on_hidden_states(hint_mse, ((0, 2),))
    embedding 1.0 on_extras(hint_mse, 'embeddings', ((0, 0),))

    References:
      Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language Understanding,
      equations 7 to 9, added up as in equation 6.
    """
    embedding = on_extras(losses.hint_mse, "embeddings", EMBEDDINGS)
    return combine(
        {
            "attention": (1.0, on_scores(losses.attention_mse, layers)),
            "hidden": (1.0, on_hidden_states(losses.hint_mse, layers)),
            "embedding": (1.0, embedding),
        }
    )


def tinybert_prediction(*, temperature: Any = 1.0) -> Objective:
    """TinyBERT's second stage: cross-entropy with the teacher's distribution.

    At temperature 1, the paper's choice, this is its formula; at others it is that
    times the temperature squared. The gradient is that of `soft_targets`.

    Args:
      temperature: a number above 0, a traced value, or `step -> number`.

    >>> tinybert_prediction()
    combine({'prediction': (1.0, on_logits(soft_cross_entropy, temperature=1.0))})

    References:
      Jiao et al. 2020, TinyBERT: Distilling BERT for Natural Language Understanding,
      equation 10.
    """
    term = on_logits(losses.soft_cross_entropy, temperature=temperature)
    return combine({"prediction": (1.0, term)})


def distilbert(*, temperature: Any = 2.0) -> Objective:
    """DistilBERT's triple loss: soft targets, masked tokens, directions.

    Weights are those of the published training command: 5 for the soft targets, 2 for
    the labels of masked tokens, 1 for the cosine of the last hidden states. The labels
    count at the batch's `token_mask` (`data.tokens.mask_tokens`); the other two at all
    real tokens, as in the published script unless it is told `restrict_ce_to_mask`. The
    widths must be equal, or the student's last layer projected.

    Args:
      temperature: a number above 0, a traced value, or `step -> number`.

    Raises:
      ValueError: when it is called, the batch has no `token_mask`.

    >>> for name, (weight, term) in distilbert().terms.items():
    ...     print(name, weight, term)
    soft 5.0 real_tokens(soft_targets(temperature=2.0))
    masked 2.0 masked_labels()
    cosine 1.0 on_hidden_states(cosine_distance, ((-1, -1),))

    References:
      Sanh et al. 2019, DistilBERT, a distilled version of BERT, section 2 (the triple
      loss) and section 3; the weights are of the authors' code alone.
    """
    return combine(
        {
            "soft": (5.0, real_tokens(soft_targets(temperature=temperature))),
            "masked": (2.0, BoundTerm("masked_labels", (), {}, _masked_labels)),
            "cosine": (1.0, on_hidden_states(losses.cosine_distance, last())),
        }
    )


def minilm(heads: int) -> Objective:
    """MiniLM: the last layer's attention distributions and value relations.

    Both KL divergences with weight 1, the mean over heads and queries. The widths may
    differ.

    Args:
      heads: attention heads, of student and teacher alike.

    >>> for name, (weight, term) in minilm(12).terms.items():
    ...     print(name, weight, term)
    attention 1.0 on_attentions(attention_kl, ((-1, -1),))
    values 1.0 on_extras(relation_kl, 'values', ((-1, -1),), heads=12)

    References:
      Wang et al. 2020, MiniLM: Deep Self-Attention Distillation, sections 3.1 and 3.2.
    """
    relation = on_extras(losses.relation_kl, "values", last(), heads=heads)
    attention = on_attentions(losses.attention_kl, last())
    return combine({"attention": (1.0, attention), "values": (1.0, relation)})


def minilm_v2(heads: int, layer: int = -1) -> Objective:
    """MiniLMv2: query, key and value relations of one of the teacher's layers.

    Three KL divergences with weight 1, of the student's last layer from the chosen one.
    Neither widths nor numbers of attention heads need agree.

    Args:
      heads: relation heads, a divisor of both widths: 48 in the paper for a teacher of
        12 heads, 64 for one of 16.
      layer: the teacher's; the paper takes the last of 12, an upper middle one of 24.

    >>> for name, (weight, term) in minilm_v2(48, layer=20).terms.items():
    ...     print(name, weight, term)
    queries 1.0 on_extras(relation_kl, 'queries', ((-1, 20),), heads=48)
    keys 1.0 on_extras(relation_kl, 'keys', ((-1, 20),), heads=48)
    values 1.0 on_extras(relation_kl, 'values', ((-1, 20),), heads=48)

    References:
      Wang et al. 2021, MiniLMv2: Multi-Head Self-Attention Relation Distillation for
      Compressing Pretrained Transformers, equations 1 to 5 and section 3.2.
    """
    return combine(
        {
            name: (
                1.0,
                on_extras(losses.relation_kl, name, ((-1, layer),), heads=heads),
            )
            for name in ("queries", "keys", "values")
        }
    )


def _masked_labels(student: Outputs, teacher: Outputs | None, batch: Batch):
    if "token_mask" not in batch:
        raise ValueError(
            "distilbert needs to know which tokens are masked, and the batch has no "
            "token_mask (masking.mask_tokens makes one)"
        )
    return hard_labels()(student, teacher, batch, 0)
