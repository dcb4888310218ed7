# SPDX-License-Identifier: Apache-2.0
"""A pretrained encoder under a new head, to be trained on a task of one's own.

module, variables = load_classifier("bert-base-uncased", 2, rng)
state = init_state(rng, models.student(module), optimizer, batch)
state = state.replace(params=variables["params"])
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdistill.huggingface import (
    WEIGHTS,
    body_places,
    find,
    place,
    read_weights,
    with_todays_names,
)
from jaxdistill.huggingface_config import read_config, size_of
from jaxdistill.huggingface_names import PREFIXES, Place
from jaxdistill.layers import stack_layers
from jaxdistill.models.bert import BertClassifier, Encoder

OTHER_HEADS = re.compile(r"(cls|classifier|pre_classifier|qa_outputs|vocab_\w+)\.")
"""Names of the heads that a pretrained encoder may have, and which are left out."""
POOLER = Place(("pooler.dense",), "pooler")


def load_classifier(
    folder: str | Path,
    num_classes: int,
    rng: jax.Array,
    *,
    scan: bool = False,
    remat: bool = False,
    maps: bool = True,
) -> tuple[BertClassifier, dict[str, Any]]:
    """A classifier whose encoder is pretrained, whatever head it was trained under.

    A BERT's pooler is read where the file has one. The classifier is drawn.

    Args:
      folder: with `config.json` and `model.safetensors` of a BERT or a DistilBERT, or a
        hub's id, see `huggingface.load`.
      num_classes: C.
      rng: draws what is not read.
      scan: see `models.transformer.Blocks`.
      remat: likewise.
      maps: likewise.

    Raises:
      ValueError: a model that is no encoder, or a file that is missing, cut short, or
        does not fit the configuration; it names the first tensor.
    """
    folder = find(folder)
    config = read_config(folder)
    kind = config["model_type"]
    if kind not in ("bert", "distilbert"):
        raise ValueError(f"{folder} is a {kind}, and a classifier needs an encoder")
    encoder = Encoder(size_of(config), scan=scan, remat=remat, maps=maps)
    pool = "relu" if kind == "distilbert" else "tanh"
    module = BertClassifier(encoder, num_classes, pool)
    state = with_todays_names(read_weights(folder / WEIGHTS))
    # A body saved by itself has no prefix.
    prefix = PREFIXES[kind] if any(k.startswith(PREFIXES[kind]) for k in state) else ""
    places = list(body_places(config, prefix))
    if f"{prefix}pooler.dense.weight" in state:
        places.append((POOLER, [f"{prefix}pooler.dense"], ("pooler",)))
    found, used = place(state, places)
    left = sorted(k for k in {*state} - used if not OTHER_HEADS.match(k))
    if left:
        raise ValueError(f"the weights hold {left[0]!r}, which has no place here")
    read = traverse_util.unflatten_dict(found)
    drawn = module.init(rng, {"input_ids": jnp.zeros((1, 2), jnp.int32)})
    return module, {
        "params": _put(drawn["params"], stack_layers(read) if scan else read)
    }


def _put(drawn: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The drawn parameters, but for those that were read, in the drawn ones' types.

    Raises:
      ValueError: their shapes differ.
    """
    whole = traverse_util.flatten_dict(dict(drawn))
    for path, array in traverse_util.flatten_dict(dict(read)).items():
        expected = whole[path].shape
        if np.shape(array) != expected:
            raise ValueError(
                f"{'/'.join(path)!r} has the shape {np.shape(array)}, config.json asks "
                f"for {expected}"
            )
        whole[path] = np.asarray(array, whole[path].dtype)
    return traverse_util.unflatten_dict(whole)
