# SPDX-License-Identifier: Apache-2.0
"""Both sides of compare_pytorch, step by step: same weights, batches and teacher."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments.article_job import Task, baseline
from jaxdistill import convert, teachers


def parity(task: Task) -> dict[str, Any]:
    """The largest relative differences, in both precisions, for each seed's weights.

    In float32 optax takes Adam's `1 - b2^t` in float32, a rate up to 1e-5 off the one
    PyTorch takes in double. That is enough for some activation to fall on the other
    side of zero within 200 steps, and then the two drift apart as any two runs do. So
    `float32` gives PyTorch the same rates; `as_is` leaves each its own. Even then an
    activation within rounding of zero may come, for one seed and not for another.
    """
    task.taught(0)  # in float32 whatever follows
    seeds = range(task.config.seeds)
    return {
        "float64": [side_by_side(task, seed, "float64") for seed in seeds],
        "float32": [side_by_side(task, seed, "float32") for seed in seeds],
        "as_is": [
            side_by_side(task, seed, "float32", same_rates=False) for seed in seeds
        ],
    }


def side_by_side(
    task: Task, seed: int, dtype: str, *, same_rates: bool = True
) -> dict[str, Any]:
    """Both sides from the same weights through the same batches.

    The parameters' difference is taken relative to the largest parameter: a weight that
    passes through zero has no relative error worth a name.
    """
    torch, config = baseline(), task.config

    def cast(tree):
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)

    inputs, labels = cast(task.train["inputs"]), task.train["labels"]
    with jax.enable_x64(dtype == "float64"):
        taught, state = cast(task.taught(0)), task.fresh("student", seed)
        start = cast(state.params)
        state = replace(state, params=start, opt_state=task.optimizer.init(start))
        examples = {"inputs": inputs, "labels": labels}
        rows = task.batches(seed).rows(0, config.parity_steps)
        ours, metrics = task.step("student")(
            task.run.place(state),
            task.run.place((task.teacher(taught), examples)),
            task.run.split(rows, 1),
        )
        losses, params = np.asarray(metrics["loss"][0]), cast(ours.params)
        rates = config.learning_rate * np.ones(config.parity_steps)
        if same_rates:
            rates *= bias_rounding(config.parity_steps)
    variables = {"params": start}
    student = task.torch_module("student", variables)
    back = convert.from_torch(student.state_dict(), variables)
    if teachers.digest(back) != teachers.digest(variables):
        raise ValueError("weights to PyTorch and back are not the same weights")
    real = [i[m > 0] for i, m in zip(rows["index"], rows["mask"], strict=True)]
    expected = torch.follow(
        student,
        task.torch_module("teacher", taught),
        task.loss,
        ((inputs[i], labels[i]) for i in real),
        rates,
    )
    theirs = convert.from_torch(student.state_dict(), variables)["params"]
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(theirs), strict=True))
    largest = max(abs(b).max() for _, b in pairs)
    return {
        "steps": config.parity_steps,
        "loss": float(np.max(np.abs(losses - expected) / np.abs(expected))),
        "params": float(max(abs(a - b).max() for a, b in pairs) / largest),
        "first_and_last_loss": [float(expected[0]), float(expected[-1])],
    }


def bias_rounding(steps: int) -> np.ndarray:
    """What Adam's rate is multiplied by, step by step, for want of precision.

    The rate is `sqrt(1 - b2^t) / (1 - b1^t)`, in JAX's present precision over exactly.
    """
    rounds = jax.jit(lambda t, decay: 1 - decay**t, static_argnums=1)
    count = np.arange(1, steps + 1)
    off = [
        np.asarray(rounds(count.astype(np.int32), decay), np.float64)
        / (1 - decay ** count.astype(np.float64))
        for decay in (0.9, 0.999)
    ]
    return np.sqrt(off[1]) / off[0]
