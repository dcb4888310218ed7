# SPDX-License-Identifier: Apache-2.0
"""Does reading data from disk slow a training down?

Question: how fast is a ResNet job fed by `data.Stream` (records in an ArrayRecord
file, decoded and normalised by grain's workers, sent to the device ahead of their step)
beside the same job over data that lies on the device? And how fast does the stream read
when nothing is trained? Images of 32x32x3 are drawn at random, as PNG (which noise
makes larger and slower to decode than photographs) or raw bytes, and written to the run
directory. There is no teacher, whose forward pass would leave reading more time.

Every round measures each job once, in turns. What workers read while others were
measured is taken before the clock starts.

Expected: where a reader alone is faster than the resident job, streamed within a few
per cent of it. On a CPU readers and steps share the cores: the job pays for decoding.

  pip install 'jaxdistill[data]'
  python -m experiments.speed.streaming
  python -m experiments.speed.streaming --depth 8 --encoding raw --workers 0 1 2 4

Cost: about ten minutes on two cores; seconds with --smoke.
"""

import io
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import models, objectives, parallel, report, train
from jaxdistill.data import Batches, Stream, normalize
from jaxdistill.parallel import Kind
from jaxdistill.study import script
from jaxdistill.train import cost
from jaxdistill.train.loop import STREAMED_PER_DISPATCH

SHAPE, CLASSES = (32, 32, 3), 10


@dataclass(frozen=True)
class Config:
    """Time a ResNet job over resident data and over a stream, in turns."""

    run_dir: str = "runs/streaming"
    """where the data, the summary and the table go"""
    depth: int = 20
    """of the residual network: 6 n + 2"""
    encoding: Literal["png", "raw"] = "png"
    """how an image lies in its record"""
    workers: tuple[int, ...] = (0, 1, 2)
    """reading processes, a row of the table each; 0 is a thread"""
    ahead: int = 2
    """batches that each reads ahead"""
    images: int = 8_192
    """records in the file"""
    batch_size: int = 128
    """examples in a batch, over all devices"""
    steps: int = 32
    """steps of a job in each round"""
    rounds: int = 5
    """turns of each job; the table has their medians and ranges"""
    parallel: Kind = "auto"
    """how a step runs: a mesh where there are several devices, else jit"""
    smoke: bool = False
    """a few steps of a small job: whether it works, not how fast"""
    save: Path | None = None
    """also copy the small files there, below experiments/results"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""


SMOKE = "--depth 8 --images 64 --batch-size 8 --steps 8 --rounds 1"


def execute(config: Config) -> dict[str, Any]:
    """Runs the experiment, prints its table, returns its summary."""
    if config.steps % STREAMED_PER_DISPATCH or config.steps < 1 or config.rounds < 1:
        raise ValueError(
            f"--steps must be a multiple of {STREAMED_PER_DISPATCH}, --rounds at least "
            f"1; got {config.steps} and {config.rounds}"
        )
    run_dir = train.RunDir(config.run_dir, train.settings(config))
    summary = measure(config, Path(config.run_dir) / "images.array_record")
    run_dir.write("summary.json", summary)
    run_dir.write_bytes("table.md", table(summary).encode())
    if config.save is not None:
        report.save(run_dir.path, config.save)
    print(table(summary), run_dir, sep="\n")
    return summary


def write(path: Path, config: Config) -> dict[str, np.ndarray]:
    """Writes random images to an ArrayRecord file; returns them as examples."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image

    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (config.images, *SHAPE), np.uint8)
    labels = draw.integers(0, CLASSES, config.images).astype(np.int32)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for image, label in zip(images, labels, strict=True):
        content = io.BytesIO(image.tobytes())
        if config.encoding == "png":
            Image.fromarray(image).save(content, format="png")
        writer.write(bytes([label]) + content.getvalue())
    writer.close()
    return {"inputs": normalize(images, 0.5, 0.25), "labels": labels}


def decode_png(record: bytes) -> dict[str, Any]:
    """A label's byte and a PNG as one example."""
    from PIL import Image

    image = np.asarray(Image.open(io.BytesIO(record[1:])))
    return {"inputs": normalize(image, 0.5, 0.25), "labels": np.int32(record[0])}


def decode_raw(record: bytes) -> dict[str, Any]:
    """A label's byte and the pixels as one example."""
    image = np.frombuffer(record, np.uint8, offset=1).reshape(SHAPE)
    return {"inputs": normalize(image, 0.5, 0.25), "labels": np.int32(record[0])}


@dataclass
class Job:
    """The ResNet job; `train` goes on where it stopped."""

    config: Config
    examples: Mapping[str, np.ndarray]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self):
        config = self.config
        self.partitioner = parallel.choose(config.parallel)
        self.batches = Batches(config.images, config.batch_size)
        state, self.step = train.begin(
            models.resnet_cifar(config.depth, CLASSES),
            objectives.combine({"hard": (1.0, objectives.hard_labels())}),
            optax.sgd(0.1, momentum=0.9, nesterov=True),
            partitioner=self.partitioner,
            examples=self.examples,
        )
        self.state: Any = state

    def train(self, examples: Any, batches: Batches | Stream, start: int) -> None:
        """The configured number of steps after step `start`."""
        train.fit(
            self.state.replace(step=jnp.int32(start)),
            self.step,
            partitioner=self.partitioner,
            examples=examples,
            batches=batches,
            steps=start + self.config.steps,
            evaluate_every=STREAMED_PER_DISPATCH,
            progress=False,
        )

    def timed(self, name: str, work: Callable[[], Any]) -> None:
        """Does a job and keeps its seconds."""
        self.seconds.setdefault(name, []).append(cost.seconds(work))


def measure(config: Config, path: Path) -> dict[str, Any]:
    """Seconds of every job in every round, and what follows from them."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    job = Job(config, write(path, config))
    placed = job.partitioner.replicate(dict(job.examples))
    decode = {"png": decode_png, "raw": decode_raw}[config.encoding]
    turns: dict[str, Callable[[], Any]] = {
        "resident": lambda: job.timed(
            "resident", lambda: job.train(placed, job.batches, 0)
        )
    }
    with ExitStack() as stack:
        for workers in config.workers:
            source = ArrayRecordDataSource(str(path))
            stream = stack.enter_context(
                Stream(source, job.batches, decode, workers=workers, ahead=config.ahead)
            )
            turns |= reading(job, stream, workers)
        cost.interleave(turns, config.rounds)
    seconds = {name: times[1:] for name, times in job.seconds.items()}
    return {
        "examples": config.steps * config.batch_size,
        "seconds": seconds,
        "ratios": {
            name: cost.ratios(seconds["resident"], times)
            for name, times in seconds.items()
        },
        "setting": {
            **train.settings(config),
            "device": str(job.partitioner.devices[0].device_kind),
        },
    }


def reading(job: Job, stream: Stream, workers: int) -> dict[str, Callable[[], Any]]:
    """Two jobs over one stream: to read, and to train on what is read."""
    at = 0

    def forward(steps: int) -> int:
        nonlocal at
        for _ in range(0, steps, STREAMED_PER_DISPATCH):
            stream.indices(at, at + STREAMED_PER_DISPATCH)
            at += STREAMED_PER_DISPATCH
        return at

    # Each process holds what it reads ahead three times over: in its own buffer, in
    # the queue to this one, and in this one's.
    held = max(workers, 1) * (3 * job.config.ahead + 1)

    def read():
        forward(held)
        job.timed(f"read {workers}", lambda: forward(job.config.steps))

    def train():
        nonlocal at
        start = forward(held)
        job.timed(f"streamed {workers}", lambda: job.train({}, stream, start))
        at = start + job.config.steps

    return {f"read {workers}": read, f"streamed {workers}": train}


def table(summary: Mapping[str, Any]) -> str:
    """The rates as Markdown: medians and ranges over the rounds."""
    setting, seconds = summary["setting"], summary["seconds"]

    def rate(name: str) -> str:
        return cost.span([summary["examples"] / s for s in seconds[name]], ",.0f")

    head = "input", "reader alone, examples/s", "job, examples/s", "over resident"
    lines = [["resident", "-", rate("resident"), "-"]]
    for workers in setting["workers"]:
        name = f"workers: {workers}" if workers else "a thread"
        part = cost.span(summary["ratios"][f"streamed {workers}"], ".3f")
        read, job = rate(f"read {workers}"), rate(f"streamed {workers}")
        lines.append([name, read, job, part])
    return report.markdown_table(
        head,
        lines,
        f"Median (lowest to highest) of {setting['rounds']} rounds in turns: ResNet-"
        f"{setting['depth']}, batch {setting['batch_size']}, {setting['encoding']} "
        f"images of 32x32x3, on {setting['device']}.",
    )


main = script.command(execute, {"": Config()}, __doc__, smoke=SMOKE)

if __name__ == "__main__":
    main()
