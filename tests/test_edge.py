# SPDX-License-Identifier: Apache-2.0
"""The edge experiment on the shipped digits: its rows, its files, its resume."""

import json

import pytest

from experiments import edge
from jaxdistill import deployment, export, runtimes, saved, teachers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:'VariableState' was removed"),  # qwix's
]
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
    assert {*summary["rows"]} == {*floats, *eight, *aware}
    for name, row in summary["rows"].items():
        manifest = runtimes.read_manifest(folder / "export" / f"{name}-0.onnx")
        assert manifest["int8"] == (None if name in floats else "static")
        assert summary["seeds"][name][0]["accuracy"] == manifest["check"]["accuracy"]
        assert row["cost"]["bytes"] == manifest["bytes"]
        assert row["accuracy"]["n"] == 2


def test_latency_is_the_median_of_turns(run, measured):
    """One round more is not counted; all are of the first seed."""
    names = [name.removesuffix("-0") for name, _ in measured]
    rows, (_, summary) = 12, run
    assert names == 2 * names[:rows] + names[rows - 1 :: -1] + names[:rows]
    for name in names[:rows]:
        times = [p50 for file, p50 in measured if file == f"{name}-0"][1:]
        found = summary["rows"][name]["cost"]["latency_us"]
        assert found == sorted(times)[1]


def test_what_is_compared_and_drawn(run):
    folder, summary = run
    assert {*summary["paired"]["distilled_8_aware"]} == {
        "distilled_8",
        "distilled_8_int8",
        "scratch_8_aware",
    }
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
        assert teachers.fingerprint(subject.student) == known
        assert subject.accuracy == summary["seeds"][name][0]["accuracy"]
        taught = subject.about["teacher"]
        assert (taught is not None) == (name == "distilled_8")
    teacher = saved.load_model(folder, "teacher")
    assert taught["fingerprint"] == teachers.fingerprint(teacher)
    assert not (folder / "models" / "distilled_8_aware.json").exists()
