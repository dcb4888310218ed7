# SPDX-License-Identifier: Apache-2.0
"""What an export leaves: a file that was checked, or nothing, and no other's gone."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import export, runtimes
from jaxdistill.export import ExportError, check
from jaxdistill.export.subject import logits_of
from jaxdistill.runtimes import ArtefactError
from tests.export.exporting import PACKAGES, TEST, digits, needs


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
    real = check.run_fresh
    monkeypatch.setattr(check, "run_fresh", lambda *files: change(real(*files)))
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
    manifest = runtimes.read_manifest(path)
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
