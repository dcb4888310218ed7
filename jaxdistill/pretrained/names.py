# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's names for the layers of BERT, DistilBERT and GPT-2, and ours."""

import re
from typing import NamedTuple


class Place(NamedTuple):
    """Where tensors of a layer go.

    Attributes:
      theirs: layer names; `{}` is the block's number. Several make one product.
      ours: the module's path.
      kind: "linear" `[out, in]`, "matrix" likewise without a bias, "conv1d"
        `[in, out]`, "norm", "embed" or "bias".
    """

    theirs: tuple[str, ...]
    ours: str
    kind: str = "linear"


def _block(theirs: str, ours: str, kind: str = "linear", parts=("",)) -> Place:
    names = tuple(f"{theirs}{part}" for part in parts)
    return Place(names, f"blocks/layer_{{}}/{ours}", kind)


_BERT = (
    Place(("embeddings.word_embeddings",), "words", "embed"),
    Place(("embeddings.position_embeddings",), "places", "embed"),
    Place(("embeddings.token_type_embeddings",), "segments", "embed"),
    Place(("embeddings.LayerNorm",), "norm", "norm"),
    _block(
        "encoder.layer.{}.attention.self.",
        "attention/qkv",
        parts=("query", "key", "value"),
    ),
    _block("encoder.layer.{}.attention.output.dense", "attention/out"),
    _block("encoder.layer.{}.attention.output.LayerNorm", "attention_norm", "norm"),
    _block("encoder.layer.{}.intermediate.dense", "feed_forward/inner"),
    _block("encoder.layer.{}.output.dense", "feed_forward/outer"),
    _block("encoder.layer.{}.output.LayerNorm", "feed_forward_norm", "norm"),
)
_DISTILBERT = (
    Place(("embeddings.word_embeddings",), "words", "embed"),
    Place(("embeddings.position_embeddings",), "places", "embed"),
    Place(("embeddings.LayerNorm",), "norm", "norm"),
    _block(
        "transformer.layer.{}.attention.",
        "attention/qkv",
        parts=("q_lin", "k_lin", "v_lin"),
    ),
    _block("transformer.layer.{}.attention.out_lin", "attention/out"),
    _block("transformer.layer.{}.sa_layer_norm", "attention_norm", "norm"),
    _block("transformer.layer.{}.ffn.lin1", "feed_forward/inner"),
    _block("transformer.layer.{}.ffn.lin2", "feed_forward/outer"),
    _block("transformer.layer.{}.output_layer_norm", "feed_forward_norm", "norm"),
)
_GPT2 = (
    Place(("wte",), "words", "embed"),
    Place(("wpe",), "places", "embed"),
    _block("h.{}.ln_1", "attention_norm", "norm"),
    _block("h.{}.attn.c_attn", "attention/qkv", "conv1d"),
    _block("h.{}.attn.c_proj", "attention/out", "conv1d"),
    _block("h.{}.ln_2", "feed_forward_norm", "norm"),
    _block("h.{}.mlp.c_fc", "feed_forward/inner", "conv1d"),
    _block("h.{}.mlp.c_proj", "feed_forward/outer", "conv1d"),
    Place(("ln_f",), "norm", "norm"),
)
HEADS = {
    "BertForSequenceClassification": (
        Place(("bert.pooler.dense",), "pooler"),
        Place(("classifier",), "classifier"),
    ),
    "BertForMaskedLM": (
        Place(("cls.predictions.transform.dense",), "transform"),
        Place(("cls.predictions.transform.LayerNorm",), "transform_norm", "norm"),
        Place(("cls.predictions",), "", "bias"),
    ),
    "DistilBertForSequenceClassification": (
        Place(("pre_classifier",), "pooler"),
        Place(("classifier",), "classifier"),
    ),
    "DistilBertForMaskedLM": (
        Place(("vocab_transform",), "transform"),
        Place(("vocab_layer_norm",), "transform_norm", "norm"),
        Place(("vocab_projector",), "", "bias"),
    ),
    "GPT2ForSequenceClassification": (Place(("score",), "score", "matrix"),),
}
ENDS = {
    "BertForMaskedLM": Place(("cls.predictions.decoder",), "end", "embed"),
    "DistilBertForMaskedLM": Place(("vocab_projector",), "end", "embed"),
    "GPT2LMHeadModel": Place(("lm_head",), "end", "embed"),
}
"""A language model's last matrix where it is not that of the embeddings."""
BARE = {"BertModel", "DistilBertModel", "GPT2Model"}
"""Bodies by themselves, whose names have no prefix."""
BODIES = {"bert": _BERT, "distilbert": _DISTILBERT, "gpt2": _GPT2}
PREFIXES = {"bert": "bert.", "distilbert": "distilbert.", "gpt2": "transformer."}
ROOTS = {"bert": "encoder", "distilbert": "encoder", "gpt2": "decoder"}
"""Where a body is in `params` below a head of its own."""
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight",
    "lm_head.weight": "transformer.wte.weight",
}
"""Names under which a tied language model's file may hold a matrix a second time."""
BIAS, BIAS_AGAIN = "cls.predictions.bias", "cls.predictions.decoder.bias"
"""Names of the bias of BERT's last layer. In an untied model transformers 5 computes
with the second and holds a first without use; transformers 4 saves the first alone."""
HEAD = re.compile(
    r"(cls|classifier|pre_classifier|qa_outputs|vocab_\w+|lm_head|score"
    r"|multiple_choice_head)\."
)
"""How the names of heads begin, which have no prefix."""
BUFFERS = {
    "bert": ("bert.embeddings.position_ids",),
    "distilbert": ("distilbert.embeddings.position_ids",),
    "gpt2": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
}
"""Constants that older files hold beside the weights; `{}` is the block's number."""
OLDER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Ends of names in older files, as in bert-base-uncased, and what they are now."""
BESIDE = {
    "BertModel": re.compile(r"bert\.pooler\.dense\.(weight|bias)$"),
    "GPT2ForSequenceClassification": re.compile(r"lm_head\.weight$"),
    "BertForMaskedLM": re.compile(
        r"(bert\.pooler\.dense|cls\.seq_relationship)\.(weight|bias)$"
    ),
}
"""Tensors that a file may hold beside its model's, as bert-base-uncased's does: BERT's
head for the next sentence, which a masked LM does not compute, nor an encoder; of a
classifier the matrix that a language model has at its end."""
NOTHING = re.compile(r"(?!)")
TURNED = {"linear", "matrix"}
"""Kinds whose matrices are `[out, in]` in a file and `[in, out]` here."""
LEAVES = {
    "linear": {"weight": "kernel", "bias": "bias"},
    "matrix": {"weight": "kernel"},
    "conv1d": {"weight": "kernel", "bias": "bias"},
    "norm": {"weight": "scale", "bias": "bias"},
    "embed": {"weight": "embedding"},
    "bias": {"bias": "bias"},
}
