# SPDX-License-Identifier: Apache-2.0
"""An epoch of the articles' job by every loop that benchmark compares.

Each function returns `{name: epoch}`, and why the loops that cannot run here are left
out. All start from the same weights and the same trained teacher; an epoch has all
images once, in a new order.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.speed import bare_jax
from experiments.speed.article_job import Job, Task, baseline
from experiments.speed.parts import baseline_module
from jaxdistill import models, objectives, parallel, teachers, train
from jaxdistill.data import Batches
from jaxdistill.study import sweep
from jaxdistill.types import TrainState

Loops = tuple[dict[str, Callable[[], Any]], dict[str, str]]

LIVE, STORED, SWEPT = "jaxdistill, live", "jaxdistill, stored", "jaxdistill, swept"
ARTICLE, TUNED = "PyTorch, the article's loop", "PyTorch, tuned"
COMPILED, KERAS = "PyTorch, tuned and compiled", "Keras Distiller"
STEPS, SCANNED = "bare JAX, step by step", "bare JAX, scanned"


def torch_loops(task: Task, variables: Any, compiled: bool) -> Loops:
    """The article's loop, a tuned one, and that under torch.compile."""
    source, start = task.source, task.drawn("student")
    numbers = source.mean, source.deviation, source.peak
    raw = (source.train["images"], source.train["labels"], *numbers)
    ready = (task.train["inputs"], task.train["labels"])

    def networks(tuned):
        del tuned
        student = task.torch_module("student", start)
        return student, task.torch_module("teacher", variables)

    return theirs(task.config, networks, raw, ready, compiled)


def theirs(
    config: Job, networks: Callable, raw: Any, ready: Any, compiled: bool
) -> Loops:
    """PyTorch's three loops over the same networks.

    Args:
      config: the job's numbers.
      networks: `whether for the tuned ones -> (student, teacher)`, new ones.
      raw: of `pytorch_mlp.Images`.
      ready: normalised images, and labels.
      compiled: whether to compile.
    """
    try:
        torch = baseline()
    except ValueError as error:
        return {}, dict.fromkeys((ARTICLE, TUNED, COMPILED), str(error))
    torch.torch.set_num_threads(config.threads)
    loss = torch.make_loss(config.temperature, config.hard_weight, config.soft_weight)
    sizes = {"batch_size": config.batch_size, "learning_rate": config.learning_rate}

    def tuned(**options):
        return torch.tuned(*networks(True), loss, *ready, **sizes, **options)

    article = torch.article(*networks(False), loss, torch.Images(*raw), **sizes)
    jobs = {ARTICLE: article, TUNED: tuned()}
    problem = torch.compiler_problem() if compiled else "not asked for"
    if problem:
        return jobs, {COMPILED: problem}
    return {**jobs, COMPILED: tuned(compiled=True)}, {}


def keras_loops(task: Task, variables: Any) -> Loops:
    """Keras's `Distiller`."""
    needed = "needs it: pip install 'jaxdistill[keras]'"
    try:
        keras_mlp = baseline_module("keras_mlp", ("keras",), needed)
    except ValueError as error:
        return {}, {KERAS: str(error)}
    names = ("batch_size", "learning_rate", "temperature", "hard_weight")
    epoch = keras_mlp.distill(
        keras_mlp.mlp(_layers(task.drawn("student")), trainable=True),
        keras_mlp.mlp(_layers(variables), trainable=False),
        task.train["inputs"],
        task.train["labels"],
        **{name: getattr(task.config, name) for name in names},
    )
    return {KERAS: epoch}, {}


def bare_loops(task: Task, variables: Any) -> Loops:
    """JAX by hand: a step a dispatch, and all of an epoch in one."""
    state, step, data = bare(task, variables)
    one = jax.jit(step, donate_argnums=0)
    all_rows = jax.jit(bare_jax.scan(step), donate_argnums=0)
    batches = task.batches(0)
    copies = {name: jax.tree.map(jnp.copy, state) for name in (STEPS, SCANNED)}
    orders = {name: _orders(batches) for name in copies}

    def step_by_step():
        rows, losses = next(orders[STEPS]), []
        for i in range(batches.steps_per_epoch):
            row = {name: array[i] for name, array in rows.items()}
            copies[STEPS], metrics = one(copies[STEPS], *data, row)
            losses.append(metrics[0])
        return np.asarray(jax.device_get(losses)).mean()

    def scanned():
        rows = next(orders[SCANNED])
        copies[SCANNED], metrics = all_rows(copies[SCANNED], *data, rows)
        return np.asarray(metrics[0]).mean()

    return {STEPS: step_by_step, SCANNED: scanned}, {}


def _orders(batches) -> Iterator[dict[str, np.ndarray]]:
    """The rows of each epoch."""
    length = batches.steps_per_epoch
    for epoch in itertools.count():
        yield batches.indices(epoch * length, (epoch + 1) * length)


def bare(task: Task, variables: Any):
    """The hand-written loop's state, step, and `(teacher, images, labels)`, placed."""
    config = task.config
    numbers = config.temperature, config.hard_weight, config.soft_weight
    step = bare_jax.make_step(*numbers, task.optimizer)
    params = _layers(task.drawn("student"))
    state = task.partitioner.place((params, task.optimizer.init(params)))
    data = _layers(variables), task.train["inputs"], task.train["labels"]
    return state, step, task.partitioner.place(data)


def our_loops(task: Task, variables: Any, students: int) -> Loops:
    """Ours: the teacher in every step, its outputs stored, and many students at once.

    The swept students have grids of rates, temperatures and seeds, and are evaluated
    on the test images at each epoch's end; the single ones are not.
    """
    live = task.partitioner.place(task.teacher(variables))
    stored = teachers.with_logits(live, task.placed)
    step, state = task.step("student"), task.fresh("student", 0)
    one = partial(one_epoch, task.partitioner, step, state)
    batches = task.batches(0)
    return {
        LIVE: one(batches, live, task.placed),
        STORED: one(batches, teachers.StoredTeacher(), stored),
        f"{SWEPT}, each of {students}": swept(task, stored, students),
    }, {}


def one_epoch(
    partitioner: parallel.Partitioner,
    step: Callable,
    state: TrainState,
    batches: Batches,
    *resident: Any,
) -> Callable[[], float]:
    """A function that trains for an epoch in one dispatch; the steps' mean loss.

    Args:
      partitioner: see `parallel`.
      step: of many steps, compiled (`train.scan_train`).
      state: where the first epoch starts, not placed.
      batches: which examples go into which batch.
      resident: the placed teacher, and the placed examples.
    """
    state, done = partitioner.place(state), 0

    def epoch() -> float:
        nonlocal state, done
        stop = done + batches.steps_per_epoch
        rows = partitioner.split(batches.indices(done, stop), 1)
        state, metrics = step(state, resident, rows)
        done = stop
        return float(np.asarray(metrics["loss"][0]).mean())

    return epoch


def cells_for(students: int) -> dict[str, np.ndarray]:
    """A grid of so many trials: rates, temperatures, and seeds for what is left."""
    rates = [3e-4, 1e-3][: 2 if students % 2 == 0 else 1]
    temperatures = [1.0, 2.0, 4.0, 8.0][: 4 if students % 8 == 0 else 1]
    seeds = range(students // (len(rates) * len(temperatures)))
    return sweep.grid(learning_rate=rates, temperature=temperatures, seed=seeds)


def swept(
    task: Task, examples: Any, students: int, steps: int | None = None
) -> Callable[[], Any]:
    """Steps of many students, each with its own schedule, in one dispatch.

    On CPUs each core trains its own, one after another.

    Args:
      task: the job.
      examples: with stored outputs.
      students: how many.
      steps: of a dispatch; None is an epoch, and their evaluation on the test images.
    """
    config, batches = task.config, task.batches(0)
    length = steps or batches.steps_per_epoch
    trials, module = cells_for(students), task.modules["student"]
    student = models.student(module)
    total = config.epochs * batches.steps_per_epoch

    def make_objective(trial):
        return objectives.hinton(
            trial["temperature"], config.soft_weight, config.hard_weight
        )

    def make_optimizer(trial):
        return optax.adam(optax.cosine_decay_schedule(trial["learning_rate"], total))

    partitioner = sweep.choose(trials)
    states = sweep.init_states(trials, student, make_optimizer, task.first())
    states, examples = partitioner.place(states), partitioner.replicate(examples)
    step = sweep.make_sweep_step(student, make_objective, make_optimizer)
    group = sweep.group_for(partitioner)
    many_steps = sweep.compile_sweep(partitioner, step, trials, group=group)
    judge = train.Evaluator(partitioner, task.test, trials=True)
    done = 0

    def dispatch():
        nonlocal states, done
        rows = partitioner.split(batches.indices(done, done + length), 1)
        states, metrics = many_steps(states, (teachers.StoredTeacher(), examples), rows)
        done += length
        if steps is None:
            return judge(models.trained(module, states))
        return np.asarray(metrics["loss"][0])

    return dispatch


def _layers(variables: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """An MLP's `(kernel, bias)` in their order."""
    layers = sorted(variables["params"].items(), key=lambda item: int(item[0][6:]))
    return [(np.asarray(x["kernel"]), np.asarray(x["bias"])) for _, x in layers]
