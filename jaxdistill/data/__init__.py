# SPDX-License-Identifier: Apache-2.0
"""Data as NumPy arrays: sources, transforms, batches. Nothing here imports jax."""

from jaxdistill.data.batches import Batches, Orders, pad
from jaxdistill.data.corpus import Corpus, Vocabulary, load_corpus, windows
from jaxdistill.data.examples import DataError, check_inputs, check_labels, normalize
from jaxdistill.data.images import Dataset, holdout, load
from jaxdistill.data.stream import Stream
from jaxdistill.data.texts import Labelled, Texts, load_texts

__all__ = [
    "Batches",
    "Corpus",
    "DataError",
    "Dataset",
    "Labelled",
    "Orders",
    "Stream",
    "Texts",
    "Vocabulary",
    "check_inputs",
    "check_labels",
    "holdout",
    "load",
    "load_corpus",
    "load_texts",
    "normalize",
    "pad",
    "windows",
]
