# SPDX-License-Identifier: Apache-2.0
"""Do large text models fit a TPU slice, and what does a step move and hold?

Question: BERT-base teaches six of its layers on 8 chips; a GPT of 7 billion parameters
teaches one of a billion on 256. Does a chip hold the state, and does it gather the
weights of a layer only while that layer runs? Nothing runs and no TPU is needed: as in
`tpu_compile`, the step is lowered from shapes and compiled by libtpu.

Jobs:
  bert      BERT-base to 6 layers, classes and hidden states, 128 tokens, bfloat16, a
            copy of the step on each chip (mesh).
  gpt       7 billion to 1 billion, soft targets over 50,304 words taken a part at a
            time, 1,024 tokens, both models' parameters cut over all chips (fsdp),
            layers scanned, the student's computed again in the backward pass. The
            teacher is kept in bfloat16.

Expected of `gpt`: weights are gathered inside the loops over layers (a compiler may do
it by all-reduces of parts), and collectives outside return activations and embeddings
alone; temporaries are at most two layers' gathered weights beside activations.

  pip install 'jaxdistill[tpu]'
  python -m experiments.tpu.text --job bert
  python -m experiments.tpu.text --job gpt

Cost: minutes on a laptop.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.tpu import images as tpu_compile

# isort: split
import jax
import jax.numpy as jnp
import optax
import tyro
from flax import linen as nn

from jaxdistill import losses, models, objectives, parallel, teachers, train
from jaxdistill.train import cost
from jaxdistill.types import Objective, Term


class Job(NamedTuple):
    """A distillation step of text models.

    Attributes:
      teacher: its module.
      student: the same.
      objective: what the student learns.
      kind: how the chips divide the step.
      topology: of the chips.
      batch: examples on a chip.
      length: tokens of an example.
      by_token: whether each token has a label, or the example.
    """

    teacher: nn.Module
    student: nn.Module
    objective: Objective
    kind: parallel.Kind
    topology: str
    batch: int
    length: int
    by_token: bool


def bert() -> Job:
    """BERT-base, and six layers of it."""
    pairs = objectives.uniform(6, 12)
    terms: dict[str, tuple[float, Term]] = {
        "hard": (0.1, objectives.hard_labels()),
        "soft": (0.9, objectives.soft_targets(temperature=2.0)),
        "hidden": (1.0, objectives.on_hidden_states(losses.cosine_distance, pairs)),
    }
    teacher, student = (
        models.BertClassifier(models.Encoder(size, scan=True, maps=False), 2)
        for size in (models.BERT_BASE, replace(models.BERT_BASE, depth=6))
    )
    return Job(
        teacher, student, objectives.combine(terms), "mesh", "v5e:2x4", 32, 128, False
    )


def gpt() -> Job:
    """A GPT of 7 billion parameters, and one of a billion."""
    numbers = {"positions": 1024, "dropout": 0.0, "attention_dropout": 0.0}
    teacher = models.gpt_config(50_304, 4096, 32, 32, **numbers)
    student = models.gpt_config(50_304, 2048, 18, 16, **numbers)
    options: dict[str, Any] = {"scan": True, "maps": False, "factored": True}
    return Job(
        models.GPT(teacher, **options),
        models.GPT(student, remat=True, **options),
        objectives.combine({"soft": (1.0, objectives.soft_targets(temperature=1.0))}),
        "fsdp",
        "v5p:8x8x4",
        1,
        1024,
        True,
    )


JOBS = {"bert": bert, "gpt": gpt}

LINES = (
    ("teacher", "teacher, million parameters", 1e-6),
    ("student", "student, million parameters", 1e-6),
    ("arguments", "arguments, MB", 1e-6),
    ("aliased", "of them donated, MB", 1e-6),
    ("temporaries", "temporaries, MB", 1e-6),
    ("layer", "one of the teacher's layers, bfloat16, MB", 1e-6),
    ("flops", "GFLOP, a loop's body counted once", 1e-9),
    ("in loops", "collectives in loops", 1),
    ("a turn", "what they return in a turn of each loop, MB", 1e-6),
    ("outside", "collectives outside", 1),
    ("once", "what those return, MB", 1e-6),
)
"""The table's lines, see `tpu_compile.LINES`."""


@dataclass(frozen=True)
class Config:
    """Compile a text model's distillation step for TPU chips; print what it costs."""

    job: Literal["bert", "gpt"] = "bert"
    """which teacher and student"""
    topology: str | None = None
    """generation and chip grid, as libtpu names them; None is the job's"""
    batch_per_chip: int | None = None
    """examples of a step on each chip; None is the job's"""
    save: Path | None = None
    """also write the table there, as experiments/results/tpu/text_gpt.md"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Compiles, prints the table, returns its numbers."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    tpu_compile.check_libtpu()
    job = JOBS[config.job]()
    job = job._replace(
        topology=config.topology or job.topology,
        batch=config.batch_per_chip or job.batch,
    )
    chips = tpu_compile.find(job.topology)
    found = costs(job, chips)
    title = f"{len(chips)} x {chips[0].device_kind} ({job.topology}), {job.kind}"
    text = (
        f"Job: {config.job}, {job.batch} examples of {job.length} tokens on each "
        f"chip.\n\n{tpu_compile.table({title: found}, LINES)}"
    )
    tpu_compile.say(text, config.save)
    return found


def costs(job: Job, chips: Sequence[Any]) -> dict[str, Any]:
    """Memory, FLOPs and collectives of one chip's program."""
    partitioner = parallel.choose(job.kind, chips)
    step, arguments = abstract_step(job, partitioner, len(chips))
    jitted: Any = partitioner.compile(step)
    compiled = jitted.lower(*arguments).compile()
    repeated, others = (
        [size for sizes in tpu_compile.collectives(text).values() for size in sizes]
        for text in apart(compiled.as_text())
    )
    return {
        "teacher": count(arguments[1]),
        "student": count(arguments[0].params),
        **cost.memory(compiled),
        "flops": cost.flops(compiled),
        "layer": layer_bytes(arguments[1]),
        "in loops": len(repeated),
        "a turn": sum(repeated),
        "outside": len(others),
        "once": sum(others),
    }


def abstract_step(job: Job, partitioner: parallel.Partitioner, chips: int):
    """The train step, and the shapes of its arguments, where the chips hold them."""
    size = job.batch * chips
    shape = (size, job.length) if job.by_token else (size,)
    tokens = jax.ShapeDtypeStruct((size, job.length), jnp.int32)
    batch = {
        "inputs": {"input_ids": tokens},
        "labels": jax.ShapeDtypeStruct(shape, jnp.int32),
        "mask": jax.ShapeDtypeStruct((size,), jnp.float32),
    }
    student, optimizer = models.student(job.student), optax.adamw(1e-4)

    def start(batch):
        rng = jax.random.key(0)
        state = train.init_state(rng, student, optimizer, batch)
        variables = job.teacher.init(rng, batch["inputs"])
        kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
        return state, teachers.live(job.teacher, kept)

    state, teacher = jax.eval_shape(start, batch)
    step = train.make_train_step(student, job.objective, optimizer, dtype="bfloat16")

    def held(tree):
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            tree,
            partitioner.shardings(tree),
        )

    return step, (held(state), held(teacher), batch)


def count(tree: Any) -> int:
    """Numbers in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def layer_bytes(teacher: models.BoundModule) -> int:
    """Bytes of one of the teacher's layers, gathered in bfloat16."""
    stacked = [
        leaf.size // leaf.shape[0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(teacher.variables)
        if "'layers'" in jax.tree_util.keystr(path)
    ]
    return 2 * sum(stacked)


def apart(hlo: str) -> tuple[str, str]:
    """A program's computations that loops repeat, and the others.

    >>> step = "%body (p: f32[]) -> f32[] {\\n %g = f32[2]{0} all-gather(%p)\\n}\\n"
    >>> apart(step + "ENTRY %main () -> f32[] {\\n %w = while(%x), body=%body\\n}")
    (' %g = f32[2]{0} all-gather(%p)\\n', ' %w = while(%x), body=%body\\n')
    """
    computation = re.compile(
        r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.M | re.S
    )
    found = {match[1]: match[2] for match in computation.finditer(hlo)}
    inside: set[str] = set()
    new = {*re.findall(r"\bbody=%?([\w.\-]+)", hlo)}
    while new:
        inside |= new
        called = (re.findall(r"[=,{ ]%([\w.\-]+)", found[name]) for name in new)
        new = {name for names in called for name in names if name in found} - inside
    repeated = (text for name, text in found.items() if name in inside)
    others = (text for name, text in found.items() if name not in inside)
    return "".join(repeated), "".join(others)


if __name__ == "__main__":
    main()
