# SPDX-License-Identifier: Apache-2.0
"""Sequences from a language model's own distribution, with a key and value cache."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jaxdistill.models.gpt import empty_cache
from jaxdistill.teachers import Live
from jaxdistill.types import Array


@partial(jax.jit, static_argnames=("steps", "temperature", "end"))
def generate(
    model: Live,
    prompt: Mapping[str, Array],
    rng: Array,
    *,
    steps: int,
    temperature: float = 1.0,
    end: int | None = None,
) -> dict[str, Array]:
    """Draws so many tokens behind each prompt.

    Args:
      model: a live `models.GPT`.
      prompt: `input_ids` `[B, L]`, and `attention_mask` `[B, L]` where prompts have
        several lengths: padding comes first.
      rng: a typed key; no prompt's draws depend on the others.
      steps: tokens to draw.
      temperature: of the distribution; 0 takes the most likely token.
      end: the token behind which a sequence is padding, if any.

    Returns:
      `input_ids` and `attention_mask` `[B, L + steps]`; behind an end the tokens are
      ends too, and masked.

    Raises:
      ValueError: the sequences are longer than the model's positions.
    """
    ids = prompt["input_ids"]
    mask = prompt.get("attention_mask", jnp.ones_like(ids))
    batch, length = ids.shape
    kind = jax.tree.leaves(model.variables)[0].dtype
    cache = empty_cache(model.module.size, batch, length + steps, kind)
    places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)

    def forward(ids, mask, places, cache):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        outputs = model.module.apply(model.variables, inputs, cache=cache)
        return outputs.logits[:, -1], outputs.extras["cache"]

    def choose(logits, step):
        if temperature == 0:
            return logits.argmax(-1).astype(ids.dtype)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(rng, step)))(
            jnp.arange(batch)
        )
        draw = jax.vmap(jax.random.categorical)
        return draw(keys, logits / temperature).astype(ids.dtype)

    def body(carry, step):
        logits, cache, place, alive = carry
        token = choose(logits, step)
        if end is not None:
            token = jnp.where(alive, token, end)
        place = place + 1
        logits, cache = forward(
            token[:, None], alive[:, None].astype(mask.dtype), place[:, None], cache
        )
        after = alive if end is None else alive & (token != end)
        return (logits, cache, place, after), (token, alive)

    logits, cache = forward(ids, mask, places, cache)
    start = (logits, cache, places[:, -1], jnp.ones(batch, bool))
    _, (tokens, alive) = jax.lax.scan(body, start, jnp.arange(steps))
    return {
        "input_ids": jnp.concatenate([ids, tokens.T], axis=1),
        "attention_mask": jnp.concatenate([mask, alive.T.astype(mask.dtype)], axis=1),
    }
