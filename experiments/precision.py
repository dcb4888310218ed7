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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdistill import data, losses, models, objectives, report, study, teachers, train
from jaxdistill.parallel import processes
from jaxdistill.study.sweep import divide
from jaxdistill.teachers.manifest import DTYPES
from jaxdistill.types import TopK

TEMPERATURE = 2.0
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Measure what rounding costs: in the store, and in the steps."""

    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """digits is shipped; the others come from --data-dir or TFDS"""
    data_dir: str | None = None
    """a folder of original IDX files, or TFDS's data folder"""
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
    distributed: bool = False
    """one of several, see parallel.processes; SLURM and TPU pods need no flag"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""
    progress: bool = True
    """show progress bars"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs both parts, prints their tables, returns the summary."""
    config = train.parse({"": Config()}, argv, __doc__)
    with train.exit_with_message():
        return execute(config)


def execute(config: Config) -> dict[str, Any]:
    """Trains in both types, then stores one teacher's outputs in every form."""
    source = data.load(config.data, config.data_dir)
    train_split, test = source.inputs(source.train), source.inputs(source.test)
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
    batches = data.Batches(len(train_split["labels"]), config.batch_size)
    return study.Study(
        train.RunDir(path, {**train.settings(config), "precision": kind}),
        partitioner=partitioner,
        examples=lambda arm, seed: train_split,
        steps=config.epochs * batches.steps_per_epoch,
        batch_size=config.batch_size,
        test=train.Evaluator(partitioner, test),
        evaluations=1,
        precision=kind,
        together=together,
        progress=config.progress,
    )


def arms(config: Config, classes: int, steps: int) -> dict[str, study.Arm]:
    """Teacher, student from scratch, distilled student."""
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, steps))
    teacher = models.MLP((*config.teacher, classes))
    student = models.MLP((*config.student, classes))
    hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
    soft = objectives.soft_targets(temperature=TEMPERATURE)
    both = objectives.combine(
        {"hard": (0.1, objectives.hard_labels()), "soft": (0.9, soft)}
    )
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
    batch = {**train_split, "mask": np.ones(len(train_split["labels"]), np.float32)}
    forward = jax.jit(lambda model, batch: model(batch).logits)
    logits, targets = forward(student, batch), forward(teacher, batch)
    exact = losses.forward_kl(logits, targets, temperature=TEMPERATURE)
    result: dict[str, Any] = {"exact": {"loss": float(exact.mean())}}
    for top_k in (None, *config.top_k):
        for dtype in DTYPES:
            name = "dense" if top_k is None else f"top-{top_k}"
            manifest = teachers.store.describe(
                teacher,
                train_split,
                data=config.data,
                split="train",
                transform="normalised",
                top_k=top_k,
                dtype=dtype,
            )
            path = Path(experiment.run_dir.path) / "outputs" / f"{name}-{dtype}"
            teachers.store.write(
                path, teacher, train_split, manifest, progress=config.progress
            )
            # The first process finishes the store, and the others wait until then.
            processes.on_first(partial(teachers.store.check, path, manifest))
            found = soft_loss(logits, teachers.store.read(path, manifest))
            arrays = [f for f in path.rglob("*") if f.is_file()]
            size = sum(f.stat().st_size for f in arrays if f.suffix != ".json")
            result[f"{name}, {dtype}"] = {
                "bytes": size / len(train_split["labels"]),
                "error": float(jnp.abs(found - exact).mean()),
                "bias": float((found - exact).mean()),
            }
    return result


def soft_loss(logits, stored: Mapping[str, np.ndarray]):
    """The loss of each example against stored outputs of one view."""
    outputs = {name: jnp.asarray(array[:, 0]) for name, array in stored.items()}
    if "logits" in outputs:
        return losses.forward_kl(logits, outputs["logits"], temperature=TEMPERATURE)
    kept = TopK(outputs["ids"], outputs["log_probs"], outputs["logsumexp"])
    return losses.sparse_forward_kl(logits, kept, temperature=TEMPERATURE)


def compute_table(part: Mapping[str, Any]) -> str:
    """Accuracy by type as Markdown."""
    lines = [
        "| test accuracy % | float32 | bfloat16 | difference, points |",
        "| --- | --: | --: | --: |",
    ]
    for name, found in part.items():
        cells = [
            f"{100 * found[kind]['mean']:.2f} ± {100 * found[kind]['std']:.2f}"
            for kind in PRECISIONS
        ]
        gap = {k: 100 * found["paired"][k] for k in ("mean", "low", "high")}
        cells.append(f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    count = part["teacher"]["float32"]["n"]
    return "\n".join([*lines, "", f"{count} seeds; 95% interval.", ""])


def storage_table(part: Mapping[str, Any]) -> str:
    """Bytes against the loss's error as Markdown."""
    lines = [
        "| stored | bytes per example | error of the soft loss, nats | its mean |",
        "| --- | --: | --: | --: |",
    ]
    for name, found in part.items():
        if name == "exact":
            continue
        lines.append(
            f"| {name} | {found['bytes']:.1f} | {found['error']:.1e} | "
            f"{found['bias']:+.1e} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Error: mean distance of an example's loss from that of the exact outputs, "
            f"which is {part['exact']['loss']:.3f} on average; bytes on disk, "
            "compressed.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
