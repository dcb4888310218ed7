# SPDX-License-Identifier: Apache-2.0
"""How a family of models is described: its tensors' names and its numbers.

`bert` and `gpt2` have a `Family` for each; `config` has the list of them.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

NOTHING = re.compile(r"(?!)")


class Place(NamedTuple):
    """Where tensors of a layer go.

    Attributes:
      theirs: layer names; `{}` is the block's number. Several make one product.
      ours: the module's path.
      kind: "linear" `[out, in]`, "matrix" likewise without a bias, "conv1d"
        `[in, out]`, "norm", "embed" or "bias".
    """

    theirs: tuple[str, ...]
    ours: str
    kind: str = "linear"


class Architecture(NamedTuple):
    """A model of a family: what is above its body.

    Attributes:
      head: places of its head.
      end: of a language model's last matrix, where it is not the embeddings'.
      alone: the body is at the root of `params`.
      bare: there is no head, and the file's names have no prefix.
      beside: what else a file may hold, which is left out.
    """

    head: tuple[Place, ...] = ()
    end: Place | None = None
    alone: bool = False
    bare: bool = False
    beside: re.Pattern[str] = NOTHING


class Family(NamedTuple):
    """Models of one `model_type`.

    Attributes:
      prefix: how the names of the body's tensors begin.
      root: where the body is in `params` below a head.
      body: places of the body.
      architectures: by the name that config.json has.
      numbers: by our names of the numbers a configuration's, and what it means where it
        is not given.
      usual: settings with which the models are computed as they are here.
      copies: names under which a tied language model's file may hold a tensor a second
        time, each with the first.
      buffers: constants that older files hold beside the weights; `{}` is the block's
        number.
      classifier: of an encoder its classifier's activation, and the name of its dropout
        and what that usually is; None there is the encoder's.
    """

    prefix: str
    root: str
    body: tuple[Place, ...]
    architectures: Mapping[str, Architecture]
    numbers: Mapping[str, tuple[str, Any]]
    usual: Mapping[str, Any]
    copies: Mapping[str, str]
    buffers: tuple[str, ...]
    classifier: tuple[str, str, float | None] | None = None


def block(theirs: str, ours: str, kind: str = "linear", parts=("",)) -> Place:
    """A place in every block of the body."""
    names = tuple(f"{theirs}{part}" for part in parts)
    return Place(names, f"blocks/layer_{{}}/{ours}", kind)


HEAD = re.compile(
    r"(cls|classifier|pre_classifier|qa_outputs|vocab_\w+|lm_head|score"
    r"|multiple_choice_head)\."
)
"""How the names of heads begin, which have no prefix."""
OLDER = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Ends of names in older files, as in bert-base-uncased, and what they are now."""
TURNED = {"linear", "matrix"}
"""Kinds whose matrices are `[out, in]` in a file and `[in, out]` here."""
LEAVES = {
    "linear": {"weight": "kernel", "bias": "bias"},
    "matrix": {"weight": "kernel"},
    "conv1d": {"weight": "kernel", "bias": "bias"},
    "norm": {"weight": "scale", "bias": "bias"},
    "embed": {"weight": "embedding"},
    "bias": {"bias": "bias"},
}
