# SPDX-License-Identifier: Apache-2.0
"""What a student is trained on: losses as terms over student, teacher and batch.

`terms`    a loss with its settings; terms on some classes, or on all real tokens
`logits`   terms on labels and logits, and `combine`, which makes an objective of terms
`layers`   terms on hidden states, attention and extras, by a map of layers
`recipes`  the objectives of published methods

    objective = combine({"hard": (0.1, hard_labels()),
                         "soft": (0.9, soft_targets(temperature=4.0))})
"""

from jaxdistill.objectives.layers import (
    last,
    on_attentions,
    on_extras,
    on_hidden_states,
    on_scores,
    uniform,
)
from jaxdistill.objectives.logits import (
    combine,
    hard_labels,
    mutual_targets,
    on_logits,
    soft_targets,
    teacher_labels,
)
from jaxdistill.objectives.recipes import (
    distilbert,
    hinton,
    minilm,
    minilm_v2,
    tinybert_intermediate,
    tinybert_prediction,
)
from jaxdistill.objectives.terms import first_classes, real_tokens
