# SPDX-License-Identifier: Apache-2.0
"""BERT and DistilBERT: their tensors' names and their numbers."""

import re

from jaxdistill.pretrained.family import Architecture, Family, Place, block

BIAS, BIAS_AGAIN = "cls.predictions.bias", "cls.predictions.decoder.bias"
"""Names of the bias of BERT's last layer. In an untied model transformers 5 computes
with the second and holds a first without use; transformers 4 saves the first alone."""

BERT = Family(
    prefix="bert.",
    root="encoder",
    body=(
        Place(("embeddings.word_embeddings",), "words", "embed"),
        Place(("embeddings.position_embeddings",), "places", "embed"),
        Place(("embeddings.token_type_embeddings",), "segments", "embed"),
        Place(("embeddings.LayerNorm",), "norm", "norm"),
        block(
            "encoder.layer.{}.attention.self.",
            "attention/qkv",
            parts=("query", "key", "value"),
        ),
        block("encoder.layer.{}.attention.output.dense", "attention/out"),
        block("encoder.layer.{}.attention.output.LayerNorm", "attention_norm", "norm"),
        block("encoder.layer.{}.intermediate.dense", "feed_forward/inner"),
        block("encoder.layer.{}.output.dense", "feed_forward/outer"),
        block("encoder.layer.{}.output.LayerNorm", "feed_forward_norm", "norm"),
    ),
    architectures={
        "BertForSequenceClassification": Architecture(
            (
                Place(("bert.pooler.dense",), "pooler"),
                Place(("classifier",), "classifier"),
            )
        ),
        "BertForMaskedLM": Architecture(
            (
                Place(("cls.predictions.transform.dense",), "transform"),
                Place(
                    ("cls.predictions.transform.LayerNorm",), "transform_norm", "norm"
                ),
                Place(("cls.predictions",), "", "bias"),
            ),
            end=Place(("cls.predictions.decoder",), "end", "embed"),
            # As bert-base-uncased's file: the head for the next sentence, which a
            # masked language model does not compute.
            beside=re.compile(
                r"(bert\.pooler\.dense|cls\.seq_relationship)\.(weight|bias)$"
            ),
        ),
        "BertModel": Architecture(
            alone=True,
            bare=True,
            beside=re.compile(r"bert\.pooler\.dense\.(weight|bias)$"),
        ),
    },
    numbers={
        "vocab": ("vocab_size", 30_522),
        "width": ("hidden_size", 768),
        "depth": ("num_hidden_layers", 12),
        "heads": ("num_attention_heads", 12),
        "inner": ("intermediate_size", 3072),
        "positions": ("max_position_embeddings", 512),
        "types": ("type_vocab_size", 2),
        "epsilon": ("layer_norm_eps", 1e-12),
        "activation": ("hidden_act", "gelu"),
        "dropout": ("hidden_dropout_prob", 0.1),
        "attention_dropout": ("attention_probs_dropout_prob", 0.1),
    },
    usual={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        BIAS_AGAIN: BIAS,
    },
    buffers=("bert.embeddings.position_ids",),
    classifier=("tanh", "classifier_dropout", None),
)

DISTILBERT = Family(
    prefix="distilbert.",
    root="encoder",
    body=(
        Place(("embeddings.word_embeddings",), "words", "embed"),
        Place(("embeddings.position_embeddings",), "places", "embed"),
        Place(("embeddings.LayerNorm",), "norm", "norm"),
        block(
            "transformer.layer.{}.attention.",
            "attention/qkv",
            parts=("q_lin", "k_lin", "v_lin"),
        ),
        block("transformer.layer.{}.attention.out_lin", "attention/out"),
        block("transformer.layer.{}.sa_layer_norm", "attention_norm", "norm"),
        block("transformer.layer.{}.ffn.lin1", "feed_forward/inner"),
        block("transformer.layer.{}.ffn.lin2", "feed_forward/outer"),
        block("transformer.layer.{}.output_layer_norm", "feed_forward_norm", "norm"),
    ),
    architectures={
        "DistilBertForSequenceClassification": Architecture(
            (
                Place(("pre_classifier",), "pooler"),
                Place(("classifier",), "classifier"),
            )
        ),
        "DistilBertForMaskedLM": Architecture(
            (
                Place(("vocab_transform",), "transform"),
                Place(("vocab_layer_norm",), "transform_norm", "norm"),
                Place(("vocab_projector",), "", "bias"),
            ),
            end=Place(("vocab_projector",), "end", "embed"),
        ),
        "DistilBertModel": Architecture(alone=True, bare=True),
    },
    numbers={
        "vocab": ("vocab_size", 30_522),
        "width": ("dim", 768),
        "depth": ("n_layers", 6),
        "heads": ("n_heads", 12),
        "inner": ("hidden_dim", 3072),
        "positions": ("max_position_embeddings", 512),
        "activation": ("activation", "gelu"),
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
    },
    usual={},
    copies={
        "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    },
    buffers=("distilbert.embeddings.position_ids",),
    classifier=("relu", "seq_classif_dropout", 0.2),
)
