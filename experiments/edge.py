# SPDX-License-Identifier: Apache-2.0
"""How small may a student be, and what does its teacher buy at each size?

Question: students of falling size on MNIST and Fashion-MNIST, from scratch and
distilled, as floats and in eight bits: which accuracy for how many bytes and
microseconds? At the smallest, where eight bits cost most: what does training in eight
bits recover, and does the teacher help there too?

  teacher       A small convolutional network.
  scratch_W     An MLP with one hidden layer of W units, on the labels.
  distilled_W   The same on the teacher's soft targets, and the labels.
  ..._int8      Weights and activations of the trained network rounded, their ranges
                taken from training images (post-training static quantisation).
  ..._aware     Trained in eight bits from the start (`quantize.quantized`; Jacob et al.
                2018, Quantization and Training of Neural Networks for Efficient
                Integer-Arithmetic-Only Inference), then rounded as the others.

Every row is an ONNX file: its accuracy is what ONNX Runtime answers on the test images,
its size that of the file, its latency that of one raw image on one thread: the median
of fresh processes, which take turns once everything is trained. Size and latency are
those of the first seed. Nothing is tuned; all students take the same steps, last epoch.

  python -m experiments.edge --data-dir ~/mnist
  python -m experiments.edge --preset fashion_mnist --data-dir ~/fashion_mnist
  python -m experiments.edge --preset digits --smoke

Needs jaxdistill[onnx,quantize]. Cost: an estimated quarter of an hour a data set on two
cores, not yet measured; two minutes with --smoke.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optax

from jaxdistill import (
    data,
    deployment,
    export,
    failures,
    models,
    parallel,
    report,
    runtimes,
    saved,
)
from jaxdistill.evaluate import Evaluator
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.quantize import quantized
from jaxdistill.runs import Run, parse, settings
from jaxdistill.study import Row, Study
from jaxdistill.teachers import Live


@dataclass(frozen=True)
class Config:
    """Train, distil, quantise and measure students of falling size."""

    preset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    """the data set; digits is shipped"""
    smoke: bool = False
    """all rows for a few steps"""
    data_dir: str | None = None
    """a folder of original IDX files, or TFDS's data folder"""
    run_dir: str = "runs/edge_{preset}"
    """where the run is kept and resumed from"""
    widths: tuple[int, ...] = (128, 64, 32, 16, 8)
    """hidden units of the students, the smallest last"""
    teacher: tuple[int, ...] = (16, 32)
    """channels of the teacher's convolutions"""
    teacher_hidden: int = 128
    """units of its dense layer"""
    teacher_epochs: int = 10
    """passes of the teacher over the training images"""
    epochs: int = 20
    """passes of every student"""
    batch_size: int = 128
    """examples in a batch"""
    learning_rate: float = 1e-3
    """Adam's first rate, brought to nothing by a cosine"""
    temperature: float = 4.0
    """softens both distributions"""
    hard_weight: float = 0.1
    """weight of the labels beside soft targets, whose weight is 0.9"""
    seeds: int = 3
    """trainings of everything"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""
    progress: bool = True
    """show progress bars"""


ROUNDS = 5
"""In which the files are measured, in turns."""
SMOKE: dict[str, Any] = {
    "widths": (16, 8),
    "teacher": (4,),
    "teacher_hidden": 16,
    "teacher_epochs": 2,
    "epochs": 2,
    "seeds": 2,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, returns its summary."""
    presets = {name: Config(preset=name) for name in ("mnist", "fashion_mnist")}
    config = parse({**presets, "digits": Config(preset="digits")}, argv, __doc__)
    with failures.in_a_sentence():
        return execute(config)


def execute(config: Config) -> dict[str, Any]:
    """Trains and exports every row for every seed, resuming what a run holds."""
    if config.smoke:
        config = replace(config, **SMOKE)
    task = Task(config)
    results: dict[str, list] = {}
    files: dict[str, Path] = {}
    for seed in range(config.seeds):
        for name, path, manifest in task.artefacts(seed):
            accuracy = manifest["check"]["accuracy"]
            results.setdefault(name, []).append({"accuracy": accuracy})
            files.setdefault(name, path)
    costs = task.costs(files)
    summary = report.summarize(results, costs, comparisons(config.widths))
    summary = {**summary, "lines": families(config.widths)}
    task.study.log.write("summary.json", summary)
    print(report.write(task.study.log.path))
    print(task.study.log)
    return summary


class Task:
    """The data, the trainings, and the files made of them."""

    def __init__(self, config: Config):
        self.config = config
        self.source = data.load(config.preset, config.data_dir)
        self.train = self.source.inputs(self.source.train)
        run = parallel.choose("jit")
        self.study = Study(
            run,
            Run(
                config.run_dir.format(preset=config.preset),
                {**settings(config), "data": config.preset},
            ),
            examples=lambda row, seed: self.train,
            steps=self.steps(config.epochs),
            batch_size=config.batch_size,
            test=Evaluator(run, self.source.inputs(self.source.test)),
            stored=True,
            progress=config.progress,
        )
        self.rows = self._rows()

    def steps(self, epochs: int) -> int:
        """Optimizer steps of passes over the training images."""
        size = len(self.train["labels"])
        return epochs * data.Batches(size, self.config.batch_size).steps_per_epoch

    def _rows(self) -> dict[str, Row]:
        """What is trained, a teacher before its students."""
        config, classes = self.config, self.source.num_classes
        hard = combine({"hard": (1.0, hard_labels())})
        soft = soft_targets(temperature=config.temperature)
        both = combine(
            {"hard": (config.hard_weight, hard_labels()), "soft": (0.9, soft)}
        )
        conv = models.ConvNet(
            config.teacher, config.teacher_hidden, classes, dropout=0.3
        )
        steps = self.steps(config.teacher_epochs)
        rows = {"teacher": Row(conv, hard, adam(config, steps), steps=steps)}
        optimizer = adam(config, self.study.steps)

        def pair(module: Any, width: int, kind: str = "") -> dict[str, Row]:
            return {
                f"scratch_{width}{kind}": Row(module, hard, optimizer),
                f"distilled_{width}{kind}": Row(module, both, optimizer, "teacher"),
            }

        for width in config.widths:
            rows |= pair(models.MLP((width, classes)), width)
        smallest = models.MLP((config.widths[-1], classes))
        return {**rows, **pair(quantized(smallest), config.widths[-1], "_aware")}

    def artefacts(self, seed: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """`(row, file, manifest)` of everything that a seed gives."""
        known: dict[str, Any] = {}
        for name, row in self.rows.items():
            taught_by = None if row.teacher is None else known[row.teacher]
            model = self.study.train(name, row, seed, taught_by)
            if name == "teacher":
                known[name] = self.study.run.place(model)
            aware = name.endswith("_aware")
            if seed == 0 and not aware:
                taught = None if row.teacher is None else (row.teacher, taught_by)
                saved.save_model(self.study.log, name, model, taught)
            if aware:  # the float module takes the same parameters
                plain = self.rows[name.removesuffix("_aware")].module
                model = Live(model.variables, plain)
            for int8 in ("static",) if aware else (None, "static"):
                kind = "_int8" if int8 and not aware else ""
                yield self.export(f"{name}{kind}", model, seed, int8)

    def export(
        self, name: str, model: Live, seed: int, int8: export.Int8 | None
    ) -> tuple[str, Path, dict[str, Any]]:
        """A row's name, its ONNX file, written now unless it is there, its manifest."""
        path = Path(self.study.log.path) / "export" / f"{name}-{seed}.onnx"
        images, about = self.source.train["images"], {"data": self.source.name}
        subject = export.of_images(model, self.source, images, about)
        export.obtain(subject, [path], to="onnx", int8=int8, max_drop=100.0)
        return name, path, runtimes.read_manifest(path)

    def costs(self, files: Mapping[str, Path]) -> dict[str, dict[str, float]]:
        """What each costs in ONNX Runtime, one image at a time on one thread."""
        images = self.source.test["images"]
        jobs = {
            name: partial(deployment.measure, path, images, threads=1)
            for name, path in files.items()
        }
        found = deployment.in_turns(jobs, ROUNDS)
        costs = {}
        for name, path in files.items():
            manifest = runtimes.read_manifest(path)
            p50 = [each["latency_us"]["p50"] for each in found[name]]
            costs[name] = {
                "parameters": manifest["student"]["parameters"],
                "latency_us": statistics.median(p50),
                "bytes": manifest["bytes"],
            }
        return costs


def adam(config: Config, steps: int) -> optax.GradientTransformation:
    """Adam, its rate brought to nothing by a cosine."""
    return optax.adam(optax.cosine_decay_schedule(config.learning_rate, steps))


def comparisons(widths: Sequence[int]) -> dict[str, list[str]]:
    """Which rows are compared, seed by seed."""
    pairs = {f"distilled_{width}": [f"scratch_{width}"] for width in widths}
    last = widths[-1]
    pairs[f"distilled_{last}_aware"] = [
        f"distilled_{last}",
        f"distilled_{last}_int8",
        f"scratch_{last}_aware",
    ]
    return pairs


def families(widths: Sequence[int]) -> dict[str, list[str]]:
    """Rows that a line of the figure goes through."""
    return {
        f"{kind}{said}": [f"{kind}_{width}{suffix}" for width in widths]
        for kind in ("scratch", "distilled")
        for suffix, said in (("", ""), ("_int8", ", int8"))
    }


if __name__ == "__main__":
    main()
