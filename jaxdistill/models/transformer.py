# SPDX-License-Identifier: Apache-2.0
"""What BERT and GPT-2 are made of: attention, blocks, stacks, parameters by layer.

Every array that distillation matches is returned: hidden states, attention
probabilities, and the queries, keys and values of each layer.

A student that starts as some of its teacher's layers (Sanh et al. 2019, DistilBERT, a
distilled version of BERT, section 3):

    small = module.clone(encoder=module.encoder.clone(size=replace(size, depth=3)))
    # A GPTClassifier's is its `decoder`; a GPT is cloned itself.
    params = take_layers(variables["params"], (0, 2, 4))
    state = init_state(rng, models.student(small), optimizer, batch)
    state = state.replace(params=params)
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxdistill.models.config import TransformerConfig, activation
from jaxdistill.models.layers import Dropout
from jaxdistill.types import Array, Outputs

NORMAL = nn.initializers.normal(0.02)


class Layer(NamedTuple):
    """What a block returns beside its hidden state; of several blocks, by layer.

    Attributes:
      attention: probabilities, `[B, H, L, S]`.
      queries: `[B, L, D]`, all heads one after another.
      keys: `[B, L, D]`.
      values: `[B, L, D]`.
    """

    attention: Any
    queries: Any
    keys: Any
    values: Any


class KeyValues(NamedTuple):
    """A layer's keys and values of the tokens so far.

    Attributes:
      keys: `[B, H, S, D / H]`, of which those before `length` are there; new ones go
        behind them. Heads come before tokens: a product of each head then reads its
        own rows, where XLA would copy the whole array for every token.
      values: likewise.
      length: `[]`, tokens so far.
    """

    keys: Any
    values: Any
    length: Array


def attend(
    q: Array, k: Array, v: Array, keep: Array | None = None, drop=lambda x: x
) -> tuple[Array, Array]:
    """Attention: `softmax(q k' / sqrt(d)) v` in each head.

    Args:
      q: `[B, H, L, d]`.
      k: `[B, H, S, d]`.
      v: `[B, H, S, d]`.
      keep: which keys a query may look at, broadcast to `[B, H, L, S]`, or None for
        all. A query without any looks at all alike.
      drop: dropout on the probabilities.

    Returns:
      `[B, L, H d]`, and the probabilities `[B, H, L, S]`, whose last axis sums to one.

    References:
      Vaswani et al. 2017, Attention Is All You Need, section 3.2.
    """
    scores = jnp.einsum("bhld,bhsd->bhls", q * q.shape[-1] ** -0.5, k)
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if keep is not None:
        # Not -inf: a query that may look at no key would be NaN.
        wide = jnp.where(keep, wide, jnp.finfo(wide.dtype).min)
    probabilities = jax.nn.softmax(wide).astype(scores.dtype)
    mixed = jnp.einsum("bhls,bhsd->blhd", drop(probabilities), v)
    return mixed.reshape(*mixed.shape[:2], -1), probabilities


def by_head(x: Array, heads: int) -> Array:
    """`[B, L, H d]` to `[B, H, L, d]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1), 2, 1)


class SelfAttention(nn.Module):
    """Queries, keys and values by one product, attention, and the output's product."""

    size: TransformerConfig

    @nn.compact
    def __call__(self, x, keep, train, before: KeyValues | None = None, divisor=None):
        """`[B, L, D]` to `[B, L, D]`, its `Layer`, and the keys and values so far."""
        size = self.size
        qkv = dense(3 * size.width, "qkv")(x)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        layer = Layer(None, q, k, v)
        q, k, v = (by_head(y, size.heads) for y in (q, k, v))
        if not size.scaled:
            q = q * q.shape[-1] ** 0.5  # by which `attend` divides
        if divisor is not None:
            q = q / divisor
        after = None
        if before is not None:
            zero = jnp.zeros_like(before.length)  # of its type, with 64 bits too
            start = (zero, zero, before.length, zero)
            k, v = (
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), start)
                for old, new in ((before.keys, k), (before.values, v))
            )
            after = KeyValues(k, v, before.length + x.shape[1])
        drop = partial(Dropout(size.attention_dropout), train=train)
        mixed, attention = attend(q, k, v, keep, drop)
        layer = layer._replace(attention=attention)
        return dense(size.width, "out")(mixed), layer, after


class FeedForward(nn.Module):
    """Two dense layers with the activation between them."""

    size: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, L, D]` to `[B, L, D]`."""
        inner = dense(self.size.inner or 4 * self.size.width, "inner")(x)
        return dense(self.size.width, "outer")(activation(self.size.activation)(inner))


class Block(nn.Module):
    """Attention, then a feed-forward network, each added to what it reads.

    Attributes:
      size: the model's numbers.
      norm_first: normalise what each of the two reads (GPT-2), not what it adds up to
        (BERT).

    References:
      Vaswani et al. 2017, Attention Is All You Need, section 3.1; Radford et al. 2019,
      Language Models are Unsupervised Multitask Learners, section 2.3 (norms first).
    """

    size: TransformerConfig
    norm_first: bool

    @nn.compact
    def __call__(self, x, keep, train, before: KeyValues | None = None, divisor=None):
        """`[B, L, D]` to `[B, L, D]`, its `Layer`, and the keys and values so far."""
        size = self.size
        drop = partial(Dropout(size.dropout), train=train)
        attention = SelfAttention(size, name="attention")
        feed = FeedForward(size, name="feed_forward")
        norm = layer_norm(size, "attention_norm"), layer_norm(size, "feed_forward_norm")
        if self.norm_first:
            y, layer, after = attention(norm[0](x), keep, train, before, divisor)
            x = x + drop(y)
            return x + drop(feed(norm[1](x))), layer, after
        y, layer, after = attention(x, keep, train, before, divisor)
        x = norm[0](x + drop(y))
        return norm[1](x + drop(feed(x))), layer, after


class Blocks(nn.Module):
    """All layers, one after another.

    Attributes:
      size: the model's numbers.
      norm_first: see `Block`.
      scan: run them by `nn.scan`, their parameters stacked under `layers`: one
        compilation of a block, however many there are. What is returned is stacked too.
      remat: whether the backward pass computes each block again, from its input.
      maps: whether attention probabilities, queries, keys and values are returned. A
        scan keeps them all for the backward pass, even if one is used.
    """

    size: TransformerConfig
    norm_first: bool
    scan: bool = False
    remat: bool = False
    maps: bool = True

    @nn.compact
    def __call__(self, x, keep, train, before: Any = None):
        """The hidden states after each block, the `Layer`s, the keys and values.

        Args:
          x: `[B, L, D]`.
          keep: which keys a query may look at.
          train: whether dropout is on.
          before: `KeyValues`, keys and values a tuple by layer, or None. Not one array:
            it would be put together anew for every token.
        """
        # 3 is `train`: the module counts as 0.
        block = nn.remat(Block, static_argnums=3) if self.remat else Block
        if self.scan:
            return self._scanned(block, x, keep, train, before)
        hidden_states, layers, afters = [], [], []
        for i in range(self.size.depth):
            mine = None
            if before is not None:
                mine = KeyValues(before.keys[i], before.values[i], before.length)
            one = block(self.size, self.norm_first, name=f"layer_{i}")
            divisor = i + 1 if self.size.scaled_by_layer else None
            x, layer, after = one(x, keep, train, mine, divisor)
            hidden_states.append(x)
            layers.append(layer)
            afters.append(after)
        found = Layer(*map(tuple, zip(*layers, strict=True))) if self.maps else None
        if before is None:
            return tuple(hidden_states), found, None
        keys, values = list(zip(*afters, strict=True))[:2]
        return tuple(hidden_states), found, KeyValues(keys, values, afters[0].length)

    def _scanned(self, block, x, keep, train, before):
        def body(module, x, by_layer):
            mine, divisor = by_layer
            if mine is not None:
                mine = KeyValues(mine[0], mine[1], before.length)
            x, layer, after = module(x, keep, train, mine, divisor)
            return x, (x, layer if self.maps else None, after and after[:2])

        many = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.size.depth,
        )
        module = block(self.size, self.norm_first, name="layers")
        stacked = before and tuple(jnp.stack(side) for side in before[:2])
        numbers = 1 + jnp.arange(self.size.depth)
        divisors = numbers if self.size.scaled_by_layer else None
        _, (hidden_states, found, after) = many(module, x, (stacked, divisors))
        if before is not None:
            keys, values = (tuple(side) for side in after)
            after = KeyValues(keys, values, before.length + x.shape[1])
        return hidden_states, found, after


def dense(width: int, name: str | None = None) -> nn.Dense:
    """A dense layer as BERT, GPT-2 and ViTs start it.

    DeiT's code truncates at +-2, a hundred standard deviations: never.
    """
    return nn.Dense(width, kernel_init=NORMAL, name=name)


def layer_norm(size: TransformerConfig, name: str | None = None) -> nn.LayerNorm:
    """A layer norm; Flax's fast variance cancels where the mean is large."""
    return nn.LayerNorm(epsilon=size.epsilon, use_fast_variance=False, name=name)


def embedding_dropout(size: TransformerConfig) -> Dropout:
    """Dropout after embeddings."""
    rate = size.embedding_dropout
    return Dropout(size.dropout if rate is None else rate)


def outputs_of(embeddings: Array, hidden_states: Any, layers: Layer | None) -> Any:
    """What distillation matches, by layer, without logits."""
    extras = {"embeddings": (embeddings,)}
    if layers is None:
        return Outputs(None, hidden_states, extras=extras)
    extras |= {"queries": layers.queries, "keys": layers.keys, "values": layers.values}
    return Outputs(None, hidden_states, layers.attention, extras=extras)


BLOCKS, STACKED = "blocks", "layers"
"""Names of `transformer.Blocks` in a model, and of its stacked parameters."""


def take_layers(params: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """Parameters of the same model with some of its layers, the rest as it is.

    Args:
      params: of a BERT or a GPT, scanned or not; the result is the same.
      layers: which layers, in the order they will have, counted from 0; negative ones
        from the end.

    Raises:
      ValueError: no layers, or one that is not there.
    """
    if not layers:
        raise ValueError("a student needs at least one of its teacher's layers")

    def take(blocks):
        apart = _apart(blocks)
        wrong = [i for i in layers if not -len(apart) <= i < len(apart)]
        if wrong:
            raise ValueError(
                f"there is no layer {wrong[0]}: the teacher has {len(apart)}, 0 to "
                f"{len(apart) - 1}"
            )
        every = list(apart.values())
        taken = {f"layer_{i}": every[at] for i, at in enumerate(layers)}
        return _stacked(taken) if STACKED in blocks else taken

    return _at_blocks(take, params)


def drop_types(params: Mapping[str, Any]) -> dict[str, Any]:
    """A BERT's parameters for the same model without token types (`Size(types=0)`).

    The embedding of type 0, which every token of a single text has, is added to the
    positions': nothing but rounding changes for such texts. DistilBERT has no types
    either, and leaves their embeddings out.

    Args:
      params: of a BERT that has types, alone or in a student with a projector.

    Raises:
      ValueError: it has none.

    References:
      Sanh et al. 2019, DistilBERT, section 3.
    """
    found, dropped = _without_types(params)
    if not dropped:
        raise ValueError("the parameters have no token types")
    return found


def _without_types(params: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Without types wherever there are some, and whether there were."""
    if "segments" in params and "places" in params:
        first = params["segments"]["embedding"][:1]
        places = {"embedding": params["places"]["embedding"] + first}
        rest = {name: tree for name, tree in params.items() if name != "segments"}
        return {**rest, "places": places}, True
    found, dropped = dict(params), False
    for name, tree in params.items():
        if isinstance(tree, Mapping):
            found[name], some = _without_types(tree)
            dropped |= some
    return found, dropped


def stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a model with `scan=True` has them."""
    return _at_blocks(_stacked, params)


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a model without a scan has them."""
    return _at_blocks(_apart, params)


def _at_blocks(change: Callable, params: Mapping[str, Any]) -> dict[str, Any]:
    def at(name, tree):
        if name == BLOCKS:
            return change(tree)
        return _at_blocks(change, tree) if isinstance(tree, Mapping) else tree

    return {name: at(name, tree) for name, tree in params.items()}


def _stacked(blocks: Mapping[str, Any]) -> dict[str, Any]:
    if STACKED in blocks:
        return dict(blocks)
    trees = [blocks[f"layer_{i}"] for i in range(len(blocks))]

    def stack(*leaves):  # what is on the host stays there, in its own precision
        on_host = isinstance(leaves[0], np.ndarray)
        return (np if on_host else jnp).stack(leaves)

    return {STACKED: jax.tree.map(stack, *trees)}


def _apart(blocks: Mapping[str, Any]) -> dict[str, Any]:
    if STACKED not in blocks:
        return {f"layer_{i}": blocks[f"layer_{i}"] for i in range(len(blocks))}
    depth = len(jax.tree.leaves(blocks[STACKED])[0])
    return {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], blocks[STACKED])
        for i in range(depth)
    }
