# SPDX-License-Identifier: Apache-2.0
"""A pretrained body under a new head: all of it is read, other heads are not."""

import json

import jax
import numpy as np
import pytest

from jaxdistill import pretrained
from tests.pretrained.test_weights import text, torch_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed"
)


def body(name):
    """A model of transformers and its body alone."""
    model = torch_model(name)
    return model, getattr(model, model.base_model_prefix)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("alone", [False, True], ids=["with its head", "alone"])
@pytest.mark.parametrize(
    "name",
    [
        "bert-classes",
        "bert-masked",
        "distilbert-masked",
        "gpt2",
        "gpt2-classes",
        "gpt2-untied",
    ],
)
def test_the_body_is_what_was_trained(name, alone, scan, tmp_path):
    model, inner = body(name)
    (inner if alone else model).save_pretrained(tmp_path)
    module, variables = pretrained.load_classifier(
        tmp_path, 5, jax.random.key(0), scan=scan
    )
    inputs = text(model.config.vocab_size, getattr(model.config, "type_vocab_size", 0))
    found = jax.jit(module.apply)(variables, inputs)
    assert found.logits.shape == (4, 5)
    with torch.no_grad():
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        expected = inner(**given).last_hidden_state
    np.testing.assert_allclose(found.hidden_states[-1], expected, rtol=0, atol=1e-5)


def test_the_body_under_two_heads_is_read(tmp_path):
    numbers = torch_model("gpt2").config
    transformers.GPT2DoubleHeadsModel(numbers).save_pretrained(tmp_path)
    module, _ = pretrained.load_classifier(tmp_path, 3, jax.random.key(0))
    assert module.num_classes == 3


def test_a_pooler_is_read_where_there_is_one(tmp_path):
    model, inner = body("bert-classes")
    model.save_pretrained(tmp_path)
    module, variables = pretrained.load_classifier(tmp_path, 5, jax.random.key(0))
    kernel = variables["params"]["pooler"]["kernel"]
    expected = inner.pooler.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel, expected)
    other = pretrained.load_classifier(tmp_path, 5, jax.random.key(1))[1]["params"]
    assert (
        other["classifier"]["kernel"] != variables["params"]["classifier"]["kernel"]
    ).any()


def test_norms_named_as_in_tensorflow_are_read(tmp_path):
    """The file of bert-base-uncased holds them so."""
    files = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed"
    )
    body("bert-masked")[0].save_pretrained(tmp_path)
    expected = pretrained.load_classifier(tmp_path, 5, jax.random.key(0))[1]
    path = tmp_path / "model.safetensors"
    state = {}
    for name, array in files.load_file(path).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        state[name.replace("LayerNorm.bias", "LayerNorm.beta")] = array
    files.save_file(state, path)
    found = pretrained.load_classifier(tmp_path, 5, jax.random.key(0))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 4}, "the weights lack 'bert.encoder.layer.3."),
        ({"num_hidden_layers": 2}, "the weights hold 'encoder.layer.2."),
        ({"vocab_size": 40}, "hold 'embeddings.word_embeddings.weight' of shape"),
    ],
)
def test_a_file_that_does_not_fit_is_named(change, said, tmp_path):
    body("bert-classes")[1].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=said):
        pretrained.load_classifier(tmp_path, 2, jax.random.key(0))
