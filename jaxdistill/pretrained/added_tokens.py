# SPDX-License-Identifier: Apache-2.0
"""Tokens that were added to a tokenizer's vocabulary, as a folder names them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add(
    tokenizer: Any, folder: Path, config: Mapping[str, Any], added: Mapping[str, Any]
) -> Any:
    """The tokenizer, changed in place: with the added tokens, by their numbers.

    Args:
      tokenizer: a `tokenizers.Tokenizer` of the vocabulary alone.
      folder: for messages.
      config: the content of tokenizer_config.json.
      added: that of added_tokens.json.

    Raises:
      ValueError: an entry is no token, has a number that is not the next, or every
        text is to begin with a token of its own.
    """
    from tokenizers import AddedToken

    if config.get("add_bos_token"):
        raise ValueError(
            f"{folder}: tokenizer_config.json has add_bos_token, which is read from "
            "tokenizer.json alone"
        )
    entries = [_checked(entry, folder) for entry in _entries(config, added, folder)]
    for entry in sorted(entries, key=lambda entry: entry["id"]):
        flags = {name: entry[name] for name in FLAGS if name in entry}
        token = AddedToken(entry["content"], **flags)
        if entry.get("special"):
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        found = tokenizer.token_to_id(token.content)
        if found != entry["id"]:
            raise ValueError(
                f"{folder}: the added token {token.content!r} is {entry['id']}, and "
                f"would be {found}"
            )
    return tokenizer


def _entries(config, added, folder) -> Iterator[dict[str, Any]]:
    """The tokens of both files, each with its number."""
    for token, number in added.items():
        yield {"content": token, "id": number}
    try:
        for number, token in config.get("added_tokens_decoder", {}).items():
            yield {**token, "id": int(number)}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: the added_tokens_decoder of tokenizer_config.json is no "
            "mapping from numbers to tokens"
        ) from error


def _checked(entry: dict[str, Any], folder: Path) -> dict[str, Any]:
    flags = [entry[name] for name in FLAGS if name in entry]
    named = isinstance(entry.get("content"), str) and type(entry["id"]) is int
    if not (named and all(isinstance(flag, bool) for flag in flags)):
        raise ValueError(f"{folder} has an added token that is none: {entry}")
    return entry
