# SPDX-License-Identifier: Apache-2.0
"""Weights and tokenizers from elsewhere, as linen variables, and back.

`weights`      BERT, DistilBERT and GPT-2 from Hugging Face folders
`config`       their config.json, and the module that it describes
`family`       how a family of models is described
`bert`, `gpt2` the names of their tensors and their numbers
`classifier`   a pretrained body below a new head
`state_dicts`  PyTorch's state_dict of a module of your own
`tokenizers`   a tokenizer for texts, read or trained
`files`        where a folder has its weights
"""

from jaxdistill.pretrained.classifier import load_classifier
from jaxdistill.pretrained.config import module_of, read_config
from jaxdistill.pretrained.state_dicts import from_torch, load_state_dict, to_torch
from jaxdistill.pretrained.tokenizers import (
    check_same_tokenizer,
    check_tokenizer,
    encode,
    load_tokenizer,
    train_wordpiece,
)
from jaxdistill.pretrained.weights import from_linen, load, save, to_linen
