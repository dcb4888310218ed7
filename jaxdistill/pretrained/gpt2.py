# SPDX-License-Identifier: Apache-2.0
"""GPT-2: its tensors' names and its numbers."""

import re

from jaxdistill.pretrained.family import Architecture, Family, Place, block

GPT2 = Family(
    prefix="transformer.",
    root="decoder",
    body=(
        Place(("wte",), "words", "embed"),
        Place(("wpe",), "places", "embed"),
        block("h.{}.ln_1", "attention_norm", "norm"),
        block("h.{}.attn.c_attn", "attention/qkv", "conv1d"),
        block("h.{}.attn.c_proj", "attention/out", "conv1d"),
        block("h.{}.ln_2", "feed_forward_norm", "norm"),
        block("h.{}.mlp.c_fc", "feed_forward/inner", "conv1d"),
        block("h.{}.mlp.c_proj", "feed_forward/outer", "conv1d"),
        Place(("ln_f",), "norm", "norm"),
    ),
    architectures={
        "GPT2LMHeadModel": Architecture(
            end=Place(("lm_head",), "end", "embed"), alone=True
        ),
        "GPT2ForSequenceClassification": Architecture(
            (Place(("score",), "score", "matrix"),),
            beside=re.compile(r"lm_head\.weight$"),
        ),
        "GPT2Model": Architecture(alone=True, bare=True),
    },
    numbers={
        "vocab": ("vocab_size", 50_257),
        "width": ("n_embd", 768),
        "depth": ("n_layer", 12),
        "heads": ("n_head", 12),
        "inner": ("n_inner", None),
        "positions": ("n_positions", 1024),
        "epsilon": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "dropout": ("resid_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
        "embedding_dropout": ("embd_pdrop", 0.1),
        "scaled": ("scale_attn_weights", True),
        "scaled_by_layer": ("scale_attn_by_inverse_layer_idx", False),
    },
    usual={"add_cross_attention": False, "is_causal": True},
    copies={"lm_head.weight": "transformer.wte.weight"},
    buffers=("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
)
