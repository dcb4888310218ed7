# SPDX-License-Identifier: Apache-2.0
"""Losses on sequences: next tokens, frames, and labels without alignment."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, Real

from jaxdistill.losses.logits import check_softmax, check_temperature
from jaxdistill.losses.numerics import divergence, fixed, promote
from jaxdistill.types import Array


def shift_tokens(
    logits: Float[Array, "b l v"], tokens: Int[Array, "b l"], mask: Real[Array, "b l"]
) -> tuple[Float[Array, "b l1 v"], Int[Array, "b l1"], Real[Array, "b l1"]]:
    """A language model's logits beside the tokens they predict: the next ones.

    Args:
      logits: `[B, L, V]`, those at position l predicting token l + 1.
      tokens: `[B, L]` integers in `[0, V)`.
      mask: `[B, L]`, 0 for padding.

    Returns:
      Logits `[B, L-1, V]`, labels `[B, L-1]` and a mask `[B, L-1]`: a position counts
      where the token it reads and the one it predicts are both real. Their units are
      those given.

    >>> import jax.numpy as jnp
    >>> tokens, mask = jnp.array([[5, 6, 7]]), jnp.array([[1, 1, 0]])
    >>> _, labels, mask = shift_tokens(jnp.zeros((1, 3, 9)), tokens, mask)
    >>> print(labels, mask)
    [[6 7]] [[1 0]]

    References:
      Radford et al. 2018, Improving Language Understanding by Generative Pre-Training,
      equation 1: each token from those before it.
    """
    counts = (mask > 0).astype(mask.dtype)
    return logits[:, :-1], tokens[:, 1:], counts[:, :-1] * counts[:, 1:]


def ctc(
    student: Float[Array, "b t v"],
    labels: Int[Array, "b n"],
    frame_mask: Real[Array, "b t"],
    label_mask: Real[Array, "b n"],
    *,
    blank: int = 0,
) -> Float[Array, " b"]:
    """Connectionist temporal classification: labels without alignment to frames.

    `-log p(labels)`, summed over all ways to spread them over the frames with blanks
    between; zero when one way has all the probability. Labels that do not fit into the
    frames get a value near 1e5 in place of +inf.

    Args:
      student: `[B, T, V]` logits of any float type.
      labels: `[B, N]` integers in `[0, V)`, none of them the blank.
      frame_mask: `[B, T]`, 0 for padding, which must come last.
      label_mask: `[B, N]`, 0 for padding, which must come last.
      blank: the blank's index.

    Returns:
      `[B]` values in nats, at least float32.

    Raises:
      ValueError: there is no class beside the blank.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones((1, 1))
    >>> print(ctc(jnp.zeros((1, 1, 2)), jnp.array([[1]]), one, one).round(4))  # log 2
    [0.6931]

    References:
      Graves et al. 2006, Connectionist Temporal Classification, section 4.1.
    """
    check_softmax("ctc", student)
    # optax multiplies log-probabilities by 0, and is NaN at -inf.
    student = jnp.maximum(promote(student), -1e5)
    padding = (1 - (frame_mask > 0), 1 - (label_mask > 0))
    frames, tokens = (side.astype(student.dtype) for side in padding)
    return optax.losses.ctc_loss(student, frames, labels, tokens, blank_id=blank)


def frame_kl(
    student: Float[Array, "b t c"], teacher: Float[Array, "b t2 c"], *, temperature=1.0
) -> Float[Array, "b t"]:
    """Temperature-scaled KL to the teacher, frame by frame, at either one's rate.

    `T^2 KL(p || q)` for each of the student's frames, `p` the mean of the teacher's
    tempered distributions over the `r = T'/T` frames that it spans: the forward KL
    where the two have one frame rate.

    Args:
      student: `[B, T, C]` logits of any float type.
      teacher: `[B, T', C]` logits, `T'` a multiple of `T`; no gradient flows into them.
      temperature: above 0, applied to both sides; may be traced.

    Returns:
      `[B, T]` values in nats times `temperature^2`, at least float32.

    Raises:
      ValueError: other batch or classes, one class, `T'` is no multiple of `T`, or the
        temperature is not one number above 0.

    >>> import jax.numpy as jnp
    >>> student = jnp.zeros((1, 1, 2))
    >>> teacher = jnp.array([[[9.0, -jnp.inf], [-jnp.inf, 9.0]]])
    >>> print(frame_kl(student, teacher))  # the two frames' mean is even
    [[0.]]

    References:
      Hinton, Vinyals, Dean 2015, Distilling the Knowledge in a Neural Network, section
      4 (frame-level acoustic models); frames of other rates are ours.
    """
    check_temperature(temperature, "frame_kl")
    check_softmax("frame_kl", student)
    batch, frames, classes = student.shape
    ratio, rest = divmod(teacher.shape[1], frames)
    if rest or ratio < 1 or (batch, classes) != (teacher.shape[0], teacher.shape[2]):
        raise ValueError(
            f"frame_kl: teacher logits of shape {teacher.shape} do not fit student "
            f"logits of shape {student.shape}: batch and classes must be equal, the "
            "teacher's frames a multiple of the student's"
        )
    log_p = jax.nn.log_softmax(fixed(teacher) / temperature)
    parts = log_p.reshape(batch, frames, ratio, classes)
    mean = jax.nn.logsumexp(parts, axis=2) - math.log(ratio)
    log_q = jax.nn.log_softmax(promote(student) / temperature)
    return divergence(mean, log_q) * temperature**2
