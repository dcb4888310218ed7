# SPDX-License-Identifier: Apache-2.0
"""One line of a table, and from what its student can learn."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxdistill.data.augment import replay
from jaxdistill.data.examples import some_of
from jaxdistill.models import apply
from jaxdistill.teachers.forward import MeanLogits, WithClasses
from jaxdistill.teachers.knowledge import unwrap
from jaxdistill.types import Batch, Objective, TrainState


class Arm(NamedTuple):
    """One line of a table: a network, what it learns, and from whom.

    Attributes:
      module: the linen module that is trained.
      objective: see `objectives.combine`.
      optimizer: an optax transformation.
      teacher: the arm whose trained model teaches this one, or None.
      augment: augmentation, see `train.make_train_step`.
      views: of each example, shown again in place of ever new ones where the study
        stores a teacher's outputs (`augment.replay`); 0 leaves the teacher live.
      micro_batches: see `train.make_train_step`.
      rollout: likewise; the teacher then is live.
      top_k: learn from stored outputs, whatever the study does, that keep only so many
        of the teacher's classes (`losses.sparse_forward_kl`).
      live: ask the teacher in every step, also where the study stores outputs: only
        logits are stored, and hidden states and attention maps are not.
      start: `(state, teacher, seed) -> state`, another start than the drawn one, such
        as pretrained weights, layers of the teacher, which is None without one, or what
        a first stage has trained.
      steps: optimizer steps, or None for as many as the study's; 0 leaves it as it
        starts.
    """

    module: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    teacher: str | None = None
    augment: Callable[[Batch, jax.Array], Batch] | None = None
    views: int = 0
    micro_batches: int = 1
    rollout: Callable[[TrainState, Batch, jax.Array], Batch] | None = None
    top_k: int | None = None
    live: bool = False
    start: Callable[[TrainState, Any, int], TrainState] | None = None
    steps: int | None = None

    def replays(self, stored: bool) -> int:
        """The views of each example that come again, with a teacher's stored outputs.

        Args:
          stored: whether the study stores a teacher's outputs.
        """
        kept = stored or self.top_k is not None
        return self.views if kept and not self.live and self.rollout is None else 0

    def options(self, stored: bool) -> dict[str, Any]:
        """What `train.make_train_step` is told beside module, objective and optimizer.

        Args:
          stored: likewise.
        """
        augment, views = self.augment, self.replays(stored)
        if augment is not None and views:
            augment = replay(augment, 0, views)
        return {
            "augment": augment,
            "rollout": self.rollout,
            "micro_batches": self.micro_batches,
        }

    def learns_from_disk(self, teacher: Any, stored: bool) -> bool:
        """Whether a teacher's outputs can be computed once, and are.

        What the student makes itself (`rollout`) has no stored outputs.

        Args:
          teacher: see `teachers`; None teaches nothing.
          stored: likewise.

        Raises:
          ValueError: there are views or `top_k`, but nothing that can be stored so.
        """
        kinds = apply.BoundModule | MeanLogits | WithClasses
        one = isinstance(unwrap(teacher), kinds)
        views = self.replays(stored)
        if views and not (one and self.augment):
            raise ValueError(
                "an arm with views needs an augmentation and one teacher's logits; of "
                "several teachers teachers.mean_logits has them"
            )
        known = one and self.rollout is None and (self.augment is None or views > 0)
        if self.top_k is not None and (self.live or not known):
            raise ValueError(
                "an arm with top_k needs one teacher's logits, of the examples as they "
                "are or of views, and cannot be live"
            )
        return known and not self.live and (stored or self.top_k is not None)


def few_labels(train: Mapping[str, np.ndarray], count: int | None):
    """Examples for a study in which only `count` labels may be used, by anyone.

    Args:
      train: `inputs` and `labels` of all training examples.
      count: how many labels are known; None is all.

    Returns:
      `(arm, seed) -> examples`, other labels for every seed. Who has no teacher gets
      the labelled examples alone; a student of one gets all, with `labelled` marking
      those whose label it may use, because soft targets need none.
    """
    size = len(train["labels"])
    if count is None or count >= size:
        return lambda arm, seed: train

    @lru_cache(maxsize=2)
    def choose(seed: int, has_teacher: bool):
        # No epoch's key: with one, its first batches would hold all known labels.
        draw = np.random.default_rng([seed, 0, 1])
        chosen = np.sort(draw.permutation(size)[:count])
        known = np.isin(np.arange(size), chosen).astype(np.float32)
        examples = {**train, "labelled": known}
        return examples if has_teacher else some_of(examples, chosen)

    return lambda arm, seed: choose(seed, arm.teacher is not None)
