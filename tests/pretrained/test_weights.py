# SPDX-License-Identifier: Apache-2.0
"""Text models against transformers': odd sizes, padding; folders that do not fit."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from jaxdistill import models, pretrained, teachers
from jaxdistill.pretrained import read_config
from jaxdistill.pretrained import weights as huggingface
from jaxdistill.pretrained.config import FAMILIES
from jaxdistill.pretrained.weights import by_todays_names

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed"
)

BERT = {
    "vocab_size": 31,
    "hidden_size": 21,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 17,
    "max_position_embeddings": 13,
    "type_vocab_size": 3,
}
DISTILBERT = {
    "vocab_size": 29,
    "dim": 20,
    "n_layers": 2,
    "n_heads": 5,
    "hidden_dim": 33,
    "max_position_embeddings": 12,
    "activation": "relu",
}
GPT2 = {
    "vocab_size": 37,
    "n_embd": 14,
    "n_layer": 3,
    "n_head": 7,
    "n_inner": 9,
    "n_positions": 15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SCALES = {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}
UNTIED = {"tie_word_embeddings": False}
MODELS = {
    "bert-classes": ("BertForSequenceClassification", {**BERT, "num_labels": 4}),
    "bert-masked": ("BertForMaskedLM", BERT),
    "distilbert-classes": ("DistilBertForSequenceClassification", DISTILBERT),
    "distilbert-masked": ("DistilBertForMaskedLM", DISTILBERT),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2-classes": (
        "GPT2ForSequenceClassification",
        {**GPT2, "num_labels": 4, "pad_token_id": 36},
    ),
    "bert-untied": ("BertForMaskedLM", {**BERT, **UNTIED}),
    "distilbert-untied": ("DistilBertForMaskedLM", {**DISTILBERT, **UNTIED}),
    "gpt2-untied": ("GPT2LMHeadModel", {**GPT2, **UNTIED}),
    "bert-body": ("BertModel", BERT),
    "distilbert-body": ("DistilBertModel", DISTILBERT),
    "gpt2-body": ("GPT2Model", {**GPT2, **SCALES}),
}


def torch_model(name, **changes):
    """A model of transformers, its weights large enough to matter."""
    kind, numbers = MODELS[name]
    made = getattr(transformers, kind)
    config = made.config_class(**{**numbers, **changes}, attn_implementation="eager")
    torch.manual_seed(0)
    model = made(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """A model and the folder it is saved in."""
    model = torch_model(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return model, folder


def text(vocab, segments=0, rows=4, length=11):
    """Tokens with padding, the last of the vocabulary: behind, before, nothing else."""
    rng = np.random.default_rng(0)
    mask = np.ones((rows, length), np.int64)
    mask[1, 7:], mask[2, :3], mask[3] = 0, 0, 0
    ids = rng.integers(0, vocab - 1, (rows, length))
    inputs = {
        "input_ids": np.where(mask, ids, vocab - 1),
        "attention_mask": mask,
    }
    if segments:
        inputs["token_type_ids"] = rng.integers(0, segments, (rows, length))
    return inputs


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_everything_equals_transformers(saved, scan, dtype, bound):
    model, folder = saved
    model = model.to(getattr(torch, dtype))
    inputs = text(model.config.vocab_size, getattr(model.config, "type_vocab_size", 0))
    with torch.no_grad():
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        expected = model(**given, output_hidden_states=True, output_attentions=True)
    with jax.enable_x64(dtype == "float64"):
        module, variables = pretrained.load(folder, scan=scan)
        variables = jax.tree.map(lambda x: x.astype(dtype), variables)
        found = jax.jit(module.apply)(variables, inputs)
        assert found.hidden_states[-1].dtype == dtype
        embeddings, *hidden_states = expected.hidden_states
        pairs = [
            (found.extras["embeddings"][0], embeddings),
            *zip(found.hidden_states, hidden_states, strict=True),
            *zip(found.attentions, expected.attentions, strict=True),
        ]
        if "logits" in expected:  # a body's own are none
            pairs.append((found.logits, expected.logits))
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_given_positions_and_types_are_those_that_are_read(saved):
    model, folder = saved
    model, rng = model.float(), np.random.default_rng(1)
    inputs = text(model.config.vocab_size)
    shape = inputs["input_ids"].shape
    inputs["position_ids"] = rng.integers(0, 12, shape)
    if model.config.model_type != "distilbert":
        inputs["token_type_ids"] = rng.integers(0, 3, shape)
    module, variables = pretrained.load(folder)
    found = jax.jit(module.apply)(variables, inputs)
    with torch.no_grad():
        given = {name: torch.tensor(array) for name, array in inputs.items()}
        expected = model(**given, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(found.hidden_states[-1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_back_again_is_the_identity(saved, scan, tmp_path):
    model, folder = saved
    model = model.float()
    loaded = teachers.live(*pretrained.load(folder, scan=scan))
    pretrained.save(tmp_path / "back", loaded, read_config(folder))
    again = type(model).from_pretrained(tmp_path / "back").state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("pooler."):  # which is left out
            continue
        if name == "cls.predictions.bias":  # what is added is the layer's own
            value = model.cls.predictions.decoder.bias
        torch.testing.assert_close(again[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_what_is_saved_is_loaded_in_its_own_type(saved, key, tmp_path):
    """A training in float32 of 16-bit weights was lost: config.json said bfloat16."""
    model, folder = saved
    module, variables = pretrained.load(folder)
    moved = jax.tree.map(lambda x: x.astype(np.float32) + np.float32(1e-4), variables)
    config = {k: v for k, v in read_config(folder).items() if k != "dtype"}
    trained = teachers.live(module, moved)
    pretrained.save(tmp_path / "out", trained, {**config, key: "bfloat16"})
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    assert read_config(tmp_path / "out")[key] == "float32"
    _, back = pretrained.load(tmp_path / "out")
    assert_same_variables(back, moved)


def test_weights_that_are_no_floats_are_refused(saved):
    _, folder = saved
    state, config = states(folder), read_config(folder)
    name = next(name for name, array in state.items() if array.ndim == 2)
    other = {**state, name: np.zeros(state[name].shape, np.int8)}
    with pytest.raises(ValueError, match=f"{name}' of type int8, which is no float"):
        pretrained.to_linen(other, config)


def states(folder):
    """The tensors that a folder of transformers holds."""
    return huggingface.read_weights(folder / "model.safetensors")


def assert_same_variables(found, expected):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, str(path))


def test_shards_are_one_file(saved, tmp_path):
    model, folder = saved
    model.float().save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()
    found, expected = (pretrained.load(one)[1] for one in (tmp_path, folder))
    assert_same_variables(found, expected)
    first, *_, last = sorted(tmp_path.glob("model-*.safetensors"))
    last.write_bytes(first.read_bytes())
    twice = min(huggingface.read_weights(first))
    with pytest.raises(ValueError, match=f"{last.name} holds '{twice}', as another"):
        pretrained.load(tmp_path)
    last.unlink()
    with pytest.raises(ValueError, match=f"{last.name} does not exist"):
        pretrained.load(tmp_path)
    for index in ("[]", '{"weight_map": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ValueError, match="index.json is damaged: it names no shar"):
            pretrained.load(tmp_path)


def test_names_in_older_files_are_known(saved):
    """BERT's norms as TensorFlow names them; a body without its prefix under a head."""
    _, folder = saved
    config, state, older = read_config(folder), states(folder), {}
    kind = config["model_type"]
    for name, array in state.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        older[name.removeprefix(FAMILIES[kind].prefix)] = array
    for name in FAMILIES[kind].buffers:
        name = name.format(1).removeprefix(FAMILIES[kind].prefix)
        older[name] = np.ones((1, 1, 3, 3), np.float32)
    found, expected = (pretrained.to_linen(one, config) for one in (older, state))
    assert_same_variables(found, expected)
    whole = by_todays_names(state, config)
    state = {name: array for name, (_, array) in whole.items()}
    others = ["x.position_ids", "x.attn.masked_bias"]
    others += ["transformer.h.3.attn.bias", "bert.encoder.layer.0.attn.bias"]
    others += ["bert.embeddings.LayerNorm.gamma" if kind == "bert" else "wte.weight"]
    for other in others:
        with pytest.raises(ValueError, match=f"hold '{other}', which has no place"):
            pretrained.to_linen({**state, other: np.zeros(3, np.float32)}, config)


def test_a_masked_lm_is_read_from_what_bert_was_pretrained_as(tmp_path):
    """As bert-base-uncased: a masked LM's configuration, two heads' tensors."""
    numbers = transformers.BertConfig(**BERT, attn_implementation="eager")
    whole = transformers.BertForPreTraining(numbers).eval()
    whole.save_pretrained(tmp_path)
    config = {**read_config(tmp_path), "architectures": ["BertForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    module, variables = pretrained.load(tmp_path)
    inputs = text(20)
    expected = whole(**{k: torch.tensor(v) for k, v in inputs.items()})
    found = module.apply(variables, inputs).logits
    logits = expected.prediction_logits.detach().numpy()
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)
    state = states(tmp_path)
    other = {**state, "cls.other.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="hold 'cls.other.weight', which has no place"):
        pretrained.to_linen(other, config)


def test_a_bias_of_a_matrix_of_its_own_has_two_names(tmp_path):
    """transformers 4 saves the one, 5 computes with the other."""
    model = torch_model("bert-untied")
    model.save_pretrained(tmp_path)
    config, state = read_config(tmp_path), states(tmp_path)
    found = pretrained.to_linen(state, config)["params"]["bias"]
    np.testing.assert_array_equal(found, state["cls.predictions.decoder.bias"])
    older = dict(state)
    other = older.pop("cls.predictions.decoder.bias") + 1
    older["cls.predictions.bias"] = other
    found = pretrained.to_linen(older, config)["params"]["bias"]
    np.testing.assert_array_equal(found, other)
    saved = pretrained.from_linen(pretrained.to_linen(state, config), config)
    for name in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        expected = state["cls.predictions.decoder.bias"]
        np.testing.assert_array_equal(saved[name], expected)


def test_a_language_models_end_is_no_part_of_a_classifier(tmp_path):
    torch_model("gpt2-classes").save_pretrained(tmp_path)
    config, state = read_config(tmp_path), states(tmp_path)
    more = {**state, "lm_head.weight": np.ones((37, 14), np.float32)}
    expected, found = (pretrained.to_linen(one, config) for one in (state, more))
    assert_same_variables(found, expected)
    body = models.GPT(models.gpt_config(9, 4, 1, 2, tied=False))
    with pytest.raises(ValueError, match="a classifier's decoder has no last matrix"):
        models.GPTClassifier(body, 2).init(jax.random.key(0), text(9))


def test_what_a_scan_returns_is_indexed_by_layer(saved):
    _, folder = saved
    inputs = text(20)
    found = []
    for scan in (False, True):
        module, variables = pretrained.load(folder, scan=scan, remat=scan)
        found.append(jax.jit(module.apply)(variables, inputs))
    loop, scanned = found
    for name in ("queries", "keys", "values"):
        for a, b in zip(loop.extras[name], scanned.extras[name], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


LAYER = "bert.encoder.layer.1."


@pytest.mark.parametrize(
    ("shapes", "first", "expected"),
    [
        (
            {
                "attention.self.query.weight": (20, 21),
                "attention.self.key.weight": (22, 21),
            },
            "attention.self.query.weight",
            (21, 21),
        ),
        ({"attention.self.value.bias": (20,)}, "attention.self.value.bias", (21,)),
        ({"attention.self.key.weight": (21,)}, "attention.self.key.weight", (21, 21)),
        ({"attention.self.query.bias": ()}, "attention.self.query.bias", (21,)),
        (
            {"intermediate.dense.weight": (21, 17)},
            "intermediate.dense.weight",
            (17, 21),
        ),
        ({"output.LayerNorm.gamma": (1, 21)}, "output.LayerNorm.gamma", (21,)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_of_another_shape_is_named(shapes, first, expected):
    """Also where queries and keys together are as long as they should be."""
    model = torch_model("bert-classes")
    config = {
        **model.config.to_dict(),
        "architectures": ["BertForSequenceClassification"],
    }
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    for name, shape in shapes.items():
        state.pop(LAYER + name.replace("gamma", "weight"))
        state[LAYER + name] = np.zeros(shape, np.float32)
    given, wanted = map(re.escape, map(str, (shapes[first], expected)))
    said = f"hold '{LAYER}{first}' of shape {given}; config.json asks for {wanted}"
    with pytest.raises(ValueError, match=said):
        pretrained.to_linen(state, config)


@pytest.fixture
def bert(tmp_path):
    """A folder to damage."""
    torch_model("bert-classes").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architectures": ["T5Model"]},
            "names the architecture 'T5Model'; known: Bert",
        ),
        ({"model_type": "t5"}, "describes a model of type 't5'; known: bert"),
        ({"num_hidden_layers": 4}, "lack 'bert.encoder.layer.3.attention.self.query"),
        ({"num_hidden_layers": 2}, "hold 'bert.encoder.layer.2.attention.output.La"),
        (
            {"vocab_size": 30},
            r"'bert\.embeddings\.word_embeddings\.weight' of shape \(31, 21\);.* \(30,",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'rel"),
        ({"hidden_act": "swish2"}, "unknown activation 'swish2'; known: gelu"),
        ({"num_attention_heads": 4}, "4 heads do not divide a width of 21"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel'; known: BertFor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_does_not_fit_is_refused(bert, values, message):
    change(bert, **values)
    with pytest.raises(ValueError, match=message):
        pretrained.load(bert)


def test_damaged_folders_are_refused(bert, tmp_path):
    weights, config = bert / "model.safetensors", bert / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        pretrained.load(bert)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist"):
        pretrained.load(bert)
    config.write_text(config.read_text()[:-9])
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        pretrained.load(bert)
    shutil.rmtree(bert)
    bert.mkdir()
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        pretrained.load(bert)


def test_a_second_copy_must_be_the_same():
    model = torch_model("gpt2")
    config = {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    pretrained.to_linen(state, config)
    with pytest.raises(ValueError, match="'lm_head.weight' other than"):
        pretrained.to_linen(
            {**state, "lm_head.weight": state["lm_head.weight"] + 1}, config
        )
