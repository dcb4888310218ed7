# SPDX-License-Identifier: Apache-2.0
"""`fit`: epochs over data with evaluation, logs, checkpoints and resume.

It logs a record a dispatch, of each network that trains (`MetricLogger`).
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from tqdm.auto import tqdm

from jaxdistill.data import Batches, DataError, Orders, Stream, check_examples
from jaxdistill.models import student
from jaxdistill.parallel import processes
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.teachers.knowledge import check_knowledge
from jaxdistill.train import memory
from jaxdistill.train.checkpoint import CheckpointError, Checkpoints
from jaxdistill.train.identity import Content, examine, logits_of, of_training
from jaxdistill.train.intervals import check_steps, dispatches
from jaxdistill.train.run_dir import RunDir
from jaxdistill.train.step import init_state, make_train_step, scan_train
from jaxdistill.types import Objective, TrainState

STEPS_PER_DISPATCH, STREAMED_PER_DISPATCH = 1000, 8
KNOWN = 1024
"""Records of a stream on which a teacher is tried."""


def begin(
    module: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    partitioner: Partitioner,
    examples: Mapping[str, Any],
    seed: int = 0,
    **options: Any,
) -> tuple[TrainState, Callable]:
    """What `fit` starts from: a module's fresh state, and its step on these devices.

    Args:
      module: see `models.student`.
      objective: see `objectives.combine`.
      optimizer: an optax transformation.
      partitioner: see `parallel`.
      examples: the first is looked at, for shapes.
      seed: of the weights that are drawn.
      options: see `make_train_step`.

    Raises:
      DataError: as `data.check_examples`.
    """
    check_examples(examples, check_finite=False)
    pure = student(module)
    first = jax.tree.map(lambda x: x[:1], dict(examples))
    first["mask"] = np.ones(1, np.float32)
    state = init_state(jax.random.key(seed), pure, optimizer, first)
    step = make_train_step(pure, objective, optimizer, **options)
    return state, partitioner.compile(scan_train(step), batch_axis=1)


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the message says at which step."""


class MetricLogger:
    """The records of one `train.fit`, and the last scores of an evaluation."""

    def __init__(
        self, run_dir: RunDir | None, names: Sequence[str], steps_per_epoch: int
    ):
        """Nothing is written yet.

        Args:
          run_dir: where records go, or None.
          names: of a single network one; of a sweep's trials one each, or one for the
            mean of all.
          steps_per_epoch: to tell the epoch of a step.
        """
        self.run_dir, self.names = run_dir, tuple(names)
        self.steps_per_epoch = steps_per_epoch
        self.records: list[dict[str, float]] = []
        self.scores: dict[str, float] = {}

    def rewind(self, step: int) -> None:
        """Drops what was logged after a step: the training resumes from there."""
        if self.run_dir is not None:
            for name in self.names:
                self.run_dir.rewind(name, step)

    def read(self, metrics: Mapping[str, Any], start: int) -> None:
        """Takes a dispatch's metrics as this dispatch's records.

        Args:
          metrics: `{name: (sum, count)}`, each `[K]` or, of a sweep, `[K, trials]`.
          start: the step before the first of them.

        Raises:
          NonFiniteLoss: of one of the names.
        """
        metrics = jax.tree.map(np.asarray, dict(metrics))
        parts = [metrics]
        if len(self.names) > 1:
            trials = range(len(self.names))
            parts = [jax.tree.map(lambda x, i=i: x[:, i], metrics) for i in trials]
        if self.run_dir is not None:
            self.run_dir.dispatched(len(metrics["loss"][0]))
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
        if self.run_dir is None:
            return
        epoch = round(stop / self.steps_per_epoch, 6)
        for name, record in zip(self.names, self.records, strict=True):
            self.run_dir.log({"fit": name, "step": stop, "epoch": epoch, **record})


def fit(
    state: TrainState,
    step: Callable,
    *,
    partitioner: Partitioner,
    examples: Any,
    batches: Batches | Orders | Stream,
    steps: int,
    teacher: Any = None,
    evaluate: Callable[[TrainState], Any] | None = None,
    evaluate_every: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int | None = None,
    run_dir: RunDir | None = None,
    name: str = "fit",
    trials: Sequence[str] = (),
    steps_per_dispatch: int | None = None,
    progress: bool = True,
    content: Content | None = None,
    check_finite: bool = True,
) -> TrainState:
    """Trains up to step `steps`, resuming where a checkpoint stands.

    The position is the step count: batches, keys and the boundaries between dispatches
    are functions of it, so a run resumed with the same settings repeats the very
    programs an uninterrupted one runs, and ends bit-identical. The host reads metrics
    once a dispatch.

    Args:
      state: a fresh state (`train.init_state`), not placed; it stays usable.
      step: `partitioner.compile(scan_train(train_step), batch_axis=1)`.
      partitioner: see `parallel`.
      examples: the data set, on every device (`partitioner.replicate`); `{}` where it
        is streamed.
      batches: which examples go into which batch; a stream, which its owner closes,
        brings them, of several processes to each its own part.
      steps: optimizer steps in all, those before a resume included.
      teacher: a placed teacher, or None.
      evaluate: `placed state -> {name: number}`, with `trials` one such of each.
      evaluate_every: steps between evaluations, an epoch if None; also after the last.
      checkpoints: where to save, or None.
      checkpoint_every: least steps between saves, None for one where a state is
        evaluated; the last state is always saved.
      run_dir: where records go, `{"fit", "step", "epoch", ...}`.
      name: this training's name in logs and messages.
      trials: names of a sweep's trials, which have a record each and stop it where one
        of them diverges; without names, a record is the mean of those that have not.
      steps_per_dispatch: most steps in one dispatch; None is 1000, of a stream 8: the
        devices hold the batches of two dispatches.
      progress: whether to show a bar on what takes longer than two seconds, and to say
        how much of the labels a teacher knows.
      content: the examples' (`identity.examine`), whose owner has checked them and the
        teacher; None checks both here.
      check_finite: see `data.check_examples`.

    Returns:
      The trained state, on one device (`partitioner.fetch`).

    Raises:
      DataError: the examples', see `data.check_examples`, or a stream's; what was
        trained before it is logged and saved.
      TeacherError: the teacher knows nothing of the labels, and is no control
        (`teachers.check_knowledge`).
      CheckpointError: the checkpoints are of another training (`train.identity`), or of
        one with more steps.
      ValueError: a number of steps that there is not.
      NonFiniteLoss: naming the step; the last good checkpoint stays.
      OutOfMemory: naming a batch that would fit on the devices.
      SystemExit: after SIGTERM to any of the processes, with the state saved.
      ProcessError: there are fewer examples than processes.
    """
    check_steps(steps, evaluate_every, checkpoint_every, steps_per_dispatch)
    given = (step, state, teacher, examples, batches, content, checkpoints)
    _admit(partitioner, *given, check_finite, progress)
    every = min(evaluate_every or batches.steps_per_epoch, steps)
    state = _resumed(state, partitioner, checkpoints, steps)
    saved = done = int(state.step)
    logger = MetricLogger(run_dir, trials or (name,), batches.steps_per_epoch)
    logger.rewind(done)
    state = partitioner.place(state)
    if done >= steps:
        return partitioner.fetch(state)
    plan = dispatches(done, steps, every, steps_per_dispatch or _usual(batches))
    with (
        _bar(name, steps, done, progress) as bar,
        _written(checkpoints),
        processes.fail_together(),
        _Preemption() as preempted,
    ):
        run = (state, (teacher, examples), batches)
        for start, stop, state in _dispatched(partitioner, step, *run, plan, logger):
            bar.update(stop - start)
            bar.set_postfix(loss=f"{logger.loss:.4f}", refresh=False)
            judged = stop % every == 0 or stop == steps
            if evaluate and judged:
                logger.score(evaluate(state))
            logger.write(stop)
            waited = checkpoint_every is not None and stop - saved >= checkpoint_every
            due = stop == steps or (judged if checkpoint_every is None else waited)
            # The dispatch's metrics are read: asking the others costs no more waiting.
            leave = processes.any_process(preempted.is_set())
            if checkpoints is not None and (due or leave):
                # The scores of an earlier state are not this one's.
                scores = logger.scores if judged else {}
                whole = partitioner.storable(state)
                checkpoints.save(whole, batches.position(stop), scores)
                saved = stop
            if leave:
                _leave(name, stop, checkpoints)
    return partitioner.fetch(state)


def _usual(batches: Batches | Orders | Stream) -> int:
    """Most steps in a dispatch: the devices hold a stream's batches."""
    streamed = isinstance(batches, Stream)
    return STREAMED_PER_DISPATCH if streamed else STEPS_PER_DISPATCH


def _admit(
    partitioner: Partitioner,
    step: Callable,
    state: TrainState,
    teacher: Any,
    examples: Any,
    batches: Batches | Orders | Stream,
    content: Content | None,
    checkpoints: Checkpoints | None,
    check_finite: bool,
    progress: bool,
) -> None:
    """Checks what a training is given, and tells its checkpoints what it is."""
    if not hasattr(batches, "indices"):
        raise DataError(
            "fit takes its batches from a data.Batches or a data.Stream, got a "
            f"{type(batches).__name__}; of a source of records, with len and [i], "
            "data.Stream makes batches that can be resumed"
        )
    processes.check_examples(batches.size)
    partitioner.check_batch(batches.batch_size)
    local = _on_one(partitioner, teacher), _on_one(partitioner, examples)
    if content is None:
        content = _examined(step, state, *local, batches, check_finite, progress)
    if checkpoints is not None and not checkpoints.identified:
        checkpoints.identify(of_training(step, state, *local, content, batches))


def _on_one(partitioner: Partitioner, tree: Any) -> Any:
    """What is placed on one device; under fsdp as it is, which may be too large."""
    there = partitioner.name == "fsdp" or not jax.tree.leaves(tree)
    return tree if there else partitioner.fetch(tree)


def _examined(
    step: Callable,
    state: TrainState,
    teacher: Any,
    examples: Any,
    batches: Batches | Orders | Stream,
    check_finite: bool,
    progress: bool,
) -> Content | None:
    """The content of resident examples; a stream checks its own as it reads them."""
    if isinstance(batches, Stream):
        if examples:
            raise DataError(
                "a stream brings its examples: give fit examples={}, got "
                f"{', '.join(map(str, examples))}"
            )
        batches.expect(logits_of(step, state, batches.some(1)))
        seen = {} if teacher is None else batches.some(KNOWN)
        check_knowledge(teacher, seen, progress=progress)
        return None
    logits = logits_of(step, state, examples)
    content = examine(examples, logits=logits, check_finite=check_finite)
    batches.check_size(content.size)
    check_knowledge(teacher, examples, progress=progress)
    return content


def _resumed(
    state: TrainState,
    partitioner: Partitioner,
    checkpoints: Checkpoints | None,
    steps: int,
) -> TrainState:
    """The state of the newest checkpoint that is whole, or the given one."""
    if checkpoints is None:
        return state
    restored = checkpoints.restore(state, shardings=partitioner.shardings(state))
    if restored is None:
        return state
    if (done := int(restored[0].step)) > steps:
        raise CheckpointError(
            f"{checkpoints.path} holds a training of {done:,} steps, more than the "
            f"{steps:,} asked for: give as many, or another folder"
        )
    return restored[0]


def _bar(name: str, steps: int, done: int, progress: bool) -> tqdm:
    hidden = not (progress and processes.is_first())
    return tqdm(
        desc=name, total=steps, initial=done, unit="step", delay=2, disable=hidden
    )


def _dispatched(
    partitioner: Partitioner,
    step: Callable,
    state: TrainState,
    resident: tuple[Any, Any],
    batches: Any,
    plan: Iterator[tuple[int, int]],
    logger: MetricLogger,
) -> Iterator[tuple[int, int, TrainState]]:
    """`(start, stop, state)` after each dispatch; the logger has its metrics."""
    after = next(plan, None)
    indices = _ahead(partitioner, batches, after)
    while after is not None:
        (start, stop), after = after, next(plan, None)
        sent = indices.result()
        try:
            state, sums = step(state, resident, sent)
            indices = _ahead(partitioner, batches, after)
            logger.read(partitioner.fetch(sums), start)
        except jax.errors.JaxRuntimeError as error:
            memory.explain(error, partitioner, step, (state, resident, sent))
            raise
        yield start, stop, state


def _ahead(partitioner: Partitioner, batches: Any, after: tuple | None) -> Future:
    """The next dispatch's batches, sent to the devices while one runs, before its end.

    Bad data is raised by `result`: the dispatch that runs is logged and saved first.
    """
    indices: Future = Future()
    send = partitioner.join if isinstance(batches, Stream) else partitioner.split
    try:
        indices.set_result(after and send(batches.indices(*after), 1))
    except DataError as error:
        indices.set_exception(error)
    return indices


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
    # The status that a shell gives a process that this signal ended.
    raise SystemExit(128 + signal.SIGTERM)


def _means(metrics: Mapping[str, Any], start: int, name: str) -> dict[str, float]:
    """Means over a dispatch, from per-step sums and counts.

    Of many trials also over these; one that diverged is left out from there on.
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
        # A term without a real entry has sum 0 and count 0: its mean is 0.
        record[key] = float(sums / max(counts, 1e-30))
    return record
