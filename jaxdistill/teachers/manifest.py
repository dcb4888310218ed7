# SPDX-License-Identifier: Apache-2.0
"""A store's small files: what its outputs are of, and which parts are there.

They are replaced whole, so that a kill leaves the old one or the new one.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from etils import epath

from jaxdistill.parallel.processes import write_whole
from jaxdistill.parallel.sealed import seal, unseal
from jaxdistill.teachers.forward import Ensemble
from jaxdistill.teachers.programs import differs
from jaxdistill.teachers.views import View
from jaxdistill.types import Outputs

FORMAT = 5
"""Of a store's manifest; 3 and 4 are of jaxdistill 0.1 and 0.2, and do not say what the
teacher and the views' augmentation compute."""
DTYPES = ("float32", "float16", "bfloat16")


class StoreError(ValueError):
    """Stored outputs that cannot be used; one sentence says why."""


@dataclass(frozen=True)
class Manifest:
    """What stored outputs are of; all of it is compared when a store is opened.

    Attributes:
      teacher: its `fingerprints.of_model`.
      program: what its forward pass computes (`programs.of_program`), or None where
        that cannot be told.
      data: the data set's name.
      split: which part of it.
      size: examples.
      content: `fingerprints.of_tree` of the inputs.
      transform: what was done to the inputs, in words.
      classes: C or V.
      top_k: K, or None for dense logits.
      dtype: of the stored floats.
      views: augmented views of each example.
      seed: of the views.
      view: which views they are, a `views.View`; None is the examples as they are.
      layers: which hidden states.
      batch_size: of the teacher's forward pass; a step of another one differs from a
        live teacher's by rounding.
      devices: over how many of them that batch is split; of another number, likewise.
      bucket_lengths: lengths to which batches of texts of like length were cut
        (`data.tokens`); a step that cuts others differs by rounding.
      compute: what the teacher computes in (`models.Precision`), or None for its own
        types.
      arrays: `{name: {"shape", "dtype"}}` of what is stored of one example.
      format: of the store.
    """

    teacher: str
    data: str
    split: str
    size: int
    content: str
    transform: str
    classes: int
    program: Mapping[str, Any] | None = None
    top_k: int | None = None
    dtype: str = "float32"
    views: int = 1
    seed: int = 0
    view: View | None = None
    layers: tuple[int, ...] = ()
    batch_size: int = 512
    devices: int = 1
    bucket_lengths: tuple[int, ...] = ()
    compute: str | None = None
    arrays: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self):
        for name in ("size", "views", "batch_size", "devices"):
            if getattr(self, name) < 1:
                raise StoreError(
                    f"{name} of a store must be at least 1, got {getattr(self, name)}"
                )
        if self.batch_size % self.devices:
            raise StoreError(
                f"a batch_size of {self.batch_size} does not divide over "
                f"{self.devices} devices"
            )
        if self.dtype not in DTYPES:
            raise StoreError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")

    def shapes(self, rows: int) -> dict[str, list[int]]:
        """The shapes of the arrays of so many examples."""
        return {name: [rows, *x["shape"]] for name, x in self.arrays.items()}


def check_outputs(outputs: Outputs, teacher: Any, manifest: Manifest) -> None:
    """Raise StoreError unless the teacher says what the manifest asks for."""
    *leading, classes = outputs.logits.shape
    # An ensemble of as many members as the batch has examples has the right length.
    if leading[:1] != [manifest.batch_size] or isinstance(teacher, Ensemble):
        raise StoreError(
            "a store takes logits of one model, [B, ..., C], got shape "
            f"{outputs.logits.shape} for a batch of {manifest.batch_size}; of an "
            "ensemble it can store the `mean_logits`"
        )
    if manifest.bucket_lengths and (leading[1:] or manifest.layers):
        raise StoreError(
            "a store with bucket_lengths takes one set of logits of each text; store "
            "what a teacher says of every token without it, or keep the teacher live"
        )
    if manifest.top_k is not None and not 0 < manifest.top_k <= classes:
        raise StoreError(
            f"top_k must lie between 1 and the {classes} classes, got {manifest.top_k}"
        )
    depth = len(outputs.hidden_states)
    for layer in manifest.layers:
        if not 0 <= layer < depth:
            raise StoreError(
                f"layers must be of the teacher's {depth} hidden states, counted "
                f"from 0, got {layer}"
            )


def compare(path: epath.Path, manifest: Manifest) -> None:
    """Raise StoreError unless a manifest on disk is the expected one."""
    versions: dict[Any, str] = {3: "0.1", 4: "0.2"}
    try:
        content = path.read_bytes()
        stored = json.loads(content)
        if isinstance(stored, dict) and stored.get("format") in versions:
            raise StoreError(
                f"{path.parent} was written by jaxdistill {versions[stored['format']]};"
                " delete it and give the command that wrote it again"
            )
        stored = unseal(content)
    except StoreError:
        raise
    except (OSError, ValueError) as error:  # no JSON, or not what was written
        raise StoreError(
            f"{path} is damaged: {error}; delete it and give the command that wrote "
            "it again: outputs that are there are kept"
        ) from error
    # As it is read from the file: JSON turns tuples into lists.
    expected = json.loads(json.dumps(asdict(manifest)))
    for name in dict.fromkeys(["format", *expected, *stored]):
        # A name that is damaged is missing, which None is not.
        if name not in stored or _other(name, stored[name], expected.get(name)):
            raise StoreError(
                f"{path.parent} holds outputs of another {name}: "
                f"{stored.get(name)!r} is stored, {expected.get(name)!r} was expected"
            )


def _other(name: str, stored: Any, expected: Any) -> bool:
    """Whether a field on disk is not the expected one."""
    if name == "program":
        return differs(stored, expected) is not None
    if name == "view" and stored and expected:
        old, new = (json.loads(view["program"]) for view in (stored, expected))
        return differs(old, new) is not None or stored["seed"] != expected["seed"]
    # `describe` need not know the augmentation, which `write` gets and stores.
    return stored != expected and not (name == "view" and expected is None)


def save(path: epath.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file whole; several processes may write the same one."""
    write_whole(path, json.dumps(seal(value), indent=1))


def is_marked(path: epath.Path, shapes: Mapping[str, Any]) -> bool:
    """Whether a shard's mark is there, and says that arrays of these shapes are."""
    try:
        return unseal(path.read_bytes()) == shapes
    except (OSError, ValueError):
        return False
