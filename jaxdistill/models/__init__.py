# SPDX-License-Identifier: Apache-2.0
"""Linen modules that return `Outputs`, and how a module becomes a student.

A module is called as `module(inputs, mask=None, train=False)`: `mask` is the batch's
`[B]` mask, for layers whose statistics must not count padding.
"""

from jaxdistill.models.adapters import Peers, Projector, with_projector
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
from jaxdistill.models.config import Size
from jaxdistill.models.conv import ConvNet
from jaxdistill.models.gpt import DISTILGPT2, GPT, GPT2, GPTClassifier, gpt_size
from jaxdistill.models.layers import BatchNorm
from jaxdistill.models.mlp import MLP
from jaxdistill.models.resnet import ResNet, resnet_cifar, resnet_imagenet
from jaxdistill.models.student import student
from jaxdistill.models.text import BagOfEmbeddings, BiLSTM
from jaxdistill.models.vit import ViT, deit_base, deit_small, deit_tiny

__all__ = [
    "BERT_BASE",
    "BERT_MEDIUM",
    "BERT_MINI",
    "BERT_SMALL",
    "BERT_TINY",
    "DISTILGPT2",
    "GPT",
    "GPT2",
    "GPTClassifier",
    "MLP",
    "BagOfEmbeddings",
    "BatchNorm",
    "BertClassifier",
    "BertMaskedLM",
    "BiLSTM",
    "ConvNet",
    "Encoder",
    "Peers",
    "Projector",
    "ResNet",
    "Size",
    "ViT",
    "deit_base",
    "deit_small",
    "deit_tiny",
    "gpt_size",
    "resnet_cifar",
    "resnet_imagenet",
    "student",
    "with_projector",
]
