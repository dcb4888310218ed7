# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json asks for: which module, of which size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import linen as nn

from jaxdistill.models.bert import BertClassifier, BertMaskedLM, Encoder
from jaxdistill.models.gpt import GPT
from jaxdistill.models.transformer import Size

CONFIG = "config.json"
ARCHITECTURES = (
    "BertForSequenceClassification",
    "BertForMaskedLM",
    "DistilBertForSequenceClassification",
    "DistilBertForMaskedLM",
    "GPT2LMHeadModel",
)
USUAL = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
"""Settings with which the models are computed as they are here."""
NUMBERS = {
    "bert": {
        "vocab": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "inner": "intermediate_size",
        "positions": "max_position_embeddings",
        "types": "type_vocab_size",
        "epsilon": "layer_norm_eps",
        "activation": "hidden_act",
        "dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
    },
    "distilbert": {
        "vocab": "vocab_size",
        "width": "dim",
        "depth": "n_layers",
        "heads": "n_heads",
        "inner": "hidden_dim",
        "positions": "max_position_embeddings",
        "activation": "activation",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
    },
    "gpt2": {
        "vocab": "vocab_size",
        "width": "n_embd",
        "depth": "n_layer",
        "heads": "n_head",
        "inner": "n_inner",
        "positions": "n_positions",
        "epsilon": "layer_norm_epsilon",
        "activation": "activation_function",
        "dropout": "resid_pdrop",
        "attention_dropout": "attn_pdrop",
    },
}
"""Our names of the numbers in a configuration."""


def read_config(folder: str | Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
      ValueError: it is missing, damaged, or of a model that is not known.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    known = ", ".join(NUMBERS)
    if not isinstance(config, dict) or config.get("model_type") not in NUMBERS:
        found = config.get("model_type") if isinstance(config, dict) else config
        raise ValueError(f"{path} describes a model of type {found!r}; known: {known}")
    return config


def module_of(config: Mapping[str, Any], **flags: Any) -> nn.Module:
    """The module that a configuration asks for.

    Raises:
      ValueError: an architecture, or a variant of it, that is not known.
    """
    architecture, size = architecture_of(config), size_of(config)
    if config["model_type"] == "gpt2":
        return GPT(size, **flags)
    encoder = Encoder(size, **flags)
    if architecture.endswith("MaskedLM"):
        return BertMaskedLM(encoder)
    pool = "relu" if config["model_type"] == "distilbert" else "tanh"
    return BertClassifier(encoder, _classes(config), pool)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture's name.

    Raises:
      ValueError: it is not known.
    """
    found = (config.get("architectures") or ["none"])[0]
    if found not in ARCHITECTURES:
        raise ValueError(
            f"config.json names the architecture {found!r}; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    return found


def size_of(config: Mapping[str, Any]) -> Size:
    """A configuration's numbers.

    Raises:
      ValueError: a variant that is computed otherwise.
    """
    for name, usual in USUAL.items():
        if config.get(name, usual) != usual:
            raise ValueError(
                f"config.json has {name} = {config[name]!r}; only {usual!r} is computed"
            )
    names = NUMBERS[config["model_type"]]
    numbers = {ours: config[name] for ours, name in names.items() if name in config}
    defaults = {"types": 0, "epsilon": 1e-12, "activation": "gelu"}
    if config["model_type"] == "gpt2":
        defaults = {"types": 0, "epsilon": 1e-5, "activation": "gelu_new"}
    try:
        return Size(**{**defaults, **numbers})
    except TypeError as error:
        raise ValueError(f"config.json is not whole: {error}") from error


def _classes(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or range(config.get("num_labels", 2)))
