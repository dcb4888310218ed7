# SPDX-License-Identifier: Apache-2.0
"""What may be rounded: the stored teacher outputs, and the arithmetic of the steps?

Question, part storage: how many bytes does an example's stored teacher output take, and
how far is the student's soft loss (KL at temperature 2) from that of the exact outputs,
in nats, for dense logits and for the k largest classes, in each type? Asked of the
student from scratch, over the training images.

Question, part compute: does a bfloat16 run (both forward passes and the backward pass;
parameters, optimizer and losses in float32) reach the accuracy of a float32 one?
Teacher, student from scratch and distilled student, paired by seed, last epoch, on the
test images.

Expected: float16 is as good as float32 at half the bytes, bfloat16 is not: it has 8
bits of mantissa where logits need more; no difference in accuracy.

  python -m experiments.precision
  python -m experiments.precision --data mnist --data-dir ~/mnist --epochs 10

Cost: a minute on two cores for the digits, ten for MNIST.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax

from experiments.stored import divergence, forms
from jaxdistill import data, models, objectives, report, study, teachers, train
from jaxdistill.parallel import processes
from jaxdistill.study import script
from jaxdistill.study.sweep import divide

TEMPERATURE = 2.0
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config(script.SharedFlags):
    """Measure what rounding costs: in the store, and in the steps."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
    run_dir: str = "runs/precision"
    """where the run is kept and resumed from, a local folder"""
    teacher: tuple[int, ...] = (512, 256)
    """hidden widths of the teacher"""
    student: tuple[int, ...] = (128, 64)
    """hidden widths of the student"""
    epochs: int = 60
    """passes over the training images"""
    batch_size: int = 64
    """examples in a batch"""
    seeds: int = 5
    """runs of everything, each with its own weights and order"""
    top_k: tuple[int, ...] = (1, 3, 5)
    """how many classes a sparse store keeps"""


def execute(config: Config) -> dict[str, Any]:
    """Trains in both types, then stores one teacher's outputs in every form."""
    source = data.load(config.data, config.data_dir)
    train_split, test, _ = source.splits(None)
    run_dir = train.RunDir(config.run_dir, train.settings(config))
    studies = {
        kind: make_study(config, kind, train_split, test, run_dir.path / kind)
        for kind in PRECISIONS
    }
    lines = arms(config, source.num_classes, studies["float32"].steps)
    seeds = {
        kind: study.compare(experiment, lines, config.seeds)["seeds"]
        for kind, experiment in studies.items()
    }
    summary = {
        "compute": compute(seeds),
        "storage": storage(config, studies["float32"], train_split),
    }
    run_dir.write("summary.json", summary)
    texts = {
        "compute.md": compute_table(summary["compute"]),
        "storage.md": storage_table(summary["storage"]),
    }
    for name, text in texts.items():
        run_dir.write_bytes(name, text.encode())
    if processes.is_first():
        print(*texts.values(), studies["float32"].run_dir, run_dir, sep="\n")
    return summary


def make_study(config: Config, kind: Any, train_split, test, path) -> study.Study:
    """Trains in one precision, below the run's directory."""
    partitioner, together = divide("auto", config.seeds)
    run_dir = train.RunDir(path, {**train.settings(config), "precision": kind})
    options = {"evaluations": 1, "precision": kind, "together": together}
    return study.Study(
        run_dir,
        partitioner=partitioner,
        examples=train_split,
        test=test,
        epochs=config.epochs,
        **script.study_options(config, **options),
    )


def arms(config: Config, classes: int, steps: int) -> dict[str, study.Arm]:
    """Teacher, student from scratch, distilled student."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    teacher = models.MLP((*config.teacher, classes))
    student = models.MLP((*config.student, classes))
    hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
    both = objectives.hinton(TEMPERATURE, 0.9, hard_weight=0.1)
    return {
        "teacher": study.Arm(teacher, hard, optimizer),
        "scratch": study.Arm(student, hard, optimizer),
        "distilled": study.Arm(student, both, optimizer, "teacher"),
    }


def compute(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracies in both types, and their differences seed by seed."""
    result = {}
    for name in seeds["float32"]:
        exact, low = ([s["accuracy"] for s in seeds[k][name]] for k in PRECISIONS)
        result[name] = {
            "float32": report.spread(exact),
            "bfloat16": report.spread(low),
            "paired": report.paired(low, exact),
        }
    return result


def storage(config: Config, experiment: study.Study, train_split) -> dict[str, Any]:
    """Bytes per example and the soft loss's error, for each way to store."""
    teacher, student = (
        train.load_model(experiment.run_dir.path, k) for k in ("teacher", "scratch")
    )
    said, targets = (
        teachers.with_logits(model, train_split)["teacher"]
        for model in (student, teacher)
    )
    exact = divergence(said["logits"][:, 0], targets, TEMPERATURE)
    result: dict[str, Any] = {"exact": {"loss": float(exact.mean())}}
    for name, _, size, found in forms(
        teacher,
        student,
        train_split,
        top_k=config.top_k,
        temperatures=[TEMPERATURE],
        folder=Path(experiment.run_dir.path) / "outputs",
        progress=config.progress,
        data=config.data,
        split="train",
        transform="normalised",
    ):
        gap = found[TEMPERATURE] - exact
        result[name] = {
            "bytes": size / len(train_split["labels"]),
            "error": float(jnp.abs(gap).mean()),
            "bias": float(gap.mean()),
        }
    return result


def compute_table(part: Mapping[str, Any]) -> str:
    """Accuracy by type as Markdown."""
    lines = []
    for name, found in part.items():
        cells = [
            f"{100 * found[kind]['mean']:.2f} ± {100 * found[kind]['std']:.2f}"
            for kind in PRECISIONS
        ]
        gap = {k: 100 * found["paired"][k] for k in ("mean", "low", "high")}
        cells.append(f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})")
        lines.append([name, *cells])
    head = ["test accuracy %", *PRECISIONS, "difference, points"]
    count = part["teacher"]["float32"]["n"]
    return report.markdown_table(head, lines, f"{count} seeds; 95% interval.")


def storage_table(part: Mapping[str, Any]) -> str:
    """Bytes against the loss's error as Markdown."""
    head = "stored", "bytes per example", "error of the soft loss, nats", "its mean"
    forms = {name: found for name, found in part.items() if name != "exact"}
    lines = [
        [k, f"{v['bytes']:.1f}", f"{v['error']:.1e}", f"{v['bias']:+.1e}"]
        for k, v in forms.items()
    ]
    return report.markdown_table(
        head,
        lines,
        "Error: mean distance of an example's loss from that of the exact outputs, "
        f"which is {part['exact']['loss']:.3f} on average; bytes on disk, compressed.",
    )


main = script.command(execute, {"": Config()}, __doc__)

if __name__ == "__main__":
    main()
