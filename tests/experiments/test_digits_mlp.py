# SPDX-License-Identifier: Apache-2.0
"""The experiment as a user runs it: run directory, resume, messages, recipes."""

import ast
import inspect
import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from etils import epath
from flax import serialization

from experiments import digits_mlp
from jaxdistill import data, train
from jaxdistill.data import images
from jaxdistill.teachers import fingerprints
from jaxdistill.train import loop, parse, saved
from jaxdistill.train.run_dir import read_records, read_summary
from tests.builders import largest_difference

pytestmark = pytest.mark.usefixtures("any_teacher")

ARMS = ["teacher", "scratch", "distilled"]
STEPS = 4 * 15  # epochs times batches of 48 in 700 images
# No dropout: its draws differ under pmap. 48 divides over the 8 virtual devices.
TINY = ["--epochs", "4", "--evaluations", "2", "--batch-size", "48"]
TINY += ["--teacher-dropout", "0", "--no-progress"]


def settings(argv: list[str]):
    return parse(digits_mlp.PRESETS, argv, None)


def test_a_buckets_address_stays_one():
    assert settings(["--data-dir", "gs://bucket/tfds"]).data_dir == "gs://bucket/tfds"


def run(directory, *flags: str, parallel: str = "jit", seeds: int = 1) -> dict:
    rest = ["--run-dir", str(directory), "--parallel", parallel, "--seeds", str(seeds)]
    return digits_mlp.main([*TINY, *rest, *flags])


def model(directory: Path, name: str):
    path = directory / "models" / f"{name}.msgpack"
    return serialization.msgpack_restore(path.read_bytes())


def records(directory: Path) -> list[dict]:
    return read_records(epath.Path(directory / "metrics.jsonl"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds: its directory and summary."""
    directory = tmp_path_factory.mktemp("digits") / "run"
    return directory, run(directory, seeds=2)


@pytest.mark.slow
def test_stored_outputs_teach_the_same_to_the_bit(finished, tmp_path, capsys):
    _, live = finished
    summary = run(tmp_path / "run", "--stored", seeds=2)
    assert summary["digests"] == live["digests"]
    stores = list((tmp_path / "run" / "outputs").iterdir())
    assert len(stores) == 2  # a teacher a seed
    assert all((store / "manifest.json").exists() for store in stores)


class TestRunDirectory:
    def test_summary_has_every_row_and_pair(self, finished):
        directory, summary = finished
        assert read_summary(directory) == summary
        assert list(summary["arms"]) == ARMS
        assert set(summary["digests"]) == {f"{arm}-{i}" for arm in ARMS for i in (0, 1)}
        assert list(summary["paired"]["distilled"]) == ["scratch"]
        for arm in summary["arms"].values():
            assert arm["accuracy"]["n"] == 2
            assert 0 < arm["accuracy"]["mean"] < 1
            assert len(arm["class_error"]) == 10
        assert summary["arms"]["teacher"]["agreement"]["mean"] == 1

    def test_summary_states_the_sizes(self, finished):
        arms = finished[1]["arms"]
        assert arms["teacher"]["cost"]["parameters"] == 65 * 256 + 257 * 128 + 129 * 10
        assert arms["scratch"]["cost"]["parameters"] == 65 * 8 + 9 * 10
        assert arms["distilled"]["cost"]["parameters"] == 65 * 8 + 9 * 10

    def test_config_has_every_setting_that_changes_the_result(self, finished):
        config = json.loads((finished[0] / "config.json").read_text())
        names = {field.name for field in fields(digits_mlp.Config)}
        free = {"run_dir", "data_dir", "parallel", "distributed", "stored"}
        free |= {"compilation_cache", "progress"}
        assert names - set(config) == free
        assert (config["epochs"], config["batch_size"]) == (4, 48)

    def test_environment(self, finished):
        env = json.loads((finished[0] / "env.json").read_text())
        assert env["versions"]["jax"] == jax.__version__
        assert env["devices"]["count"] == 8
        assert env["matmul_precision"] == "default"

    def test_log_has_a_record_for_every_evaluation(self, finished):
        for fit in finished[1]["digests"]:
            mine = [r for r in records(finished[0]) if r["fit"] == fit]
            assert [r["step"] for r in mine] == [STEPS // 2, STEPS]
            assert all(r["loss"] > 0 and 0 < r["accuracy"] < 1 for r in mine)
        assert [r["epoch"] for r in mine] == [2, 4]  # distilled, of all 700 images

    def test_checkpoints_of_every_training(self, finished):
        for fit in finished[1]["digests"]:
            steps = {p.name for p in (finished[0] / "checkpoints" / fit).iterdir()}
            assert {str(STEPS // 2), str(STEPS)} <= steps

    @pytest.mark.parametrize("name", ARMS)
    def test_saved_weights_are_the_ones_tested(self, finished, name):
        directory, summary = finished
        digest = fingerprints.of_tree(model(directory, name))
        assert digest == summary["digests"][f"{name}-0"]

    def test_figures_and_table(self, finished, capsys):
        directory, summary = finished
        table = (directory / "table.md").read_text()
        for arm in ARMS:
            mean = 100 * summary["arms"][arm]["accuracy"]["mean"]
            assert f"| {arm} | {mean:.2f} ± " in table
        assert "distilled minus scratch: " in table
        for name in ("curves.png", "comparison.png"):
            assert (directory / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_command_again_retrains_nothing(finished, monkeypatch, capsys):
    directory, summary = finished
    run_dir = (directory / "metrics.jsonl").read_bytes()

    def never(*_):
        raise AssertionError("a finished training was trained again")

    monkeypatch.setattr(loop, "dispatches", never)
    again = run(directory, seeds=2)
    assert again["digests"] == summary["digests"]
    assert again["seeds"] == summary["seeds"]
    assert (directory / "metrics.jsonl").read_bytes() == run_dir
    assert (directory / "table.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
def test_seeds_together_train_as_one_after_another(finished, tmp_path, capsys):
    """Weights, labels, teachers and batches are each seed's own, in one program."""
    directory, one_by_one = finished
    summary = run(tmp_path / "run", "--stored", parallel="seeds", seeds=2)
    for name in ARMS:
        found, expected = (model(d, name) for d in (tmp_path / "run", directory))
        assert largest_difference(found, expected) < 1e-3
        for mine, theirs in zip(
            summary["seeds"][name], one_by_one["seeds"][name], strict=True
        ):
            assert mine["nll"] == pytest.approx(theirs["nll"], rel=1e-3)
    mine, theirs = (
        {(r["fit"], r["step"]): r["loss"] for r in records(d)}
        for d in (tmp_path / "run", directory)
    )
    assert mine == pytest.approx(theirs, rel=1e-3)
    again = run(tmp_path / "run", "--stored", parallel="seeds", seeds=2)
    assert again["digests"] == summary["digests"]
    with pytest.raises(SystemExit, match=r"begun with --parallel seeds; give that"):
        run(tmp_path / "run", parallel="jit", seeds=2)


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
@pytest.mark.slow
def test_eight_devices_train_the_same_networks(finished, kind, tmp_path):
    run(tmp_path / "run", parallel=kind)
    for name in ARMS:
        one, many = model(finished[0], name), model(tmp_path / "run", name)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4)
    source = saved.read_teacher(tmp_path / "run", "distilled")
    teacher = train.load_model(tmp_path / "run", "teacher")
    fingerprint = fingerprints.of_model(teacher)
    assert source == {"arm": "teacher", "fingerprint": fingerprint}


JIT, MESH = ["--parallel", "jit"], ["--parallel", "mesh"]
SENTENCES = {
    "--temperature 0": "temperature must be above 0, got 0.0",
    "--hard-weight -1": "the weight of 'hard' must be 0 or more, got -1.0",
    "--hard-weight 0 --soft-weight 0": "an objective needs a term with a weight above "
    "0, got {'hard': 0.0, 'soft': 0.0}",
    "--batch-size 701": "a batch of 701 cannot be drawn from 700 examples",
    "--batch-size 101": "a batch of 101 cannot be drawn from 100 examples",
    "--labels 20": "a batch of 48 cannot be drawn from 20 examples",
    "--parallel mesh --batch-size 50": "a batch of 50 does not divide over 8 devices; "
    "take a multiple of 8, or --parallel jit",
    "--micro-batches 5": "a batch of 48 does not divide into 5 micro-batches",
    "--validation 1000": "cannot hold out 1000 of 1000 examples: one split would be "
    "empty",
    "--data mnist --data-dir /no/such/folder": "data folder /no/such/folder does not "
    "exist or is not a folder",
    "--epochs 0": "--epochs must be at least 1, got 0",
    "--seeds 0": "--seeds must be at least 1, got 0",
    "--evaluations 0": "--evaluations must be at least 1, got 0",
    "--micro-batches 0": "--micro-batches must be at least 1, got 0",
    "--labels -3": "--labels must be at least 1, got -3",
    "--validation -1": "--validation must be 0 or more, got -1",
    "--student 8 0": "--student must be at least 1, got 0",
    "--learning-rate -1": "--learning-rate must be above 0, got -1.0",
    "--learning-rate nan": "--learning-rate must be a finite number, got nan",
    "--temperature inf": "--temperature must be a finite number, got inf",
    "--clip-norm 0": "--clip-norm must be above 0, got 0.0",
    "--weight-decay -1": "--weight-decay must be 0 or more, got -1.0",
    "--teacher-dropout 1": "--teacher-dropout must be 0 or more and below 1, got 1.0",
}


@pytest.mark.parametrize("flags", SENTENCES)
def test_bad_settings_end_in_one_sentence(flags, tmp_path):
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *flags.split())
    assert end.value.code == f"error: {SENTENCES[flags]}"
    assert not records(tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "cifar"], ["'cifar'", "'digits', 'mnist', 'fashion_mnist'"]),
        (["--preset", "paper"], ["'paper'", "'digits', 'article'"]),
        (["--frobnicate", "1"], ["Unrecognized options: --frobnicate"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
    ],
)
def test_unknown_words_are_named(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *flags)
    assert end.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in words:
        assert word in said


def test_the_corrected_command_may_use_the_same_directory(tmp_path):
    """A refused setting leaves nothing behind that the next command trips over."""
    with pytest.raises(SystemExit, match="does not divide over 8 devices"):
        run(tmp_path / "run", "--batch-size", "50", parallel="mesh")
    with pytest.raises(SystemExit, match="micro-batches"):
        run(tmp_path / "run", "--batch-size", "40", "--micro-batches", "3")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["batch_size"] == 40


def test_a_run_directory_of_another_configuration(finished):
    with pytest.raises(SystemExit) as end:
        run(finished[0], "--temperature", "3", "--clip-norm", "1", seeds=2)
    assert end.value.code == (
        f"error: run directory {finished[0]} holds another run: clip_norm was None, is "
        "now 1.0; temperature was 2.0, is now 3.0; give another --run-dir, or the "
        "first command again to resume it"
    )


def test_a_run_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "file" / "run")
    begin = f"error: cannot write to run directory {tmp_path / 'file' / 'run'}: "
    assert end.value.code.startswith(begin)


def test_a_diverging_training_names_the_step_and_keeps_what_was_good(tmp_path):
    flags = ["--learning-rate", "1e30", "--epochs", "1", "--evaluations", "15"]
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", *flags)
    assert end.value.code == (
        "error: teacher-0: the loss is nan at step 2; stopped, the last good "
        "checkpoint is kept (a lower learning rate or clipping may help; a label that "
        "is no class gives nan)"
    )
    assert (tmp_path / "run" / "checkpoints" / "teacher-0" / "1").is_dir()
    assert [record["step"] for record in records(tmp_path / "run")] == [1]


def test_labels_beyond_the_model_stop_before_training(tmp_path, monkeypatch):
    digits = data.load("digits")
    labels = digits.train["labels"].copy()
    labels[labels == 9] = 10
    mine = digits._replace(train={**digits.train, "labels": labels}, num_classes=11)
    monkeypatch.setattr(data, "load", lambda *_: mine)
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "run", "--labels", "700")
    assert "error: label 10 at position " in end.value.code
    assert "is out of range: with 10 classes, labels are 0 to 9" in end.value.code
    assert not records(tmp_path / "run")


class TestArticlePreset:
    config = settings(["--preset", "article"])

    def test_is_the_recipe_to_the_letter(self):
        recipe = {
            "data": "mnist",
            "teacher": (512, 256),
            "student": (128, 64),
            "batch_size": 64,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "weight_decay": 0.0,
            "clip_norm": None,
            "epochs": 10,
            "temperature": 2.0,
            "hard_weight": 0.7,
            "soft_weight": 0.3,
            "teacher_dropout": 0.0,
            "labels": None,
            "validation": 0,
            "micro_batches": 1,
        }
        assert {name: asdict(self.config)[name] for name in recipe} == recipe
        assert images._PIXELS["mnist"] == (0.1307, 0.3081)

    def test_arms(self):
        arms = digits_mlp.arms(self.config, steps=10)
        assert list(arms) == [*ARMS, "label_smoothing", "untrained_teacher"]
        assert arms["teacher"].module.features == (512, 256, 10)
        for name in arms:
            if name != "teacher":
                assert arms[name].module.features == (128, 64, 10)
        both = (
            "combine({'hard': (0.7, hard_labels()), "
            "'soft': (0.3, soft_targets(temperature=2.0))})"
        )
        assert repr(arms["distilled"].objective) == both
        assert repr(arms["untrained_teacher"].objective) == both
        assert repr(arms["scratch"].objective) == (
            "combine({'hard': (1.0, hard_labels())})"
        )

    def test_the_optimizer_is_adam_at_a_constant_rate(self):
        """With a constant gradient every step of Adam is the rate itself."""
        optimizer = digits_mlp.make_optimizer(self.config, steps=10)
        params = {"w": np.zeros(2, np.float32)}
        grads = {"w": np.array([1.0, -100.0], np.float32)}
        state = optimizer.init(params)
        for _ in range(12):
            updates, state = optimizer.update(grads, state, params)
            np.testing.assert_allclose(updates["w"], [-1e-3, 1e-3], rtol=1e-4)

    def test_flags_override_the_preset(self):
        config = settings(["--epochs", "3", "--preset", "article"])
        assert (config.epochs, config.batch_size) == (3, 64)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], [1e-3, 0.5e-3]),  # half a cosine at half of the steps
        (["--schedule", "constant"], [1e-3, 1e-3]),
    ],
)
def test_schedule(flags, expected):
    optimizer = digits_mlp.make_optimizer(settings(flags), steps=10)
    params, seen = {"w": np.zeros(1, np.float32)}, []
    state = optimizer.init(params)
    for _ in range(6):
        updates, state = optimizer.update({"w": np.ones(1, np.float32)}, state, params)
        seen.append(-float(updates["w"][0]))
    np.testing.assert_allclose([seen[0], seen[5]], expected, rtol=1e-4)


def test_decay_and_clipping_are_used():
    """Decay pulls towards zero without a gradient; moments see the clipped gradient."""
    config = settings(["--weight-decay", "0.1", "--schedule", "constant"])
    optimizer = digits_mlp.make_optimizer(config, steps=10)
    params = {"w": np.full(1, 2.0, np.float32)}
    zero = {"w": np.zeros(1, np.float32)}
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-1e-3 * 0.1 * 2], rtol=1e-5)
    config = settings(["--clip-norm", "0.5"])
    chain = digits_mlp.make_optimizer(config, steps=10)
    state = chain.update(
        {"w": np.full(1, 30.0, np.float32)}, chain.init(params), params
    )[1]
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["w"], [0.1 * 0.5], rtol=1e-5)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        digits_mlp.main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    helps = {}
    for kind in digits_mlp.Config.__mro__[:-1]:  # the last is `object`
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words = ast.literal_eval(text.value).split()
                helps.setdefault(field.target.id, " ".join(words))
    assert set(helps) == {field.name for field in fields(digits_mlp.Config)}
    for name, text in helps.items():
        assert re.search(rf"--{name.replace('_', '-')}\b.*{re.escape(text)}", said)
