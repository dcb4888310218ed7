# SPDX-License-Identifier: Apache-2.0
"""Batches of data that do not fit into memory, read ahead by worker processes.

    with Stream(source, Batches(len(source), 128), transform, workers=2) as stream:
        fit(state, step, run=run, examples={}, batches=stream, ...)

The order is that of `Batches`, a function of the step alone: a run that streams sees
the examples that a run over resident data sees, and resumes from its step.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from multiprocessing import parent_process
from typing import Any

import numpy as np

from jaxdistill.data.batches import Batches
from jaxdistill.data.examples import DataError, check_examples, check_inputs

STEPS = 2**31 - 1
"""More than a training can have: its step is an int32."""


class Stream:
    """What `Batches` is for resident data, with the examples themselves in the rows.

    A script that has workers needs `if __name__ == "__main__":` around what it runs:
    each worker imports it.
    """

    def __init__(
        self,
        source: Any,
        batches: Batches,
        transform: Callable[[Any], Mapping[str, Any]] | None = None,
        *,
        workers: int = 0,
        threads: int = 1,
        ahead: int = 2,
        part: tuple[int, int] = (0, 1),
        check_finite: bool = True,
    ):
        """Nothing is read and no process started before the first rows are asked for.

        Args:
          source: records by position: `len(source)` and `source[i]`, or faster
            `source.__getitems__([i, ...])`, as of a TFDS `data_source` or an
            ArrayRecord file. A mapping of arrays `[N, ...]` is one, too.
          batches: which records go into which batch.
          transform: from a record to one example, `inputs`, `labels` and what else a
            batch has, all of one shape; None where records are examples.
          workers: processes that read and transform; 0 is threads of this process.
            Source and transform are copied into each.
          threads: that do so in each process, for sources that wait for a network.
          ahead: batches that a process reads ahead.
          part: `(i, n)`, read the i-th of n equal parts of every batch, in order; of
            several hosts each reads its own.
          check_finite: see `data.check_examples`.

        Raises:
          DataError: a source of another size, or a part that there is not.
        """
        source = Arrays(source) if isinstance(source, Mapping) else source
        index, count = part
        if len(source) != batches.size:
            raise DataError(
                f"the source has {len(source)} records, the batches are of "
                f"{batches.size}"
            )
        if not 0 <= index < count or batches.batch_size % count:
            raise DataError(
                f"part {index} of {count} of a batch of {batches.batch_size}: the "
                "parts count from 0 and are equal"
            )
        if workers < 0 or threads < 1 or ahead < 1:
            raise DataError(
                f"{workers} workers, {threads} threads, {ahead} batches ahead: at "
                "least 0, 1 and 1 are needed"
            )
        size = batches.batch_size // count
        columns = slice(index * size, (index + 1) * size)
        self.batches, self.position = batches, batches.position
        self.size, self.batch_size = batches.size, batches.batch_size
        self.steps_per_epoch = batches.steps_per_epoch
        self._reader = _Reader(
            source, transform, batches, columns, check_finite=check_finite
        )
        self._workers, self._threads, self._ahead = workers, threads, ahead
        self._iterator: Any = None
        self._at = 0

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def indices(self, start: int, stop: int) -> dict[str, Any]:
        """Batches as arrays `[stop - start, B, ...]`, with `index` and `mask`.

        Reading goes on where the last call stopped; another `start` begins anew there.

        Raises:
          DataError: a record cannot be read or transformed, is nothing that a step can
            use (`check_examples`), or has another form than others of its batch; it is
            named. Or a worker has died, or no step is asked for.
        """
        if not 0 <= start < stop:
            raise DataError(f"there are no steps from {start} to {stop}")
        try:
            if self._iterator is None or start != self._at:
                self._open(start)
            steps = _collect(self._iterator, stop - start)
        # Ctrl-C too: whatever ends the reading, no worker may be left.
        except BaseException as error:
            self.close()
            if not isinstance(error, Exception):
                raise
            reason = str(error).split("\n")[0]  # Grain adds lines of its own.
            if not isinstance(error, DataError):
                reason = f"reading stopped in steps {start} to {stop}: {reason}"
            raise DataError(reason) from error
        self._at = stop
        order = self.batches.indices(start, stop)
        mine = {key: value[:, self._reader.columns] for key, value in order.items()}
        return {**steps, **mine}

    def expect(self, logits: Sequence[int] | None) -> None:
        """Refuses, from the next reading on, labels that fit no such logits.

        Args:
          logits: the shape `[..., C]` of one example's, or None; `train.fit` knows it.
        """
        self.close()
        self._reader = replace(self._reader, logits=logits)

    def some(self, count: int) -> dict[str, Any]:
        """At most `count` examples, spread over the source, as arrays `[N, ...]`.

        They are read here, by none of the workers.

        Raises:
          DataError: as `indices`.
        """
        size = min(count, self.size)
        return self._reader.stacked([i * self.size // size for i in range(size)])

    def close(self) -> None:
        """Ends the workers and drops what they have read."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator.close()

    def _open(self, start: int) -> None:
        self.close()
        try:
            import grain
            from absl import flags
        except ImportError as error:
            raise DataError(
                "streaming needs grain (pip install 'jaxdistill[data]')"
            ) from error
        # Grain reads its options from absl's flags, which only absl's own main parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        reader = replace(self._reader, start=start)
        # Grain uses no more threads than its buffer has places, and warns.
        ahead = max(self._ahead, self._threads)
        steps = grain.MapDataset.source(reader).to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
        )
        if self._workers:
            options = grain.MultiprocessingOptions(self._workers, self._ahead)
            steps = steps.mp_prefetch(options, worker_init_fn=_serve)
        self._iterator, self._at = iter(steps), start


@dataclass(frozen=True)
class Arrays:
    """A mapping of arrays `[N, ...]` as a source of N records."""

    examples: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.examples.values())))

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {key: value[position] for key, value in self.examples.items()}


@dataclass(frozen=True)
class _Reader:
    """The examples of each step from `start` on: grain's source, sent to its workers.

    A record of grain's is a whole batch: sources read many records faster than one, and
    between processes one large array is cheaper than many small.
    """

    source: Any
    transform: Callable[[Any], Mapping[str, Any]] | None
    batches: Batches
    columns: slice
    start: int = 0
    check_finite: bool = True
    logits: Sequence[int] | None = None

    def __len__(self) -> int:
        return STEPS - self.start

    def __getitem__(self, after: int) -> dict[str, Any]:
        step = self.start + after
        index = self.batches.indices(step, step + 1)["index"][0, self.columns].tolist()
        return self.stacked(index)

    def stacked(self, index: list[int]) -> Any:
        """The examples at these positions as a batch, checked."""
        # Padding repeats a record: it is read once.
        positions = list(dict.fromkeys(index))
        examples = dict(zip(positions, self._examples(positions), strict=True))
        try:
            batch = _map(lambda *xs: np.stack(xs), *(examples[i] for i in index))
        except (KeyError, TypeError, ValueError) as error:
            raise _mismatch(examples) from error
        if "inputs" in batch:  # else it is for a loop of one's own
            self._check(batch, examples)
        return batch

    def _check(self, batch: Any, examples: Mapping[int, Mapping[str, Any]]) -> None:
        """Raise DataError, naming the record, unless a step can use the batch."""
        check = partial(
            check_examples,
            logits=self.logits,
            check_finite=self.check_finite,
            whole=False,
        )
        try:
            check(batch)
        except DataError as error:
            for position, example in examples.items():
                alone = _map(lambda x: np.asarray(x)[None], example)
                try:
                    check(alone)
                except DataError as reason:
                    raise DataError(f"record {position}: {reason}") from error
            raise

    def _examples(self, positions: list[int]) -> list[Mapping[str, Any]]:
        try:
            if hasattr(self.source, "__getitems__"):
                records = self.source.__getitems__(positions)
            else:
                records = [self.source[i] for i in positions]
            return [self._transformed(record) for record in records]
        except Exception:
            # Once more, one at a time, to name the record that fails.
            return [self._example(i) for i in positions]

    def _example(self, position: int) -> Mapping[str, Any]:
        try:
            return self._transformed(self.source[position])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise DataError(
                f"record {position} cannot be read or transformed: {reason}"
            ) from error

    def _transformed(self, record: Any) -> Mapping[str, Any]:
        example = record if self.transform is None else self.transform(record)
        if isinstance(example, Mapping):
            check_inputs(example.get("inputs"))
        return example


def _map(function: Callable, *trees: Any) -> Any:
    """`function` of the arrays that stand at the same keys of nested mappings."""
    if isinstance(trees[0], Mapping):
        keys = trees[0]
        return {key: _map(function, *(tree[key] for tree in trees)) for key in keys}
    return function(*trees)


def _collect(iterator: Iterator, count: int) -> Any:
    """The next batches in arrays with a leading axis `[count]`."""
    first = next(iterator)
    steps = _map(lambda x: np.empty((count, *x.shape), x.dtype), first)
    # Copied as they come: what workers send lies in shared memory, of which a
    # container has little.
    for i, batch in enumerate(chain([first], islice(iterator, count - 1))):
        _map(lambda into, x, i=i: _copy(into[i], x), steps, batch)
    return steps


def _copy(into: np.ndarray, batch: np.ndarray) -> None:
    if batch.shape != into.shape:
        raise ValueError(f"a batch has shape {batch.shape}, one before {into.shape}")
    into[...] = batch


def _mismatch(examples: Mapping[int, Mapping[str, Any]]) -> DataError:
    """The sentence about examples of one batch that have not the same form."""
    shapes = {i: _map(np.shape, example) for i, example in examples.items()}
    first, shape = next(iter(shapes.items()))
    other = next((i for i in shapes if shapes[i] != shape), first)
    return DataError(
        f"record {other} gives arrays of shapes {shapes[other]}, record {first} of "
        f"{shape}: a batch needs the same of all"
    )


def _serve(worker: int, workers: int) -> None:
    """Makes a worker live as long as its parent: no shorter, and no longer."""
    del worker, workers
    # Ctrl-C and a machine's shutdown reach every process: the parent decides, which
    # may still want batches, to save at the end of a dispatch.
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)

    def leave_with_parent():
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
