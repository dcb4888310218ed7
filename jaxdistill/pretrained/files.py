# SPDX-License-Identifier: Apache-2.0
"""The files of a Hugging Face folder: where they are, and what is in them."""

import json
from pathlib import Path

import numpy as np

from jaxdistill.pretrained.config import CONFIG
from jaxdistill.pretrained.state_dicts import load_state_dict

WEIGHTS = "model.safetensors"
INDEX, SHARDS = f"{WEIGHTS}.index.json", "model-*-of-*.safetensors"
TOKENIZERS = ("*.txt", "tokenizer*.json", "added_tokens.json", "vocab.json")


def find(folder: str | Path) -> Path:
    """The folder, or where the hub's library has put what has this id.

    Raises:
      ValueError: it is neither.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{folder} is no folder, and asking the hub for it needs huggingface_hub: "
            "pip install 'jaxdistill[huggingface]'"
        ) from error
    try:
        found = snapshot_download(
            str(folder), allow_patterns=[CONFIG, WEIGHTS, INDEX, SHARDS, *TOKENIZERS]
        )
    except Exception as error:  # whatever the network says
        raise ValueError(
            f"{folder} is neither a folder nor to be had from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Path(found)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Tensors by their names, of a safetensors file or of its shards.

    Raises:
      ValueError: two shards hold the same tensor, or see `pretrained.load_state_dict`.
    """
    state: dict[str, np.ndarray] = {}
    for shard in _shards(path):
        part = load_state_dict(shard)
        twice = sorted({*part} & {*state})
        if twice:
            raise ValueError(f"{shard} holds {twice[0]!r}, as another shard does")
        state |= part
    return state


def _shards(path: Path) -> list[Path]:
    index = path.with_name(INDEX)
    if path.is_file() or not index.is_file():
        return [path]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        found = sorted({path.with_name(name) for name in names})
        if not found:
            raise ValueError("an empty weight_map")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it names no shards") from error
    return found
