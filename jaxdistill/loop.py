# SPDX-License-Identifier: Apache-2.0
"""`fit`: epochs over resident data with evaluation, logs, checkpoints and resume."""

import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from jaxdistill.checkpoint import Checkpoints
from jaxdistill.data.batches import Batches
from jaxdistill.parallel import Parallel
from jaxdistill.runs import Run
from jaxdistill.types import TrainState

STEPS_PER_DISPATCH = 1000


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says at which step."""


def fit(
    state: TrainState,
    step: Callable,
    *,
    run: Parallel,
    examples: Any,
    batches: Batches,
    epochs: int,
    teacher: Any = None,
    evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
    evaluate_every: int = 1,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    log: Run | None = None,
    name: str = "fit",
    steps_per_dispatch: int = STEPS_PER_DISPATCH,
    progress: bool = True,
) -> TrainState:
    """Trains to the end of the last epoch, resuming where a checkpoint stands.

    The position is the step count: batches, keys and the boundaries between dispatches
    are functions of it, so a resumed run repeats the very programs an uninterrupted one
    runs, and ends bit-identical. The host reads metrics once a dispatch.

    Args:
      state: a fresh state (`steps.init_state`), not placed; it stays usable.
      step: `run.compile(scan_train(train_step), batch_axis=1)`.
      run: see `parallel`.
      examples: the data set, placed (`run.place`).
      batches: which examples go into which batch.
      epochs: epochs in all, those before a resume included.
      teacher: a placed teacher, or None.
      evaluate: `placed state -> {name: number}`, after every `evaluate_every` epochs and
        the last.
      checkpoints: where to save, or None.
      checkpoint_every: steps between saves, an epoch if None; the last is always saved.
      log: where records go, `{"fit", "step", "epoch", ...}`.
      name: this training's name in logs and messages.
      steps_per_dispatch: most steps in one dispatch.
      progress: whether to show a bar on what takes longer than two seconds.

    Returns:
      The trained state, on one device (`run.fetch`).

    Raises:
      NonFiniteLoss: naming the step; the last good checkpoint stays.
      SystemExit: after SIGTERM, with the state saved.
    """
    run.check_batch(batches.batch_size)
    per_epoch = batches.steps_per_epoch
    total = epochs * per_epoch
    restored = None if checkpoints is None else checkpoints.restore(state)
    state, _ = restored or (state, {})
    done = int(state.step)
    if log is not None:
        log.rewind(name, done)
    if done >= total:
        return state
    state = run.place(state)
    every, saved, scores = checkpoint_every or per_epoch, done, {}
    bar = tqdm(
        desc=name, total=total, initial=done, unit="step", delay=2, disable=not progress
    )
    with bar, _Preemption() as preempted:
        for start, stop in dispatches(done, total, per_epoch, steps_per_dispatch):
            epoch = start // per_epoch
            window = slice(start - epoch * per_epoch, stop - epoch * per_epoch)
            rows = {key: value[window] for key, value in batches.rows(epoch).items()}
            state, sums = step(state, (teacher, examples), run.split(rows, 1))
            record = _record(run.fetch(sums), start, name)
            bar.update(stop - start)
            bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
            ends = stop % per_epoch == 0
            if ends and evaluate and ((epoch + 1) % evaluate_every == 0 or stop == total):
                scores = dict(evaluate(state))
                record |= scores
            if log is not None:
                log.log({"fit": name, "step": stop, "epoch": stop / per_epoch, **record})
            due = stop == total or stop - saved >= every or preempted.is_set()
            if checkpoints is not None and due:
                position = {"epoch": stop // per_epoch, "batch": stop % per_epoch}
                checkpoints.save(run.fetch(state), position, _numbers(scores))
                saved = stop
            if preempted.is_set() and stop < total:
                _leave(name, stop, checkpoints)
    if checkpoints is not None:
        checkpoints.wait()
    return run.fetch(state)


def dispatches(done: int, total: int, per_epoch: int, most: int):
    """`(start, stop)` of the dispatches after step `done`.

    An epoch is cut into equal parts (of two sizes at most), so that boundaries do not
    depend on where a run was interrupted and nothing compiles after the first epoch.

    >>> list(dispatches(0, 10, 5, 3))
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    parts = -(-per_epoch // most)
    cuts = [per_epoch * i // parts for i in range(parts + 1)]
    for base in range(0, total, per_epoch):
        for low, high in zip(cuts, cuts[1:], strict=False):
            if base + low >= done:
                yield base + low, base + high


def _record(metrics: Mapping[str, Any], start: int, name: str) -> dict[str, float]:
    """Means over a dispatch, from per-step sums and counts."""
    losses = np.asarray(metrics["loss"][0])
    if not np.isfinite(losses).all():
        at = start + int(np.argmin(np.isfinite(losses))) + 1
        raise NonFiniteLoss(
            f"{name}: the loss is {losses[at - start - 1]} at step {at}; stopped, the last "
            "good checkpoint is kept (try a lower learning rate or gradient clipping)"
        )
    record = {}
    for key, (sums, counts) in metrics.items():
        count = np.asarray(counts, np.float64).sum()
        record[key] = float(np.asarray(sums, np.float64).sum() / max(count, 1e-30))
    return record


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in scores.items() if isinstance(v, int | float)}


class _Preemption:
    """Turns SIGTERM into a flag while a training runs in the main thread."""

    def __enter__(self) -> threading.Event:
        event = threading.Event()
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._old = signal.signal(signal.SIGTERM, lambda *_: event.set())
        return event

    def __exit__(self, *_) -> None:
        if self._main:
            signal.signal(signal.SIGTERM, self._old)


def _leave(name: str, step: int, checkpoints: Checkpoints | None) -> None:
    if checkpoints is None:
        print(f"SIGTERM: {name} stopped at step {step}, nothing saved", file=sys.stderr)
    else:
        checkpoints.wait()
        print(
            f"SIGTERM: {name} saved at step {step} in {checkpoints.path}; run the same "
            "command again to resume",
            file=sys.stderr,
        )
    raise SystemExit(128 + signal.SIGTERM)
