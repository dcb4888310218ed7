# SPDX-License-Identifier: Apache-2.0
"""Vision transformers: DeiT's sizes, PyTorch's values, the distillation head."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import pretrained
from jaxdistill.models import ViT, deit_base, deit_small, deit_tiny

PLAIN = ViT(5, width=8, depth=2, heads=2, patch=4)
TINY = PLAIN.clone(distillation_token=True)

close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def abstract(model, shape):
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def start(model, shape=(3, 8, 12, 3)):
    """Variables with all entries random, and images."""
    images = jax.random.normal(jax.random.key(0), shape)
    leaves, tree = jax.tree.flatten(abstract(model, shape))
    rng = np.random.default_rng(0)
    drawn = [rng.normal(0, 0.5, x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, drawn), images


@partial(jax.jit, static_argnames=("model", "train"))
def apply(model, variables, images, train=False):
    return model.apply(variables, images, train=train)


SIZES = {
    # With the token, and without.
    deit_tiny: (5_910_800, 5_717_416),
    deit_small: (22_436_432, 22_050_664),
    deit_base: (87_338_192, 86_567_656),
}


@pytest.mark.parametrize("make", SIZES)
@pytest.mark.parametrize("token", [True, False])
def test_deit_has_the_published_sizes(make, token):
    model = make(distillation_token=token)
    sizes = jax.tree.leaves(abstract(model, (1, 224, 224, 3)))
    assert sum(x.size for x in sizes) == SIZES[make][not token]


@pytest.mark.parametrize(("model", "tokens"), [(PLAIN, 7), (TINY, 8)])
@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 8, 12, 3)])
def test_shapes(model, tokens, shape):
    found = apply(model, *start(model, shape))
    assert found.logits.shape == (3, 5)
    assert [h.shape for h in found.hidden_states] == [(3, tokens, 8)] * 2
    assert [a.shape for a in found.attentions] == [(3, 2, tokens, tokens)] * 2
    for attention in found.attentions:
        close(attention.sum(-1), np.ones((3, 2, tokens)))


def test_evaluation_takes_the_mean_of_the_two_heads():
    variables, images = start(TINY)
    found = apply(TINY, variables, images)
    trained = apply(TINY, variables, images, train=True)
    assert set(trained.extras) == {"distillation"}
    assert not found.extras
    assert not np.allclose(trained.logits, trained.extras["distillation"])
    close(found.logits, (trained.logits + trained.extras["distillation"]) / 2)


def test_each_head_reads_its_own_token():
    variables, images = start(TINY)
    found = apply(TINY, variables, images, train=True)
    x = np.asarray(found.hidden_states[-1], np.float64)
    params = variables["params"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    for head, token, logits in (
        ("head", 0, found.logits),
        ("head_dist", 1, found.extras["distillation"]),
    ):
        kernel, bias = params[head]["kernel"], params[head]["bias"]
        close(logits, x[:, token] @ kernel + bias)


def test_without_the_token_nothing_changes_in_training():
    variables, images = start(PLAIN)
    found = apply(PLAIN, variables, images)
    trained = apply(PLAIN, variables, images, train=True)
    assert not trained.extras
    jax.tree.map(np.testing.assert_array_equal, trained, found)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (PLAIN.clone(patch=5), "patches of 5 pixels do not tile 8 x 12 images"),
        (PLAIN.clone(heads=3), "3 heads do not divide a width of 8"),
    ],
)
def test_what_does_not_fit_is_refused(model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        abstract(model, (3, 8, 12))


def test_values_are_those_of_torch():
    """Its own encoder layer, pre-norm and with exact GELU, around DeiT's tokens."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.manual_seed(0)
    nn = torch.nn

    def block():
        return nn.TransformerEncoderLayer(
            8, 2, 32, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
        )

    patches = nn.Conv2d(3, 8, 4, 4)
    norm = nn.LayerNorm(8, eps=1e-6)
    network = nn.ModuleList(
        [patches, block(), block(), norm, nn.Linear(8, 5), nn.Linear(8, 5)]
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    images = torch.randn(3, 3, 8, 12)
    ours = np.asarray(images.permute(0, 2, 3, 1))

    # The packed projection is no layer there, and the tokens belong to none.
    weights = {
        key.replace("in_proj_", "in_proj."): value
        for key, value in network.state_dict().items()
    }
    like = abstract(TINY, ours.shape)["params"]
    free = {k: torch.randn(like[k].shape) for k in like if "_token" in k or "pos" in k}
    layers = {k: v for k, v in like.items() if k not in free}
    names = {"4": "head", "5": "head_dist"}
    params = pretrained.from_torch(weights, {"params": layers}, names)["params"]
    params |= {k: np.asarray(v) for k, v in free.items()}
    found = apply(TINY, {"params": params}, ours, train=True)

    with torch.no_grad():
        x = patches(images).flatten(2).transpose(1, 2)
        first = [free[k].expand(3, 1, 8) for k in ("cls_token", "dist_token")]
        x = torch.cat([*first, x], 1) + free["pos_embed"]
        for layer, hidden, attention in zip(
            network[1:3], found.hidden_states, found.attentions, strict=True
        ):
            y = layer.norm1(x)
            _, weights = layer.self_attn(y, y, y, average_attn_weights=False)
            x = layer(x)
            close(attention, weights)
            close(hidden, x)
        close(found.logits, network[4](norm(x)[:, 0]))
        close(found.extras["distillation"], network[5](norm(x)[:, 1]))
