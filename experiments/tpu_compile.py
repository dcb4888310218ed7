# SPDX-License-Identifier: Apache-2.0
"""Does the train step compile for a TPU slice, and what does a step move and hold?

Question: are jit over a mesh and pmap the same program on TPU, with one sum over the
chips for all gradients? Nothing runs and no TPU is needed: the step is lowered from
shapes alone and compiled by libtpu for the chips of a topology. The networks are the
`article` preset's of `digits_mlp.py`, with the teacher inside the step.

Expected: two all-reduces and no other collective, one for the counts of real examples
and one for all gradients, as large as the student; FLOPs within a few per cent of the
matrix products on the chip's own examples.

  pip install 'jaxdistill[tpu]'
  python experiments/tpu_compile.py
  python experiments/tpu_compile.py --topology v5p:8x8x16 --parallel mesh

Cost: seconds on a laptop.
"""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

# Both must stand before jax is imported: libtpu only compiles, and asks no metadata
# server which TPU this machine is.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.experimental import topologies

from jaxdistill import benchmark, models, parallel, teachers
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.steps import init_state, make_train_step

TEACHER, STUDENT = (784, 512, 256, 10), (784, 128, 64, 10)

_COLLECTIVE = re.compile(
    r" = (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\("
)
_FLOATS = re.compile(r"f32\[([\d,]*)\]")


@dataclass(frozen=True)
class Config:
    """Compile the distillation step for a TPU topology; print what it costs."""

    topology: str = "v5e:2x4"
    """generation and chip grid, as libtpu names them"""
    parallel: Literal["mesh", "pmap", "both"] = "both"
    """how the step is spread over the chips"""
    batch_per_chip: int = 64
    """examples of a step on each chip"""


def main(argv: Sequence[str] | None = None) -> dict[Any, dict[str, Any]]:
    """Compiles, prints the table, returns its rows."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    if config.batch_per_chip < 1:
        sys.exit(f"error: --batch-per-chip is {config.batch_per_chip}, below 1")
    if importlib.util.find_spec("libtpu") is None:
        sys.exit("error: libtpu is not installed: pip install 'jaxdistill[tpu]'")
    try:
        topology = topologies.get_topology_desc(config.topology, platform="tpu")
    except Exception as error:  # the plugin raises its own types
        reason = str(error).strip().split("\n")[0]
        sys.exit(f"error: libtpu has no topology {config.topology!r}: {reason}")
    chips: Sequence[Any] = topology.devices
    kinds: Sequence[parallel.Kind] = ("mesh", "pmap")
    if config.parallel != "both":
        kinds = (config.parallel,)
    rows = {kind: costs(kind, chips, config.batch_per_chip) for kind in kinds}
    each = f"{config.batch_per_chip} examples each"
    print(f"{len(chips)} x {chips[0].device_kind}, {each}")
    print(table(rows), end="")
    for kind, row in rows.items():
        if row["reduced"] < row["gradients"]:
            sys.exit(f"error: {kind}: the all-reduces do not carry all gradients")
    return rows


def costs(kind: parallel.Kind, chips: Sequence[Any], batch: int) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one chip's program."""
    run = parallel.choose(kind, chips)
    step, arguments = abstract_step(kind, len(chips), batch)
    jitted: Any = run.compile(step)
    compiled = jitted.lower(*arguments).compile()
    found = collectives(compiled.as_text())
    reduced = found.pop("all-reduce", [])
    return {
        **benchmark.memory(compiled),
        "flops": benchmark.flops(compiled),
        "matmul_flops": matmul_flops(batch),
        "all-reduce": len(reduced),
        "reduced": sum(reduced),
        "gradients": 4 * sum((a + 1) * b for a, b in pairwise(STUDENT)),
        "other collectives": sum(len(sizes) for sizes in found.values()),
    }


def abstract_step(kind: str, chips: int, batch: int):
    """The train step and the shapes of its three arguments, for all chips."""
    student = models.student(models.MLP(STUDENT[1:]))
    teacher = models.MLP(TEACHER[1:])
    objective = combine(
        {"hard": (0.7, hard_labels()), "soft": (0.3, soft_targets(temperature=2.0))}
    )
    optimizer = optax.adam(1e-3)
    size = batch if kind == "pmap" else batch * chips
    shapes = {
        "inputs": jax.ShapeDtypeStruct((size, STUDENT[0]), jnp.float32),
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }

    def start(batch):
        rng = jax.random.key(0)
        state = init_state(rng, student, optimizer, batch)
        return state, teachers.live(teacher, teacher.init(rng, batch["inputs"]))

    arguments = (*jax.eval_shape(start, shapes), shapes)
    if kind == "pmap":
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((chips, *x.shape), x.dtype), arguments
        )
    return make_train_step(student, objective, optimizer), arguments


def collectives(hlo: str) -> dict[str, list[int]]:
    """The collectives in a compiled program, each with the float32 bytes it returns.

    >>> collectives("%a = (f32[10]{0}, f32[]{:T(128)}) all-reduce(%b, %c)")
    {'all-reduce': [44]}
    """
    found: dict[str, list[int]] = {}
    for shapes, name in _COLLECTIVE.findall(hlo):
        arrays = [text.split(",") for text in _FLOATS.findall(shapes)]
        size = sum(4 * math.prod(int(n) for n in a if n) for a in arrays)
        found.setdefault(name, []).append(size)
    return found


def matmul_flops(batch: int) -> int:
    """FLOPs of a chip's matrix products: the student's forward pass and both gradients
    (none to its input), the teacher's forward pass."""
    weights = [a * b for a, b in pairwise(STUDENT)]
    lesson = sum(a * b for a, b in pairwise(TEACHER))
    return 2 * batch * (3 * sum(weights) - weights[0] + lesson)


def table(rows: dict[Any, dict[str, Any]]) -> str:
    """The rows as Markdown, sizes in kB per chip."""
    columns = (
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
    )
    lines = [["per chip and step", *rows], ["---"] + ["--:"] * len(rows)]
    for key, title, unit in columns:
        digits = 0 if unit == 1 else 1
        lines.append([title] + [f"{r[key] * unit:,.{digits}f}" for r in rows.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
