# SPDX-License-Identifier: Apache-2.0
"""Of what stored outputs are: the view of each example that the teacher saw.

A student that sees another view than its teacher did learns wrong answers, and nothing
shows it but a lower score. So stored outputs say of which view they are, as data, and
the step that reads them refuses another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxdistill.data import augment as augmentation
from jaxdistill.data.augment import Augment, Chain, Replay, Unseen
from jaxdistill.teachers.programs import batch_of, differs, of_program
from jaxdistill.types import Batch


@dataclass(frozen=True)
class View:
    """Which views of the examples a teacher's outputs are of.

    Attributes:
      words: the augmentation as it describes itself, or "" where it cannot.
      program: what it computes (`programs.of_program`), as JSON.
      seed: of the views.
      views: how many of each example.
    """

    words: str
    program: str
    seed: int
    views: int

    @classmethod
    def of(
        cls, augment: Augment, seed: int, views: int, examples: Mapping[str, Any]
    ) -> "View":
        """The views that an augmentation makes of examples with `inputs` `[N, ...]`."""
        # One example alone, as `view_of` makes them.
        known = {k: examples[k] for k in ("inputs", "labels") if k in examples}
        one = batch_of(known, 1)
        found = of_program(augment, one, jax.random.key(0))
        return cls(words_of(augment), json.dumps(found), seed, views)

    def __str__(self) -> str:
        return f"{self.views} of {self.words or 'an augmentation'}, seed {self.seed}"


def words_of(augment: Augment) -> str:
    """`augment.describe`, or nothing where it cannot tell."""
    try:
        return augmentation.describe(augment)
    except ValueError:
        return ""


class StoredOutputs(dict):
    """A teacher's outputs by name, `[N, views, ...]`, that know what they are of.

    It is a mapping of arrays, and what it knows is static: a step compiled for one view
    does not run on another.

    Attributes:
      view: which views of the examples, or None: the examples as they are.
      teacher: whose they are (`programs.of_teacher`) as JSON, or None where that is not
        known.
    """

    view: View | None
    teacher: str | None

    def __init__(
        self,
        arrays: Mapping[str, Any],
        *,
        view: View | None = None,
        teacher: str | None = None,
    ):
        """Takes the arrays as they are."""
        super().__init__(arrays)
        self.view, self.teacher = view, teacher

    def like(self, arrays: Mapping[str, Any]) -> "StoredOutputs":
        """Other arrays, of the same view and teacher."""
        return StoredOutputs(arrays, view=self.view, teacher=self.teacher)


def _flatten(outputs: StoredOutputs):
    names = sorted(outputs)
    children = [(jax.tree_util.DictKey(name), outputs[name]) for name in names]
    return children, (tuple(names), outputs.view, outputs.teacher)


def _unflatten(static, children) -> StoredOutputs:
    names, view, teacher = static
    arrays = dict(zip(names, children, strict=True))
    return StoredOutputs(arrays, view=view, teacher=teacher)


jax.tree_util.register_pytree_with_keys(StoredOutputs, _flatten, _unflatten)


def check(batch: Batch, augment: Augment | None) -> None:
    """Raise ValueError unless a batch's stored outputs are of what the student sees.

    Args:
      batch: with `teacher`, stored outputs `[B, views, ...]`; arrays of a user's own
        are of the examples as they are, unless they are `StoredOutputs` with a view.
      augment: the step's augmentation.
    """
    if "teacher" not in batch:
        raise ValueError(
            "a StoredTeacher needs the examples' stored outputs, and the examples have "
            "no entry 'teacher': {**examples, 'teacher': store.read(...)}"
        )
    outputs = batch["teacher"]
    view = outputs.view if isinstance(outputs, StoredOutputs) else None
    count = jax.tree.leaves(dict(outputs))[0].shape[1]
    shown = [one for one in _parts(augment) if not isinstance(one, Unseen)]
    said = "the examples as they are" if view is None else str(view)
    if not shown:
        if view is None and count == 1:
            return
        raise ValueError(
            f"the stored outputs are of {said} ({count} for each example), and the "
            "step shows the student the examples without augmentation: give it "
            "augment.replay(augmentation, seed, views) of the same"
        )
    words = "" if augment is None else words_of(augment)
    if len(shown) > 1 or not isinstance(replayed := shown[0], Replay):
        raise ValueError(
            f"the stored outputs are of {said}, and the step's augmentation, "
            f"{words or augment}, draws other views: store views and give "
            "augment.replay, ask the teacher live, or say by augment.unseen(...) that "
            "it changes nothing a teacher sees"
        )
    if view is None or count != view.views:
        raise ValueError(
            f"the step replays {replayed.views} views, and the stored outputs, "
            f"{count} for each example, are of {said}; of arrays of your own say it: "
            "teachers.StoredOutputs(arrays, view=teachers.View.of(...))"
        )
    mine = View.of(replayed.augment, replayed.seed, replayed.views, batch)
    other = differs(json.loads(view.program), json.loads(mine.program))
    if (view.seed, view.views) != (mine.seed, mine.views) or other:
        raise ValueError(
            f"the stored outputs are of other views than the step replays: stored "
            f"{view}, replayed {mine}" + (f" ({other})" if other else "")
        )


def _parts(augment: Augment | None) -> list[Augment]:
    """An augmentation's parts in their order."""
    if augment is None:
        return []
    if isinstance(augment, Chain):
        return [part for one in augment.augmentations for part in _parts(one)]
    return [augment]
