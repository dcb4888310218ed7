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

Every arm is an ONNX file: its accuracy is what ONNX Runtime answers on the test images,
its size that of the file, its latency that of one raw image on one thread: the median
of fresh processes, which take turns once everything is trained. Size and latency are
those of the first seed. All students take the same steps, last epoch.

The best temperature falls with the width (hinton_mnist). So for each width temperature
and rate of the distilled student, and the rate of the one from scratch, are chosen on
held-out training images, which neither they nor their teacher have seen, by a training
of each setting; then all train on all training images. Both try the same rates, the
distilled student each at every temperature: three times as many trials. `..._aware`
arms take what was chosen for the float arm of their kind and width. Training does not
round quite as the file does (`quantized`): it has one symmetric range for an array, of
this batch; the file one for each channel of the weights and, for the rest, fixed ones
of 256 training images.

  python -m experiments.edge.students --data-dir ~/mnist
  python -m experiments.edge.students --preset fashion_mnist --data-dir ~/fashion_mnist
  python -m experiments.edge.students --preset digits --smoke

Needs jaxdistill[onnx,quantize]. Cost: a quarter of an hour a data set on two cores; two
minutes with --smoke.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.edge.choice import adam, choose, make_objective
from jaxdistill import data, models, objectives, parallel, report, study, train
from jaxdistill.export import Int8, obtain, of_images
from jaxdistill.export import benchmark as deployment
from jaxdistill.export.quantize import quantized
from jaxdistill.runtimes import read_manifest
from jaxdistill.study import script, sweep


@dataclass(frozen=True)
class Config(script.Flags):
    """Train, distil, quantise and measure students of falling size."""

    preset: Literal["mnist", "fashion_mnist", "digits"] = "mnist"
    """the data set; digits is shipped"""
    smoke: bool = False
    """all arms for a few steps"""
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
    teacher_rate: float = 1e-3
    """the teacher's first rate, as all rates brought to nothing by a cosine"""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """first rates tried for either student"""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """tried for the distilled students; they soften both distributions"""
    validation: int = 10_000
    """training images held out to choose on"""
    hard_weight: float = 0.1
    """weight of the labels beside soft targets, whose weight is 1 - this"""
    seeds: int = 5
    """trainings of everything"""


LABELS = objectives.combine({"hard": (1.0, objectives.hard_labels())})
"""What the teacher and students from scratch learn from."""
ROUNDS = 5
"""In which the files are measured, in turns."""
PRESETS = {
    "mnist": Config(),
    "fashion_mnist": Config(preset="fashion_mnist"),
    "digits": Config(preset="digits", validation=300),
}
SMOKE = """--widths 16 8 --teacher 4 --teacher-hidden 16 --teacher-epochs 2 --epochs 2
    --rates 1e-3 3e-3 --temperatures 1 4 --seeds 2"""


def execute(config: Config) -> dict[str, Any]:
    """Trains and exports every arm for every seed, resuming what a run holds."""
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
    task.run_dir.write("summary.json", summary)
    script.show(task.run_dir, task.chosen)
    return summary


class Task:
    """The data, the trainings, and the files made of them."""

    def __init__(self, config: Config):
        self.config = config
        self.source = data.load(config.preset, config.data_dir)
        self.partitioner = parallel.choose("jit")
        path = config.run_dir.replace("{preset}", config.preset)
        settings = {**train.settings(config), "data": config.preset}
        self.run_dir = train.RunDir(path, settings)
        self.study = self.study_on(*self.source.splits(None)[:2])
        steps = self.steps(config.teacher_epochs)
        conv = models.ConvNet(
            config.teacher, config.teacher_hidden, self.source.num_classes, dropout=0.3
        )
        optimizer = adam(config.teacher_rate, steps)
        self.teacher = study.Arm(conv, LABELS, optimizer, steps=steps)
        chosen, self.chosen = choose(self)
        self.arms = self._arms(chosen)

    def study_on(
        self, examples: Mapping[str, Any], test: Mapping[str, Any]
    ) -> study.Study:
        """Trainings on some examples, in as many steps as all training images take."""
        return study.Study(
            self.run_dir,
            partitioner=self.partitioner,
            examples=examples,
            test=test,
            steps=self.steps(self.config.epochs),
            **script.study_options(self.config, stored=True),
        )

    def steps(self, epochs: int) -> int:
        """Optimizer steps of passes over the training images."""
        return script.steps_of(epochs, self.source.train, self.config.batch_size)

    def mlp(self, width: int) -> models.MLP:
        """A student of so many hidden units."""
        return models.MLP((width, self.source.num_classes))

    def _arms(self, chosen: Mapping[str, Mapping[str, float]]) -> dict[str, study.Arm]:
        """What is trained, a teacher before its students, as was chosen for each."""

        def arm(name: str, module: Any) -> study.Arm:
            optimizer = adam(chosen[name]["learning_rate"], self.study.steps)
            if name.startswith("scratch"):
                return study.Arm(module, LABELS, optimizer)
            return study.Arm(module, make_objective(chosen[name]), optimizer, "teacher")

        arms, last = {"teacher": self.teacher}, self.config.widths[-1]
        for width in self.config.widths:
            module = self.mlp(width)
            for name in (f"scratch_{width}", f"distilled_{width}"):
                arms[name] = arm(name, module)
        eight = quantized(self.mlp(last))
        for name in (f"scratch_{last}", f"distilled_{last}"):
            arms[f"{name}_aware"] = arm(name, eight)
        return arms

    def artefacts(self, seed: int) -> Iterator[tuple[str, Path, dict[str, Any]]]:
        """`(arm, file, manifest)` of everything that a seed gives."""
        known: dict[str, Any] = {}
        for name, arm in self.arms.items():
            its_teacher = None if arm.teacher is None else known[arm.teacher]
            model = self.study.train(name, arm, seed, its_teacher)
            if name == "teacher":
                known[name] = self.partitioner.place(model)
            aware = name.endswith("_aware")
            if seed == 0 and not aware:
                source = None if arm.teacher is None else (arm.teacher, its_teacher)
                train.save_model(self.run_dir, name, model, source)
            if aware:  # the float module takes the same parameters
                plain = self.arms[name.removesuffix("_aware")].module
                model = models.BoundModule(model.variables, plain)
            for int8 in ("static",) if aware else (None, "static"):
                kind = "_int8" if int8 and not aware else ""
                yield self.export(f"{name}{kind}", model, seed, int8)

    def export(
        self, name: str, model: models.BoundModule, seed: int, int8: Int8 | None
    ) -> tuple[str, Path, dict[str, Any]]:
        """An arm's name, its ONNX file, written where it is missing, its manifest."""
        path = Path(self.run_dir.path) / "export" / f"{name}-{seed}.onnx"
        images, about = self.source.train["images"], {"data": self.source.name}
        subject = of_images(model, self.source, images, about)
        obtain(subject, [path], to="onnx", int8=int8, max_drop=100.0)
        return name, path, read_manifest(path)

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
            manifest = read_manifest(path)
            p50 = [each["latency_us"]["p50"] for each in found[name]]
            costs[name] = {
                "parameters": manifest["student"]["parameters"],
                "latency_us": statistics.median(p50),
                "bytes": manifest["bytes"],
            }
        return costs


def comparisons(widths: Sequence[int]) -> dict[str, list[str]]:
    """Which arms are compared, seed by seed."""
    pairs = {
        f"distilled_{width}{kind}": [f"scratch_{width}{kind}"]
        for kind in ("", "_int8")
        for width in widths
    }
    last = widths[-1]
    pairs[f"scratch_{last}_aware"] = [f"scratch_{last}_int8"]
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


main = script.command(execute, PRESETS, __doc__, smoke=SMOKE, before=sweep.use_cores)

if __name__ == "__main__":
    main()
