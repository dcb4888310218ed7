# SPDX-License-Identifier: Apache-2.0
"""Which examples go into which batch: shuffled by seed, padded, masked, resumable."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from jaxdistill.data.examples import DataError, check_examples, some_of

POOL = 50
"""Most batches among whose examples those of like length are put together."""


@dataclass(frozen=True)
class Batches:
    """The order of examples through all epochs: a pure function of these numbers.

    The position in it is the optimizer step alone, so a resumed run sees exactly the
    batches that were left.

    Attributes:
      size: examples in the data set.
      batch_size: examples in a batch; the last of an epoch is padded and masked.
      seed: each epoch's permutation is drawn from (seed, epoch).
      lengths: tokens of each example, whose batches then are of like length, in random
        order, or None. As with `group_by_length` of Hugging Face's Trainer examples are
        sorted within pools, which are drawn anew in each epoch: of 50 batches, or of a
        quarter of all where there are fewer than 200.
    """

    size: int
    batch_size: int
    seed: int = 0
    lengths: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.size < 1:
            raise DataError("the data set is empty")
        if not 0 < self.batch_size <= self.size:
            raise DataError(
                f"a batch of {self.batch_size} cannot be drawn from {self.size} "
                "examples"
            )
        if self.lengths is not None and len(self.lengths) != self.size:
            raise DataError(
                f"{len(self.lengths)} lengths were given for {self.size} examples"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the padded one included."""
        return -(-self.size // self.batch_size)

    def indices(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """`index` int32 and `mask` float32 `[stop - start, batch_size]` of these steps.

        Steps count through all epochs, from 0.
        """
        return _window(self, _epoch, start, stop)

    def position(self, step: int) -> dict[str, int]:
        """Where the data stands after `step` steps, as JSON for a checkpoint."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return {"seed": self.seed, "epoch": epoch, "batch": batch}

    def check_size(self, size: int) -> None:
        """Raise DataError unless the batches are drawn from so many examples."""
        if size != self.size:
            raise DataError(
                f"there are {size:,} examples, and the batches are drawn from "
                f"{self.size:,}: Batches(len(labels), batch_size)"
            )

    def iterate(self, examples: Mapping[str, Any], epoch: int) -> Iterator[dict]:
        """Host batches of one epoch, for a loop of one's own.

        Raises:
          DataError: as `check_examples`, or of another size.
        """
        if "inputs" in examples:  # else they are for another loop than ours
            self.check_size(check_examples(examples))
        rows = _epoch(self, epoch)
        for index, mask in zip(rows["index"], rows["mask"], strict=True):
            yield {**some_of(examples, index), "index": index, "mask": mask}


@dataclass(frozen=True)
class Orders:
    """Several trainings' batches side by side, for a sweep whose trials have their own.

    Attributes:
      each: a `Batches` for each trial, alike but for its seed.
      size: examples of a trial; these three are as of any of them.
      batch_size: examples in a trial's batch.
      steps_per_epoch: batches in an epoch, the padded one included.
    """

    each: tuple[Batches, ...]

    size = property(lambda self: self.each[0].size)
    batch_size = property(lambda self: self.each[0].batch_size)
    steps_per_epoch = property(lambda self: self.each[0].steps_per_epoch)

    def indices(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """`index` and `mask` `[stop - start, trials, batch_size]`, see `Batches`."""
        return _window(self, _epoch_of_all, start, stop)

    def check_size(self, size: int) -> None:
        """See `Batches`."""
        self.each[0].check_size(size)

    def position(self, step: int) -> dict[str, Any]:
        """Where the data stands after `step` steps, as JSON for a checkpoint."""
        seeds = [batches.seed for batches in self.each]
        return {**self.each[0].position(step), "seed": seeds}


@lru_cache(maxsize=2)
def _epoch(batches: Batches, epoch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([batches.seed, epoch])
    order = rng.permutation(batches.size)
    if batches.lengths is not None:
        order = _of_like_length(order, batches, rng)
    return pad(order, batches.batch_size)


def _of_like_length(order: np.ndarray, batches: Batches, rng: np.random.Generator):
    lengths, size = np.asarray(batches.lengths), batches.batch_size
    count = len(order) // size
    # What is left for a batch that is not full are texts of any length.
    whole, rest = np.split(order, [count * size])
    together = size * max(1, min(POOL, count // 4))
    pools = np.split(whole, range(together, len(whole), together))
    # A stable sort: others put ties in another order on another processor.
    alike = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    rows = np.concatenate(alike).reshape(-1, size)
    return np.concatenate([rng.permutation(rows).ravel(), rest])


@lru_cache(maxsize=2)
def _epoch_of_all(orders: Orders, epoch: int) -> dict[str, np.ndarray]:
    rows = [_epoch(batches, epoch) for batches in orders.each]
    return {key: np.stack([row[key] for row in rows], 1) for key in rows[0]}


def _window(batches: Any, epoch_of: Any, start: int, stop: int):
    """The rows of steps that may lie in several epochs."""
    per, parts = batches.steps_per_epoch, []
    for epoch in range(start // per, -(-stop // per)):
        # Cut first: a stream asks for one step of a long epoch at a time.
        window = slice(max(start - epoch * per, 0), stop - epoch * per)
        parts.append({k: v[window] for k, v in epoch_of(batches, epoch).items()})
    return {
        key: np.concatenate([part[key] for part in parts]) for key in ("index", "mask")
    }


def pad(order: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """Rows of `batch_size` from an order; the last repeats its first entry, masked.

    >>> pad(np.arange(3), 2)["mask"]
    array([[1., 1.],
           [1., 0.]], dtype=float32)
    """
    steps = -(-len(order) // batch_size)
    at = np.arange(steps * batch_size)
    real = at < len(order)
    index = order[np.where(real, at, (steps - 1) * batch_size)].astype(np.int32)
    mask = real.astype(np.float32)
    return {k: v.reshape(steps, -1) for k, v in {"index": index, "mask": mask}.items()}
