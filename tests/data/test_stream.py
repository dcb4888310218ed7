# SPDX-License-Identifier: Apache-2.0
"""A stream gives the batches of resident data, in its order, and leaves nothing."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.data import Batches, DataError, Stream, augment, normalize
from jaxdistill.objectives import combine, hard_labels
from jaxdistill.train import (
    Checkpoints,
    RunDir,
    fit,
    init_state,
    make_train_step,
    scan_train,
)
from jaxdistill.train.loop import STREAMED_PER_DISPATCH
from tests.builders import assert_identical

pytest.importorskip("grain", reason="grain is not installed")

ROOT = Path(__file__).parents[2]
SIZE, BATCH = 22, 4  # six batches an epoch, the last padded


def images(size: int = SIZE) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "images": draw.integers(0, 256, (size, 4, 4, 3), np.uint8),
        "labels": draw.integers(0, 4, size).astype(np.int32),
    }


def fails(match: str):
    """The sentence is one line and ends without a stop, as `error: ...` shows it."""
    return pytest.raises(DataError, match=rf"\A{match}\Z")


def make_scale():
    # A closure is sent to workers by value: they need not import this file and jax.
    def scale(record):
        inputs = normalize(record["images"], 0.5, 0.25)
        return {"inputs": inputs, "labels": record["labels"]}

    return scale


scale = make_scale()


EXAMPLES = {"inputs": scale(images())["inputs"], "labels": images()["labels"]}


@pytest.fixture
def no_process_left():
    assert multiprocessing.active_children() == []
    yield
    assert multiprocessing.active_children() == []


def epochs(batches: Batches, examples, count: int) -> dict[str, np.ndarray]:
    """What `Batches.iterate` gives in all epochs, step after step."""
    steps = [b for epoch in range(count) for b in batches.iterate(examples, epoch)]
    return {key: np.stack([step[key] for step in steps]) for key in steps[0]}


def assert_same(rows, expected, window=slice(None)):
    assert rows.keys() == expected.keys()
    for key, value in expected.items():
        assert rows[key].dtype == value.dtype
        np.testing.assert_array_equal(rows[key], value[window])


class TestOrder:
    @pytest.mark.parametrize(
        ("size", "batch_size"), [(22, 4), (9, 2), (8, 4), (5, 5), (1, 1)]
    )
    @pytest.mark.parametrize("seed", [0, 7])
    def test_is_that_of_the_batches(self, size, batch_size, seed):
        source, batches = images(size), Batches(size, batch_size, seed)
        expected = epochs(batches, source, 3)
        with Stream(source, batches) as stream:
            total, at = 3 * batches.steps_per_epoch, 0
            while at < total:  # windows that cross the ends of epochs
                stop = min(at + 4, total)
                assert_same(stream.indices(at, stop), expected, slice(at, stop))
                at = stop

    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_with_workers(self, workers, no_process_left):
        batches = Batches(SIZE, BATCH, seed=1)
        expected = epochs(batches, EXAMPLES, 3)
        with Stream(images(), batches, scale, workers=workers) as stream:
            assert_same(stream.indices(2, 9), expected, slice(2, 9))
            assert_same(stream.indices(9, 18), expected, slice(9, 18))
            assert len(multiprocessing.active_children()) == workers

    def test_any_step_may_come_next(self):
        batches = Batches(SIZE, BATCH)
        expected = epochs(batches, EXAMPLES, 2)
        with Stream(images(), batches, scale, threads=3) as stream:
            for start, stop in [(7, 9), (0, 1), (11, 12), (9, 11), (11, 12)]:
                assert_same(stream.indices(start, stop), expected, slice(start, stop))

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_parts_make_up_the_batch(self, count):
        batches = Batches(SIZE, BATCH)
        parts = []
        for index in range(count):
            with Stream(images(), batches, scale, part=(index, count)) as stream:
                parts.append(stream.indices(3, 9))
                assert stream.batch_size == BATCH
        rows = {k: np.concatenate([p[k] for p in parts], axis=1) for k in parts[0]}
        assert_same(rows, epochs(batches, EXAMPLES, 2), slice(3, 9))

    def test_a_part_reads_its_own_records_and_padding_once(self):
        read = []

        class Source:
            def __len__(self):
                return SIZE

            def __getitem__(self, i):
                read.append(i)
                return {"labels": i}

        batches = Batches(SIZE, BATCH)
        with Stream(Source(), batches, part=(1, 2)) as stream:
            stream.indices(5, 7)
        padded, whole = batches.indices(5, 7)["index"][:, 2:].tolist()
        assert padded[0] == padded[1]
        assert read[:3] == [padded[0], *whole]

    def test_nested_inputs(self):
        class Source:
            def __len__(self):
                return 3

            def __getitem__(self, i):
                return {"inputs": {"ids": np.full(2, i), "more": i}, "labels": -i}

        batches = Batches(3, 2)
        with Stream(Source(), batches) as stream:
            rows = stream.indices(0, 2)
        index = batches.indices(0, 2)["index"]
        np.testing.assert_array_equal(rows["inputs"]["ids"][..., 1], index)
        np.testing.assert_array_equal(rows["inputs"]["more"], index)
        np.testing.assert_array_equal(rows["labels"], -index)

    def test_position_is_the_batches(self):
        batches = Batches(SIZE, BATCH, seed=3)
        stream = Stream(images(), batches)
        assert stream.position(8) == batches.position(8)
        assert stream.steps_per_epoch == 6


class TestSources:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_array_record(self, workers, tmp_path):
        module = pytest.importorskip("array_record.python.array_record_module")
        sources = pytest.importorskip("array_record.python.array_record_data_source")
        path, source = str(tmp_path / "images.array_record"), images()
        writer = module.ArrayRecordWriter(path, "group_size:1")
        for image, label in zip(source["images"], source["labels"], strict=True):
            writer.write(bytes([label]) + image.tobytes())
        writer.close()

        def decode(record: bytes):
            values = np.frombuffer(record, np.uint8)
            image = {"images": values[1:].reshape(4, 4, 3)}
            return scale({**image, "labels": values[0].astype(np.int32)})

        batches = Batches(SIZE, BATCH)
        records = sources.ArrayRecordDataSource(path)
        with Stream(records, batches, decode, workers=workers) as stream:
            assert_same(stream.indices(0, 6), epochs(batches, EXAMPLES, 1))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_tfds(self, workers, tmp_path):
        tfds = pytest.importorskip("tensorflow_datasets", reason="no TFDS")
        pytest.importorskip("array_record", reason="array_record is not installed")
        from tensorflow_datasets.core import registered

        with registered.skip_registration():

            class Small(tfds.core.GeneratorBasedBuilder):
                VERSION = tfds.core.Version("1.0.0")

                def _info(self):
                    features = tfds.features.FeaturesDict(
                        {
                            "image": tfds.features.Image(shape=(4, 4, 3)),
                            "label": tfds.features.ClassLabel(num_classes=4),
                        }
                    )
                    return tfds.core.DatasetInfo(builder=self, features=features)

                def _split_generators(self, dl_manager):
                    return {"train": self._generate_examples()}

                def _generate_examples(self):
                    from PIL import Image

                    source = images()
                    pairs = zip(source["images"], source["labels"], strict=True)
                    for i, (image, label) in enumerate(pairs):
                        yield i, {"image": Image.fromarray(image), "label": int(label)}

        builder = Small(data_dir=tmp_path, file_format="array_record")
        builder.download_and_prepare()
        source = builder.as_data_source("train")
        records = [source[i] for i in range(SIZE)]  # TFDS shuffles as it writes
        examples = {
            "inputs": np.stack([record["image"] for record in records]),
            "labels": np.array([record["label"] for record in records]),
        }
        assert sorted(examples["labels"]) == sorted(images()["labels"])

        def decode(record):
            return {"inputs": record["image"], "labels": record["label"]}

        batches = Batches(SIZE, BATCH, seed=2)
        with Stream(source, batches, decode, workers=workers) as stream:
            assert_same(stream.indices(0, 6), epochs(batches, examples, 1))


class TestErrors:
    def test_a_text_that_is_all_padding_is_named(self):
        bad = int(Batches(SIZE, BATCH).indices(4, 5)["index"][0, 1])
        keep = np.ones((SIZE, 2), np.int32)
        keep[bad] = 0
        source = {"ids": np.zeros((SIZE, 2), np.int32), "keep": keep}

        def transform(record):
            inputs = {"input_ids": record["ids"], "attention_mask": record["keep"]}
            return {"inputs": inputs}

        with Stream(source, Batches(SIZE, BATCH), transform) as stream:
            stream.indices(0, 4)
            with fails(f"record {bad} cannot .*: DataError: row 0 is all padding: .*"):
                stream.indices(4, 5)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_record_that_fails_is_named(self, workers, no_process_left):
        bad = int(Batches(SIZE, BATCH).indices(4, 5)["index"][0, 1])

        def transform(record):
            if record["labels"] == -1:
                raise OSError("truncated\nin two lines")
            return record

        source = images()
        source["labels"][bad] = -1
        with Stream(source, Batches(SIZE, BATCH), transform, workers=workers) as stream:
            stream.indices(0, 4)
            with fails(
                f"record {bad} cannot be read or transformed: OSError: truncated"
            ):
                stream.indices(4, 6)
            assert multiprocessing.active_children() == []

    def test_a_damaged_file(self, tmp_path):
        module = pytest.importorskip("array_record.python.array_record_module")
        sources = pytest.importorskip("array_record.python.array_record_data_source")
        path = tmp_path / "damaged.array_record"
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        draw = np.random.default_rng(0)
        for i in range(64):
            writer.write(bytes([i]) + draw.bytes(5000))
        writer.close()
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        source = sources.ArrayRecordDataSource(str(path))
        with (
            Stream(source, Batches(64, 8), lambda r: {"inputs": r[0]}) as stream,
            fails(r"record \d+ cannot be read or transformed: .*"),
        ):
            stream.indices(0, 8)

    def test_records_of_unequal_shape(self):
        bad = int(Batches(SIZE, BATCH).indices(0, 1)["index"][0, 2])

        def transform(record):
            wide = record["labels"] == -1
            return {"inputs": np.zeros((3, 2 if wide else 1))}

        source = images()
        source["labels"][bad] = -1
        with (
            Stream(source, Batches(SIZE, BATCH), transform) as stream,
            fails(
                rf"record {bad} gives arrays of shapes {{'inputs': \(3, 2\)}}, record "
                r"\d+ of {'inputs': \(3, 1\)}: a batch needs the same of all"
            ),
        ):
            stream.indices(0, 1)

    def test_batches_of_unequal_shape(self):
        first = set(Batches(8, 4).indices(0, 1)["index"][0].tolist())
        source = {"labels": np.arange(8)}
        transform = lambda r: {"inputs": np.zeros(2 - (r["labels"] in first))}  # noqa: E731
        with (
            Stream(source, Batches(8, 4), transform) as stream,
            fails(
                r"reading stopped in steps 0 to 2: a batch has shape \(4, 2\), one "
                r"before \(4, 1\)"
            ),
        ):
            stream.indices(0, 2)

    def test_a_worker_that_dies_is_no_hang(self, no_process_left):
        with Stream(images(), Batches(SIZE, BATCH), workers=1) as stream:
            stream.indices(0, 2)
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            with fails(r"reading stopped in steps \d+ to \d+: .*exit code -9.*"):
                for at in range(2, 100):
                    stream.indices(at, at + 1)

    def test_what_cannot_be_sent_to_a_worker(self, no_process_left):
        lock = multiprocessing.get_context("spawn").Lock()
        transform = lambda record: record if lock else None  # noqa: E731
        with (
            Stream(images(), Batches(SIZE, BATCH), transform, workers=1) as stream,
            fails("reading stopped in steps 0 to 1: .*inheritance.*"),
        ):
            stream.indices(0, 1)

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"part": (2, 2)}, "part 2 of 2 of a batch of 4: .*"),
            ({"part": (-1, 2)}, "part -1 of 2 of a batch of 4: .*"),
            ({"part": (0, 3)}, "part 0 of 3 of a batch of 4: the parts .* are equal"),
            ({"workers": -1}, "-1 workers, 1 threads, 2 batches ahead: .*"),
            ({"ahead": 0}, "0 workers, 1 threads, 0 batches ahead: .* are needed"),
        ],
    )
    def test_senseless_settings(self, settings, sentence):
        with fails(sentence):
            Stream(images(), Batches(SIZE, BATCH), **settings)

    @pytest.mark.parametrize(("start", "stop"), [(2, 2), (3, 2), (-1, 1)])
    def test_no_steps(self, start, stop):
        with (
            Stream(images(), Batches(SIZE, BATCH)) as stream,
            fails(f"there are no steps from {start} to {stop}"),
        ):
            stream.indices(start, stop)

    def test_a_source_of_another_size(self):
        with fails("the source has 22 records, the batches are of 21"):
            Stream(images(), Batches(21, BATCH))

    def test_grain_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "grain", None)
        with (
            Stream(images(), Batches(SIZE, BATCH)) as stream,
            fails(r"streaming needs grain \(pip install 'jaxdistill\[data\]'\)"),
        ):
            stream.indices(0, 1)


class Job:
    """A small training over a stream, or over the same examples on the device."""

    def __init__(self, kind="jit", workers=0, streamed=True, augment=None):
        self.batches = Batches(SIZE, 8 if kind != "jit" else BATCH)
        self.partitioner = parallel.choose(kind, jax.devices()[:8])
        student = models.student(models.MLP((5, 4), dropout=0.5))
        optimizer = optax.adam(0.1)
        objective = combine({"hard": (1.0, hard_labels())})
        step = make_train_step(student, objective, optimizer, augment=augment)
        self.step = self.partitioner.compile(scan_train(step), batch_axis=1)
        example = next(self.batches.iterate(EXAMPLES, 0))
        self.state = init_state(jax.random.key(0), student, optimizer, example)
        self.stream = Stream(images(), self.batches, scale, workers=workers)
        self.streamed = streamed

    def fit(self, steps=18, **settings):
        settings = {"steps_per_dispatch": 4, "progress": False, **settings}
        with self.stream:
            return fit(
                self.state,
                self.step,
                partitioner=self.partitioner,
                examples={} if self.streamed else self.partitioner.place(EXAMPLES),
                batches=self.stream if self.streamed else self.batches,
                steps=steps,
                **settings,
            )


class TestFit:
    @pytest.mark.parametrize("kind", ["jit", "mesh", "pmap"])
    def test_equals_resident_data(self, kind):
        """Bit for bit: the gather that XLA compiles into one of the two is a copy."""
        resident = Job(kind, streamed=False).fit()
        assert_identical(Job(kind).fit(), resident)

    def test_with_workers_and_augmentation(self, no_process_left):
        both = augment.chain(augment.shift(1, 0.0), augment.flip())
        resident = Job(streamed=False, augment=both).fit()
        assert_identical(Job(workers=2, augment=both).fit(), resident)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_resumes_in_the_middle_of_an_epoch(self, workers, tmp_path):
        whole = Job().fit()

        def fail_at_8(state):
            if int(state.step) == 8:
                raise KeyboardInterrupt
            return {}

        cadence = {"evaluate_every": 4, "evaluate": fail_at_8}
        with pytest.raises(KeyboardInterrupt):
            Job(workers=workers).fit(checkpoints=Checkpoints(tmp_path), **cadence)
        assert multiprocessing.active_children() == []
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.steps() == [4]
        job = Job(workers=workers)
        _, position = checkpoints.restore(job.state)
        assert position == {"seed": 0, "epoch": 0, "batch": 4}
        resumed = job.fit(checkpoints=checkpoints, evaluate_every=4)
        assert_identical(resumed, whole)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_bad_data_ends_it_after_what_was_good_is_saved(
        self, workers, tmp_path, no_process_left
    ):
        job = Job(workers=workers)
        bad = int(job.batches.indices(5, 6)["index"][0, 0])
        source = images()
        source["labels"][bad] = -1

        def transform(record):
            if record["labels"] < 0:
                raise ValueError("no label")
            return record

        job.stream = Stream(
            {**EXAMPLES, "labels": source["labels"]},
            job.batches,
            transform,
            workers=workers,
        )
        run_dir, checkpoints = (
            RunDir(tmp_path, {}),
            Checkpoints(tmp_path / "checkpoints"),
        )
        sentence = f"record {bad} cannot be read or transformed: ValueError: no label"
        with fails(sentence):
            job.fit(run_dir=run_dir, checkpoints=checkpoints, checkpoint_every=1)
        assert [record["step"] for record in run_dir.records] == [3]
        assert checkpoints.steps() == [3]

    def test_the_next_batches_are_read_before_the_last_results_are_waited_for(self):
        job, seen = Job(), []
        rows, step, fetch = job.stream.indices, job.step, job.partitioner.fetch

        def spy(name, function):
            def call(*arguments):
                seen.append((name, *(a for a in arguments if isinstance(a, int))))
                return function(*arguments)

            return call

        job.stream.indices = spy("read", rows)
        job.step = spy("step", step)
        job.partitioner = parallel.Partitioner(
            **{**vars(job.partitioner), "fetch": spy("fetch", fetch)}
        )
        job.fit(steps=9, steps_per_dispatch=3)
        assert seen == [
            ("read", 0, 3),
            ("step",),
            ("read", 3, 6),
            ("fetch",),
            ("step",),
            ("read", 6, 9),
            ("fetch",),
            ("step",),
            ("fetch",),
            ("fetch",),
        ]

    def test_a_dispatch_is_short_unless_told(self):
        job, seen = Job(), []
        rows = job.stream.indices

        def spy(start, stop):
            seen.append(stop - start)
            return rows(start, stop)

        job.stream.indices = spy
        job.fit(steps=60, evaluate_every=60, steps_per_dispatch=None)
        assert sum(seen) == 60
        assert max(seen) <= STREAMED_PER_DISPATCH == 8


SCRIPT = """
import signal
import sys
import time
import numpy as np
from pathlib import Path
from jaxdistill.data import Batches, Stream

if __name__ == "__main__":
    # A shell's background job inherits that Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    source = {"inputs": np.zeros((64, 8), np.float32)}
    with Stream(source, Batches(64, 8), workers=2) as stream:
        at = 0
        while True:
            stream.indices(at, at + 2)
            at += 2
            Path(sys.argv[1]).touch()
            time.sleep(0.1)  # a step: Python drops a Ctrl-C that falls into a __del__
"""


class TestProcesses:
    """Whatever ends a training, its workers end with it."""

    @pytest.fixture
    def script(self, tmp_path):
        (tmp_path / "script.py").write_text(SCRIPT)
        ready = tmp_path / "ready"
        process = subprocess.Popen(
            [sys.executable, tmp_path / "script.py", ready],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        wait_until(ready.exists, 60)
        yield process
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        process.stderr.close()

    def test_interrupted_from_the_keyboard(self, script):
        # One that falls into a __del__ is lost: press again, but not into the end that
        # the first began, which is slow on a busy machine.
        for _ in range(3):
            os.killpg(script.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = script.communicate(timeout=60)[1]
                break
        wait_until(lambda: not alive(script.pid), 10)
        assert script.returncode == -signal.SIGINT
        assert said.count("Traceback") == said.count("KeyboardInterrupt") == 1

    def test_killed(self, script):
        script.kill()
        script.wait(10)
        wait_until(lambda: not alive(script.pid), 10)

    def test_workers_wait_for_what_their_parent_does_about_sigterm(self, script):
        workers = children(script.pid)
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        time.sleep(1)
        assert script.poll() is None
        assert sorted(children(script.pid)) == sorted(workers)
        script.terminate()
        script.wait(10)
        wait_until(lambda: not alive(script.pid), 10)


def wait_until(done, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit
        time.sleep(0.05)


def alive(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    tasks = list(Path(f"/proc/{pid}/task").glob("*/children"))
    if not tasks:
        pytest.skip("this system does not list a process's children")
    return [
        int(child)
        for task in tasks  # a thread of grain's has started them
        for child in task.read_text().split()
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
