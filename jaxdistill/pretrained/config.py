# SPDX-License-Identifier: Apache-2.0
"""What a Hugging Face config.json asks for: which module, of which size."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import linen as nn

from jaxdistill.models.bert import BertClassifier, BertMaskedLM, Encoder
from jaxdistill.models.config import TransformerConfig
from jaxdistill.models.gpt import GPT, GPTClassifier
from jaxdistill.pretrained.names import ENDS

CONFIG = "config.json"
ARCHITECTURES = {
    "bert": ("BertForSequenceClassification", "BertForMaskedLM", "BertModel"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertForMaskedLM",
        "DistilBertModel",
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification", "GPT2Model"),
}
USUAL: dict[str, dict[str, Any]] = {
    "bert": {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    },
    "distilbert": {},
    "gpt2": {"add_cross_attention": False, "is_causal": True},
}
"""Settings with which the models are computed as they are here."""
NUMBERS: dict[str, dict[str, tuple[str, Any]]] = {
    "bert": {
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
    "distilbert": {
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
    "gpt2": {
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
}
"""By our names of the numbers: a configuration's, and what it means where it is not."""
CLASSIFIERS = {
    "bert": ("tanh", "classifier_dropout", None),
    "distilbert": ("relu", "seq_classif_dropout", 0.2),
}
"""The activations of encoders' classifiers, and the names of their dropout and what it
usually is; None is that of the encoder."""
ALIASES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
}
"""Names that every model's configuration may have; where it has both, these count."""


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
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    kind_of(config)
    return config


def kind_of(config: Mapping[str, Any]) -> str:
    """The model's type.

    Raises:
      ValueError: it is not known.
    """
    found = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(found, str) or found not in NUMBERS:
        raise ValueError(
            f"config.json describes a model of type {found!r}; known: "
            f"{', '.join(NUMBERS)}"
        )
    return found


def module_of(config: Mapping[str, Any], **flags: Any) -> nn.Module:
    """The module that a configuration asks for.

    Raises:
      ValueError: an architecture, or a variant of it, that is not known.
    """
    architecture = architecture_of(config)
    size = replace(transformer_config(config), tied=is_tied(config))
    if architecture.endswith("MaskedLM"):
        return BertMaskedLM(Encoder(size, **flags))
    body = body_of(config, size, **flags)
    if architecture.endswith("Classification"):
        return classifier_of(config, body, _classes(config))
    return body


def body_of(
    config: Mapping[str, Any], size: TransformerConfig, **flags: Any
) -> Encoder | GPT:
    """What is below a classifier."""
    return (GPT if kind_of(config) == "gpt2" else Encoder)(size, **flags)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a language model's last matrix is that of the embeddings; else no matter.

    Raises:
      ValueError: the setting is neither true nor false.
    """
    tied = _value(config, "tie_word_embeddings", True)
    return tied or architecture_of(config) not in ENDS


def classifier_of(
    config: Mapping[str, Any], body: Encoder | GPT, num_classes: int
) -> BertClassifier | GPTClassifier:
    """A classifier as a configuration has it.

    Raises:
      ValueError: its dropout is no number.
    """
    if isinstance(body, GPT):
        return GPTClassifier(body, num_classes)
    pool, name, usual = CLASSIFIERS[kind_of(config)]
    rate = config.get(name, usual)
    if rate is not None:
        rate = _value(config, name, 0.0 if usual is None else usual)
    return BertClassifier(body, num_classes, pool, rate)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture's name.

    Raises:
      ValueError: it is not named, not known, or another model's.
    """
    known = ARCHITECTURES[kind_of(config)]
    found = config.get("architectures")
    first = found[0] if isinstance(found, list | tuple) and found else found
    if first not in known:
        named = f"the architecture {first!r}" if first else "no architecture"
        raise ValueError(f"config.json names {named}; known: {', '.join(known)}")
    return first


def transformer_config(config: Mapping[str, Any]) -> TransformerConfig:
    """A configuration's numbers.

    Raises:
      ValueError: a variant that is computed otherwise, or a number that is none.
    """
    kind = kind_of(config)
    _check(config, USUAL[kind])
    numbers: dict[str, Any] = {"types": 0}
    for ours, (name, usual) in NUMBERS[kind].items():
        alias = ALIASES.get(ours, name)
        known = alias if alias in config else name
        numbers[ours] = _value(config, known, usual)
    if numbers.get("embedding_dropout") == numbers["dropout"]:
        del numbers["embedding_dropout"]  # whoever changes `dropout` then changes both
    return TransformerConfig(**numbers)


def _check(config: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for name, usual in settings.items():
        if config.get(name, usual) != usual:
            raise ValueError(
                f"config.json has {name} = {config[name]!r}; only {usual!r} is computed"
            )


def _value(config: Mapping[str, Any], name: str, usual: Any) -> Any:
    """A value of the usual one's type; whole numbers are positive and have 32 bits."""
    found = config.get(name, usual)
    if isinstance(usual, bool):
        fits, wanted = isinstance(found, bool), "true or false"
    elif isinstance(usual, float):
        fits, wanted = type(found) in (int, float) and found >= 0, "a number"
    elif isinstance(usual, str):
        fits, wanted = isinstance(found, str), "a name"
    else:
        fits = type(found) is int and 0 < found < 2**31
        wanted = "a positive whole number below 2**31"
    if found is not usual and not fits:
        raise ValueError(f"config.json has {name} = {found!r}; expected {wanted}")
    return found


def _classes(config: Mapping[str, Any]) -> int:
    labels = config.get("id2label")
    if labels and isinstance(labels, Mapping) and "num_labels" not in config:
        return len(labels)
    return _value(config, "num_labels", 2)
