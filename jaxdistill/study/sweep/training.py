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
from jaxdistill.data import Batches, Orders, check_examples
from jaxdistill.models import apply
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.study.sweep.devices import choose, compile_sweep, group_for
from jaxdistill.study.sweep.steps import init_states, make_sweep_step, trial_state
from jaxdistill.study.sweep.trials import (
    Trial,
    apart,
    has_per_trial,
    of_trial,
)
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.knowledge import check_knowledge
from jaxdistill.train.checkpoint import Checkpoints
from jaxdistill.train.identity import Content, logits_of, of_training
from jaxdistill.train.intervals import interval
from jaxdistill.train.loop import fit
from jaxdistill.train.run_dir import RunDir
from jaxdistill.types import Objective, TrainState


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
    check_finite: bool = True,
    untrained: bool = False,
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
      check_finite: see `data.check_examples`.
      untrained: the teacher is a control (`teachers.control`).
      options: see `make_sweep_step`.

    Returns:
      All students as one placed model, whose variables have an axis of trials first.

    Raises:
      DataError: as `data.check_examples`.
      TeacherError: a teacher knows nothing of the labels, and is no control.
      CheckpointError: what is there is of another sweep.
    """
    partitioner = choose(trials) if partitioner is None else partitioner
    student = models.student(module)
    states = init_states(trials, student, make_optimizer, _first(examples))
    # A live teacher that all share is asked once for all.
    shared = jax.tree.leaves(apart(teacher)[1])
    group = None if shared else group_for(partitioner)
    sweep_step = make_sweep_step(student, make_objective, make_optimizer, **options)
    step = compile_sweep(partitioner, sweep_step, trials, group=group)
    asked = None if untrained else teacher
    content = _examined(step, states, asked, examples, batches, check_finite, progress)
    first = of_trial(teacher, 0), of_trial(dict(examples), 0)
    training = of_training(step, states, *first, content, batches)
    identity = {"name": name, "steps": steps, "settings": run_dir.settings}
    identity["training"] = training
    folder = run_dir.path / "checkpoints" / name
    checkpoints = Checkpoints(folder, identity=identity, best=best)
    trained = partial(apply.trained, module)
    states = fit(
        states,
        step,
        partitioner=partitioner,
        examples=partitioner.replicate(dict(examples)),
        content=content,
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


def _examined(
    step: Callable,
    states: TrainState,
    teacher: Any,
    examples: Mapping[str, Any],
    batches: Batches | Orders,
    check_finite: bool,
    progress: bool,
) -> Content:
    """The content of all trials' examples, checked, and each one's teacher."""
    count = len(states.rng)
    own = has_per_trial(examples) or has_per_trial(teacher)
    digests: dict[str, str] = {}
    for i in range(count if own else 1):
        seen, asked = of_trial(dict(examples), i), of_trial(teacher, i)
        logits = logits_of(step, trial_state(states, i), seen)
        size = check_examples(seen, logits=logits, check_finite=check_finite)
        batches.check_size(size)
        check_knowledge(asked, seen, progress=progress)
        found = fingerprints.of_data(seen)
        digests |= {f"{key} of {i}" if own else key: x for key, x in found.items()}
    return Content(batches.size, digests)


def _first(examples: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of the first example, of the first trial where each has its own."""
    some = {name: array for name, array in examples.items() if name != "teacher"}
    first = jax.tree.map(lambda x: x[:1], of_trial(some, 0))
    return {**first, "mask": np.ones(1, np.float32)}
