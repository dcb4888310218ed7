# SPDX-License-Identifier: Apache-2.0
"""Augmentation on the device: functions for `train.make_train_step`, and stored views.

They run before the teacher sees the batch, so teacher and student get the same view
(function matching: Beyer et al. 2022, Knowledge distillation: a good teacher is patient
and consistent, section 3). Each takes `inputs` of shape `[B, H, W]` or `[B, H, W, C]`.

A view can be made again, as stored teacher outputs need: view v of example i is the
augmentation of it alone, with a key from a seed, v and i.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.types import Array, Batch

Augment = Callable[[Batch, Array], Batch]


def describe(augment: Augment) -> str:
    """An augmentation in words: its name, and what it was made with.

    A `functools.partial` is its function and what it binds, an object or its method
    the fields, a jitted function what was jitted.

    Raises:
      ValueError: what it is made of cannot be seen: it is no function, and has no
        fields.

    >>> describe(shift(2, 0.0))
    'shift(fill=0.0, pixels=2)'
    """
    name, made_with = _made_of(augment)

    def spell(value: Any) -> str:
        if isinstance(value, tuple | list):
            return f"({', '.join(map(spell, value))})"
        if callable(value):
            return describe(value)
        return str(np.asarray(value).tolist())

    inside = ", ".join(f"{k}={spell(v)}" for k, v in sorted(made_with.items()))
    return f"{name}({inside})"


def _made_of(augment: Any) -> tuple[str, Mapping[str, Any]]:
    """Its name, and what it was made with, by name."""
    if inspect.isfunction(augment):
        made_with = inspect.getclosurevars(augment).nonlocals
        # An augmentation is a closure, `shift.<locals>.augment`: its maker names it.
        return augment.__qualname__.split(".")[0], made_with
    if isinstance(augment, functools.partial):
        name, made_with = _made_of(augment.func)
        signature = inspect.signature(augment.func)
        bound = signature.bind_partial(*augment.args, **augment.keywords)
        return name, {**made_with, **bound.arguments}
    if inspect.ismethod(augment):
        name, made_with = _made_of(augment.__self__)
        return f"{name}.{augment.__name__}", made_with
    if hasattr(augment, "__wrapped__"):  # by jax.jit
        return _made_of(augment.__wrapped__)
    if dataclasses.is_dataclass(augment) and not isinstance(augment, type):
        names = [field.name for field in dataclasses.fields(augment)]
        return type(augment).__name__, {name: getattr(augment, name) for name in names}
    if isinstance(augment, type) or not hasattr(augment, "__dict__"):
        raise ValueError(
            "an augmentation that is described must be a function, a functools.partial "
            f"or an object with fields, got {augment!r}"
        )
    return type(augment).__name__, vars(augment)


def shift(pixels: int, fill: Any) -> Augment:
    """Moves each image by up to `pixels` up or down and left or right, independently.

    Padding by `pixels` and cropping at random to the old size is the same thing.

    Args:
      pixels: the largest move; every whole number up to it is equally likely.
      fill: what comes in at the border, one number or one for each channel: the
        background (`data.Dataset.background`).

    Raises:
      ValueError: `pixels` is negative.
    """
    if pixels < 0:
        raise ValueError(f"images cannot be shifted by up to {pixels} pixels")

    def augment(batch: Batch, rng: Array) -> Batch:
        images = _alone("shift", batch)
        still = ((0, 0),) * (images.ndim - 3)
        border = ((0, 0), (pixels, pixels), (pixels, pixels), *still)
        inside = jnp.pad(jnp.ones(images.shape[1:3], bool), border[1:3])
        inside = inside.reshape(1, *inside.shape, *(1,) * len(still))
        color = jnp.broadcast_to(jnp.asarray(fill, images.dtype), images.shape[3:])
        around = color.reshape(1, 1, 1, *color.shape)
        padded = jnp.where(inside, jnp.pad(images, border), around)
        size = images.shape[1], images.shape[2]
        return {**batch, "inputs": _windows(padded, size, rng)}

    return augment


def crop(height: int, width: int) -> Augment:
    """Cuts a window of `height` by `width` out of each image, every one equally likely.

    Raises:
      ValueError: when it is called, images smaller than the window.
    """

    def augment(batch: Batch, rng: Array) -> Batch:
        images = _alone("crop", batch)
        if images.shape[1] < height or images.shape[2] < width:
            raise ValueError(
                f"images of shape {images.shape[1:]} have no {height} x {width} window"
            )
        return {**batch, "inputs": _windows(images, (height, width), rng)}

    return augment


def flip() -> Augment:
    """Turns each image left to right, or not, with equal chances."""

    def augment(batch: Batch, rng: Array) -> Batch:
        images = _alone("flip", batch)
        turn = jax.random.bernoulli(rng, shape=images.shape[:1])
        turn = turn.reshape(-1, *(1,) * (images.ndim - 1))
        return {**batch, "inputs": jnp.where(turn, images[:, :, ::-1], images)}

    return augment


def mixup(alpha: float = 1.0) -> Augment:
    """Mixes each example with another of its batch.

    `x = share x_i + (1 - share) x_j`, `share` drawn for each example from
    Beta(alpha, alpha), j the next one after a random turn of the batch. The batch gains
    `share` and the other's label, `partner`, which `objectives.hard_labels` weighs, and
    no other term. A real example is not mixed with padding, nor one whose label may be
    used with one whose label may not, but with itself.

    Args:
      alpha: above 0; 1 draws shares evenly, less keeps them near 0 and 1.

    Raises:
      ValueError: `alpha` is not above 0.

    References:
      Zhang et al. 2018, mixup: Beyond Empirical Risk Minimization, section 2.
    """
    if not alpha > 0:
        raise ValueError(f"mixup needs alpha above 0, got {alpha}")

    def augment(batch: Batch, rng: Array) -> Batch:
        labels, mask = _mixable(batch), batch["mask"]
        images = batch["inputs"]
        turn_rng, share_rng = jax.random.split(rng)
        size = images.shape[0]
        # randint needs a range that is not empty. In a batch of one the next is the
        # example itself, as 1 modulo 1 is 0.
        by = jax.random.randint(turn_rng, (), 1, max(size, 2))
        others = (jnp.arange(size) + by) % size
        labelled = batch.get("labelled", jnp.ones(size))
        allowed = (mask[others] > 0) & (labelled[others] >= labelled)
        others = jnp.where(allowed, others, jnp.arange(size))
        share = jax.random.beta(share_rng, alpha, alpha, (size,))
        weight = share.reshape(-1, *(1,) * (images.ndim - 1))
        mixed = weight * images + (1 - weight) * images[others]
        partner = labels[others]
        return {**batch, "inputs": mixed, "partner": partner, "share": share}

    return augment


@dataclasses.dataclass(frozen=True)
class Chain:
    """Augmentations one after the other, each with a key of its own (`chain`)."""

    augmentations: tuple[Augment, ...]

    def __call__(self, batch: Batch, rng: Array) -> Batch:
        for i, one in enumerate(self.augmentations):
            batch = one(batch, jax.random.fold_in(rng, i))
        return batch


def chain(*augmentations: Augment) -> Augment:
    """One after the other, each with a key of its own."""
    return Chain(augmentations)


@dataclasses.dataclass(frozen=True)
class Unseen:
    """An augmentation that changes nothing a teacher sees (`unseen`)."""

    augment: Augment

    def __call__(self, batch: Batch, rng: Array) -> Batch:
        return self.augment(batch, rng)


def unseen(augment: Augment) -> Augment:
    """Says that an augmentation changes nothing that a teacher's outputs depend on.

    A step that reads stored outputs refuses every other augmentation but `replay`.

    >>> unseen(shift(0, 0.0)).augment.__qualname__
    'shift.<locals>.augment'
    """
    return Unseen(augment)


def _alone(name: str, batch: Batch) -> Array:
    """The batch's images.

    Raises:
      ValueError: something else of the batch lies on their grid, such as a label for
        each pixel: it would stay where it is.
    """
    images = _images(name, batch)
    for other, array in batch.items():
        # A teacher's stored outputs are guarded by their view.
        if other in ("inputs", "teacher") or not hasattr(array, "shape"):
            continue
        if len(array.shape) > 2 and array.shape[1:3] == images.shape[1:3]:
            raise ValueError(
                f"{name} moves the images of shape {images.shape} and not {other!r} of "
                f"shape {array.shape}, which lies on the same pixels: augment both in "
                "a function of your own"
            )
    return images


def _images(name: str, batch: Batch) -> Array:
    images = batch["inputs"]
    if isinstance(images, Mapping) or images.ndim not in (3, 4):
        found = list(images) if isinstance(images, Mapping) else images.shape
        raise ValueError(
            f"{name} takes inputs that are images [B, H, W] or [B, H, W, C], got "
            f"{found}"
        )
    return images


def _mixable(batch: Batch) -> Array:
    """The labels of a batch that `mixup` can mix.

    Raises:
      ValueError: its labels are not one for each example, or it has entries that the
        mixed examples would have of one partner alone.
    """
    known = {"inputs", "labels", "mask", "index", "labelled", "teacher"}
    others = sorted(set(batch) - known)
    if isinstance(batch["inputs"], Mapping) or batch["labels"].ndim != 1 or others:
        found = f"entries {others}" if others else f"shape {batch['labels'].shape}"
        raise ValueError(
            "mixup mixes inputs that are one array, with one label for each example, "
            f"and nothing else; got labels or inputs of another form: {found}"
        )
    return batch["labels"]


def _windows(images: Array, size: tuple[int, int], rng: Array) -> Array:
    """A window of each image, its corner drawn evenly."""
    most = jnp.array([images.shape[1] - size[0], images.shape[2] - size[1]])
    corners = jax.random.randint(rng, (images.shape[0], 2), 0, most[None] + 1)
    shape = (*size, *images.shape[3:])

    def window(image, corner):
        start = (corner[0], corner[1], *(0,) * (len(shape) - 2))
        return jax.lax.dynamic_slice(image, start, shape)

    # A slice an image; indexing every pixel was 17 times slower on a CPU.
    return jax.vmap(window)(images, corners)


def view_of(augment: Augment, seed: int, batch: Batch, view: Array) -> Batch:
    """View `view[i]` of each example i, whatever else is in the batch.

    Args:
      augment: augmentation of single examples (`augment`); not mixup.
      seed: of all views.
      batch: with `index`, each example's position in the data set.
      view: `[B]` integers.
    """

    def one(example, view):
        rng = jax.random.fold_in(jax.random.key(seed), view)
        rng = jax.random.fold_in(rng, example["index"])
        alone = jax.tree.map(lambda x: x[None], example)
        return jax.tree.map(lambda x: x[0], dict(augment(alone, rng)))

    names = ("inputs", "labels", "mask", "index", "token_mask", "labelled")
    example = {name: batch[name] for name in names if name in batch}
    return {**batch, **jax.vmap(one)(example, view)}


@dataclasses.dataclass(frozen=True)
class Replay:
    """The augmentation of a run on stored views (`replay`)."""

    augment: Augment
    seed: int
    views: int

    def __call__(self, batch: Batch, rng: Array) -> Batch:
        size = batch["mask"].shape[0]
        view = jax.random.randint(rng, (size,), 0, self.views)
        batch = view_of(self.augment, self.seed, batch, view)
        rows = jnp.arange(size)
        stored = {k: v[rows, view][:, None] for k, v in batch["teacher"].items()}
        return {**batch, "teacher": stored}


def replay(augment: Augment, seed: int, views: int) -> Augment:
    """The augmentation of a run on stored views: shows the student what was stored.

    Each example of a batch gets one of its views at random, made again from its seed,
    and `teacher` gets that view's outputs.

    Args:
      augment: the augmentation that the views were made with.
      seed: of the views, as in the store's manifest.
      views: how many each example has there.

    Raises:
      ValueError: fewer than 1 view.
    """
    if views < 1:
        raise ValueError(f"an example has at least 1 view, got {views}")
    return Replay(augment, seed, views)
