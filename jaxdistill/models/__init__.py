# SPDX-License-Identifier: Apache-2.0
"""Linen modules that return `Outputs`, and what is done with them.

`apply`        a module bound to its variables, as a student, with projectors; precision
`config`       the numbers of a Transformer, in published sizes
`layers`       BatchNorm that does not count padding, dropout, pooling
`convolution`  convolutions that are fast on a CPU, with their gradients
`small`        MLP, ConvNet, bag of embeddings, BiLSTM
`resnet`, `vit`, `bert`, `gpt`   one architecture each
`transformer`  the blocks of the last three, and their parameters by layer
`generation`   texts from a GPT

A module is called as `module(inputs, mask=None, train=False)`: `mask` is the batch's
`[B]` mask, for layers whose statistics must not count padding.
"""

from jaxdistill.models.apply import (
    BoundModule,
    Peers,
    Precision,
    Projector,
    cast_to_compute,
    student,
    trained,
    with_projector,
)
from jaxdistill.models.bert import (
    BERT_BASE,
    BERT_MEDIUM,
    BERT_MINI,
    BERT_SMALL,
    BERT_TINY,
    BertClassifier,
    BertMaskedLM,
    Encoder,
)
from jaxdistill.models.config import TransformerConfig
from jaxdistill.models.generation import generate, on_policy
from jaxdistill.models.gpt import (
    DISTILGPT2,
    GPT,
    GPT2,
    GPTClassifier,
    empty_cache,
    gpt_config,
)
from jaxdistill.models.layers import BatchNorm
from jaxdistill.models.resnet import ResNet, resnet_cifar, resnet_imagenet
from jaxdistill.models.small import MLP, BagOfEmbeddings, BiLSTM, ConvNet
from jaxdistill.models.transformer import (
    drop_types,
    stack_layers,
    take_layers,
    unstack_layers,
)
from jaxdistill.models.vit import ViT, deit_base, deit_small, deit_tiny
