# SPDX-License-Identifier: Apache-2.0
"""The `jaxdistill` command on a finished run and on pages."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxdistill import cli, data, models, report, teachers, train
from jaxdistill.teachers import fingerprints
from jaxdistill.train import RunDir, RunError, saved
from tests.builders import NormNet
from tests.experiments.test_digits_mlp import run as train_digits
from tests.report.test_report import summary

pytestmark = pytest.mark.usefixtures("any_teacher")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with one result, and a README that is not up to date."""
    result = tmp_path / "experiments" / "results" / "tiny"
    result.mkdir(parents=True)
    (result / "summary.json").write_text(json.dumps(summary()))
    record = {"fit": "teacher-0", "step": 1, "loss": 1.0, "accuracy": 0.5}
    (result / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (result / "table.md").write_text("| tiny |\n")
    (tmp_path / "README.md").write_text("<!-- table: tiny/table -->\n<!-- end -->\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RESULT = "experiments/results/tiny"


def test_report_prints_the_table_and_rebuilds_the_figures(folder, capsys):
    cli.main(["report", RESULT])
    table = report.table(summary())
    assert capsys.readouterr().out == f"{table}\n"
    assert (folder / RESULT / "table.md").read_text() == table
    assert (folder / RESULT / "curves.png").is_file()


def test_report_saves_a_run(folder):
    cli.main(["report", RESULT, "--save", "kept/run"])
    saved = {p.name for p in (folder / "kept" / "run").iterdir()}
    assert saved == {p.name for p in (folder / RESULT).iterdir()}


def test_report_of_something_else(folder):
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "nowhere"])
    assert end.value.code.startswith("error: ")
    assert "nowhere/summary.json" in end.value.code


def test_report_of_what_only_its_script_can_report(folder, capsys):
    (folder / RESULT / "summary.json").write_text('{"loops": {}, "cold": {}}')
    for table in (folder / RESULT).glob("*.md"):
        table.unlink()
    with pytest.raises(SystemExit, match=f"error: {RESULT} has no table, .* loops, co"):
        cli.main(["report", RESULT])
    (folder / RESULT / "loops.md").write_text("its own table\n")
    cli.main(["report", RESULT])
    assert "its own table" in capsys.readouterr().out


def test_pages(folder, capsys):
    page = folder / "README.md"
    old = page.read_text()
    with pytest.raises(SystemExit) as end:
        cli.main(["pages", "--check"])
    expected = "error: run `jaxdistill pages`: README.md not up to date"
    assert end.value.code == expected
    assert page.read_text() == old

    cli.main(["pages"])
    assert "| tiny |" in page.read_text()
    cli.main(["pages", "--check"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["rebuilt: README.md", "all pages are up to date"]

    (folder / RESULT / "table.md").write_text("| changed |\n")
    with pytest.raises(SystemExit, match="README.md not up to date"):
        cli.main(["pages", "--check"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other.md"], "error: .*other.md"),
        (
            ["--results", "empty"],
            "error: README.md asks for empty/tiny/table.md, which",
        ),
    ],
)
def test_pages_that_cannot_be_made(folder, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        cli.main(["pages", *arguments])


@pytest.mark.parametrize("arguments", [[], ["serve"]])
def test_unknown_commands_list_the_known(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "report" in said
    assert "pages" in said


DIGITS = data.load("digits")
HELD = 900
TEACHER, OTHER = models.MLP((8, 10), dropout=0.5), models.MLP((4, 10))


def random_model(module, width: int = 64):
    variables = module.init(jax.random.key(0), np.zeros((1, width), np.float32))
    return teachers.live(module, variables)


@pytest.fixture
def finished(tmp_path):
    """What is there of a run of a teacher and another network on the digits."""
    config = {"data": "digits", "validation": HELD, "batch_size": 32}
    run_dir = RunDir(tmp_path / "run", config)
    train.save_model(run_dir, "teacher", random_model(TEACHER))
    train.save_model(run_dir, "other", random_model(OTHER))
    train.save_model(run_dir, "foreign", random_model(NormNet()))
    return tmp_path / "run"


def store(folder, to, *flags):
    cli.main(["store", str(folder), "--to", str(to), "--no-progress", *flags])


def test_a_runs_teacher_is_stored_and_read_back(finished, tmp_path, capsys):
    store(finished, tmp_path / "s", "--verify")
    assert capsys.readouterr().out.startswith(
        f"{tmp_path / 's'}: teacher's outputs on 100 images (digits, train, 900 held "
        "out); recomputed examples differ by 0 of the largest, accuracy "
    )
    teacher, examples, manifest = saved.load_store_source(finished)
    assert teacher.module == TEACHER
    images = DIGITS.inputs(data.holdout(DIGITS.train, HELD)[0])
    np.testing.assert_array_equal(examples["inputs"], images["inputs"])
    assert (manifest.batch_size, manifest.devices, manifest.compute) == (32, 1, None)
    found = teachers.store.read(tmp_path / "s", manifest)["logits"][:, 0]
    expected = teacher({**images, "mask": np.ones(100)}).logits
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_options_reach_the_store(finished, tmp_path):
    flags = ["--arm", "other", "--split", "test", "--top-k", "3", "--dtype", "float16"]
    store(finished, tmp_path / "s", *flags, "--batch-size", "100")
    manifest = saved.load_store_source(
        finished, "other", split="test", top_k=3, dtype="float16", batch_size=100
    ).manifest
    arrays = teachers.store.read(tmp_path / "s", manifest)
    assert arrays["log_probs"].dtype == np.float16
    assert arrays["ids"].shape == (data.images.DIGITS_TEST, 1, 3)


def test_a_bfloat16_runs_outputs_are_computed_in_it(finished):
    config = {"data": "digits", "batch_size": 32, "micro_batches": 2}
    config |= {"precision": "bfloat16"}
    (finished / "config.json").write_text(json.dumps(config))
    manifest = saved.load_store_source(finished).manifest
    assert (manifest.batch_size, manifest.compute) == (16, "bfloat16")
    assert manifest.split == "train"


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def without_checksum(content: bytes) -> bytes:
    """A file as written by version 0.2, or by hand."""
    value = json.loads(content)
    del value["checksum"]
    return json.dumps(value).encode()


def change(name, old, new):
    def damage(folder):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(without_checksum(content.replace(old, new)))

    return damage


def lose_data(folder):
    (folder / "config.json").write_text("{}")


RECORD, WEIGHTS = "models/teacher.json", "models/teacher.msgpack"


@pytest.mark.parametrize(
    ("damage", "flags", "sentence"),
    [
        (None, ["--arm", "tutor"], "holds no model 'tutor'; it has: foreign, other, "),
        (None, ["--arm", "foreign"], "builders.NormNet is no module of jaxdistill"),
        (None, ["--top-k", "11"], "top_k must lie between 1 and the 10 classes"),
        (None, ["--batch-size", "0"], "batch_size of a store must be at least 1"),
        (remove(WEIGHTS), [], "holds no model 'teacher'; it has: foreign, other$"),
        (remove(RECORD), [], "which tells the module, is missing; give the run's"),
        (remove("config.json"), [], "config.json names no data set"),
        (lose_data, [], r"config.json names no data set \(KeyError\('data'\)\)"),
        (cut(RECORD), [], "teacher.msgpack or teacher.json is damaged: "),
        (cut(WEIGHTS), [], "teacher.msgpack or teacher.json is damaged: "),
        (change(RECORD, b"0.5", b"0.4"), [], "is damaged: it was changed"),
        (change(RECORD, b'"dropout"', b'"droqout"'), [], "is damaged: .*droqout"),
        (change("config.json", b"digits", b"digit"), [], "unknown data set 'digit'"),
    ],
)
def test_what_cannot_be_stored_is_said(finished, tmp_path, damage, flags, sentence):
    if damage:
        damage(finished)
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        store(finished, tmp_path / "s", *flags)
    assert not (tmp_path / "s").exists()


def test_a_flipped_bit_of_the_weights_is_found(finished):
    content = (finished / WEIGHTS).read_bytes()
    for at in np.random.default_rng(0).choice(len(content), 40, replace=False):
        changed = bytearray(content)
        changed[at] ^= 4
        (finished / WEIGHTS).write_bytes(changed)
        with pytest.raises(RunError, match="is damaged"):
            train.load_model(finished, "teacher")


def test_images_that_the_model_does_not_take(finished, tmp_path):
    train.save_model(RunDir(finished, {}), "teacher", random_model(TEACHER, 9))
    (finished / "config.json").write_text(json.dumps({"data": "digits"}))
    with pytest.raises(SystemExit, match="'teacher' of .* not take the images of dig"):
        store(finished, tmp_path / "s")


def test_a_store_of_other_outputs_is_refused(finished, tmp_path):
    store(finished, tmp_path / "s")
    with pytest.raises(SystemExit, match="holds outputs of another teacher: "):
        store(finished, tmp_path / "s", "--arm", "other")
    with pytest.raises(SystemExit, match="holds outputs of another split: "):
        store(finished, tmp_path / "s", "--split", "test")


def test_verify_finds_outputs_of_another_model(finished, tmp_path):
    source = saved.load_store_source(finished)
    noisy = jax.tree.map(lambda x: x + 0.1, source.teacher)
    teachers.store.write(tmp_path / "s", noisy, *source[1:], progress=False)
    with pytest.raises(SystemExit, match="differs from what teacher says by "):
        store(finished, tmp_path / "s", "--verify")


MODULES = [
    models.MLP((4, 3), input_dropout=0.25),
    models.ConvNet((2, 3), 4, norm="group"),
    models.resnet_cifar(8, norm="group"),
    models.ViT(3, 8, 1, 2, patch=2, distillation_token=True),
    models.Peers((models.MLP((4, 3)), models.MLP((5, 3)))),
    models.BertClassifier(
        models.Encoder(models.TransformerConfig(9, 4, 1, 2)), 3, pool="relu"
    ),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_a_module_is_made_again_from_its_record(module, tmp_path):
    model = teachers.live(module, {"params": {"w": np.ones(2, np.float32)}})
    train.save_model(RunDir(tmp_path, {}), "arm", model)
    found = train.load_model(tmp_path, "arm")
    assert found.module == module
    assert hash(found.module) == hash(module)
    np.testing.assert_array_equal(found.variables["params"]["w"], [1, 1])


def test_a_record_of_the_first_version_is_read(tmp_path):
    module = MODULES[-1]
    model = teachers.live(module, {"params": {"w": np.ones(2, np.float32)}})
    train.save_model(RunDir(tmp_path, {}), "arm", model, ("teacher", model))
    record = tmp_path / "models" / "arm.json"
    older = record.read_text().replace("TransformerConfig", "Size")
    older = older.replace('"arm": "teacher"', '"row": "teacher"')
    record.write_bytes(without_checksum(older.encode()))
    assert train.load_model(tmp_path, "arm").module == module
    assert saved.read_teacher(tmp_path, "arm")["arm"] == "teacher"


@pytest.mark.slow
def test_a_script_leaves_what_the_command_needs(tmp_path):
    result = train_digits(tmp_path / "run", "--epochs", "1", "--evaluations", "1")
    store(tmp_path / "run", tmp_path / "s", "--verify")
    source = saved.load_store_source(tmp_path / "run")
    digest = fingerprints.of_tree(source.teacher.variables)
    assert digest == result["digests"]["teacher-0"]
    again = replace(source.manifest, content="0")
    with pytest.raises(teachers.store.StoreError, match="another content"):
        teachers.store.read(tmp_path / "s", again)
    teachers.store.read(tmp_path / "s", source.manifest)
