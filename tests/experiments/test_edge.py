# SPDX-License-Identifier: Apache-2.0
"""The edge experiment on the shipped digits: its arms, its files, its resume."""

import json

import pytest
from etils import epath

from experiments.edge import students as edge
from jaxdistill import export, runtimes, train
from jaxdistill.export import benchmark as deployment
from jaxdistill.teachers import fingerprints
from jaxdistill.train.run_dir import read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'VariableState' was removed"),  # qwix's
]
METRICS, HARD = "metrics.jsonl", {"hard": 1.0}
ARGUMENTS = ["--preset", "digits", "--smoke", "--no-progress", "--no-compilation-cache"]


@pytest.fixture(scope="module")
def measured():
    """`[(file, latency)]`, as the files were measured."""
    return []


@pytest.fixture(scope="module")
def run(tmp_path_factory, measured):
    for package in ("jax2onnx", "onnxruntime", "qwix"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folder = tmp_path_factory.mktemp("edge")
    measure = deployment.measure

    def note(path, inputs, **options):
        found = measure(path, inputs, repeats=20, **options)
        measured.append((path.stem, found["latency_us"]["p50"]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment, "measure", note)
        patch.setattr(edge, "ROUNDS", 3)
        return folder, edge.main([*ARGUMENTS, "--run-dir", str(folder)])


def test_every_row_is_a_file_that_answered_the_test(run):
    folder, summary = run
    kinds = [
        f"{kind}_{width}" for width in (16, 8) for kind in ("scratch", "distilled")
    ]
    floats = ["teacher", *kinds]
    eight = [f"{name}_int8" for name in floats]
    aware = ["scratch_8_aware", "distilled_8_aware"]
    assert {*summary["arms"]} == {*floats, *eight, *aware}
    for name, arm in summary["arms"].items():
        manifest = runtimes.read_manifest(folder / "export" / f"{name}-0.onnx")
        assert manifest["int8"] == (None if name in floats else "static")
        assert summary["seeds"][name][0]["accuracy"] == manifest["check"]["accuracy"]
        assert arm["cost"]["bytes"] == manifest["bytes"]
        assert arm["accuracy"]["n"] == 2


def test_settings_are_chosen_on_images_that_no_trial_has_seen(run):
    folder, _ = run
    kept = json.loads((folder / "chosen.json").read_text())
    names = [
        f"{kind}_{width}" for width in (16, 8) for kind in ("scratch", "distilled")
    ]
    assert list(kept["chosen"]) == list(kept["tried"]) == names
    for name, tried in kept["tried"].items():
        best = max(each["accuracy"] for each in tried)
        assert kept["chosen"][name] in tried
        assert kept["chosen"][name]["accuracy"] == best
        assert all(round(300 * s["accuracy"], 3) % 1 == 0 for s in tried)  # held out
        settings = {
            (s["temperature"], s["hard_weight"], s["learning_rate"]) for s in tried
        }
        warm = [(1.0, 1.0)] if "scratch" in name else [(1.0, 0.1), (4.0, 0.1)]
        assert settings == {(*each, rate) for each in warm for rate in (1e-3, 3e-3)}
    ends = {r["fit"]: r["epoch"] for r in read_records(epath.Path(folder / METRICS))}
    assert ends["teacher-0"] == ends["scratch_8-0"] == 2  # of 8 batches
    for fit in ("choice_teacher-1000", "choose_16", "choose_8"):
        assert ends[fit] == pytest.approx(16 / 6)  # of the 6 of 700 images
    text = (folder / "chosen.md").read_text()
    assert text.count("| distilled ") == text.count("| scratch ") == 2
    assert "300 training images" in text
    assert "2 from scratch, 4 with the teacher" in text


def test_every_row_takes_what_was_chosen(tmp_path):
    """In eight bits what was for the float arm of its kind."""
    pytest.importorskip("qwix", reason="qwix is not installed")
    named = [(k, w) for w in (16, 8) for k in ("scratch", "distilled")]
    chosen = {
        f"{kind}_{width}": {
            "temperature": 2.0 + i,
            "hard_weight": 0.25,
            "learning_rate": 0.01 * (1 + i),
            "accuracy": 0.5,
        }
        for i, (kind, width) in enumerate(named)
    }
    (tmp_path / "chosen.json").write_text(json.dumps({"chosen": chosen}))
    config = edge.Config(preset="digits", widths=(16, 8), run_dir=str(tmp_path))
    arms = edge.Task(config).arms
    assert len(arms) == 7
    for name, setting in chosen.items():
        for kind in ("", "_aware") if name.endswith("_8") else ("",):
            arm = arms[f"{name}{kind}"]
            step, _ = arm.optimizer.update(1.0, arm.optimizer.init(0.0), 0.0)
            assert -step == pytest.approx(setting["learning_rate"], rel=1e-4)
            distilled = name.startswith("distilled")
            assert arm.teacher == ("teacher" if distilled else None)
            weights = {k: weight for k, (weight, _) in arm.objective.terms.items()}
            assert weights == ({"hard": 0.25, "soft": 0.75} if distilled else HARD)
            said = f"temperature={setting['temperature']}"
            assert (said in repr(arm.objective)) == distilled


def test_latency_is_the_median_of_turns(run, measured):
    """One round more is not counted; all are of the first seed."""
    names = [name.removesuffix("-0") for name, _ in measured]
    arms, (_, summary) = 12, run
    assert names == 2 * names[:arms] + names[arms - 1 :: -1] + names[:arms]
    for name in names[:arms]:
        times = [p50 for file, p50 in measured if file == f"{name}-0"][1:]
        found = summary["arms"][name]["cost"]["latency_us"]
        assert found == sorted(times)[1]


def test_what_is_compared_and_drawn(run):
    folder, summary = run
    assert {*summary["paired"]["distilled_8_aware"]} == {
        "distilled_8",
        "distilled_8_int8",
        "scratch_8_aware",
    }
    for kind in ("", "_int8"):
        for width in (16, 8):
            compared = summary["paired"][f"distilled_{width}{kind}"]
            assert [*compared] == [f"scratch_{width}{kind}"]
    assert [*summary["paired"]["scratch_8_aware"]] == ["scratch_8_int8"]
    assert summary["lines"]["distilled, int8"] == [
        "distilled_16_int8",
        "distilled_8_int8",
    ]
    assert (folder / "frontier.png").exists()


def test_the_same_command_again_trains_and_exports_nothing(run):
    folder, summary = run
    before = {p: p.stat().st_mtime_ns for p in (folder / "export").iterdir()}
    logged = (folder / "metrics.jsonl").read_text()
    again = edge.main([*ARGUMENTS, "--run-dir", str(folder)])
    assert again["seeds"] == summary["seeds"]
    assert {p: p.stat().st_mtime_ns for p in (folder / "export").iterdir()} == before
    assert (folder / "metrics.jsonl").read_text() == logged
    assert (
        json.loads((folder / "summary.json").read_text())["seeds"] == summary["seeds"]
    )


def test_the_floats_of_the_first_seed_can_be_exported(run):
    """As the commands do, from what the run keeps alone."""
    folder, summary = run
    for name in ("teacher", "scratch_16", "distilled_8"):
        subject = export.from_run(folder, name)
        manifest = runtimes.read_manifest(folder / "export" / f"{name}-0.onnx")
        known = manifest["student"]["fingerprint"]
        assert fingerprints.of_model(subject.student) == known
        assert subject.accuracy == summary["seeds"][name][0]["accuracy"]
        source = subject.about["teacher"]
        assert (source is not None) == (name == "distilled_8")
    teacher = train.load_model(folder, "teacher")
    assert source["fingerprint"] == fingerprints.of_model(teacher)
    assert not (folder / "models" / "distilled_8_aware.json").exists()
