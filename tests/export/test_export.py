# SPDX-License-Identifier: Apache-2.0
"""Exported students in each format: a runtime says what the model says."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill import data, export, models, runtimes
from jaxdistill.export import ExportError, Pixels, artefact, check, tflite
from jaxdistill.export import onnx as onnx_format
from jaxdistill.export.subject import logits_of
from jaxdistill.runtimes import ArtefactError
from jaxdistill.types import Outputs
from tests.export.exporting import (
    BERT,
    GREY,
    MODELS,
    PACKAGES,
    digits,
    images,
    needs,
    subject,
    texts,
    trained,
)


@pytest.fixture(params=["stablehlo", "onnx", "tflite"])
def to(request):
    """Each format whose packages are installed."""
    needs(request.param)
    return request.param


FIRST = ["mlp", "convnet", "resnet", "deit", "bert"]
CASES = [(name, to) for name in FIRST for to in PACKAGES]
# What these add matters to jax2onnx.
CASES += [(name, "onnx") for name in MODELS if name not in FIRST]


@pytest.mark.parametrize(("name", "to"), CASES)
def test_a_model_gives_its_logits_in_the_runtime(name, to, tmp_path):
    needs(to)
    given = MODELS[name]()
    manifest = export.write(given, tmp_path / "m", to=to)
    found = manifest["check"]
    assert found["examples"] == 30
    assert found["largest_difference"] <= 1e-5 * max(1, found["largest_logit"])
    assert found["largest_logit"] > 0.1  # something to differ by
    assert found["disagreements"] == found["ties"]
    assert found["accuracy"] == found["model_accuracy"]
    # Once more here, from what is on the disk.
    model = runtimes.load(tmp_path / "m")
    logits = runtimes.predict(model, given.inputs, batch_size=7)
    batch = {"inputs": given.examples["inputs"], "mask": np.ones(30, np.float32)}
    if given.pixels is not None:
        peak, mean, deviation = given.pixels
        batch["inputs"] = data.normalize(batch["inputs"], mean, deviation, peak)
    expected = jax.jit(lambda model: model(batch).logits)(given.model)
    bound = 1e-5 * max(1, abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=0, atol=bound)
    assert model.batch_size == (1 if to == "tflite" else None)
    assert manifest["inputs"] == {
        key: {
            "shape": [model.batch_size or "batch", *x.shape[1:]],
            "dtype": str(x.dtype),
        }
        for key, x in given.inputs.items()
    }


def test_onnx_has_convolutions_in_place_of_patches(tmp_path):
    needs("onnx")
    import onnx

    export.write(MODELS["convnet"](), tmp_path / "m", to="onnx")
    nodes = onnx.load(tmp_path / "m").graph.node
    assert [node.op_type for node in nodes].count("Conv") == 2


def test_a_conversion_that_fails_is_tried_again(tmp_path, monkeypatch):
    """As jax2onnx's does from time to time: a file that does not load, or is wrong."""
    needs("onnx")
    right = onnx_format._convert
    content = right(digits(), None)
    other = right(digits(pixels=Pixels(16, 0.0, 1.0)), None)
    given = iter([b"no model", other, content])
    monkeypatch.setattr(onnx_format, "_convert", lambda *_: next(given))
    export.write(digits(), tmp_path / "m", to="onnx")
    assert (tmp_path / "m").read_bytes() == content

    monkeypatch.setattr(onnx_format, "_convert", lambda *_: other)
    said = "jax2onnx gave no right file in 8 conversions: its logits differ by .* from"
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "wrong", to="onnx")
    assert len([*tmp_path.iterdir()]) == 2


def test_the_comparison_needs_a_cpu(tmp_path, monkeypatch):
    def devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", devices)
    with pytest.raises(ExportError, match="which JAX_PLATFORMS leaves out: add cpu to"):
        export.write(digits(), tmp_path / "m", to="stablehlo")


def test_the_comparison_is_on_a_cpu_wherever_a_model_lies():
    """Here its arrays lie on several devices, which no computation takes."""
    model = trained()
    leaves, tree = jax.tree.flatten(model)
    devices = jax.devices()[1:]
    leaves = [jax.device_put(x, d) for x, d in zip(leaves, devices, strict=False)]
    given = digits(model=jax.tree.unflatten(tree, leaves))
    np.testing.assert_array_equal(logits_of(given), logits_of(digits()))


def test_a_fixed_batch(to, tmp_path):
    given = MODELS["mlp"]()
    export.write(given, tmp_path / "m", to=to, batch_size=8)
    model = runtimes.load(tmp_path / "m")
    assert model.batch_size == 8
    pixels = given.examples["inputs"]
    assert runtimes.predict(model, pixels).shape == (30, 10)  # no multiple of 8
    assert model(pixels[:8]).shape == (8, 10)
    with pytest.raises(ArtefactError, match=r"shape \[7, 8, 8\], expected \[8, 8, 8\]"):
        model(pixels[:7])


def test_a_projector_stays_behind(tmp_path):
    needs("stablehlo")
    module = models.with_projector(models.MLP((4, 3)), models.Projector(((0, 6),)))
    given = subject(module, np.ones((5, 4), np.float32))
    manifest = export.write(given, tmp_path / "m", to="stablehlo")
    assert manifest["student"]["module"] == "MLP"
    assert manifest["student"]["parameters"] == 4 * 4 + 4 + 4 * 3 + 3
    assert manifest["inputs"] == {"inputs": {"shape": ["batch", 4], "dtype": "float32"}}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("to", ["onnx", "tflite"])
def test_int8_tells_what_it_costs(to, kind, tmp_path):
    needs(to)
    whole = export.write(digits(), tmp_path / "whole", to=to)
    manifest = export.write(digits(), tmp_path / "int8", to=to, int8=kind)
    found = manifest["check"]
    assert manifest["int8"] == kind
    # What lies beyond the calibration's range is cut off.
    assert 0 < found["largest_difference"] < 0.3 * found["largest_logit"]
    assert found["agreement"] > 0.95
    assert found["accuracy"] > found["model_accuracy"] - 0.05
    assert found["model_accuracy"] == whole["check"]["accuracy"] > 0.85
    assert manifest["inputs"] == whole["inputs"]
    assert runtimes.load(tmp_path / "int8").manifest == manifest


def test_int8_is_made_of_a_file_that_is_right_on_the_whole_test(tmp_path, monkeypatch):
    """Here one that is right on the first examples alone."""
    needs("onnx")
    content = onnx_format._convert(digits(), None)
    expected = logits_of(digits())
    assert onnx_format._wrong(content, digits(), expected, 8) == ""
    wrong = np.concatenate([expected[:-1], 2 * expected[-1:]])
    monkeypatch.setattr(artefact, "logits_of", lambda _: wrong)
    said = "gave no right file in 8 conversions: its logits differ by "
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="onnx", int8="dynamic")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("to", ["onnx", "tflite"])
@pytest.mark.parametrize("name", ["convnet", "bert"])
def test_int8_of_convolutions_and_attention(name, to, kind, tmp_path):
    """LiteRT takes no norm in int8: there the products alone are in it."""
    needs(to)
    manifest = export.write(
        MODELS[name](), tmp_path / "m", to=to, int8=kind, max_drop=100
    )
    found = manifest["check"]
    assert 0 < found["largest_difference"] < 0.5 * found["largest_logit"]
    everything = (to, kind, name) == ("tflite", "static", "convnet")
    assert manifest["int8_operations"] == ("all" if everything else "products")


@pytest.mark.parametrize(
    ("code", "operations"),
    [("pass", "all"), ("import os; os.abort()", "products")],
)
def test_what_static_int8_has_in_int8(code, operations, tmp_path, monkeypatch):
    """All that it can, unless the runtime crashes."""
    needs("tflite")
    monkeypatch.setattr(tflite, "START", code)
    manifest = export.write(digits(), tmp_path / "m", to="tflite", int8="static")
    assert manifest["int8_operations"] == operations


def test_the_runtime_is_none_of_the_folder_one_is_in(tmp_path, monkeypatch):
    needs("tflite")
    (tmp_path / "ai_edge_litert.py").write_text("raise ValueError('not this one')")
    monkeypatch.chdir(tmp_path)
    manifest = export.write(digits(), tmp_path / "m", to="tflite", int8="static")
    assert manifest["int8_operations"] == "all"


def test_a_runtime_that_refuses_static_int8(tmp_path, monkeypatch):
    needs("tflite")
    monkeypatch.setattr(tflite, "START", "raise ValueError('no such type')")
    said = "the runtime does not take static int8: ValueError: no such type"
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="tflite", int8="static")


def test_int8_of_what_is_left_as_it_is(tmp_path):
    """TensorFlow quantises no matrix of fewer than 1,024 numbers."""
    needs("tflite")
    small = subject(models.MLP((4, 3)), images(9, 2, 2), GREY)
    with pytest.raises(ExportError, match="int8 changed nothing: the format leaves"):
        export.write(small, tmp_path / "m", to="tflite", int8="dynamic")


def test_int8_that_costs_too_much(tmp_path, monkeypatch):
    needs("onnx")
    wrong = lambda path, inputs: np.roll(logits_of(digits()), 1, -1)  # noqa: E731
    monkeypatch.setattr(check, "run_fresh", wrong)
    said = r"int8 loses \d\d\.\d points of accuracy \(\d\d\.\d% to .*\), 5 are allowed"
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="onnx", int8="dynamic")
    assert list(tmp_path.iterdir()) == []
    export.write(digits(), tmp_path / "m", to="onnx", int8="dynamic", max_drop=100)


class Odd(nn.Module):
    """A network that calls Python: no format has that."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        x = nn.Dense(3)(inputs)
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return Outputs(jax.pure_callback(lambda y: y, shape, x))


@pytest.mark.parametrize(
    ("module", "to", "sentence"),
    [
        (
            Odd(),
            "onnx",
            "Odd cannot be .* lacks its operation pure_callback; stablehlo",
        ),
        (Odd(), "stablehlo", "Odd cannot be exported to stablehlo: .*callback"),
        (Odd(), "tflite", "Odd cannot be exported to tflite: .*callback"),
        (
            models.BiLSTM(40, 4, 4, 3),
            "onnx",
            "BiLSTM cannot be exported to onnx: its RNN is not taken .*; stablehlo tak",
        ),
    ],
)
def test_an_operation_that_a_format_lacks(module, to, sentence, tmp_path):
    needs(to)
    inputs = np.ones((4, 5), np.float32) if isinstance(module, Odd) else texts(4)
    with pytest.raises(ExportError, match=sentence):
        export.write(subject(module, inputs), tmp_path / "m", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["stablehlo", "tflite"])
def test_what_the_sentence_offers_a_bilstm(to, tmp_path):
    needs(to)
    given = subject(models.BiLSTM(40, 4, 4, 3), texts(20))
    assert export.write(given, tmp_path / "m", to=to)["check"]["ties"] == 0


def test_wide_types_become_those_that_jax_has(to, tmp_path):
    given = subject(BERT, texts(9))
    wide = {name: array.astype(np.int64) for name, array in given.inputs.items()}
    given = given._replace(examples={**given.examples, "inputs": wide})
    manifest = export.write(given, tmp_path / "m", to=to)
    assert {spec["dtype"] for spec in manifest["inputs"].values()} == {"int32"}
    with jax.enable_x64(True):
        manifest = export.write(given, tmp_path / "x64", to=to)
        assert given.inputs["input_ids"].dtype == np.int32
    assert {spec["dtype"] for spec in manifest["inputs"].values()} == {"int32"}
