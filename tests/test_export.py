# SPDX-License-Identifier: Apache-2.0
"""Exported students: a runtime says what the model says, or there is nothing."""

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxdistill import cli, data, export, models, runtimes, saved, teachers, tokens
from jaxdistill.export import ExportError, Pixels, Subject, artefact, check
from jaxdistill.export import onnx as onnx_format
from jaxdistill.export import tflite as tflite_format
from jaxdistill.export.subject import logits_of
from jaxdistill.runs import Run, RunError
from jaxdistill.runtimes import ArtefactError
from jaxdistill.types import Outputs

PACKAGES = {
    "stablehlo": ("flatbuffers",),
    "onnx": ("jax2onnx", "onnx", "onnxruntime"),
    "tflite": ("tensorflow", "ai_edge_litert"),
}
DIGITS = data.load("digits")
# A part of the test: every format reads all of it, whatever its batch.
TEST = {name: array[:200] for name, array in DIGITS.test.items()}
PIXELS = Pixels(DIGITS.peak, DIGITS.mean, DIGITS.deviation)
SIZE = models.Size(40, 16, 2, 4, positions=12)
BERT = models.BertClassifier(models.Encoder(SIZE), 3)
LARGE = models.ResNet(10, (1,), (4, 4), bottleneck=True, large_stem=True, norm="group")


def needs(to: str) -> None:
    for package in PACKAGES[to]:
        pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.fixture(params=["stablehlo", "onnx", "tflite"])
def to(request):
    """Each format whose packages are installed."""
    needs(request.param)
    return request.param


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
    "bag": lambda: subject(models.BagOfEmbeddings(40, 8, 3, (6,)), texts()),
}


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


@cache
def trained() -> teachers.Live:
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
    monkeypatch.setattr(tflite_format, "START", code)
    manifest = export.write(digits(), tmp_path / "m", to="tflite", int8="static")
    assert manifest["int8_operations"] == operations


def test_a_runtime_that_refuses_static_int8(tmp_path, monkeypatch):
    needs("tflite")
    monkeypatch.setattr(tflite_format, "START", "raise ValueError('no such type')")
    said = "the runtime does not take static int8: ValueError: no such type"
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="tflite", int8="static")


def test_int8_of_what_is_left_as_it_is(tmp_path):
    """TensorFlow quantises no matrix of fewer than 1,024 numbers."""
    needs("tflite")
    small = subject(models.MLP((4, 3)), images(9, 2, 2), GREY)
    with pytest.raises(ExportError, match="int8 changed nothing: the format leaves"):
        export.write(small, tmp_path / "m", to="tflite", int8="dynamic")


def test_nothing_else_is_said(run, to, capfd):
    """TensorFlow, jax2onnx and the runtimes log as they go."""
    cli.main(["export", str(run), "--to", to])
    said, noise = capfd.readouterr()
    assert len(said.splitlines()) == 1
    assert noise == ""


def test_int8_that_costs_too_much(tmp_path, monkeypatch):
    needs("onnx")
    wrong = lambda path, inputs: np.roll(logits_of(digits()), 1, -1)  # noqa: E731
    monkeypatch.setattr(check, "run_fresh", wrong)
    said = r"int8 loses \d\d\.\d points of accuracy \(\d\d\.\d% to .*\), 5 are allowed"
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="onnx", int8="dynamic")
    assert list(tmp_path.iterdir()) == []
    export.write(digits(), tmp_path / "m", to="onnx", int8="dynamic", max_drop=100)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x: x + 1e-3, r"logits differ by 0\.001 from the model's, which are "),
        (
            lambda x: x[:, :9],
            r"logits have the shape \(200, 9\), the model's \(200, 10",
        ),
        (lambda x: x * np.nan, "logits are not finite"),
    ],
)
def test_an_artefact_that_differs_is_not_left(change, sentence, tmp_path, monkeypatch):
    needs("stablehlo")
    run = check.run_fresh
    monkeypatch.setattr(check, "run_fresh", lambda *files: change(run(*files)))
    with pytest.raises(ExportError, match=sentence):
        export.write(digits(), tmp_path / "m", to="stablehlo")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_decision_counts_unless_it_is_a_tie():
    expected = np.array([[1.0, 1 + 3e-6, 0], [0, 2, 0]])
    found = np.array([[1 + 6e-6, 1.0, 0], [0, 2, 0]])
    result = check.compare(found, expected, np.array([1, 1]))
    assert (result["disagreements"], result["ties"]) == (1, 1)
    assert (result["accuracy"], result["model_accuracy"]) == (0.5, 1.0)
    expected[0, 1], found[0] = 1 + 1.5e-5, [1 + 9e-6, 1 + 8e-6, 0]
    expected *= 0.999  # the tolerance is that of 1 all the same
    found *= 0.999
    expected[1, 1] = found[1, 1] = 1
    with pytest.raises(ExportError, match="decides otherwise than the model on 1 of 2"):
        check.compare(found, expected, np.array([1, 1]))


def test_a_process_that_ends_badly_is_told(tmp_path, monkeypatch):
    """By its own sentence, by the last line, or as a crash."""
    said = "m was written, and does not run: cannot rea"
    with pytest.raises(ExportError, match=said):
        check.run_fresh(tmp_path / "m", {"images": np.zeros(1)})
    child = tmp_path / "child.py"
    monkeypatch.setattr(runtimes, "__file__", str(child))
    for code, sentence in [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            r"crashed \(sig.* 9",
        ),
        (
            "sys.stderr.write('noise\\nerror: of mine\\nmore noise\\n'); sys.exit(1)",
            "of m",
        ),
        ("sys.stderr.write('noise\\nTypeError: x\\n'); sys.exit(1)", "TypeError: x"),
        ("sys.exit(1)", "it says nothing"),
    ]:
        child.write_text(f"import sys; {code}")
        with pytest.raises(ExportError, match=f"does not run: .*{sentence}"):
            check.run_fresh(tmp_path / "m", {"images": np.zeros(1)})


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


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("stablehlo", "flatbuffers", "export"),
        ("onnx", "jax2onnx", "onnx"),
        ("onnx", "onnxruntime", "onnx"),
        ("tflite", "tensorflow", "tflite"),
        ("tflite", "ai_edge_litert", "tflite"),
    ],
)
def test_a_missing_package_names_its_extra(to, package, extra, tmp_path, monkeypatch):
    for other in PACKAGES[to]:
        if other != package:
            pytest.importorskip(other, reason=f"{other} is not installed")
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"{package} is not installed .*: pip install 'jaxdistill\[{extra}\]'"
    with pytest.raises(ArtefactError, match=said):
        export.write(digits(), tmp_path / "m", to=to)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"to": "stablehlo", "int8": "static"},
            "StableHLO has no int8 here: export to",
        ),
        ({"to": "onnx", "batch_size": 0}, "--batch-size must be at least 1, got 0"),
        ({"to": "onnx", "max_drop": -1.0}, "--max-drop must be 0 or more, got -1.0"),
    ],
)
def test_options_that_cannot_be(options, sentence, tmp_path):
    with pytest.raises(ExportError, match=sentence):
        export.write(digits(), tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("calibration", "batch_size", "sentence"),
    [
        (None, None, "int8 static needs the inputs of 8 training .*, got 0"),
        (
            TEST["images"][:9],
            10,
            "int8 static needs the inputs of 10 training .*, got 9",
        ),
    ],
)
def test_static_int8_needs_examples(calibration, batch_size, sentence, tmp_path):
    given = digits(calibration=calibration)
    options = {"to": "onnx", "int8": "static", "batch_size": batch_size}
    with pytest.raises(ExportError, match=sentence):
        export.write(given, tmp_path / "m", **options)


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


@pytest.mark.parametrize("name", ["m", "m.json"])
def test_what_is_there_stays(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ExportError, match=f"{name} exists: delete it, or give another"):
        export.write(digits(), tmp_path / "m", to="stablehlo")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["m", "m.json"])
def test_what_appears_during_an_export_stays(name, tmp_path, monkeypatch):
    answer = check.run_fresh

    def slow(*files):
        (tmp_path / name).write_text("mine")
        return answer(*files)

    monkeypatch.setattr(check, "run_fresh", slow)
    with pytest.raises(ExportError, match=f"{name} exists: delete it, or give another"):
        export.write(digits(), tmp_path / "m", to="stablehlo")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_an_artefact_that_cannot_be_moved_leaves_no_manifest(tmp_path, monkeypatch):
    move = Path.replace

    def fails(path, to):
        if to.name == "m":
            raise OSError("disk full")
        return move(path, to)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        export.write(digits(), tmp_path / "m", to="stablehlo")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_output(tmp_path):
    said = "m is a folder: give an --output that is a file"
    (tmp_path / "m").mkdir()
    with pytest.raises(ExportError, match=said):
        export.write(digits(), tmp_path / "m", to="stablehlo")


def test_what_is_replaced_stays_until_another_is_written(tmp_path, monkeypatch):
    needs("onnx")
    options = {"to": "onnx", "int8": "dynamic"}
    path = export.obtain(digits(), [tmp_path / "m"], max_drop=100, **options)
    beside = runtimes.manifest_path(path)
    manifest = json.loads(beside.read_text())
    manifest["check"]["accuracy_difference"] = -0.03  # as if it had lost 3 points
    beside.write_text(json.dumps(manifest))
    before = path.stat().st_mtime_ns
    export.obtain(digits(), [path], max_drop=3.5, **options)
    assert path.stat().st_mtime_ns == before
    with monkeypatch.context() as patch:
        patch.setattr(check, "run_fresh", lambda *_: np.zeros((200, 10)))
        with pytest.raises(ExportError, match="int8 loses .* 2.5 are allowed"):
            export.obtain(digits(), [path], max_drop=2.5, **options)
    assert runtimes.read(path)[0] == manifest
    assert len([*tmp_path.iterdir()]) == 2
    export.obtain(digits(), [path], max_drop=2.5, **options)
    assert runtimes.read(path)[0]["check"]["accuracy_difference"] > -0.025


@pytest.mark.parametrize("off", [-0.02, 0.02])
def test_a_model_that_has_another_accuracy_than_its_run_recorded(off, tmp_path):
    guess = logits_of(digits()).argmax(-1)
    accuracy = float((guess == TEST["labels"]).mean())
    export.write(digits(accuracy=accuracy + off / 4), tmp_path / "m", to="stablehlo")
    said = (
        r"accuracy on the test is \d\d.\d%, its run recorded \d\d.\d%: the run has ano"
    )
    with pytest.raises(ExportError, match=said):
        export.write(digits(accuracy=accuracy + off), tmp_path / "n", to="stablehlo")


@pytest.fixture
def run(tmp_path):
    """What the command needs of a finished run on the digits."""
    log = Run(tmp_path / "run", {"data": "digits", "validation": 900})
    teacher = teachers.live(models.MLP((3,)), {"params": {}})
    saved.save_model(log, "distilled", trained(), ("teacher", teacher))
    saved.save_model(log, "teacher", teacher)
    saved.save_model(log, "mine", trained())
    log.write("summary.json", {})
    return tmp_path / "run"


def test_the_command_exports_a_runs_student(run, to, capsys):
    cli.main(["export", str(run), "--to", to])
    path = run / "export" / f"distilled.{to}"
    said = capsys.readouterr().out
    manifest = runtimes.read_manifest(path)
    found, runtime = manifest["check"], manifest["runtime"]
    assert said.startswith(f"{path}: distilled in {path.stat().st_size:,} bytes; in ")
    accuracy = f"accuracy {100 * found['accuracy']:.2f}%"
    assert f"{runtime} on 797 test examples {accuracy}" in said
    model = trained()
    assert manifest["student"]["fingerprint"] == teachers.fingerprint(model)
    record = json.loads((run / "models" / "teacher.json").read_text())
    taught = {"row": "teacher", "fingerprint": record["fingerprint"]}
    assert manifest["teacher"] == taught
    assert manifest["run"]["row"] == "distilled"
    assert manifest["run"]["config"] == {"data": "digits", "validation": 900}
    assert manifest["classes"] == [str(i) for i in range(10)]
    assert manifest["inputs"]["images"]["dtype"] == "uint8"
    assert manifest["preprocessing"] == {
        "in_artefact": True,
        "formula": "(images / peak - mean) / deviation",
        "peak": 16,
        "mean": DIGITS.mean,
        "deviation": DIGITS.deviation,
    }
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["versions"][runtime]
    again = runtimes.predict(runtimes.load(path), DIGITS.test["images"])
    accuracy = (again.argmax(-1) == DIGITS.test["labels"]).mean()
    assert accuracy == found["accuracy"] > 0.85


def test_what_taught_a_row(run):
    assert export.from_run(run, "distilled").about["teacher"]["row"] == "teacher"
    for row in ("teacher", "mine"):
        assert export.from_run(run, row).about["teacher"] is None
    # Older records do not tell.
    models = run / "models"
    record = json.loads((models / "distilled.json").read_text())
    del record["teacher"]
    for row, taught in [("distilled", True), ("teacher", False), ("scratch_8", False)]:
        (models / f"{row}.json").write_text(json.dumps(record))
        assert (saved.read_teacher(run, row) is not None) == taught
    (models / "teacher.json").write_text("{")
    with pytest.raises(RunError, match=r"models/teacher.json is damaged\Z"):
        export.from_run(run, "distilled")


def test_a_run_that_recorded_another_accuracy(run):
    """As one whose script prepares its images in its own way."""
    summary = {"seeds": {"distilled": [{"accuracy": 0.5}, {"accuracy": 0.9}]}}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="its run recorded 50.0%: the run has another"):
        cli.main(["export", str(run), "--to", "stablehlo"])
    cli.main(["export", str(run), "--to", "stablehlo", "--row", "mine"])
    (run / "summary.json").write_text('{"seeds": 1}')
    with pytest.raises(SystemExit, match=r"error: .*summary.json is damaged\Z"):
        cli.main(["export", str(run), "--to", "stablehlo"])


def test_an_output_in_object_storage(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    said = "error: gs://b/student is no local file: export to one, and copy it"
    with pytest.raises(SystemExit, match=said):
        cli.main(
            ["export", str(run), "--to", "stablehlo", "--output", "gs://b/student"]
        )
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_the_run_is_known_by_its_files(run):
    first = export.from_run(run)
    assert export.from_run(run).about == first.about
    (run / "summary.json").write_text('{"rows": 1}')
    assert export.from_run(run).about["run"]["digest"] != first.about["run"]["digest"]


def test_calibration_is_of_training_images_alone(run):
    """None of the test, and none that the run held out."""
    some = export.from_run(run).calibration
    known = {image.tobytes() for image in some}
    rest, held = data.holdout(DIGITS.train, 900)
    assert known <= {image.tobytes() for image in rest["images"]}
    assert not known & {image.tobytes() for image in held["images"]}
    assert len(some) == 100  # all there are


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--row", "scratch"], "holds no model 'scratch'; it has: distilled, mine"),
        (["--int8", "dynamic"], "StableHLO has no int8 here: export to onnx or tflite"),
        (
            ["--row", "teacher"],
            "MLP does not take the examples, images \\[797, 8, 8\\]: ",
        ),
    ],
)
def test_what_the_command_refuses(run, flags, sentence):
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        cli.main(["export", str(run), "--to", "stablehlo", *flags])
    assert not (run / "export").exists() or not list((run / "export").iterdir())


def test_a_run_that_was_never_trained(tmp_path):
    Run(tmp_path, {"data": "digits"})
    with pytest.raises(SystemExit, match="holds no model 'distilled'; it has: none"):
        cli.main(["export", str(tmp_path), "--to", "stablehlo"])


def test_a_run_in_object_storage_needs_an_output():
    with pytest.raises(
        SystemExit, match="gs://b/run is no local folder: give an --out"
    ):
        cli.main(["export", "gs://b/run", "--to", "stablehlo"])


SENTENCES = ("a fine film", "a dull film , again", "so fine", "again dull", "fine !")


@pytest.fixture
def text_run(tmp_path, monkeypatch):
    """A run on texts as its script leaves it, and the texts: two of each split."""
    library = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    folder = tmp_path / "sst2"
    folder.mkdir()
    rows = "\n".join(f"{line}\t{int('fine' in line)}" for line in SENTENCES)
    turned = "\n".join(f"{int('fine' in line)}\t{line}" for line in SENTENCES)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(f"sentence\tlabel\n{rows}\n")
    (folder / "test_sentences.tsv").write_text(f"label\tcontent\n{turned}\n")
    names = ("train.tsv", "dev.tsv", "test_sentences.tsv")
    monkeypatch.setattr(data.text, "COUNTS", dict.fromkeys(names, len(SENTENCES)))
    log = Run(tmp_path / "run", {"preset": "sst2", "test_length": 9})
    two = models.BertClassifier(models.Encoder(SIZE), 2)
    saved.save_model(log, "transformer", subject(two, texts()).model)
    tokenizer = tokens.train_wordpiece(SENTENCES, SIZE.vocab)
    assert isinstance(tokenizer, library.Tokenizer)
    log.write_bytes("tokenizer.json", tokenizer.to_str().encode())
    return tmp_path / "run"


def command(run, to="stablehlo"):
    flags = ["--row", "transformer", "--data-dir", str(run.parent)]
    cli.main(["export", str(run), "--to", to, *flags])
    return run / "export" / f"transformer.{to}"


def test_a_run_on_texts(text_run, to):
    path = command(text_run, to)
    manifest = runtimes.read_manifest(path)
    assert manifest["classes"] == ["negative", "positive"]
    assert [*manifest["inputs"]] == ["input_ids", "attention_mask"]
    assert manifest["inputs"]["input_ids"]["shape"][1:] == [9]
    said = manifest["preprocessing"]
    assert (said["in_artefact"], said["tokenizer"]) == (False, "tokenizer.json")
    content = (text_run / said["tokenizer"]).read_bytes()
    assert said["sha256"] == hashlib.sha256(content).hexdigest()
    # What the manifest says is enough to ask about a text of one's own.
    arrays = tokens.encode(tokens.load_tokenizer(text_run), ["so dull"], said["length"])
    given = {name: arrays[name] for name in manifest["inputs"]}
    model = saved.load_model(text_run, "transformer")
    expected = model({"inputs": arrays, "mask": np.ones(1)}).logits
    found = runtimes.load(path)(given)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_run_on_texts_without_its_tokenizer(text_run):
    (text_run / "tokenizer.json").unlink()
    said = "tokenizer.json, which turns texts into tokens, is missing; give the run's"
    with pytest.raises(SystemExit, match=said):
        command(text_run)


def test_a_run_on_texts_of_no_length(text_run):
    (text_run / "config.json").write_text(json.dumps({"preset": "sst2"}))
    with pytest.raises(SystemExit, match="config.json has no test_length, to which te"):
        command(text_run)


def test_a_smoke_run_on_texts(text_run):
    config = {"preset": "sst2", "test_length": 9, "smoke": True}
    (text_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="is of a smoke run, whose phrases are no dat"):
        command(text_run)
