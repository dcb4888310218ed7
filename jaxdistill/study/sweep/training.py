# SPDX-License-Identifier: Apache-2.0
"""A sweep from its fresh states to its trained students."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxdistill import models
from jaxdistill.data import Batches, Orders
from jaxdistill.models import apply
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.study.sweep.devices import choose, compile_sweep, group_for
from jaxdistill.study.sweep.steps import init_states, make_sweep_step
from jaxdistill.study.sweep.trials import Trial, apart, is_per_trial
from jaxdistill.teachers import fingerprints
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.loop import fit, interval
from jaxdistill.train.run_dir import RunDir
from jaxdistill.types import Objective


def train(
    trials: Mapping[str, Any],
    module: nn.Module,
    make_objective: Callable[[Trial], Objective],
    make_optimizer: Callable[[Trial], optax.GradientTransformation],
    *,
    partitioner: Partitioner | None = None,
    run_dir: RunDir,
    name: str,
    examples: Mapping[str, Any],
    batches: Batches | Orders,
    steps: int,
    teacher: Any = None,
    names: Sequence[str] = (),
    evaluate: Callable[[apply.BoundModule], Any] | None = None,
    evaluations: int = 5,
    best: str | None = None,
    progress: bool = True,
    **options: Any,
) -> apply.BoundModule:
    """Trains a grid through `train.fit`, resumed from its checkpoints.

    Args:
      trials: `{name: [trials]}`, with `seed`.
      module: the linen module of every trial.
      make_objective: see `make_sweep_step`.
      make_optimizer: likewise.
      partitioner: `choose(trials)` if None.
      run_dir: the run directory.
      name: in logs and of the checkpoint folder.
      examples: not placed, `PerTrial` in part perhaps (`stack`); with stored outputs as
        `teacher`, see `store.read`.
      batches: which examples go into which batch: the same for all trials, or `Orders`.
      steps: optimizer steps.
      teacher: not placed: `teachers.StoredTeacher()`, a live teacher, each trial's own
        (`stack`), or None.
      names: of the trials in logs; without, a record is their mean.
      evaluate: `all students -> {name: number}`, with names one such of each trial.
      evaluations: records and checkpoints of the training, about so many
        (`train.interval`).
      best: see `Checkpoints`; of the trials' mean.
      progress: whether to show a bar.
      options: see `make_sweep_step`.

    Returns:
      All students as one placed model, whose variables have an axis of trials first.
    """
    partitioner = choose(trials) if partitioner is None else partitioner
    student = models.student(module)
    trial = {name: np.asarray(of)[0] for name, of in trials.items()}
    checkpoints = Checkpoints(
        run_dir.path / "checkpoints" / name,
        identity={
            "name": name,
            "trials": {name: np.asarray(of).tolist() for name, of in trials.items()},
            "teacher": fingerprints.of_tree((teacher, examples)),
            "objective": fingerprints.described(make_objective(trial)),
            "steps": steps,
        },
        best=best,
    )
    step = make_sweep_step(student, make_objective, make_optimizer, **options)
    _, shared = apart(teacher)
    # A live teacher that all share is asked once for all.
    group = None if jax.tree.leaves(shared) else group_for(partitioner)
    trained = partial(apply.trained, module)
    states = fit(
        init_states(trials, student, make_optimizer, _first(examples)),
        compile_sweep(partitioner, step, trials, group=group),
        partitioner=partitioner,
        examples=partitioner.replicate(dict(examples)),
        batches=batches,
        steps=steps,
        teacher=partitioner.replicate(teacher),
        evaluate=None if evaluate is None else lambda x: evaluate(trained(x)),
        evaluate_every=interval(steps, evaluations),
        checkpoints=checkpoints,
        run_dir=run_dir,
        name=name,
        trials=names,
        progress=progress,
    )
    checkpoints.close()
    return trained(partitioner.place(states))


def _first(examples: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of the first example, of the first trial where each has its own."""
    first = jax.tree.map(
        lambda x: (x.tree[0] if is_per_trial(x) else x)[:1],
        {name: array for name, array in examples.items() if name != "teacher"},
        is_leaf=is_per_trial,
    )
    return {**first, "mask": np.ones(1, np.float32)}
