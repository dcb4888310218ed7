# SPDX-License-Identifier: Apache-2.0
"""Small models that are exported in tests, and their inputs."""

from functools import cache

import jax
import numpy as np
import optax
import pytest

from jaxdistill import data, models, teachers
from jaxdistill.export import Pixels, Subject

PACKAGES = {
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnx", "onnxruntime"),
    "tflite": ("tensorflow", "ai_edge_litert"),
}
DIGITS = data.load("digits")
# A part of the test: every format reads all of it, whatever its batch.
TEST = {name: array[:200] for name, array in DIGITS.test.items()}
PIXELS = Pixels(DIGITS.peak, DIGITS.mean, DIGITS.deviation)
SIZE = models.TransformerConfig(40, 16, 2, 4, positions=12)
BERT = models.BertClassifier(models.Encoder(SIZE), 3)
LARGE = models.ResNet(10, (1,), (4, 4), bottleneck=True, large_stem=True, norm="group")


def needs(to: str) -> None:
    for package in PACKAGES[to]:
        pytest.importorskip(package, reason=f"{package} is not installed")


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def texts(size: int = 30, length: int = 10) -> dict[str, np.ndarray]:
    """Random tokens, padded behind."""
    rng = np.random.default_rng(0)
    keep = (np.arange(length) < rng.integers(1, length + 1, (size, 1))).astype(np.int32)
    ids = rng.integers(0, SIZE.vocab, keep.shape) * keep
    return {"input_ids": ids.astype(np.int32), "attention_mask": keep}


def subject(module, inputs, pixels=None) -> Subject:
    """A model with random weights that are large enough to matter."""
    first = jax.tree.map(lambda x: x[:1], inputs)
    if pixels is not None:
        first = first.astype(np.float32)
    variables = jax.jit(module.init)(jax.random.key(0), first)
    leaves, tree = jax.tree.flatten(variables["params"])
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    variables = {**variables, "params": jax.tree.unflatten(tree, leaves)}
    if "batch_stats" in variables:
        variables["batch_stats"] = statistics(variables["batch_stats"])
    size = len(jax.tree.leaves(inputs)[0])
    labels = np.arange(size) % 3
    examples = {"inputs": inputs, "labels": labels}
    return Subject(teachers.live(module, variables), examples, pixels, inputs)


def statistics(fresh):
    """Random means and variances: those of a new model are 0 and 1."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape)
        named = jax.tree_util.keystr(path)
        assert ("mean" in named) != ("var" in named)
        drawn = np.exp(0.3 * drawn) if "var" in named else drawn
        return drawn.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, fresh)


COLOURS = Pixels(255, (0.5, 0.4, 0.3), (0.3, 0.2, 0.25))
GREY = Pixels(255, 0.3, 0.4)
MODELS = {
    "mlp": lambda: subject(models.MLP((16, 10)), images(30, 8, 8), GREY),
    "convnet": lambda: subject(
        models.ConvNet((4, 16), 32, norm="batch"), images(30, 11, 11), GREY
    ),
    "resnet": lambda: subject(
        models.ResNet(10, (1, 1), (4, 4, 8)), images(30, 12, 12, 3), COLOURS
    ),
    "large_stem": lambda: subject(LARGE, images(30, 20, 20, 3), COLOURS),
    "deit": lambda: subject(
        models.ViT(10, 16, 1, 4, patch=4, distillation_token=True),
        images(30, 8, 8, 3),
        COLOURS,
    ),
    "bert": lambda: subject(BERT, texts()),
    "scanned_bert": lambda: subject(
        models.BertClassifier(models.Encoder(SIZE, scan=True, maps=False), 3), texts()
    ),
    "scanned_gpt": lambda: subject(
        models.GPTClassifier(models.GPT(SIZE, scan=True, maps=False), 3), texts()
    ),
    "bag": lambda: subject(models.BagOfEmbeddings(40, 8, 3, (6,)), texts()),
}


@cache
def trained() -> models.BoundModule:
    """A small network that knows most digits."""
    module, part = models.MLP((24, 10)), DIGITS.inputs(DIGITS.train)
    params = module.init(jax.random.key(0), part["inputs"][:1])
    optimizer = optax.adam(0.02)

    def loss(params):
        logits = module.apply(params, part["inputs"]).logits
        labels = part["labels"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=150))(start)
    return teachers.live(module, jax.tree.map(np.asarray, params))


def digits(**others) -> Subject:
    examples = {"inputs": TEST["images"], "labels": TEST["labels"]}
    calibration = DIGITS.train["images"][:100]
    return Subject(trained(), examples, PIXELS, calibration)._replace(**others)
