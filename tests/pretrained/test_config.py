# SPDX-License-Identifier: Apache-2.0
"""config.json: what is missing is Hugging Face's own, what is no number is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.models import BertClassifier
from jaxdistill.models.config import ACTIVATIONS
from jaxdistill.pretrained import module_of, read_config
from jaxdistill.pretrained.config import ALIASES, FAMILIES, transformer_config

BERT = {"model_type": "bert", "architectures": ["BertForSequenceClassification"]}
DISTILBERT = {
    "model_type": "distilbert",
    "architectures": ["DistilBertForSequenceClassification"],
}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_missing_is_what_transformers_takes(kind):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    theirs = transformers.AutoConfig.for_model(kind)
    for ours, (name, usual) in FAMILIES[kind].numbers.items():
        assert getattr(theirs, name) == usual
        if ours in ALIASES:
            assert getattr(theirs, ALIASES[ours]) == usual


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    activations = pytest.importorskip(
        "transformers.activations", reason="transformers is not installed"
    )
    at = np.linspace(-12, 12, 97)  # where some are cut off
    expected = activations.ACT2FN[name](torch.tensor(at)).numpy()
    with jax.enable_x64(True):
        found = ACTIVATIONS[name](jnp.asarray(at))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_names_that_every_model_has_are_read():
    size = module_of({**GPT2, "hidden_size": 8, "num_attention_heads": 2}).size
    assert (size.width, size.heads, size.depth) == (8, 2, 12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_of_two_names_that_of_every_model_counts(kind):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    both = {"heads": (6, 2), "width": (24, 12), "depth": (5, 4), "positions": (9, 7)}
    config = {**BERT, **GPT2} if kind == "gpt2" else {**BERT, **DISTILBERT}
    config["model_type"] = kind
    for ours, (own, alias) in both.items():
        config |= {FAMILIES[kind].numbers[ours][0]: own, ALIASES[ours]: alias}
    size = transformer_config(config)
    theirs = type(transformers.AutoConfig.for_model(kind)).from_dict(config)
    for ours in both:
        assert getattr(size, ours) == getattr(theirs, ALIASES[ours])


@pytest.mark.parametrize("given", [{"num_labels": 2}, {}, {"id2label": None}])
def test_a_number_of_labels_counts_more_than_their_names(given):
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed"
    )
    config = {**BERT, "id2label": {"0": "a", "1": "b", "2": "c"}, **given}
    theirs = transformers.BertConfig.from_dict(config)
    assert module_of(config).num_classes == theirs.num_labels


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**BERT, "num_hidden_layers": 0}, "num_hidden_layers = 0; expected a positi"),
        ({**BERT, "num_attention_heads": 0}, "num_attention_heads = 0; expected a po"),
        ({**BERT, "hidden_size": "12"}, "hidden_size = '12'; expected a positive"),
        ({**BERT, "num_hidden_layers": 2.0}, "num_hidden_layers = 2.0; expected a"),
        ({**BERT, "layer_norm_eps": "1e-12"}, "eps = '1e-12'; expected a number"),
        ({**BERT, "hidden_act": ["gelu"]}, r"hidden_act = \['gelu'\]; expected a name"),
        ({**BERT, "classifier_dropout": "x"}, "dropout = 'x'; expected a number"),
        ({**BERT, "num_labels": "x"}, "num_labels = 'x'; expected a positive whole"),
        ({**BERT, "vocab_size": 10**12}, "vocab_size = 1000000000000; expected a"),
        ({**GPT2, "n_inner": 0}, "n_inner = 0; expected a positive whole number"),
        ({**GPT2, "scale_attn_weights": 1}, "weights = 1; expected true or false"),
        ({**GPT2, "is_causal": False}, "is_causal = False; only True is computed"),
        ({**GPT2, "tie_word_embeddings": 0}, "embeddings = 0; expected true or fal"),
        ({**BERT, "architectures": {"a": 1}}, "the architecture {'a': 1}; known: Bert"),
        ({**BERT, "architectures": None}, "names no architecture; known: BertForSeq"),
        ({**BERT, "architectures": []}, "names no architecture; known: BertForSeq"),
        ({"model_type": "gpt2"}, "names no architecture; known: GPT2LMHeadModel"),
        ({**BERT, "model_type": ["bert"]}, r"a model of type \['bert'\]; known: bert"),
        ({"architectures": ["BertForMaskedLM"]}, "a model of type None; known: bert"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_what_is_no_number_or_computed_otherwise_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        module_of(config)


@pytest.mark.parametrize(
    ("config", "gone"),
    [
        ({**GPT2, "embd_pdrop": 1.0, "resid_pdrop": 0.0}, True),
        ({**GPT2, "embd_pdrop": 0.0, "resid_pdrop": 1.0}, False),
        ({**BERT, "hidden_dropout_prob": 0.0, "classifier_dropout": 1.0}, True),
        ({**BERT, "hidden_dropout_prob": 0.0, "classifier_dropout": None}, False),
        ({**DISTILBERT, "dropout": 0.0, "seq_classif_dropout": 1.0}, True),
        ({**DISTILBERT, "dropout": 0.0, "seq_classif_dropout": 0.0}, False),
    ],
    ids=lambda value: "-".join([*value][2:]) if isinstance(value, dict) else "",
)
def test_dropout_acts_where_it_is_configured(config, gone):
    """On GPT-2's embeddings apart from the rest; before a classifier."""
    numbers = {"width": 8, "depth": 1, "heads": 2, "vocab": 9}
    names = {
        FAMILIES[config["model_type"]].numbers[k][0]: v for k, v in numbers.items()
    }
    module = module_of({**config, **names})
    inputs = {"input_ids": jnp.arange(3)[None]}
    variables = module.init(jax.random.key(0), inputs)
    rngs = {"dropout": jax.random.key(1)}
    found = module.apply(variables, inputs, train=True, rngs=rngs)
    gpt2 = config["model_type"] == "gpt2"
    dropped = found.extras["embeddings"][0] if gpt2 else found.logits
    assert gone != bool(dropped.any())


def test_the_usual_dropout_follows_the_rest():
    assert module_of(GPT2).size.embedding_dropout is None
    assert module_of(BERT).dropout is None
    assert module_of(DISTILBERT).dropout == 0.2


def test_settings_of_other_models_change_nothing():
    assert isinstance(module_of({**BERT, "tie_word_embeddings": False}), BertClassifier)
    assert module_of({**GPT2, "is_decoder": True}) == module_of(GPT2)


def test_a_folder_in_the_files_place_is_refused(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json cannot be read: Is a direc"):
        read_config(tmp_path)
