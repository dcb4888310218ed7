# SPDX-License-Identifier: Apache-2.0
"""A pretrained body under a new head, to be trained on a task of one's own.

module, variables = load_classifier("bert-base-uncased", 2, rng)
state = init_state(rng, models.student(module), optimizer, batch)
state = state.replace(params=variables["params"])
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxdistill.models.bert import BertClassifier
from jaxdistill.models.gpt import GPTClassifier
from jaxdistill.models.transformer import stack_layers
from jaxdistill.pretrained.config import (
    body_of,
    classifier_of,
    read_config,
    transformer_config,
)
from jaxdistill.pretrained.family import HEAD, Place
from jaxdistill.pretrained.files import WEIGHTS, find, read_weights
from jaxdistill.pretrained.weights import body_places, by_todays_names, place

POOLER = "bert.pooler.dense"


def load_classifier(
    folder: str | Path,
    num_classes: int,
    rng: jax.Array,
    *,
    scan: bool = False,
    remat: bool = False,
    maps: bool = True,
) -> tuple[BertClassifier | GPTClassifier, dict[str, Any]]:
    """A classifier whose body is pretrained, whatever head it was trained under.

    A BERT's pooler is read where the file has one. The classifier is drawn. Whoever
    saves a GPT-2's for transformers puts into its configuration the `pad_token_id` with
    which texts are padded: that library finds their ends by it.

    Args:
      folder: with `config.json` and `model.safetensors` of a BERT, a DistilBERT or a
        GPT-2, or a hub's id, see `pretrained.load`.
      num_classes: C.
      rng: draws what is not read.
      scan: see `models.transformer.Blocks`.
      remat: likewise.
      maps: likewise.

    Raises:
      ValueError: a model that is not known, or a file that is missing, cut short, or
        does not fit the configuration; it names the first tensor.
    """
    folder = find(folder)
    config = read_config(folder)
    size = transformer_config(config)
    body = body_of(config, size, scan=scan, remat=remat, maps=maps)
    module = classifier_of(config, body, num_classes)
    tensors = by_todays_names(read_weights(folder / WEIGHTS), config)
    places = list(body_places(config))
    if f"{POOLER}.weight" in tensors:
        places.append((Place((POOLER,), "pooler"), [POOLER], ("pooler",)))
    # Without `scan`, whatever was asked for: a file has its layers apart.
    apart = classifier_of(config, body_of(config, size), num_classes)
    read = traverse_util.unflatten_dict(place(tensors, places, apart, HEAD))
    drawn = module.init(rng, {"input_ids": jnp.zeros((1, 2), jnp.int32)})
    return module, {
        "params": _put(drawn["params"], stack_layers(read) if scan else read)
    }


def _put(drawn: Mapping[str, Any], read: Mapping[str, Any]) -> dict[str, Any]:
    """The drawn parameters, but for those that were read, in the drawn ones' types."""
    whole = traverse_util.flatten_dict(dict(drawn))
    for path, array in traverse_util.flatten_dict(dict(read)).items():
        whole[path] = np.asarray(array, whole[path].dtype)
    return traverse_util.unflatten_dict(whole)
