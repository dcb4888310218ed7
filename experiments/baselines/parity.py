# SPDX-License-Identifier: Apache-2.0
"""Both sides of compare_pytorch, step by step: same weights, batches and teacher."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from experiments.speed.article_job import Task, baseline
from jaxdistill import pretrained
from jaxdistill.teachers import fingerprints
from jaxdistill.types import TrainState


def parity(task: Task) -> dict[str, Any]:
    """The largest relative differences, for each seed's initial weights.

    `float64` and `float32` run side by side for all steps. In float32 optax takes
    Adam's `1 - b2^t` in float32, a rate up to 1e-5 off the one PyTorch takes in double.
    That is enough for some activation to fall on the other side of zero within 200
    steps, and then the two drift apart as any two runs do. So `float32` gives PyTorch
    the same rates; `as_is` leaves each its own. Even then an activation within rounding
    of zero may come, for one seed and not for another: `restarted` compares the same
    steps, each from a state that both share.
    """
    task.teacher_variables(0)  # in float32 whatever follows
    seeds = range(task.config.seeds)
    return {
        "float64": [side_by_side(task, seed, "float64") for seed in seeds],
        "restarted": [restarted(task, seed) for seed in seeds],
        "float32": [side_by_side(task, seed, "float32") for seed in seeds],
        "as_is": [
            side_by_side(task, seed, "float32", same_rates=False) for seed in seeds
        ],
    }


def side_by_side(
    task: Task, seed: int, dtype: str, *, same_rates: bool = True
) -> dict[str, Any]:
    """Both sides from the same weights through the same batches."""
    torch, config = baseline(), task.config

    def cast(tree):
        return jax.tree.map(lambda x: np.asarray(x, dtype), tree)

    inputs, labels = cast(task.train["inputs"]), task.train["labels"]
    with jax.enable_x64(dtype == "float64"):
        teaching, state = cast(task.teacher_variables(0)), task.fresh("student", seed)
        start = cast(state.params)
        state = replace(state, params=start, opt_state=task.optimizer.init(start))
        examples = {"inputs": inputs, "labels": labels}
        rows = task.batches(seed).indices(0, config.parity_steps)
        ours, metrics = task.step("student")(
            task.partitioner.place(state),
            task.partitioner.place((task.teacher(teaching), examples)),
            task.partitioner.split(rows, 1),
        )
        losses, params = np.asarray(metrics["loss"][0]), cast(ours.params)
        rates = config.learning_rate * np.ones(config.parity_steps)
        if same_rates:
            rates *= bias_rounding(config.parity_steps)
    variables = {"params": start}
    student = task.torch_module("student", variables)
    back = pretrained.from_torch(student.state_dict(), variables)
    if fingerprints.of_tree(back) != fingerprints.of_tree(variables):
        raise ValueError("weights to PyTorch and back are not the same weights")
    expected = torch.follow(
        student,
        task.torch_module("teacher", teaching),
        task.torch_loss(),
        ((inputs[i], labels[i]) for i in _real(rows)),
        rates,
    )
    theirs = pretrained.from_torch(student.state_dict(), variables)["params"]
    return _differences(losses, expected, [_apart(params, theirs)])


def restarted(task: Task, seed: int) -> dict[str, Any]:
    """Both sides from our weights and Adam's moments, anew at each step."""
    torch, config = baseline(), task.config
    train, variables = task.train, task.teacher_variables(0)
    rows = task.batches(seed).indices(0, config.parity_steps)
    student = task.torch_module("student")
    optimizer = torch.torch.optim.Adam(student.parameters(), lr=config.learning_rate)
    teacher = task.torch_module("teacher", variables)
    step = torch.make_step(student, teacher, task.torch_loss(), optimizer)
    losses, expected, apart = [], [], []
    steps = _one_by_one(task, seed, variables, rows)
    for (before, loss, after), index in zip(steps, _real(rows), strict=True):
        adam = before.opt_state[0]

        def named(tree):
            return pretrained.to_torch({"params": tree}, student.state_dict())

        torch.load(student, named(before.params))
        torch.set_adam(
            optimizer, student, int(adam.count), named(adam.mu), named(adam.nu)
        )
        images, labels = (train[key][index] for key in ("inputs", "labels"))
        value = step(torch.torch.tensor(images), torch.torch.tensor(labels).long())
        theirs = pretrained.from_torch(student.state_dict(), {"params": before.params})
        losses.append(loss)
        expected.append(float(value))
        apart.append(_apart(after.params, theirs["params"]))
    return _differences(np.array(losses), np.array(expected), apart)


def _one_by_one(
    task: Task, seed: int, variables, rows
) -> Iterator[tuple[TrainState, float, TrainState]]:
    """Our run, a step a dispatch: `(state before, loss, state after)`."""
    teacher = task.partitioner.place(task.teacher(variables))
    before = task.partitioner.fetch(task.partitioner.place(task.fresh("student", seed)))
    for at in range(task.config.parity_steps):
        row = jax.tree.map(lambda x, at=at: x[at : at + 1], rows)
        after, metrics = task.step("student")(
            task.partitioner.place(before),
            (teacher, task.placed),
            task.partitioner.split(row, 1),
        )
        after = task.partitioner.fetch(after)
        yield before, float(metrics["loss"][0][0]), after
        before = after


def _real(rows) -> Iterator[np.ndarray]:
    """The examples of each batch, without padding."""
    for index, mask in zip(rows["index"], rows["mask"], strict=True):
        yield index[mask > 0]


def _apart(ours, theirs) -> float:
    """The largest difference of a parameter over the largest parameter: a weight that
    passes through zero has no relative error worth a name."""
    pairs = list(zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    largest = max(abs(b).max() for _, b in pairs)
    return float(max(abs(a - b).max() for a, b in pairs) / largest)


def _differences(losses, expected, apart) -> dict[str, Any]:
    return {
        "steps": len(losses),
        "loss": float(np.max(np.abs(losses - expected) / np.abs(expected))),
        "params": max(apart),
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
