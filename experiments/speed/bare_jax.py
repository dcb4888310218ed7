# SPDX-License-Identifier: Apache-2.0
"""The articles' job by hand: the least that JAX needs, for benchmark to hold us to.

No library of ours: two MLPs as lists of `(kernel, bias)`, the masked loss, Adam, and
the same metrics. One step a dispatch, as most JAX scripts are written, or a scan.
"""

import jax
import jax.numpy as jnp
import optax


def mlp(layers, x):
    """Logits of dense layers with ReLU between them."""
    for kernel, bias in layers[:-1]:
        x = jax.nn.relu(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x @ kernel + bias


def make_step(temperature: float, hard_weight: float, soft_weight: float, optimizer):
    """`(state, teacher, images, labels, row) -> (state, metrics)`; a row has the
    `index` of its images and a `mask`, 0 where it is padded."""

    def losses(params, teacher, images, labels, mask):
        logits, teacher_logits = mlp(params, images), mlp(teacher, images)
        log_q = jax.nn.log_softmax(logits / temperature)
        log_p = jax.nn.log_softmax(teacher_logits / temperature)
        soft = temperature**2 * (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
        log_probs = jax.nn.log_softmax(logits)
        hard = -jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]
        count = jnp.maximum(mask.sum(), 1)
        hard, soft = (jnp.where(mask > 0, x, 0).sum() for x in (hard, soft))
        return (hard_weight * hard + soft_weight * soft) / count, (hard, soft, count)

    def step(state, teacher, images, labels, row):
        params, moments = state
        images, labels = images[row["index"]], labels[row["index"]]
        of = jax.value_and_grad(losses, has_aux=True)
        (loss, sums), grads = of(params, teacher, images, labels, row["mask"])
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), (loss, *sums)

    return step


def scan(step):
    """All rows in one dispatch: `(state, teacher, images, labels, rows)`."""

    def run(state, teacher, images, labels, rows):
        return jax.lax.scan(
            lambda state, row: step(state, teacher, images, labels, row), state, rows
        )

    return run
