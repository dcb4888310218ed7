# SPDX-License-Identifier: Apache-2.0
"""What a training tells of itself: a record a dispatch, of each of its networks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxdistill.train.run_dir import Run


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says at which step."""


class Journal:
    """The records of one `loop.fit`, and the last scores of an evaluation."""

    def __init__(self, log: Run | None, names: Sequence[str], steps_per_epoch: int):
        """Nothing is written yet.

        Args:
          log: where records go, or None.
          names: of a single network one; of a sweep's cells one each, or one for the
            mean of all.
          steps_per_epoch: to tell the epoch of a step.
        """
        self.log, self.names = log, tuple(names)
        self.steps_per_epoch = steps_per_epoch
        self.records: list[dict[str, float]] = []
        self.scores: dict[str, float] = {}

    def rewind(self, step: int) -> None:
        """Drops what was logged after a step: the training resumes from there."""
        if self.log is not None:
            for name in self.names:
                self.log.rewind(name, step)

    def read(self, metrics: Mapping[str, Any], start: int) -> None:
        """Takes a dispatch's metrics as this dispatch's records.

        Args:
          metrics: `{name: (sum, count)}`, each `[K]` or, of a sweep, `[K, cells]`.
          start: the step before the first of them.

        Raises:
          NonFiniteLoss: of one of the names.
        """
        metrics = jax.tree.map(np.asarray, dict(metrics))
        parts = [metrics]
        if len(self.names) > 1:
            cells = range(len(self.names))
            parts = [jax.tree.map(lambda x, i=i: x[:, i], metrics) for i in cells]
        if self.log is not None:
            self.log.dispatched(len(metrics["loss"][0]))
        each = zip(self.names, parts, strict=True)
        self.records = [_means(part, start, name) for name, part in each]

    @property
    def loss(self) -> float:
        """The mean loss of the dispatch."""
        return float(np.mean([record["loss"] for record in self.records]))

    def score(self, found: Any) -> None:
        """Adds an evaluation's scores: of one network `{name: value}`, else of each."""
        found = [found] if isinstance(found, Mapping) else list(found)
        for record, scores in zip(self.records, found, strict=True):
            record |= scores
        numbers = [k for k, v in found[0].items() if isinstance(v, int | float)]
        self.scores = {k: float(np.mean([s[k] for s in found])) for k in numbers}

    def write(self, stop: int) -> None:
        """Logs the records of the dispatch that ended at step `stop`."""
        if self.log is None:
            return
        epoch = round(stop / self.steps_per_epoch, 6)
        for name, record in zip(self.names, self.records, strict=True):
            self.log.log({"fit": name, "step": stop, "epoch": epoch, **record})


def _means(metrics: Mapping[str, Any], start: int, name: str) -> dict[str, float]:
    """Means over a dispatch, from per-step sums and counts.

    Of many cells also over these; one that diverged is left out from there on.
    """
    losses = metrics["loss"][0]
    finite = np.isfinite(losses)
    lost = np.flatnonzero(~finite.reshape(len(losses), -1).any(1))
    if len(lost):
        loss = losses[lost[0]].flat[0]
        raise NonFiniteLoss(
            f"{name}: the loss is {loss} at step {start + lost[0] + 1}; stopped, the "
            "last good checkpoint is kept (a lower learning rate or clipping may help; "
            "a label that is no class gives nan)"
        )
    record = {}
    for key, pair in metrics.items():
        sums, counts = (np.asarray(x, np.float64)[finite].sum() for x in pair)
        record[key] = float(sums / max(counts, 1e-30))
    return record
