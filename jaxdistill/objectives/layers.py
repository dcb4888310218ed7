# SPDX-License-Identifier: Apache-2.0
"""Terms over hidden states and attention maps, layer to layer.

A layer map is data, `((student_layer, teacher_layer), ...)`; negative layers count from
the end. A term's value is the sum over its pairs.

    combine({"soft": (1.0, soft_targets(temperature=4.0)),
             "hint": (100.0, on_hidden_states(losses.hint_mse, ((1, 1),)))})
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxdistill.losses import BATCH_COUPLED
from jaxdistill.losses.numerics import promote
from jaxdistill.objectives.terms import (
    BoundTerm,
    check_settings,
    loss_kwargs,
    require_teacher,
)
from jaxdistill.types import Array, Batch, Outputs, padding_mask

LayerMap = Sequence[tuple[int, int]]


def uniform(student_layers: int, teacher_layers: int) -> LayerMap:
    """Every student layer, spread evenly over the teacher's, last to last.

    Raises:
      ValueError: a student deeper than its teacher, or without layers.

    >>> uniform(2, 6)
    ((0, 2), (1, 5))
    """
    if not 0 < student_layers <= teacher_layers:
        raise ValueError(
            f"a uniform layer map needs 1 to {teacher_layers} student layers, got "
            f"{student_layers}"
        )
    step = teacher_layers / student_layers
    return tuple((i, round(step * (i + 1)) - 1) for i in range(student_layers))


def last(count: int = 1) -> LayerMap:
    """The last `count` layers of either side.

    >>> last(2)
    ((-2, -2), (-1, -1))
    """
    return tuple((i, i) for i in range(-count, 0))


def on_hidden_states(loss: Callable, layers: LayerMap, **settings: Any) -> BoundTerm:
    """A loss between hidden states or feature maps, through a layer map.

    A student with a projector (`models.with_projector`) is compared through it in the
    layers it projects. Values per position of a feature map are averaged over it; those
    per token stay, and padding does not count. A loss of relations between examples
    takes all of an example's states for one vector, in which padded tokens are 0. An
    ensemble has no hidden states.

    Args:
      loss: `(student, teacher, ...) -> values`; a parameter called `labels` or `mask`
        gets the batch's.
      layers: which layers, `((student, teacher), ...)`.
      settings: hyperparameters: numbers, traced values, or `step -> number`.

    Raises:
      ValueError: a setting the loss does not have, no layers, or, when it is called,
        a layer that does not exist.
    """

    def pair(student: Outputs, teacher: Outputs, i: int, j: int, batch: Batch):
        mine = _layer("student", student.hidden_states, i)
        if student.projected and student.projected[i] is not None:
            mine = student.projected[i]
        theirs = _layer("teacher", teacher.hidden_states, j)
        if any(loss is x for x in BATCH_COUPLED):
            mine, theirs = (_without_padding(x, batch) for x in (mine, theirs))
        return mine, theirs, loss_kwargs(loss, batch, batch["mask"])

    return _through("on_hidden_states", loss, layers, settings, pair)


def on_attentions(loss: Callable, layers: LayerMap, **settings: Any) -> BoundTerm:
    """A loss between attention maps, through a layer map; padded keys do not count.

    Args:
      loss: `(student, teacher, mask, ...) -> values [B, L]`, see `losses.attention`.
      layers: which layers, `((student, teacher), ...)`.
      settings: hyperparameters: numbers, traced values, or `step -> number`.

    Raises:
      ValueError: a setting the loss does not have, no layers, or, when it is called,
        a layer that does not exist.
    """

    return _on_maps("on_attentions", loss, layers, settings, _attention)


def on_scores(loss: Callable, layers: LayerMap, **settings: Any) -> BoundTerm:
    """A loss between attention scores before softmax, through a layer map.

    The scores are `q k' / sqrt(d)` in each head, made again from the queries and keys
    in `extras`, in as many heads as the attention maps have, whatever a `Size` says of
    their scale. Padded keys do not count; later tokens, which a causal model hides, do.

    Args:
      loss: `(student, teacher, mask, ...) -> values [B, L]`, as `losses.attention_mse`.
      layers: which layers, `((student, teacher), ...)`.
      settings: hyperparameters: numbers, traced values, or `step -> number`.

    Raises:
      ValueError: a setting the loss does not have, no layers, or, when it is called,
        a layer that does not exist.

    References:
      Vaswani et al. 2017, Attention Is All You Need, equation 1, for the scores.
    """

    return _on_maps("on_scores", loss, layers, settings, _scores)


def on_extras(
    loss: Callable, name: str, layers: LayerMap, **settings: Any
) -> BoundTerm:
    """A loss between what models put into `extras`, such as queries, keys or values.

    Where the student has a projection of it (the embeddings', `models.with_projector`)
    it is compared through that.

    Args:
      loss: `(student, teacher, mask, ...) -> values [B, L]`, as `losses.relation_kl`.
      name: of a tuple by layer of `[B, L, D]`.
      layers: which layers, `((student, teacher), ...)`.
      settings: hyperparameters: numbers, traced values, or `step -> number`.

    Raises:
      ValueError: a setting the loss does not have, no layers, or, when it is called,
        a layer that does not exist.
    """

    def pair(student: Outputs, teacher: Outputs, i: int, j: int, batch: Batch):
        mine = _layer("student", student.extras.get(name, ()), i)
        projected = student.extras.get(f"projected_{name}")
        if projected and projected[i] is not None:
            mine = projected[i]
        tokens = padding_mask(batch, mine.shape[:2])
        theirs = _layer("teacher", teacher.extras.get(name, ()), j)
        return mine, theirs, loss_kwargs(loss, batch, tokens)

    return _through("on_extras", loss, layers, settings, pair, name)


def _on_maps(name, loss, layers, settings, map_of: Callable) -> BoundTerm:
    def pair(student: Outputs, teacher: Outputs, i: int, j: int, batch: Batch):
        mine, theirs = map_of("student", student, i), map_of("teacher", teacher, j)
        keys = padding_mask(batch, (mine.shape[0], mine.shape[-1]))
        return mine, theirs, loss_kwargs(loss, batch, keys)

    return _through(name, loss, layers, settings, pair)


def _through(name, loss, layers, settings, pair, *given) -> BoundTerm:
    layers = tuple((int(i), int(j)) for i, j in layers)
    if not layers:
        raise ValueError(f"{name} needs at least one (student, teacher) pair of layers")
    check_settings(loss, settings)

    def function(student: Outputs, teacher: Outputs | None, batch: Batch, **settings):
        total = jnp.zeros(())
        for i, j in layers:
            mine, theirs, given = pair(
                student, require_teacher(loss, teacher), i, j, batch
            )
            values = loss(mine, theirs, **given, **settings)
            if values.ndim > 2:
                values = values.mean(tuple(range(1, values.ndim)))
            total = total + values
        return total, padding_mask(batch, total.shape)

    return BoundTerm(name, (loss, *given, layers), settings, function)


def _without_padding(states: Array, batch: Batch) -> Array:
    """0 for padded tokens of states `[B, L, D]`; others are as they are."""
    if states.ndim != 3:
        return states
    return jnp.where(padding_mask(batch, states.shape[:2])[..., None] > 0, states, 0)


def _attention(side: str, outputs: Outputs, i: int) -> Array:
    return _layer(side, outputs.attentions, i)


def _scores(side: str, outputs: Outputs, i: int) -> Array:
    """`[B, H, L, S]`, at least float32."""
    heads = _attention(side, outputs, i).shape[1]
    q, k = (
        promote(_layer(side, outputs.extras.get(name, ()), i))
        for name in ("queries", "keys")
    )
    q, k = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k))
    return jnp.einsum("blhd,bshd->bhls", q, k) / q.shape[-1] ** 0.5


def _layer(side: str, states: Sequence[Array] | Mapping[int, Array], i: int) -> Array:
    if isinstance(states, Mapping):
        if i not in states:
            raise ValueError(
                f"the layer map asks for layer {i} of the {side}, whose hidden states "
                f"are stored of layers {sorted(states)}, counted from 0"
            )
    elif not -len(states) <= i < len(states):
        raise ValueError(
            f"the layer map asks for layer {i} of the {side}, which returns "
            f"{len(states)} layers"
        )
    return states[i]
