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
from jaxdistill.pretrained.bert import BERT, DISTILBERT
from jaxdistill.pretrained.family import Architecture, Family
from jaxdistill.pretrained.gpt2 import GPT2

CONFIG = "config.json"
FAMILIES = {"bert": BERT, "distilbert": DISTILBERT, "gpt2": GPT2}
"""By the `model_type` of a configuration."""
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
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    family_of(config)
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of the model's type.

    Raises:
      ValueError: it is not known.
    """
    found = config.get("model_type") if isinstance(config, Mapping) else None
    if not isinstance(found, str) or found not in FAMILIES:
        raise ValueError(
            f"config.json describes a model of type {found!r}; known: "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[found]


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
    return (Encoder if family_of(config).classifier else GPT)(size, **flags)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a language model's last matrix is that of the embeddings; else no matter.

    Raises:
      ValueError: the setting is neither true nor false.
    """
    tied = _value(config, "tie_word_embeddings", True)
    return tied or architecture(config).end is None


def classifier_of(
    config: Mapping[str, Any], body: Encoder | GPT, num_classes: int
) -> BertClassifier | GPTClassifier:
    """A classifier as a configuration has it.

    Raises:
      ValueError: its dropout is no number.
    """
    if isinstance(body, GPT):
        return GPTClassifier(body, num_classes)
    made = family_of(config).classifier
    assert made is not None, "a family of encoders without a classifier"
    pool, name, usual = made
    rate = config.get(name, usual)
    if rate is not None:
        rate = _value(config, name, 0.0 if usual is None else usual)
    return BertClassifier(body, num_classes, pool, rate)


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture's name.

    Raises:
      ValueError: it is not named, not known, or another model's.
    """
    known = tuple(family_of(config).architectures)
    found = config.get("architectures")
    first = found[0] if isinstance(found, list | tuple) and found else found
    if first not in known:
        named = f"the architecture {first!r}" if first else "no architecture"
        raise ValueError(f"config.json names {named}; known: {', '.join(known)}")
    return first


def architecture(config: Mapping[str, Any]) -> Architecture:
    """What its model has above the body; it raises as `architecture_of` does."""
    return family_of(config).architectures[architecture_of(config)]


def transformer_config(config: Mapping[str, Any]) -> TransformerConfig:
    """A configuration's numbers.

    Raises:
      ValueError: a variant that is computed otherwise, or a number that is none.
    """
    family = family_of(config)
    _check(config, family.usual)
    numbers: dict[str, Any] = {"types": 0}
    for ours, (name, usual) in family.numbers.items():
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
