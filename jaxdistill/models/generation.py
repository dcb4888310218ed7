# SPDX-License-Identifier: Apache-2.0
"""Sequences from a language model's own distribution, with a key and value cache."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxdistill.models.apply import BoundModule, trained
from jaxdistill.models.gpt import GPT, empty_cache
from jaxdistill.models.transformer import unstack_layers
from jaxdistill.types import Array, Batch, Factored, TrainState, is_concrete


def generate(
    model: BoundModule,
    prompt: Mapping[str, Any],
    rng: Array,
    *,
    steps: int,
    temperature: float = 1.0,
    end: int | None = None,
    vocab: int | None = None,
) -> dict[str, Array]:
    """Draws so many tokens behind each prompt.

    Args:
      model: a live `models.GPT`.
      prompt: `input_ids` `[B, L]`, and `attention_mask` `[B, L]` where prompts have
        several lengths: padding comes first.
      rng: a typed key; no prompt's draws depend on the others.
      steps: tokens to draw.
      temperature: of the distribution; 0 takes the most likely token. One program is
        compiled for each.
      end: the token behind which a sequence is padding, if any.
      vocab: only the first so many tokens are drawn, where the vocabulary is padded;
        None is all.

    Returns:
      `input_ids` and `attention_mask` `[B, L + steps]`; behind an end the tokens are
      ends too, and masked. A token is -1 where the model's logits were NaN.

    Raises:
      ValueError: another model, nothing to be drawn or to start from, a temperature
        below 0, an end or a vocabulary that the model has not, a prompt that ends in
        padding (where its mask is not traced), or sequences that are longer than the
        model's positions.
    """
    if not isinstance(model.module, GPT):
        raise ValueError(
            f"generate takes a models.GPT, got a {type(model.module).__name__}"
        )
    if steps < 1:
        raise ValueError(f"steps is at least 1 token to draw, got {steps}")
    _check_draws(temperature)
    _check_vocab(model.module.size.vocab, end, vocab)
    ids = jnp.asarray(prompt["input_ids"])
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(
            f"a prompt's input_ids are [B, L] of at least 1 token, got {ids.shape}"
        )
    mask = jnp.asarray(prompt.get("attention_mask", jnp.ones_like(ids)), jnp.int32)
    if "attention_mask" in prompt:
        _check_padding(mask, ids.shape)
    return _generate(model, ids, mask, rng, steps, float(temperature), end, vocab)


@partial(jax.jit, static_argnums=(4, 5, 6, 7))
def _generate(
    model: BoundModule,
    ids: Array,
    mask: Array,
    rng: Array,
    steps: int,
    temperature: float,
    end: int | None,
    vocab: int | None,
) -> dict[str, Array]:
    batch, length = ids.shape
    kind = jax.tree.leaves(model.variables)[0].dtype
    # Nothing is asked of the model about the last token.
    cache = empty_cache(model.module.size, batch, length + steps - 1, kind)
    # Positions count real tokens from 0. Padding before them is masked: any will do.
    places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    forward = _last_logits(model)

    def choose(logits, step):
        drawn = logits[:, :vocab], jax.random.fold_in(rng, step)
        return _draw(*drawn, temperature, ids.dtype)

    def body(carry, step):
        token, cache, place, alive = carry
        place = place + 1
        logits, cache = forward(
            token[:, None], alive[:, None].astype(mask.dtype), place[:, None], cache
        )
        token, alive = choose(logits, step), after(token, alive)
        if end is not None:
            token = jnp.where(alive, token, end)
        return (token, cache, place, alive), (token, alive)

    def after(token, alive):
        return alive if end is None else alive & (token != end)

    logits, cache = forward(ids, mask, places, cache)
    first, alive = choose(logits, 0), jnp.ones(batch, bool)
    start = (first, cache, places[:, -1], alive)
    _, drawn = jax.lax.scan(body, start, jnp.arange(1, steps))
    tokens, alive = (
        jnp.concatenate([x[None], rest]).T
        for x, rest in zip((first, alive), drawn, strict=True)
    )
    return {
        "input_ids": jnp.concatenate([ids, tokens], axis=1),
        "attention_mask": jnp.concatenate([mask, alive.astype(mask.dtype)], axis=1),
    }


def _check_draws(temperature: float) -> None:
    """Raise ValueError where a temperature of draws is below 0."""
    if temperature < 0:
        raise ValueError(f"a temperature of draws is 0 or more, got {temperature}")


def _check_vocab(size: int, end: int | None, vocab: int | None) -> None:
    """Raise ValueError at an end or a vocabulary that a model of `size` has not."""
    if vocab is not None and not 0 < vocab <= size:
        raise ValueError(f"the model has {size} tokens, vocab asks for {vocab}")
    if end is not None and not 0 <= end < (vocab or size):
        raise ValueError(f"the end {end} is none of the {vocab or size} tokens drawn")


def _check_padding(mask: Array, shape: tuple[int, ...]) -> None:
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask has the shape {mask.shape}, and input_ids {shape}"
        )
    if is_concrete(mask) and not mask[:, -1].all():
        raise ValueError(
            "a prompt ends in padding, which comes first: tokens.encode(front=True)"
        )


def _last_logits(model: BoundModule) -> Callable:
    """`(ids, mask, places, cache) -> (logits [B, V] of the last token, cache)`."""
    # Logits of a prompt's other tokens would be the largest arrays of all.
    # A scan over layers would copy their cache for each token.
    module = model.module.clone(factored=True, scan=False)
    variables = {**model.variables, "params": unstack_layers(model.variables["params"])}

    def forward(ids, mask, places, cache):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        outputs = module.apply(variables, inputs, cache=cache)
        head = outputs.logits
        last = Factored(head.hidden[:, -1], head.kernel, head.bias)
        return last.multiply(), outputs.extras["cache"]

    return forward


def _draw(logits: Array, rng: Array, temperature: float, kind: Any) -> Array:
    """A token of each row of `[B, V]`, -1 where a logit is NaN."""
    if temperature == 0:
        tokens = first_of_largest(logits)
    else:
        rows = jnp.arange(len(logits))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(rng, rows)
        tokens = jax.vmap(jax.random.categorical)(keys, logits / temperature)
    return jnp.where(jnp.isnan(logits).any(-1), -1, tokens.astype(kind))


def first_of_largest(x: Array) -> Array:
    """`argmax(x, -1)` of what has no NaN, in two passes that a CPU vectorises.

    XLA's own reduces pairs of value and place one at a time there, which of GPT-2's
    vocabulary takes a third of a step.
    """
    places = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    largest = x == x.max(-1, keepdims=True)
    return jnp.where(largest, places, x.shape[-1]).min(-1)


@dataclasses.dataclass(frozen=True)
class OnPolicy:
    """A step's `rollout`, see `on_policy`; the step knows by it what is drawn."""

    module: nn.Module
    prompt: int
    share: Any
    temperature: float
    end: int | None
    vocab: int | None

    def __call__(self, state: TrainState, batch: Batch, rng: Array) -> Batch:
        choice, draw = jax.random.split(rng)
        ids = batch["inputs"]["input_ids"]
        _check_prompt(batch["inputs"], self.prompt)
        given = {
            **batch,
            "token_mask": _floats(batch.get("token_mask"), ids.shape),
            "labelled": _floats(batch.get("labelled"), ids.shape[:1]),
        }
        of_all = self.share(state.step) if callable(self.share) else self.share
        chosen = jax.random.uniform(choice) < of_all
        # Both sides must have one structure: `given` has the masks that `_own` sets.
        own = partial(self._own, state, draw)
        return jax.lax.cond(chosen, own, dict, given)

    def _own(self, state: TrainState, rng: Array, batch: Batch) -> Batch:
        ids = batch["inputs"]["input_ids"]
        drawn = generate(
            trained(self.module, state),
            {"input_ids": ids[:, : self.prompt]},
            rng,
            steps=ids.shape[1] + 1 - self.prompt,
            temperature=self.temperature,
            end=self.end,
            vocab=self.vocab,
        )
        tokens = drawn["input_ids"].astype(ids.dtype)
        # Of what was drawn the end counts, and nothing behind it.
        alive = drawn["attention_mask"][:, 1:] > 0
        counts = alive & (jnp.arange(ids.shape[1]) >= self.prompt - 1)[None]
        return {
            **batch,
            "inputs": {**batch["inputs"], "input_ids": tokens[:, :-1]},
            "labels": tokens[:, 1:].astype(batch["labels"].dtype),
            "token_mask": counts.astype(jnp.float32),
            "labelled": jnp.zeros_like(batch["labelled"]),
        }


def on_policy(
    module: nn.Module,
    *,
    prompt: int,
    end: int | None,
    share: Any = 1.0,
    temperature: float = 1.0,
    vocab: int | None = None,
) -> OnPolicy:
    """Sequences of the student's own, for its teacher to judge: a step's `rollout`.

    A share of the batches (under pmap, of the devices' parts of them) keep their first
    tokens, and the student goes on from there. Of these the tokens it drew count
    (`token_mask`), up to the end of its text, and labels do not (`labelled`): what it
    learns there comes from the teacher alone. The other batches are as they were.

    Args:
      module: the student, a `models.GPT`, perhaps with a projector.
      prompt: tokens of an example that are kept, at least 1.
      end: the token that ends a text, or None where texts have no end, which is to be
        said: behind an end that is not known most tokens may be noise that counts.
      share: of the batches, 0 to 1: a number, or `step -> number`.
      temperature: of the student's draws.
      vocab: only the first so many tokens are drawn: those that the teacher has too,
        where the student's vocabulary is padded beyond them.

    Returns:
      `(state, batch, rng) -> batch`, of a batch with `inputs["input_ids"]` and `labels`
      `[B, L]`, the next tokens, without padding.

    Raises:
      ValueError: a share outside 0 to 1, a temperature below 0, a prompt that leaves
        nothing to draw; examples of several lengths; an end that is not drawn.

    References:
      Agarwal et al. 2024, On-Policy Distillation of Language Models: Learning from
      Self-Generated Mistakes, algorithm 1 (GKD).
    """
    if not callable(share) and not 0 <= share <= 1:
        raise ValueError(f"a share of the batches is 0 to 1, got {share}")
    _check_draws(temperature)
    return OnPolicy(module, prompt, share, temperature, end, vocab)


def _check_prompt(inputs: Mapping[str, Any], prompt: int) -> None:
    ids = inputs["input_ids"]
    if not 0 < prompt < ids.shape[1] + 1:
        raise ValueError(
            f"of {ids.shape[1]} tokens and the next a prompt of {prompt} leaves "
            "none to draw, or nothing to start from"
        )
    if "attention_mask" in inputs:
        raise ValueError(
            "on_policy goes on from examples without padding, and these have an "
            "attention_mask"
        )


def _floats(mask: Array | None, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape) if mask is None else jnp.asarray(mask, jnp.float32)
