# SPDX-License-Identifier: Apache-2.0
"""How fast is the articles' distillation job, and what does it cost?

Question: seconds of an epoch of the same job (MNIST, teacher 784-512-256-10 trained
beforehand, student 784-128-64-10, batch 64, Adam, temperature 2) by what users would
otherwise run, and by ours.

  loops    the article's PyTorch loop; PyTorch with all that makes it fast, eager and
           compiled; Keras's Distiller on JAX; JAX by hand, step by step and scanned;
           ours with the teacher in every step, with its outputs stored, and many
           students at once, evaluated and each with its own schedule. They take turns
           on the same cores; a ratio is taken pair by pair. Beside them: XLA's FLOPs
           and bytes of ours and of the hand-written scan, and the share of the
           machine's matrix-multiply peak that each reaches.
  resnet   ResNet-20 teaches ResNet-8 on 32x32 colour images, the same loss: PyTorch's
           three loops, ours live and stored.
  scaling  milliseconds of a step against the teacher's width, the batch, and the
           number of students.
  cold     the whole job as a process of its own, nothing compiled before: import, read
           the teacher and the images, 10 epochs, evaluate, save.

Expected on two cores: live 8 to 13 times as fast as the article's loop, twice tuned
PyTorch, 1.7 times Keras; stored twice live; swept 1.4 times stored, a student; as fast
as the hand-written scan within 3%.

The PyTorch loops need jaxdistill[torch], Keras's jaxdistill[keras]; what is not there
is left out, and the table says so. A run directory keeps the parts it has: run one
again at a quiet time. Cost on two cores: about 20 minutes, a minute with --smoke.

  python -m experiments.speed.images --data-dir ~/mnist
  python -m experiments.speed.images --data-dir ~/mnist --part loops --rounds 25
  python -m experiments.speed.images --smoke
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from experiments.speed import bare_jax, loops, resnet_job
from experiments.speed import report as speed_report
from experiments.speed.article_job import Job, Task
from experiments.speed.parts import in_turns, keep_to_threads, run_parts
from jaxdistill import teachers
from jaxdistill.study import script, sweep
from jaxdistill.train import cost

WIDTHS, BATCHES, STUDENTS = (0.5, 1, 2, 4), (16, 64, 256, 1024), (1, 4, 16, 32)
SCALING_STEPS = 200


@dataclass(frozen=True)
class Config(Job):
    """Time the articles' job by every loop there is."""

    part: Literal["loops", "resnet", "scaling", "cold", "all"] = "all"
    """what to run"""
    run_dir: str = "runs/speed"
    """where the results are kept"""
    rounds: int = 15
    """epochs timed of each loop, after one that is not counted"""
    processes: int = 5
    """whole processes timed of either side"""
    students: int = 16
    """students of the sweep"""
    resnet_images: int = 1024
    """images in an epoch of the ResNets"""
    compile: bool = True
    """also time torch.compile"""


SMOKE = """--data digits --teacher 32 --student 16 8 --rounds 2 --processes 1
    --students 4 --resnet-images 64 --epochs 2"""


def execute(config: Config) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds."""
    if config.smoke:
        config = script.with_flags(config, SMOKE)
    task = Task(config)
    made = {"loops": epochs, "resnet": residual, "scaling": scaling, "cold": cold}
    jobs = {name: partial(job, task) for name, job in made.items()}
    return run_parts(config, jobs, speed_report.tables, speed_report.figures)


def begin(config: Config) -> None:
    """Before any side makes its threads, or touches a device."""
    keep_to_threads(config)
    sweep.use_cores()


def epochs(task: Task) -> dict[str, Any]:
    """Seconds per epoch of every loop, in turns; what XLA counts of ours."""
    config = task.config
    variables = task.teacher_variables(0)
    jobs: dict[str, Callable] = {}
    skipped: dict[str, str] = {}
    for found, missing in (
        loops.torch_loops(task, variables, config.compile),
        loops.keras_loops(task, variables),
        loops.bare_loops(task, variables),
        loops.our_loops(task, variables, config.students),
    ):
        jobs |= found
        skipped |= missing
    times = in_turns(config, "loops", jobs, config.rounds)
    # A sweep's epoch trains many: a student's share of it.
    times = {
        name: [t / config.students for t in seconds]
        if name.startswith(loops.SWEPT)
        else seconds
        for name, seconds in times.items()
    }
    return {
        "seconds": times,
        "skipped": skipped,
        "programs": programs(task, variables),
        "peak_gflops": peak(),
        "images": len(task.train["labels"]),
        "steps": task.batches(0).steps_per_epoch,
        "batch_size": config.batch_size,
        "students": config.students,
    }


def residual(task: Task) -> dict[str, Any]:
    """Seconds per epoch of the ResNets' loops, in turns."""
    config = task.config
    jobs, skipped = resnet_job.all_loops(config, config.resnet_images, config.compile)
    return {
        "seconds": in_turns(config, "resnet", jobs, config.rounds),
        "skipped": skipped,
        "images": config.resnet_images,
        "batch_size": config.batch_size,
    }


def programs(task: Task, variables: Any) -> dict[str, dict[str, float]]:
    """XLA's FLOPs and bytes of a step, and its memory: ours, and the one by hand.

    Of the programs of one step: XLA counts the body of a loop once, however often it
    runs.
    """
    rows = task.partitioner.split(task.batches(0).indices(0, 1), 1)
    live = task.partitioner.place(task.teacher(variables))
    state = task.partitioner.place(task.fresh("student", 0))
    by_hand, step, data = loops.bare(task, variables)
    stored = (teachers.StoredTeacher(), teachers.with_logits(live, task.placed))
    scanned: Any = jax.jit(bare_jax.scan(step), donate_argnums=0)
    ours: Any = task.step("student")
    lowered = {
        loops.SCANNED: scanned.lower(by_hand, *data, rows),
        loops.LIVE: ours.lower(state, (live, task.placed), rows),
        loops.STORED: ours.lower(state, stored, rows),
    }
    result = {}
    for name, program in lowered.items():
        compiled = program.compile()
        result[name] = {
            "flops": cost.flops(compiled),
            "bytes": cost.bytes_accessed(compiled),
            **cost.memory(compiled),
        }
    return result


def peak(size: int = 2048) -> float:
    """The best of ten float32 matrix products, in GFLOP/s: what the machine can do."""
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)

    def once():
        product(a, a).block_until_ready()

    once()
    return 2 * size**3 / min(cost.seconds(once) for _ in range(10)) / 1e9


def scaling(task: Task) -> dict[str, Any]:
    """Milliseconds per step and student, against what makes a job larger."""
    config = task.config
    steps = 20 if config.smoke else SCALING_STEPS

    def of_sizes(part: str, tasks: dict[str, Task]) -> dict[str, float]:
        jobs: dict[str, Callable] = {}
        for size, other in tasks.items():
            live, stored = lessons(other)
            jobs[f"live {size}"] = dispatch(other, live, other.placed, steps)
            jobs[f"stored {size}"] = dispatch(
                other, teachers.StoredTeacher(), stored, steps
            )
        return per_step(task, part, jobs, steps)

    scaled = [tuple(int(x * width) for width in config.teacher) for x in WIDTHS]
    widths = {"-".join(map(str, t)): Task(replace(config, teacher=t)) for t in scaled}
    some = [size for size in BATCHES if size <= len(task.train["labels"])]
    batches = {f"{size}": Task(replace(config, batch_size=size)) for size in some}
    result: dict[str, Any] = {"teacher": of_sizes("teacher", widths)}
    result["batch"] = of_sizes("batch", batches)
    _, stored = lessons(task)
    many = {
        f"swept {count}": loops.swept(task, stored, count, steps) for count in STUDENTS
    }
    times = per_step(task, "students", many, steps)
    result["students"] = {name: ms / int(name.split()[1]) for name, ms in times.items()}
    return result


def lessons(task: Task) -> tuple[Any, Any]:
    """A teacher as it is drawn, placed, and the examples with its outputs."""
    live = task.partitioner.place(task.teacher(task.drawn("teacher")))
    return live, teachers.with_logits(live, task.placed)


def dispatch(task: Task, teacher: Any, examples: Any, steps: int) -> Callable:
    """A function that trains for so many steps in one dispatch."""
    step = task.step("student")
    rows = task.partitioner.split(task.batches(0).indices(0, steps), 1)
    state = task.partitioner.place(task.fresh("student", 0))

    def run():
        nonlocal state
        state, metrics = step(state, (teacher, examples), rows)
        return np.asarray(metrics["loss"][0])

    return run


def per_step(task: Task, part: str, jobs, steps: int) -> dict[str, float]:
    """The median of five turns, in milliseconds a step."""
    config = task.config
    times = in_turns(config, part, jobs, 1 if config.smoke else 5)
    return {name: 1e3 * float(np.median(t)) / steps for name, t in times.items()}


def cold(task: Task) -> dict[str, Any]:
    """Seconds and peak memory of whole processes, ours and the article's, in turns."""
    config = task.config
    sides = ["pytorch"] if importlib.util.find_spec("torch") else []
    sides.append("jaxdistill")
    found: dict[str, list] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights: Any = task.torch_weights("teacher", task.teacher_variables(0))
        np.savez(folder / "teacher.npz", **weights)
        job = {field.name: getattr(config, field.name) for field in fields(Job)}
        text = json.dumps({**job, "progress": False}, default=str)
        (folder / "job.json").write_text(text, encoding="utf-8")
        for turn in tqdm(range(config.processes), "cold", disable=not config.progress):
            for side in sides if turn % 2 == 0 else reversed(sides):
                found[side].append(process(side, folder, folder / f"{side}-{turn}"))
    return {"processes": found, "epochs": config.epochs}


def process(side: str, folder: Path, output: Path) -> dict[str, float]:
    """One side's whole job, with nothing compiled before."""
    command = [sys.executable, "-m", "experiments.speed.whole_job"]
    command += [side, str(folder), str(output)]
    env = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    root = Path(__file__).parents[2]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"the cold job of {side} failed: {done.stderr[-500:]}")
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


main = script.command(execute, {"": Config()}, __doc__, begin=begin)

if __name__ == "__main__":
    main()
