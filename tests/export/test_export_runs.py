# SPDX-License-Identifier: Apache-2.0
"""The export of a finished run, of images or of texts, by its command."""

import hashlib
import json

import jax
import numpy as np
import pytest

from jaxdistill import cli, data, export, models, pretrained, runtimes, teachers, train
from jaxdistill.parallel.sealed import unseal
from jaxdistill.teachers import fingerprints
from jaxdistill.train import RunDir, RunError, saved
from tests.export.exporting import DIGITS, SIZE, needs, subject, texts, trained


@pytest.fixture(params=["stablehlo", "onnx", "tflite"])
def to(request):
    """Each format whose packages are installed."""
    needs(request.param)
    return request.param


def test_nothing_else_is_said(run, to, capfd):
    """TensorFlow, jax2onnx and the runtimes log as they go."""
    cli.main(["export", str(run), "--to", to])
    said, noise = capfd.readouterr()
    assert len(said.splitlines()) == 1
    assert noise == ""


@pytest.fixture
def run(tmp_path):
    """What the command needs of a finished run on the digits."""
    run_dir = RunDir(tmp_path / "run", {"data": "digits", "validation": 900})
    teacher = teachers.live(models.MLP((3,)), {"params": {}})
    train.save_model(run_dir, "distilled", trained(), ("teacher", teacher))
    train.save_model(run_dir, "teacher", teacher)
    train.save_model(run_dir, "mine", trained())
    run_dir.write("summary.json", {})
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
    assert manifest["student"]["fingerprint"] == fingerprints.of_model(model)
    record = json.loads((run / "models" / "teacher.json").read_text())
    source = {"arm": "teacher", "fingerprint": record["fingerprint"]}
    assert manifest["teacher"] == source
    assert manifest["run"]["arm"] == "distilled"
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


def test_what_taught_a_arm(run):
    assert export.from_run(run, "distilled").about["teacher"]["arm"] == "teacher"
    for arm in ("teacher", "mine"):
        assert export.from_run(run, arm).about["teacher"] is None
    # Older records do not tell.
    models = run / "models"
    record = unseal((models / "distilled.json").read_bytes())
    del record["teacher"]
    for arm, source in [("distilled", True), ("teacher", False), ("scratch_8", False)]:
        (models / f"{arm}.json").write_text(json.dumps(record))
        assert (saved.read_teacher(run, arm) is not None) == source
    (models / "teacher.json").write_text("{")
    with pytest.raises(RunError, match=r"models/teacher.json is damaged\Z"):
        export.from_run(run, "distilled")


def test_a_run_that_recorded_another_accuracy(run):
    """As one whose script prepares its images in its own way."""
    summary = {"seeds": {"distilled": [{"accuracy": 0.5}, {"accuracy": 0.9}]}}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="its run recorded 50.0%: the run has another"):
        cli.main(["export", str(run), "--to", "stablehlo"])
    cli.main(["export", str(run), "--to", "stablehlo", "--arm", "mine"])
    (run / "summary.json").write_text('{"seeds": 1}')
    with pytest.raises(SystemExit, match=r"error: .*summary.json is damaged\Z"):
        cli.main(["export", str(run), "--to", "stablehlo"])


def test_an_output_in_object_storage(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    said = "error: gs://b/student is no local file: export to one, and copy it"
    with pytest.raises(SystemExit, match=said):
        cli.main(
            [
                "export",
                str(run),
                "--to",
                "stablehlo",
                "--output",
                "gs://b/student",
            ]
        )
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_the_run_is_known_by_its_files(run):
    first = export.from_run(run)
    assert export.from_run(run).about == first.about
    (run / "summary.json").write_text('{"arms": 1}')
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
        (["--arm", "scratch"], "holds no model 'scratch'; it has: distilled, mine"),
        (["--int8", "dynamic"], "StableHLO has no int8 here: export to onnx or tflite"),
        (
            ["--arm", "teacher"],
            "MLP does not take the examples, images \\[797, 8, 8\\]: ",
        ),
    ],
)
def test_what_the_command_refuses(run, flags, sentence):
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        cli.main(["export", str(run), "--to", "stablehlo", *flags])
    assert not (run / "export").exists() or not list((run / "export").iterdir())


def test_a_run_that_was_never_trained(tmp_path):
    RunDir(tmp_path, {"data": "digits"})
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
    arms = "\n".join(f"{line}\t{int('fine' in line)}" for line in SENTENCES)
    turned = "\n".join(f"{int('fine' in line)}\t{line}" for line in SENTENCES)
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(f"sentence\tlabel\n{arms}\n")
    (folder / "test_sentences.tsv").write_text(f"label\tcontent\n{turned}\n")
    names = ("train.tsv", "dev.tsv", "test_sentences.tsv")
    monkeypatch.setattr(data.texts, "COUNTS", dict.fromkeys(names, len(SENTENCES)))
    run_dir = RunDir(tmp_path / "run", {"preset": "sst2", "test_length": 9})
    two = models.BertClassifier(models.Encoder(SIZE), 2)
    train.save_model(run_dir, "transformer", subject(two, texts()).model)
    tokenizer = pretrained.train_wordpiece(SENTENCES, SIZE.vocab)
    assert isinstance(tokenizer, library.Tokenizer)
    run_dir.write_bytes("tokenizer.json", tokenizer.to_str().encode())
    return tmp_path / "run"


def command(run, to="stablehlo"):
    flags = ["--arm", "transformer", "--data-dir", str(run.parent)]
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
    arrays = pretrained.encode(
        pretrained.load_tokenizer(text_run), ["so dull"], said["length"]
    )
    given = {name: arrays[name] for name in manifest["inputs"]}
    model = train.load_model(text_run, "transformer")
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
