# SPDX-License-Identifier: Apache-2.0
"""`fit`: epochs over data with evaluation, logs, checkpoints and resume."""

import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import jax
from tqdm.auto import tqdm

from jaxdistill.data import Batches, DataError, Orders, Stream
from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Parallel
from jaxdistill.train import memory
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.journal import Journal
from jaxdistill.train.run_dir import Run
from jaxdistill.types import TrainState

STEPS_PER_DISPATCH, STREAMED_PER_DISPATCH = 1000, 8


def fit(
    state: TrainState,
    step: Callable,
    *,
    run: Parallel,
    examples: Any,
    batches: Batches | Orders | Stream,
    steps: int,
    teacher: Any = None,
    evaluate: Callable[[TrainState], Any] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    log: Run | None = None,
    name: str = "fit",
    cells: Sequence[str] = (),
    steps_per_dispatch: int | None = None,
    progress: bool = True,
) -> TrainState:
    """Trains up to step `steps`, resuming where a checkpoint stands.

    The position is the step count: batches, keys and the boundaries between dispatches
    are functions of it, so a run resumed with the same settings repeats the very
    programs an uninterrupted one runs, and ends bit-identical. The host reads metrics
    once a dispatch.

    Args:
      state: a fresh state (`steps.init_state`), not placed; it stays usable.
      step: `run.compile(scan_train(train_step), batch_axis=1)`.
      run: see `parallel`.
      examples: the data set, on every device (`run.replicate`); `{}` where it is
        streamed.
      batches: which examples go into which batch; a stream, which its owner closes,
        brings them, of several processes to each its own part.
      steps: optimizer steps in all, those before a resume included.
      teacher: a placed teacher, or None.
      evaluate: `placed state -> {name: number}`, with `cells` one such of each.
      evaluate_every: steps between evaluations, an epoch if None; also after the last.
      checkpoints: where to save, or None.
      checkpoint_every: least steps between saves, None for one where a state is
        evaluated; the last state is always saved.
      log: where records go, `{"fit", "step", "epoch", ...}`.
      name: this training's name in logs and messages.
      cells: names of a sweep's cells, which have a record each and stop it where one of
        them diverges; without names, a record is the mean of those that have not.
      steps_per_dispatch: most steps in one dispatch; None is 1000, of a stream 8: the
        devices hold the batches of two dispatches.
      progress: whether to show a bar on what takes longer than two seconds.

    Returns:
      The trained state, on one device (`run.fetch`).

    Raises:
      DataError: a stream's; what was trained before it is logged and saved.
      NonFiniteLoss: naming the step; the last good checkpoint stays.
      OutOfMemory: naming a batch that would fit on the devices.
      SystemExit: after SIGTERM to any of the processes, with the state saved.
      ProcessError: there are fewer examples than processes.
    """
    processes.check_examples(batches.size)
    run.check_batch(batches.batch_size)
    every = min(evaluate_every or batches.steps_per_epoch, steps)
    restored = checkpoints and checkpoints.restore(
        state, shardings=run.shardings(state)
    )
    state, _ = restored or (state, {})
    saved = done = int(state.step)
    journal = Journal(log, cells or (name,), batches.steps_per_epoch)
    journal.rewind(done)
    state = run.place(state)
    if done >= steps:
        return run.fetch(state)
    if steps_per_dispatch is None:
        streamed = isinstance(batches, Stream)
        steps_per_dispatch = STREAMED_PER_DISPATCH if streamed else STEPS_PER_DISPATCH
    plan = list(dispatches(done, steps, every, steps_per_dispatch))
    shown = progress and processes.is_first()
    bar = tqdm(
        desc=name, total=steps, initial=done, unit="step", delay=2, disable=not shown
    )
    with (
        bar,
        _written(checkpoints),
        processes.fail_together(),
        _Preemption() as preempted,
    ):
        rows = _ahead(run, batches, next(iter(plan), None))
        for (start, stop), after in zip_longest(plan, plan[1:]):
            resident, sent = (teacher, examples), rows.result()
            try:
                state, sums = step(state, resident, sent)
                rows = _ahead(run, batches, after)
                journal.read(run.fetch(sums), start)
            except jax.errors.JaxRuntimeError as error:
                memory.explain(error, run, step, (state, resident, sent))
                raise
            bar.update(stop - start)
            bar.set_postfix(loss=f"{journal.loss:.4f}", refresh=False)
            judged = stop % every == 0 or stop == steps
            if evaluate and judged:
                journal.score(evaluate(state))
            journal.write(stop)
            due = judged
            if checkpoint_every is not None:
                due = stop == steps or stop - saved >= checkpoint_every
            # The dispatch's metrics are read: asking the others costs no more waiting.
            leave = processes.any_process(preempted.is_set())
            if checkpoints is not None and (due or leave):
                # The scores of an earlier state are not this one's.
                scores = journal.scores if judged else {}
                checkpoints.save(run.storable(state), batches.position(stop), scores)
                saved = stop
            if leave:
                _leave(name, stop, checkpoints)
    return run.fetch(state)


def _ahead(run: Parallel, batches: Any, after: tuple | None) -> Future:
    """The next dispatch's rows, sent to the devices while one runs, before its end.

    Bad data is raised by `result`: the dispatch that runs is logged and saved first.
    """
    rows: Future = Future()
    send = run.join if isinstance(batches, Stream) else run.split
    try:
        rows.set_result(after and send(batches.rows(*after), 1))
    except DataError as error:
        rows.set_exception(error)
    return rows


def interval(steps: int, evaluations: int) -> int:
    """Steps between evaluations, of which there are about so many.

    As many as divide the steps, where a number up to half as many again, or more than
    half as many, does: one shorter stretch at the end would be one more program to
    compile.

    >>> interval(100, 10)
    10
    >>> interval(78, 5)  # six, and not four of 16 steps and one of 14
    13
    >>> interval(23, 4)
    6
    """
    near = range(evaluations // 2 + 1, 3 * evaluations // 2 + 1)
    for n in sorted(near, key=lambda n: abs(n - evaluations)):
        if steps % n == 0:
            return steps // n
    return -(-steps // evaluations)


def dispatches(done: int, total: int, every: int, most: int):
    """`(start, stop)` of the dispatches after step `done`.

    Each stretch of `every` steps is cut into equal parts, of two sizes at most, and of
    one where less than twice as many can be: the boundaries do not depend on where a
    run was interrupted, and little compiles late, the last stretch where it is shorter.
    A run that other boundaries interrupted goes on from there to the next.

    >>> list(dispatches(0, 10, 5, 3))
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    >>> list(dispatches(0, 12, 6, 4))
    [(0, 3), (3, 6), (6, 9), (9, 12)]
    >>> list(dispatches(4, 12, 6, 6))
    [(4, 6), (6, 12)]
    """
    parts = -(-every // most)
    parts = next((n for n in range(parts, 2 * parts) if every % n == 0), parts)
    cuts = [every * i // parts for i in range(parts + 1)]
    for base in range(0, total, every):
        for low, high in zip(cuts, cuts[1:], strict=False):
            start, stop = max(base + low, done), min(base + high, total)
            if start < stop:
                yield start, stop


@contextmanager
def _written(checkpoints: Checkpoints | None):
    """Whatever ends a training, NaN or Ctrl-C, the last save reaches the disk."""
    try:
        yield
    finally:
        if checkpoints is not None:
            checkpoints.wait()


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
    said = f"SIGTERM: {name} stopped at step {step}, nothing saved"
    if checkpoints is not None:
        checkpoints.wait()
        said = (
            f"SIGTERM: {name} saved at step {step} in {checkpoints.path}; run the same "
            "command again to resume"
        )
    if processes.is_first():
        print(said, file=sys.stderr)
    raise SystemExit(128 + signal.SIGTERM)
