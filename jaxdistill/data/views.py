# SPDX-License-Identifier: Apache-2.0
"""Augmented views that can be made again: stored teacher outputs need the same one.

View v of example i is `prepare` of it alone, with a key from a seed, v and i.
"""

import jax
import jax.numpy as jnp

from jaxdistill.data.augment import Prepare
from jaxdistill.types import Array, Batch


def view_of(prepare: Prepare, seed: int, batch: Batch, view: Array) -> Batch:
    """View `view[i]` of each example i, whatever else is in the batch.

    Args:
      prepare: augmentation of single examples (`augment`); not mixup.
      seed: of all views.
      batch: with `index`, each example's position in the data set.
      view: `[B]` integers.
    """

    def one(example, view):
        rng = jax.random.fold_in(jax.random.key(seed), view)
        rng = jax.random.fold_in(rng, example["index"])
        alone = jax.tree.map(lambda x: x[None], example)
        return jax.tree.map(lambda x: x[0], dict(prepare(alone, rng)))

    names = ("inputs", "labels", "mask", "index", "token_mask", "labelled")
    example = {name: batch[name] for name in names if name in batch}
    return {**batch, **jax.vmap(one)(example, view)}


def replay(prepare: Prepare, seed: int, views: int) -> Prepare:
    """The augmentation of a run on stored views: shows the student what was stored.

    Each example of a batch gets one of its views at random, made again from its seed,
    and `teacher` gets that view's outputs.

    Args:
      prepare: the augmentation that the views were made with.
      seed: of the views, as in the store's manifest.
      views: how many each example has there.
    """

    def prepared(batch: Batch, rng: Array) -> Batch:
        size = batch["mask"].shape[0]
        view = jax.random.randint(rng, (size,), 0, views)
        batch = view_of(prepare, seed, batch, view)
        rows = jnp.arange(size)
        taught = {k: v[rows, view][:, None] for k, v in batch["teacher"].items()}
        return {**batch, "teacher": taught}

    return prepared
