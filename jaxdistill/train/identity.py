# SPDX-License-Identifier: Apache-2.0
"""To what a checkpoint belongs: the data, and all that makes its training what it is.

Compared, and named where they differ:

    data        each entry of the examples, by content; a stream's by some records
    start       the first numbers of each parameter before the first step, and the key
    teacher     its arrays and what it computes, or the stored outputs of it
    batches     their size, seed, number, lengths
    step        what it computes: `student` the module with the objective, its weights
                and schedules, and `optimizer`, `augment`, `rollout`; and its
                micro_batches, bucket_lengths and dtype

Free are how a training runs and where: jit, mesh, fsdp or pmap, devices, remat, how
many steps a dispatch takes, when it is evaluated and saved, and whether a teacher's
outputs are stored or it is asked in every step.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import Batches, DataError, Orders, Stream, check_examples
from jaxdistill.data.augment import Replay
from jaxdistill.parallel.sharding import whole
from jaxdistill.teachers import fingerprints, programs
from jaxdistill.teachers.knowledge import unwrap
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.teachers.views import StoredOutputs
from jaxdistill.train.recipe import Recipe, recipe_of
from jaxdistill.types import TrainState, whole_logits

PROGRAMS = ("step", "student", "rollout", "program")
"""Parts that may not be known: tracing them fails outside of the step."""
RECORDS, NUMBERS = 8, 4
"""Records of a stream, and numbers of a parameter, that are looked at."""


class Content(NamedTuple):
    """Examples that have passed the gate (`examine`).

    Attributes:
      size: how many there are.
      digests: of each entry, by its path.
    """

    size: int
    digests: Mapping[str, str]


def examine(
    examples: Mapping[str, Any],
    *,
    logits: Sequence[int] | None = None,
    check_finite: bool = True,
) -> Content:
    """Checks examples (`data.check_examples`) and takes their digests."""
    size = check_examples(examples, logits=logits, check_finite=check_finite)
    return Content(size, fingerprints.of_data(dict(examples)))


def logits_of(
    step: Any, state: TrainState, examples: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """The shape `[..., C]` of a student's logits on one of these examples.

    Of several students in one (`models.Peers`) it is each one's. None where it cannot
    be told before the step runs.

    Args:
      step: with a recipe (`recipe.recipe_of`).
      state: fresh.
      examples: `inputs` and what else a batch has.
    """
    if (recipe := recipe_of(step)) is None or not examples:
        return None
    size, student, state = 3, recipe.student, first_trial(state)
    shown = {name: x for name, x in examples.items() if name != "teacher"}

    def logits(state, batch, key):
        if recipe.augment is not None and not isinstance(recipe.augment, Replay):
            batch = recipe.augment(batch, key)
        given = state.params, state.model_state, batch, key
        outputs, _ = student.apply(*given)
        return outputs.logits.shape

    shapes: list[tuple[int, ...]] = []
    batch = programs.batch_of(shown, size)
    try:
        # Noted, not returned: logits may be no array (`types.Factored`).
        jax.eval_shape(
            lambda *given: shapes.append(logits(*given)),
            state,
            batch,
            jax.random.key(0),
        )
    except Exception:  # whatever a model of the user's raises: the step says it again
        return None
    shape = shapes[0]
    return tuple(shape[1:] if shape[0] == size else shape[2:])


def of_training(
    step: Any,
    state: TrainState,
    teacher: Any,
    examples: Mapping[str, Any],
    content: Content | None,
    batches: Batches | Orders | Stream,
) -> dict[str, Any]:
    """What a training is, as JSON that `differences` compares.

    Args:
      step: with a recipe (`recipe.recipe_of`); of one without the run is warned that
        nothing is known of it.
      state: fresh, on one device or the host.
      teacher: on one device or the host, or None.
      examples: `inputs` and what else a batch has, or `{}` where they are streamed.
      content: of the examples; None of a stream.
      batches: which examples go into which batch.
    """
    recipe, state = recipe_of(step), first_trial(state)
    digests: dict[str, Any] = {} if content is None else dict(content.digests)
    outputs = {k: digests.pop(k) for k in list(digests) if k.startswith("['teacher']")}
    shapes = dict(examples)
    if isinstance(batches, Stream):
        records = _records(batches)
        digests = {"records": records and fingerprints.of_tree(records)[:16]}
        shapes = records or {}
    found = {
        "data": digests,
        "batches": _of_batches(batches),
        "start": _of_start(state),
        "teacher": _of_teacher(teacher, outputs, shapes),
        "step": None,
    }
    if recipe is None:
        warnings.warn(
            "this step was not made by train.make_train_step: a checkpoint cannot tell "
            "when it is resumed with another objective, optimizer or module",
            stacklevel=3,
        )
    elif shapes:
        size = batches.batch_size
        found["step"] = _of_step(recipe, state, shapes, size, teacher)
    # As it is read again from a checkpoint.
    return json.loads(json.dumps(found))


def first_trial(state: TrainState) -> TrainState:
    """The state of a sweep's first trial; a single training's is as it is."""
    if not jnp.ndim(state.rng):
        return state
    first: Any = jax.tree.map(lambda x: x[0], replace(state, step=()))
    return replace(first, step=state.step)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, a phrase for each, old and new."""
    found = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        # A part that one side could not tell says nothing.
        if None in (before, after) and name in PROGRAMS:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            if "digest" in before or "digest" in after:
                if (how := programs.differs(before, after)) is not None:
                    found.append(f"{name}: {how}")
            else:
                found += [f"{name} {part}" for part in differences(before, after)]
        elif not _alike(before, after):
            found.append(f"{name} was {_short(before)}, is now {_short(after)}")
    return found


def _alike(old: Any, new: Any) -> bool:
    """Whether two values are equal; floats but for what devices differ by."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_alike, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return bool(np.isclose(old, new, rtol=1e-5, atol=1e-7, equal_nan=True))
    return old == new


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _of_batches(batches: Batches | Orders | Stream) -> dict[str, Any]:
    inner = batches.batches if isinstance(batches, Stream) else batches
    each = inner.each if isinstance(inner, Orders) else (inner,)
    lengths = each[0].lengths
    return {
        "examples": inner.size,
        "batch_size": inner.batch_size,
        "seeds": [one.seed for one in each],
        "lengths": lengths and hashlib.sha256(repr(lengths).encode()).hexdigest()[:16],
    }


def _records(stream: Stream) -> dict[str, Any] | None:
    """Some records, spread over the source, as the stream transforms them."""
    try:
        return stream.some(RECORDS)
    except DataError:  # it is named when its batch is read
        return None


def _of_start(state: TrainState) -> dict[str, Any]:
    """The key, and the first numbers of each parameter."""
    key = jax.random.key_data(state.rng)
    numbers = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        array = np.asarray(whole(leaf) if isinstance(leaf, jax.Array) else leaf)
        # float() of each: bfloat16 is no type that JSON knows.
        first = array.reshape(-1)[:NUMBERS]
        numbers[jax.tree_util.keystr(path)] = [float(x) for x in first]
    return {"key": np.asarray(key).tolist(), "params": numbers}


def _of_teacher(
    teacher: Any, outputs: Mapping[str, str], examples: Mapping[str, Any]
) -> Any:
    teacher = unwrap(teacher)
    if teacher is None:
        return None
    if not isinstance(teacher, StoredTeacher):
        model = fingerprints.of_model(teacher)
        return {"model": model, "program": programs.of_teacher(teacher, examples)}
    stored = examples.get("teacher")
    if not isinstance(stored, StoredOutputs) or stored.teacher is None:
        return {"outputs": dict(outputs)}
    found = json.loads(stored.teacher)
    # Rounded outputs are another teacher's; exact ones are those of the live one.
    kinds = sorted({str(x.dtype) for name, x in stored.items() if name != "ids"})
    return found if kinds == ["float32"] else {**found, "kept as": kinds}


def _of_step(
    recipe: Recipe, state: TrainState, examples: Any, size: int, teacher: Any
) -> dict[str, Any]:
    """What the parts of a recipe compute of a batch of these examples."""
    stored = isinstance(teacher, StoredTeacher)
    seen = {k: x for k, x in examples.items() if stored or k != "teacher"}
    batch, key = programs.batch_of(seen, size), jax.random.key(0)
    state = jax.eval_shape(lambda: state)
    dtype = None if recipe.dtype is None else str(np.dtype(recipe.dtype))
    found: dict[str, Any] = {
        "trials": recipe.trials,
        "micro_batches": recipe.micro_batches,
        "bucket_lengths": list(recipe.bucket_lengths),
        "dtype": dtype,
        "optimizer": _told(
            recipe.optimizer.update, state.params, state.opt_state, state.params
        ),
        "augment": _of_augment(recipe.augment, batch, key),
    }
    if recipe.rollout is not None:
        found["rollout"] = _told(recipe.rollout, state, batch, key)
    try:
        shown = batch
        if recipe.augment is not None:
            shown = jax.eval_shape(recipe.augment, batch, key)
        answers = None if teacher is None else _answers(teacher, shown)
    except Exception:  # whatever a model of the user's raises: the step says it again
        return {**found, "student": None}
    shown = {name: x for name, x in shown.items() if name != "teacher"}

    def learn(params, model_state, batch, key, step, answers):
        outputs, _ = recipe.student.apply(params, model_state, batch, key)
        return recipe.objective(outputs, answers, batch, step)

    given = state.params, state.model_state, shown, key, state.step, answers
    return {**found, "student": _told(learn, *given)}


def _answers(teacher: Any, batch: Any) -> Any:
    """The shapes of a teacher's outputs; stored and live ones are told alike."""

    def ask(teacher, batch):
        outputs = teacher(batch)
        return outputs.replace(logits=whole_logits(outputs.logits))

    def exact(x):
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, jnp.float32 if floats else x.dtype)

    outputs = jax.eval_shape(ask, teacher, batch)
    return jax.tree.map(exact, outputs)


def _of_augment(augment: Any, batch: Any, key: Any) -> Any:
    if isinstance(augment, Replay):
        seen = {name: x for name, x in batch.items() if name != "teacher"}
        view = _told(augment.augment, seen, key)
        return {"replayed": view, "seed": augment.seed, "views": augment.views}
    return None if augment is None else _told(augment, batch, key)


def _told(function: Callable, *arguments: Any) -> dict[str, Any] | None:
    """`programs.of_program`, or None where tracing fails: the step says why."""
    try:
        return programs.of_program(function, *arguments)
    except Exception:
        return None
