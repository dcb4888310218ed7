# SPDX-License-Identifier: Apache-2.0
"""Does the train step compile for a TPU slice, and what does a step move and hold?

Question: are jit over a mesh and pmap the same program on TPU, with one sum over the
chips for all gradients? What does a step hold and compute on a chip, from 8 chips to
1,024? Nothing runs and no TPU is needed: the step is lowered from shapes alone and
compiled by libtpu for the chips of a topology. The teacher is inside the step.

Jobs:
  article   the networks of `digits_mlp.py --preset article`.
  resnet    CIFAR ResNet-56 to ResNet-20, GroupNorm, in bfloat16.

Expected: two all-reduces and no other collective, one for the counts of real examples
and one for all gradients, as large as the student (a ResNet's small ones may be apart);
FLOPs of the article's job within a few per cent of the matrix products on the chip's
own examples. Arguments, outputs and what is sent do not grow with the number of chips;
temporaries and the program are the compiler's choice for their generation; within one
the temporaries hardly change, and a small program may grow by a quarter.

  pip install 'jaxdistill[tpu]'
  python -m experiments.tpu.images
  python -m experiments.tpu.images --job resnet --parallel mesh \\
      --topology v5e:2x4 v5e:16x16 v5p:8x8x16

Beside it a chip's part on this machine's CPU, compiled alike, and how long it takes.

Cost: seconds on a laptop for the article's job, two minutes a topology for the ResNet.
"""

import importlib.util
import math
import os
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Both must stand before jax is imported: libtpu only compiles, and asks no metadata
# server which TPU this machine is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn
from jax.experimental import topologies

from jaxdistill import models, objectives, parallel, report, teachers, train
from jaxdistill.train import cost

TEACHER, STUDENT = (784, 512, 256, 10), (784, 128, 64, 10)


class Job(NamedTuple):
    """Two modules, an input's shape, and what the step computes in."""

    teacher: nn.Module
    student: nn.Module
    shape: tuple[int, ...]
    dtype: Any = None


JOBS = {
    "article": Job(models.MLP(TEACHER[1:]), models.MLP(STUDENT[1:]), TEACHER[:1]),
    "resnet": Job(
        models.resnet_cifar(56, 10, norm="group"),
        models.resnet_cifar(20, 10, norm="group"),
        (32, 32, 3),
        jnp.bfloat16,
    ),
}

_COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)
_FLOATS = re.compile(r"\b(b?f\d+)\[([\d,]*)\]")
_BYTES = {"f32": 4, "bf16": 2}

LINES = (
    ("arguments", "arguments, kB", 1e-3),
    ("outputs", "outputs, kB", 1e-3),
    ("aliased", "of them donated, kB", 1e-3),
    ("temporaries", "temporaries, kB", 1e-3),
    ("program", "program, kB", 1e-3),
    ("flops", "MFLOP", 1e-6),
    ("matmul_flops", "closed form, MFLOP", 1e-6),
    ("all-reduce", "all-reduces", 1),
    ("reduced", "all-reduced, kB", 1e-3),
    ("gradients", "the student's gradients, kB", 1e-3),
    ("other collectives", "other collectives", 1),
    ("step_ms", "ms", 1),
)
"""What the table says of a program: its key, the line's title, the unit."""


@dataclass(frozen=True)
class Config:
    """Compile the distillation step for a TPU topology; print what it costs."""

    job: Literal["article", "resnet"] = "article"
    """which teacher and student"""
    topology: tuple[str, ...] = ("v5e:2x4",)
    """generations and chip grids, as libtpu names them"""
    parallel: Literal["mesh", "pmap", "both"] = "both"
    """how the step is spread over the chips"""
    batch_per_chip: int = 64
    """examples of a step on each chip"""
    remat: bool = False
    """compute the student's residual blocks again in the backward pass"""
    cpu: bool = True
    """also compile a chip's part for this machine's CPU, and time it"""
    save: Path | None = None
    """also write the table there, as experiments/results/tpu/article.md"""


def main(argv: Sequence[str] | None = None) -> dict[Any, dict[str, Any]]:
    """Compiles, prints the table, returns its rows."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    if config.batch_per_chip < 1:
        sys.exit(f"error: --batch-per-chip is {config.batch_per_chip}, below 1")
    job = JOBS[config.job]
    if config.remat:
        if not isinstance(job.student, models.ResNet):
            sys.exit("error: --remat is for residual networks: take --job resnet")
        job = job._replace(student=job.student.clone(remat=True))
    check_libtpu()
    kinds: Sequence[parallel.Kind] = ("mesh", "pmap")
    if config.parallel != "both":
        kinds = (config.parallel,)
    rows = {}
    for name in config.topology:
        chips = find(name)
        for kind in kinds:
            # Grids of equal count, v5e:2x4 and v5e:4x2, are different topologies.
            title = f"{len(chips)} x {chips[0].device_kind} ({name}), {kind}"
            rows[title] = costs(job, kind, chips, config.batch_per_chip)
    if config.cpu:
        title = f"this CPU, {os.cpu_count()} cores, measured"
        rows[title] = on_cpu(job, config.batch_per_chip)
    text = (
        f"Job: {config.job}{', remat' if config.remat else ''}, "
        f"{config.batch_per_chip} examples on each chip.\n\n"
        f"{table(rows)}"
    )
    say(text, config.save)
    for title, row in rows.items():
        # What is equal is summed once: the gradients of two biases that are added.
        if row.get("reduced", math.inf) < 0.999 * row["gradients"]:
            sys.exit(f"error: {title}: the all-reduces do not carry all gradients")
    return rows


def check_libtpu() -> None:
    """Ends the process where there is nothing to compile with."""
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("error: libtpu is not installed: pip install 'jaxdistill[tpu]'")


def say(text: str, save: Path | None) -> None:
    """Prints the table, and writes it too where that is asked for."""
    print(text, end="")
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(text, encoding="utf-8")


def find(name: str) -> Sequence[Any]:
    """The chips of a topology."""
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:  # the plugin raises its own types
        reason = str(error).strip().split("\n")[0]
        sys.exit(f"error: libtpu has no topology {name!r}: {reason}")


def costs(
    job: Job, kind: parallel.Kind, chips: Sequence[Any], batch: int
) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one chip's program."""
    partitioner = parallel.choose(kind, chips)
    step, arguments = abstract_step(job, kind, len(chips), batch)
    jitted: Any = partitioner.compile(step)
    compiled = jitted.lower(*arguments).compile()
    found = collectives(compiled.as_text())
    reduced = found.pop("all-reduce", [])
    copies = len(chips) if kind == "pmap" else 1
    return {
        **counted(job, compiled, arguments[0].params, batch, copies),
        "all-reduce": len(reduced),
        "reduced": sum(reduced),
        "other collectives": sum(len(sizes) for sizes in found.values()),
    }


def on_cpu(job: Job, batch: int) -> dict[str, Any]:
    """The same of a chip's part on this machine's CPU, and a step's milliseconds."""
    partitioner = parallel.choose("jit")
    step, start, shapes = make_step(job, batch)
    batch_of = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state, teacher = partitioner.place(start(batch_of))
    jitted: Any = partitioner.compile(step)
    compiled = jitted.lower(state, teacher, batch_of).compile()

    def once():
        nonlocal state
        state, metrics = compiled(state, teacher, batch_of)
        jax.block_until_ready(metrics)

    found = counted(job, compiled, state.params, batch)
    once()
    times = [cost.seconds(once) for _ in range(50)]
    return {**found, "step_ms": 1e3 * statistics.median(times)}


def counted(job: Job, compiled: Any, params: Any, batch: int, copies: int = 1):
    """Memory, FLOPs, and the bytes of the student's gradients."""
    result = {
        **cost.memory(compiled),
        "flops": cost.flops(compiled),
        # Summed over the chips in the type that the backward pass computes in.
        "gradients": jnp.dtype(job.dtype or jnp.float32).itemsize
        * sum(leaf.size for leaf in jax.tree.leaves(params))
        // copies,
    }
    if job == JOBS["article"]:
        result["matmul_flops"] = matmul_flops(batch)
    return result


def make_step(job: Job, size: int):
    """The train step, `batch -> (state, teacher)` to start with, the batch's shapes."""
    student = models.student(job.student)
    objective, optimizer = objectives.hinton(2.0, 0.3, 0.7), optax.adam(1e-3)
    shapes = {
        "inputs": jax.ShapeDtypeStruct((size, *job.shape), jnp.float32),
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }

    def start(batch):
        rng = jax.random.key(0)
        state = train.init_state(rng, student, optimizer, batch)
        variables = job.teacher.init(rng, batch["inputs"])
        return state, teachers.live(job.teacher, variables)

    step = train.make_train_step(student, objective, optimizer, dtype=job.dtype)
    return step, start, shapes


def abstract_step(job: Job, kind: str, chips: int, batch: int):
    """The train step and the shapes of its three arguments, for all chips."""
    step, start, shapes = make_step(job, batch if kind == "pmap" else batch * chips)
    arguments = (*jax.eval_shape(start, shapes), shapes)
    if kind == "pmap":
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((chips, *x.shape), x.dtype), arguments
        )
    return step, arguments


def collectives(hlo: str) -> dict[str, list[int]]:
    """The collectives in a compiled program, each with the bytes of floats it returns.

    >>> collectives("%a = (f32[10]{0}, bf16[]{:T(128)}) all-reduce(%b, %c)")
    {'all-reduce': [42]}
    """
    found: dict[str, list[int]] = {}
    for shapes, name in _COLLECTIVE.findall(hlo):
        arrays = [
            _BYTES[kind] * math.prod(int(n) for n in text.split(",") if n)
            for kind, text in _FLOATS.findall(shapes)
        ]
        found.setdefault(name, []).append(sum(arrays))
    return found


def matmul_flops(batch: int) -> int:
    """FLOPs of a chip's matrix products: the student's forward pass and both gradients
    (none to its input), the teacher's forward pass."""
    weights = [a * b for a, b in pairwise(STUDENT)]
    teacher_flops = sum(a * b for a, b in pairwise(TEACHER))
    return 2 * batch * (3 * sum(weights) - weights[0] + teacher_flops)


def table(
    rows: dict[Any, dict[str, Any]], lines: Sequence[tuple[str, str, float]] = LINES
) -> str:
    """The programs as Markdown, side by side; `lines` are as `LINES`."""
    text = []
    for key, title, unit in lines:
        digits = 0 if unit == 1 and key != "step_ms" else 1
        if any(key in row for row in rows.values()):
            cells = [
                f"{row[key] * unit:,.{digits}f}" if key in row else "-"
                for row in rows.values()
            ]
            text.append([title, *cells])
    return report.markdown_table(["per chip and step", *rows], text)


if __name__ == "__main__":
    main()
