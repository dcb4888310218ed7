# SPDX-License-Identifier: Apache-2.0
"""The pure train and eval steps, and the only reduction to a scalar.

A batch may be taken in parts, micro-batches, whose gradients are added up.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdistill.data.tokens import bucketed
from jaxdistill.losses.numerics import divide
from jaxdistill.models.apply import cast_to_compute
from jaxdistill.teachers import views
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.train import memory
from jaxdistill.train.recipe import Recipe, recipe_of
from jaxdistill.types import (
    WHOLE,
    Array,
    Batch,
    Metrics,
    Objective,
    Outputs,
    Replica,
    Student,
    Teacher,
    TrainState,
    truth,
)

DROPOUT, AUGMENT, GENERATE = 0, 1, 2
"""Purposes of a step's keys: `fold_in(fold_in(state.rng, state.step), PURPOSE)`."""


def init_state(
    rng: Array, student: Student, optimizer: optax.GradientTransformation, batch: Batch
) -> TrainState:
    """A fresh state.

    Args:
      rng: a typed key, `jax.random.key(seed)`. Half of it draws the parameters, the
        other half stays in the state for dropout and augmentation.
      batch: any batch, for shapes.

    Raises:
      OutOfMemory: naming the size of the parameters.
    """
    init_rng, rng = jax.random.split(rng)
    try:
        params, model_state = jax.jit(student.init)(init_rng, batch)
        opt_state = optimizer.init(params)
    except Exception as error:
        memory.explain_init(error, student.init, init_rng, batch)
        raise
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, model_state, opt_state, rng)


def make_train_step(
    student: Student,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    augment: Callable[[Batch, Array], Batch] | None = None,
    rollout: Callable[[TrainState, Batch, Array], Batch] | None = None,
    micro_batches: int = 1,
    bucket_lengths: Sequence[int] = (),
    dtype: Any = None,
) -> Callable:
    """One optimizer step: `(state, teacher, batch) -> (state, metrics)`.

    The loss is `sum_k weight_k sum(values_k mask_k) / sum(mask_k)`, the counts being
    summed over devices and micro-batches before any gradient is taken, so that padding
    weighs nothing wherever it falls. A term without a real entry adds 0; a step without
    any leaves all but `step` as it was.

    Args:
      student: see `models.student`.
      objective: see `objectives.combine`.
      optimizer: an optax transformation.
      augment: `(batch, rng) -> batch`, augmentation that teacher and student share.
      rollout: `(state, batch, rng) -> batch`, what the student makes of a batch before
        both see it (`models.on_policy`); no gradient flows through it.
      micro_batches: parts in which the gradient is accumulated. For per-example terms
        the sum is the large batch's gradient. It is not for BatchNorm (statistics are
        each part's own), dropout draws, and terms that pair examples.
      bucket_lengths: lengths in tokens, to the shortest of which that holds its texts a
        batch is cut (`data.tokens`); of inputs with `attention_mask`, and terms to
        which padding does not matter. () cuts nothing.
      dtype: what both forward passes and the backward pass compute in
        (`models.Precision`), or None for the types of the parameters.

    Returns:
      The step. `teacher` is a pytree of `teachers`, or None. Metrics are
      `{term: (sum, count)}` and the weighted `loss` with count 1.

    Raises:
      ValueError: when it is called, stored outputs of a teacher that are not of what
        `augment` shows the student (`teachers.views`), or of other classes than the
        student's after a `rollout`.

    Warns:
      UserWarning: a term pairs examples, and sees them in parts, a device's or a
        micro-batch's.
    """

    def train_step(
        state: TrainState, teacher: Teacher | None, batch: Batch, *, replica=WHOLE
    ) -> tuple[TrainState, Metrics]:
        _warn_of_parts(objective, replica.devices, micro_batches)
        if isinstance(teacher, StoredTeacher):
            views.check(batch, augment)
        batch = _with_truth(batch)
        rng = replica.key(jax.random.fold_in(state.rng, state.step))
        if augment is not None:
            batch = augment(batch, jax.random.fold_in(rng, AUGMENT))
        if rollout is not None:
            batch = rollout(state, batch, jax.random.fold_in(rng, GENERATE))
        key = jax.random.fold_in(rng, DROPOUT)
        parts = split_batch(batch, micro_batches)
        cast_teacher = cast_to_compute(teacher, dtype)
        if rollout is not None:
            _check_draws(rollout, student, state, cast_teacher, batch, key)
        forward = _forward(
            student, objective, cast_teacher, dtype, state.step, key, micro_batches
        )
        counts = replica.sum(_counts(forward, state, parts, micro_batches))
        model_state, (loss, sums, grads) = _gradient(
            forward, state, parts, counts, micro_batches, bucket_lengths
        )
        loss, sums, grads = replica.sum((loss, sums, grads))
        model_state = _mean_state(model_state, replica)
        moved = _update(state, optimizer, grads, model_state, counts)
        metrics = {name: (sums[name], counts[name]) for name in sums}
        return moved, {**metrics, "loss": (loss, jnp.ones(()))}

    train_step.recipe = Recipe(  # type: ignore[attr-defined]
        student,
        objective,
        optimizer,
        augment,
        rollout,
        micro_batches,
        tuple(bucket_lengths),
        dtype,
    )
    return train_step


def make_eval_step(
    metrics: Callable[[Outputs, Outputs | None, Batch], Metrics],
    bucket_lengths: Sequence[int] = (),
) -> Callable:
    """Sums of metrics on one batch: `((student, teacher), batch) -> metrics`.

    Args:
      metrics: `(student, teacher, batch) -> {name: (sum, count)}`, see
        `train.evaluation`.
      bucket_lengths: see `make_train_step`.

    Returns:
      The step; student and teacher are pytrees of `teachers`, the teacher may be None.
    """

    def eval_step(models, batch: Batch, *, replica=WHOLE) -> Metrics:
        student, teacher = models
        batch = _with_truth(batch)

        def sums(batch):
            teacher_outputs = None if teacher is None else teacher(batch)
            return metrics(student(batch), teacher_outputs, batch)

        return replica.sum(bucketed(sums, bucket_lengths)(batch))

    return eval_step


def scan_train(train_step: Callable) -> Callable:
    """Many steps in one dispatch, over data that lives on the device, or comes to it.

    Returns:
      `(state, (teacher, examples), indices) -> (state, metrics)`: `examples` is a batch
      of the whole data set, `indices` has `index` and `mask` of shape `[K, B]`, and
      every metric gains a leading axis `[K]`. What `examples` lack, all of it where
      they are `{}`, `indices` brings as `[K, B, ...]` (`data.Stream`).
    """

    def run(state, resident, indices, *, replica=WHOLE):
        teacher, examples = resident
        indices, inside = within(shortest(examples), indices)

        def body(state, at):
            batch = gather_batch(examples, at)
            return train_step(state, teacher, batch, replica=replica)

        state, metrics = jax.lax.scan(body, state, indices)
        return state, or_nan(metrics, inside)

    run.recipe = recipe_of(train_step)  # type: ignore[attr-defined]
    return run


def scan_eval(eval_step: Callable) -> Callable:
    """`(models, examples, indices) -> metrics` over resident data, as `scan_train`."""

    def run(models, examples, indices, *, replica=WHOLE):
        indices, inside = within(shortest(examples), indices)

        def body(carry, at):
            return carry, eval_step(models, gather_batch(examples, at), replica=replica)

        return or_nan(jax.lax.scan(body, None, indices)[1], inside)

    return run


def gather_batch(examples: Batch, at: Batch) -> Batch:
    """The batch of the examples at `at["index"]`, with `at["mask"]`.

    An index beyond the data takes some other example: see `within`.
    """
    # Each part for itself: stored outputs say of which view they are.
    batch = {
        name: jax.tree.map(lambda x: x[at["index"]], part)
        for name, part in examples.items()
    }
    return {**batch, **at}


def within(size: int | None, indices: Batch) -> tuple[Batch, Array | None]:
    """Indices with the mask 0 in every batch that has one beyond `size`, and which
    batches have none: `or_nan` says of the others that nothing was learned.

    Of all steps at once: in a scan each of these small operations costs microseconds.
    """
    if size is None:
        return indices, None
    index = indices["index"]
    inside = ((index >= 0) & (index < size)).all(-1)
    mask = jnp.where(inside[..., None], indices["mask"], 0)
    return {**indices, "mask": mask}, inside


def or_nan(metrics: Any, inside: Array | None) -> Any:
    """Metrics of many steps, their sums NaN of steps whose indices were not inside."""
    if inside is None:
        return metrics

    def mark(x):
        axes = tuple(range(inside.ndim, x.ndim))
        return jnp.where(jnp.expand_dims(inside, axes), x, jnp.nan)

    if not isinstance(metrics, Mapping):  # a teacher's answers
        return mark(metrics)
    return {name: (mark(total), count) for name, (total, count) in metrics.items()}


def shortest(examples: Batch) -> int | None:
    """The length of the shortest array; None where there is none."""
    return min((len(x) for x in jax.tree.leaves(dict(examples))), default=None)


def masked_sum(values: Array, mask: Array) -> Array:
    """`sum(values * mask)`; values under a zero mask may be anything, NaN included."""
    return (jnp.where(mask > 0, values, 0) * mask).sum()


def _with_truth(batch: Batch) -> Batch:
    """A batch whose mask is 0 and 1.

    Raises:
      ValueError: it has none.
    """
    if "mask" not in batch:
        raise ValueError(
            f"a batch needs a mask [B], 1 for a real example, got "
            f"{', '.join(map(str, batch))}; data.Batches(...).iterate(examples, epoch) "
            "makes batches that have one"
        )
    return {**batch, "mask": truth(batch["mask"])}


def _warn_of_parts(objective: Objective, devices: int, micro_batches: int) -> None:
    coupled = getattr(objective, "coupled", ())
    parts = devices * micro_batches
    if coupled and parts > 1:
        warnings.warn(
            f"{', '.join(coupled)}: examples are compared within each of {parts} parts "
            f"of a batch (micro-batches {micro_batches}, devices under pmap {devices}),"
            " not over all of it; jit and mesh without micro-batches do that",
            stacklevel=3,
        )


def _check_draws(rollout, student, state, teacher, batch: Batch, key) -> None:
    """Raise ValueError where a student may draw tokens that its teacher has not."""

    def logits(state, teacher, batch, key):
        given = state.params, state.model_state, batch, key
        return student.apply(*given)[0].logits, teacher(batch).logits

    if teacher is None:
        return
    mine, theirs = jax.eval_shape(logits, state, teacher, batch, key)
    drawn = getattr(rollout, "vocab", None) or mine.shape[-1]
    if drawn > theirs.shape[-1]:
        raise ValueError(
            f"the student draws of {drawn} tokens, and its teacher has "
            f"{theirs.shape[-1]}: limit the draws to what both have, "
            f"on_policy(..., vocab={theirs.shape[-1]})"
        )


def _mean_state(model_state: Any, replica: Replica) -> Any:
    # A device that normalises with its own examples has its own statistics; a counter
    # is the same on all. Types stay: the state is the carry of a scan.
    devices = replica.sum(jnp.ones(()))

    def mean(x):
        floats = jnp.issubdtype(x.dtype, jnp.inexact)
        return (replica.sum(x) / devices).astype(x.dtype) if floats else x

    return jax.tree.map(mean, model_state)


def _forward(student, objective, teacher, dtype, step, dropout, micro_batches):
    """`(params, model_state, i, part) -> (terms, model_state)` on micro-batch i."""

    def forward(params, model_state, i, part):
        part = {**part, "inputs": cast_to_compute(part["inputs"], dtype)}
        teacher_outputs = None if teacher is None else teacher(part)
        # Parts of one batch must not drop the same units.
        key = dropout if micro_batches == 1 else jax.random.fold_in(dropout, i)
        params = cast_to_compute(params, dtype)
        outputs, model_state = student.apply(params, model_state, part, key)
        return objective(outputs, teacher_outputs, part, step), model_state

    return forward


def _counts(forward, state: TrainState, parts: Batch, micro_batches: int):
    """Each term's count. Only masks are used: XLA drops the forward pass."""

    def count(carry, i, part):
        terms, _ = forward(state.params, state.model_state, i, part)
        return carry, {name: mask.sum() for name, (_, _, mask) in terms.items()}

    return accumulate(count, None, parts, micro_batches)[1]


def _gradient(forward, state: TrainState, parts, counts, micro_batches, bucket_lengths):
    """The last model state, and loss, sums and gradients added up over the parts."""

    def loss_of(params, model_state, i, part):
        terms, model_state = forward(params, model_state, i, part)
        sums = {k: masked_sum(values, mask) for k, (_, values, mask) in terms.items()}
        loss = sum(w * divide(sums[k], counts[k]) for k, (w, _, _) in terms.items())
        return loss, (sums, model_state)

    def gradient(model_state, i, part):
        of = jax.value_and_grad(loss_of, has_aux=True)
        of_part = bucketed(partial(of, state.params, model_state, i), bucket_lengths)
        (loss, (sums, model_state)), grads = of_part(part)
        return model_state, (loss, sums, grads)

    return accumulate(gradient, state.model_state, parts, micro_batches)


def _update(state, optimizer, grads, model_state, counts) -> TrainState:
    def move(grads, model_state):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), model_state, opt_state

    def stay(grads, model_state):
        del grads, model_state
        return state.params, state.model_state, state.opt_state

    # Not a where of both: XLA would copy the optimizer's state and compute it twice.
    # The barrier keeps the sums over devices before the choice, where a TPU's compiler
    # makes one of them; without it the biases' gradients were summed apart.
    some, grads = sum(counts.values()) > 0, jax.lax.optimization_barrier(grads)
    params, model_state, opt_state = jax.lax.cond(some, move, stay, grads, model_state)
    return state.replace(
        step=state.step + 1, params=params, model_state=model_state, opt_state=opt_state
    )


def split_batch(batch: Batch, parts: int) -> Batch:
    """A batch `[B, ...]` as `[parts, B / parts, ...]`.

    Part i takes the rows i, i + parts, ...: a batch that is sharded over devices stays
    sharded in every part.

    Raises:
      ValueError: B does not divide into so many.
    """
    size = batch["mask"].shape[0]
    if size % parts:
        raise ValueError(
            f"a batch of {size} does not divide into {parts} micro-batches"
        )
    return jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1),
        dict(batch),
    )


def accumulate(
    function: Callable[[Any, Any, Batch], tuple[Any, Any]],
    carry: Any,
    parts: Batch,
    count: int,
) -> tuple[Any, Any]:
    """The last carry, and the sum of trees, of a function called on each part in turn.

    Args:
      function: `(carry, i, part) -> (carry, tree)`.
      carry: the first.
      parts: from `split`.
      count: how many; a single one is called without a loop.
    """
    if count == 1:
        return function(carry, 0, jax.tree.map(lambda x: x[0], parts))

    def body(loop, xs):
        carry, total = loop
        carry, tree = function(carry, *xs)
        return (carry, jax.tree.map(jnp.add, total, tree)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(function, carry, jnp.int32(0), first)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    xs = (jnp.arange(count), parts)
    return jax.lax.scan(body, (carry, zeros), xs)[0]
