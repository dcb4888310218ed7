# SPDX-License-Identifier: Apache-2.0
"""JSON files with a checksum inside: what was changed, cut or lost in them is noticed.

The checksum is the last entry of an object, `checksum`, so that a file and its checksum
are replaced together. Files without one, written by hand or by older versions, are read
as they are.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

CHECKSUM = "checksum"


class Damaged(RuntimeError):
    """A file that is not what was written; one sentence says which, and what to do."""


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object with its checksum, in the place of an older one.

    >>> seal({"a": 1})
    {'a': 1, 'checksum': 'f9d86028'}
    """
    plain = {name: x for name, x in value.items() if name != CHECKSUM}
    return {**plain, CHECKSUM: _digest(plain)}


def unseal(text: str | bytes) -> dict[str, Any]:
    """The object in a text, without its checksum.

    Raises:
      ValueError: the text is no JSON object, or not the one that was sealed.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, and no object")
    said = value.pop(CHECKSUM, None)
    if said is not None and said != _digest(value):
        raise ValueError("its content does not match its checksum")
    return value


def read_sealed(path: Any, remedy: str) -> dict[str, Any]:
    """The object in a file.

    Args:
      path: of the file; it exists.
      remedy: what to do where it is damaged, for the message.

    Raises:
      Damaged: it is not what was written.
    """
    path = epath.Path(path)
    try:
        return unseal(path.read_bytes())
    except ValueError as error:  # JSON's and Unicode's are such
        raise Damaged(f"{path} is damaged: {error}; {remedy}") from error


def _digest(value: Mapping[str, Any]) -> str:
    # Through JSON once: tuples become lists there, and numbers as keys strings.
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
