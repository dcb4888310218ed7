# SPDX-License-Identifier: Apache-2.0
"""The benchmark of a run's exported models: what is measured is what is written."""

import json
import sys

import jax
import numpy as np
import pytest

from jaxdistill import cli, export, models, runtimes, teachers, train
from jaxdistill.export import ExportError, artefact, check
from jaxdistill.export import benchmark as deployment
from jaxdistill.export.benchmark import artefacts, process
from jaxdistill.report import deployed
from jaxdistill.runtimes import ArtefactError
from jaxdistill.teachers import fingerprints
from jaxdistill.train import RunDir
from tests.export.exporting import PACKAGES, needs, trained

pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

ARMS = ("teacher", "distilled")
RUNTIMES = {"stablehlo": "jax", "onnx": "onnxruntime", "tflite": "ai-edge-litert"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 0.0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What the command needs of a finished run on the digits; one thread is all."""
    monkeypatch.setattr(process, "cores", lambda: 1)
    run_dir = RunDir(tmp_path / "run", {"data": "digits", "validation": 900})
    small = models.MLP((4, 10))
    params = small.init(jax.random.key(0), np.zeros((1, 64), np.float32))
    train.save_model(run_dir, "teacher", trained())
    train.save_model(run_dir, "distilled", teachers.live(small, params))
    return tmp_path / "run"


def measure(run, *flags) -> dict:
    options = ["--rounds", "1", "--repeats", "3", "--no-progress"]
    cli.main(["benchmark", str(run), *options, *flags])
    return json.loads((run / "deployment" / "summary.json").read_text())


def test_the_command_measures_a_run(run, capsys):
    flags = ["--to", "stablehlo", "--rounds", "2"]
    summary = measure(run, *flags, "--save", str(run.parent / "kept"))
    arms = summary["arms"]
    assert [*arms] == ["teacher stablehlo", "distilled stablehlo"]  # no scratch here
    assert summary["lines"] == {
        "teacher": ["teacher stablehlo"],
        "distilled": ["distilled stablehlo"],
    }
    arm = arms["distilled stablehlo"]
    manifest = runtimes.read_manifest(
        run / "deployment" / "artefacts" / "distilled.stablehlo"
    )
    assert arm["accuracy"] == {
        "mean": manifest["check"]["accuracy"],
        "std": 0.0,
        "n": 1,
    }
    assert arm["examples"] == 797
    assert arm["cost"]["parameters"] == 64 * 4 + 4 + 4 * 10 + 10
    assert arm["cost"]["flops"] == pytest.approx(2 * (64 * 4 + 4 * 10), rel=0.1)
    assert arm["cost"]["bytes"] == manifest["bytes"]
    rounds = arm["threads"]["1"]
    assert len(rounds) == 2
    p50 = [each["latency_us"]["p50"] for each in rounds]
    assert arm["cost"]["latency_us"] == pytest.approx(sum(p50) / 2)

    folder = run / "deployment"
    table = deployed.table(summary)
    assert (folder / "table.md").read_text() == table
    assert capsys.readouterr().out == f"{table}\nin {folder}\n"
    assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    kept = {path.name for path in (run.parent / "kept").iterdir()}
    assert kept == {"summary.json", "table.md", "frontier.png"}
    assert (run.parent / "kept" / "table.md").read_text() == table


@pytest.mark.parametrize("to", ["onnx", "tflite"])
def test_floats_and_int8_with_one_thread_and_with_two(run, to, monkeypatch):
    needs(to)
    monkeypatch.setattr(process, "cores", lambda: 2)
    summary = measure(run, "--to", to, "--arms", "teacher", "--int8", "dynamic")
    whole, int8 = summary["arms"].values()
    assert [whole["kind"], int8["kind"]] == [to, f"{to} int8 dynamic"]
    assert int8["cost"]["bytes"] < whole["cost"]["bytes"]
    assert int8["cost"]["flops"] == whole["cost"]["flops"]
    assert abs(int8["accuracy"]["mean"] - whole["accuracy"]["mean"]) < 0.05
    for arm in (whole, int8):
        assert [*arm["threads"]] == ["1", "2"]
        for threads, (found,) in arm["threads"].items():
            assert found["threads"] == int(threads)
            assert found["runtime"] == RUNTIMES[to]
            assert found["per_second"] > 0
    names = {path.name for path in (run / "deployment" / "artefacts").iterdir()}
    assert (f"teacher-batch64.{to}" in names) == (to == "tflite")


def test_int8_that_cannot_be_had_is_said(run):
    """TensorFlow leaves matrices as small as the student's."""
    needs("tflite")
    flags = ["--to", "tflite", "--arms", "distilled", "--int8", "dynamic"]
    summary = measure(run, *flags)
    assert [*summary["arms"]] == ["distilled tflite"]
    why = summary["deployed"]["left_out"]["distilled tflite int8 dynamic"]
    assert why.startswith("int8 changed nothing")
    said = f"- Left out: distilled tflite int8 dynamic: {why}.\n"
    assert said in deployed.table(summary)


def obtain(run, arm="distilled"):
    subject = export.from_run(run, arm)
    folder = run / "deployment"
    made = artefacts.obtain(subject, run, folder, arm, "stablehlo", None, 64)
    return made.path, made.path.stat().st_mtime_ns


def test_what_was_exported_is_taken(run):
    first = obtain(run)
    assert first[0] == run / "deployment" / "artefacts" / "distilled.stablehlo"
    assert obtain(run) == first
    cli.main(["export", str(run), "--to", "stablehlo"])
    mine = run / "export" / "distilled.stablehlo"
    assert obtain(run)[0] == mine
    content = mine.read_bytes()
    mine.write_bytes(content[:-1])  # is damaged, and stays
    assert obtain(run) == first
    assert mine.read_bytes() == content[:-1]


@pytest.mark.slow
def test_what_is_of_another_student_or_damaged_is_exported_again(run):
    path, written = obtain(run)
    path.write_bytes(path.read_bytes()[:-1])
    assert obtain(run)[1] > written
    runtimes.read(path)
    _, written = obtain(run)
    train.save_model(
        RunDir(run, {"data": "digits", "validation": 900}),
        "distilled",
        trained(),
    )
    assert obtain(run)[1] > written
    fingerprint = runtimes.read_manifest(path)["student"]["fingerprint"]
    assert fingerprint == fingerprints.of_model(trained())


@pytest.mark.slow
def test_formats_that_are_not_installed(run, monkeypatch):
    for package in PACKAGES["onnx"][:1] + PACKAGES["tflite"]:
        monkeypatch.setitem(sys.modules, package, None)
    summary = measure(run, "--arms", "distilled")
    assert [*summary["arms"]] == ["distilled stablehlo"]
    out = summary["deployed"]["left_out"]
    assert "jax2onnx" in out["onnx"]
    assert out["onnx"].endswith("is not installed: pip install 'jaxdistill[onnx]'")
    assert out["tflite"] == (
        "tensorflow, ai_edge_litert is not installed: pip install 'jaxdistill[tflite]'"
    )
    assert f"- Left out: tflite: {out['tflite']}.\n" in deployed.table(summary)
    with pytest.raises(SystemExit, match=r"error: tensorflow is not inst.*\[tflite\]"):
        measure(run, "--to", "tflite")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    said = r"error: no runtime is installed: pip install one of 'jaxdistill\[export\]',"
    with pytest.raises(SystemExit, match=said):
        measure(run)


@pytest.mark.parametrize("failure", [ExportError, ArtefactError])
@pytest.mark.slow
def test_a_row_that_cannot_be_exported_leaves_the_others(failure, run, monkeypatch):
    write = export.write

    def fails(subject, path, **options):
        if path.name.startswith("teacher"):
            raise failure("MLP cannot be exported")
        return write(subject, path, **options)

    monkeypatch.setattr(artefact, "write", fails)
    summary = measure(run, "--to", "stablehlo")
    assert [*summary["arms"]] == [*summary["lines"]["distilled"]]
    assert [*summary["lines"]] == ["distilled"]
    assert summary["deployed"]["left_out"] == {
        "teacher stablehlo": "MLP cannot be exported"
    }
    with pytest.raises(SystemExit, match="nothing was exported: MLP cannot be exp"):
        measure(run, "--to", "stablehlo", "--arms", "teacher")


@pytest.mark.slow
def test_a_file_that_does_not_run_leaves_the_others(run, monkeypatch):
    answer = check.run_fresh

    def fails(path, inputs):
        if path.parent.name == "artefacts" and path.name.startswith("teacher"):
            raise ExportError("it does not run")
        return answer(path, inputs)

    monkeypatch.setattr(check, "run_fresh", fails)
    summary = measure(run, "--to", "stablehlo")
    assert [*summary["arms"]] == ["distilled stablehlo"]
    assert summary["deployed"]["left_out"] == {"teacher stablehlo": "it does not run"}


@pytest.mark.slow
def test_a_measurement_that_fails_leaves_the_others(run, monkeypatch):
    """As with one thread where JAX cannot be kept to fewer cores than there are."""
    monkeypatch.setattr(process, "cores", lambda: 2)

    def fails(path, inputs, *, threads, **options):
        if threads == 1 or path.name.startswith("teacher"):
            raise ArtefactError("JAX takes all cores")
        return deployment.measure(path, inputs, threads=threads, **options)

    monkeypatch.setattr(process, "measure", fails)
    summary = measure(run, "--to", "stablehlo")
    (arm,) = summary["arms"].values()
    assert arm["arm"] == "distilled"
    assert summary["lines"] == {"distilled": ["distilled stablehlo"]}
    assert arm["cost"]["latency_us"] is None
    assert arm["threads"]["1"] == []
    assert arm["threads"]["2"][0]["latency_us"]["p50"] > 0
    labels = [f"{name} stablehlo, threads {n}" for name in ARMS for n in (1, 2)]
    assert summary["deployed"]["left_out"] == dict.fromkeys(
        labels[:3], "JAX takes all cores"
    )
    line = deployed.table(summary).splitlines()[2].split(" | ")
    assert line[6:11] == ["-"] * 5  # cold start, load, memory; p50 and p95
    assert "-" not in line[12:]
    assert (run / "deployment" / "frontier.png").exists()
    with pytest.raises(SystemExit, match="nothing was measured: JAX takes all cores"):
        measure(run, "--to", "stablehlo", "--arms", "teacher")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (
            ["--arms", "teacher", "other"],
            "run holds no model other; name --arms that it has: distilled, teacher",
        ),
    ],
)
def test_what_the_command_refuses(run, flags, sentence):
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        cli.main(["benchmark", str(run), *flags])
    assert not (run / "deployment").exists()


def test_runs_without_what_is_measured(run, tmp_path):
    with pytest.raises(
        SystemExit, match="nowhere holds no models: it is no run, or wa"
    ):
        cli.main(["benchmark", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="gs://b/run is no local folder: copy the run"):
        cli.main(["benchmark", "gs://b/run"])
    for name in ("teacher", "distilled"):
        for suffix in ("msgpack", "json"):
            (run / "models" / f"{name}.{suffix}").rename(
                run / "models" / f"{name}-2.{suffix}"
            )
    said = "holds no model none of teacher, scratch, distilled; name --arms that it has"
    with pytest.raises(SystemExit, match=said):
        cli.main(["benchmark", str(run)])
