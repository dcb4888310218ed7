# SPDX-License-Identifier: Apache-2.0
"""The tensors of a Hugging Face file by the names they have today, each once."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxdistill.pretrained.config import kind_of, size_of
from jaxdistill.pretrained.names import (
    BIAS,
    BIAS_AGAIN,
    BUFFERS,
    HEAD,
    OLDER,
    PREFIXES,
    TIED,
)

Tensors = dict[str, tuple[str, np.ndarray]]
"""Tensors by the names they have today, each with its name in the file."""


def by_todays_names(
    state: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> Tensors:
    """Tensors by the names they have today in a whole model, each with its own name.

    Older files have other names, and constants beside the weights, which are left out;
    the names of a body without a prefix get it.
    """
    kind = kind_of(config)
    found = {name: (name, np.asarray(array)) for name, array in state.items()}
    for name in [*found]:
        for old, new in OLDER.items():
            today = name.removesuffix(old) + new
            if name.endswith(old) and today not in found:
                found[today] = found.pop(name)
    prefix = PREFIXES[kind]
    if not any(name.startswith(prefix) for name in found):
        found = {k if HEAD.match(k) else prefix + k: v for k, v in found.items()}
    depth = min(size_of(config).depth, len(found))
    for name in BUFFERS[kind]:
        for i in range(depth):
            found.pop(name.format(i), None)
    return found


def without_copies(tensors: Tensors, tied: bool, beside: re.Pattern[str]) -> Tensors:
    """Without what a tied model's file holds twice, which must be equal.

    An untied one's has no matrix twice, and of two biases the one with which
    transformers computes is taken.

    Args:
      tensors: see `by_todays_names`.
      tied: whether a last matrix is that of the embeddings.
      beside: how the names begin of what is left out anyhow.

    Raises:
      ValueError: two that should be one differ.
    """
    kept = dict(tensors)
    if not tied:
        if BIAS_AGAIN in kept:
            kept[BIAS] = kept.pop(BIAS_AGAIN)
        return kept
    for copy, source in {**TIED, BIAS_AGAIN: BIAS}.items():
        if copy not in kept or beside.match(copy):
            continue
        theirs, array = kept.pop(copy)
        if source not in kept:
            kept[source] = theirs, array
        elif not np.array_equal(array, kept[source][1]):
            raise ValueError(
                f"the weights hold {theirs!r} other than {kept[source][0]!r}; here the "
                "two are one"
            )
    return kept
