# SPDX-License-Identifier: Apache-2.0
"""A run's exported models in their runtimes: what is measured is what is written."""

import ast
import json
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from test_export import MODELS, PACKAGES, digits, needs, trained

from jaxdistill import (
    cli,
    deployed,
    deployment,
    export,
    models,
    runtimes,
    saved,
    teachers,
)
from jaxdistill.deployment import artefacts, child, finished, process
from jaxdistill.export import ExportError, artefact, check
from jaxdistill.runs import Run
from jaxdistill.runtimes import ArtefactError

pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

ROWS = ("teacher", "distilled")
RUNTIMES = {"stablehlo": "jax", "onnx": "onnxruntime", "tflite": "ai-edge-litert"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`to -> path`, each exported once; never changed."""
    folder = tmp_path_factory.mktemp("exported")

    def path(to: str) -> Path:
        needs(to)
        if not (folder / to).exists():
            export.write(digits(), folder / to, to=to)
        return folder / to

    return path


@pytest.mark.parametrize("to", RUNTIMES)
def test_an_artefact_is_measured(to, exported):
    path = exported(to)
    found = deployment.measure(path, digits().inputs, repeats=7, warmup=1)
    assert found["runtime"] == RUNTIMES[to]
    assert found["version"] == runtimes.version(RUNTIMES[to])
    assert found["threads"] == 1
    assert 0 < found["latency_us"]["p50"] <= found["latency_us"]["p95"]
    assert found["cold_start_s"] > found["import_s"] + found["load_s"] > 0
    # Were this process counted, which started the other, it would be much more.
    assert 5e6 < found["memory_before"] < 100e6
    assert found["memory"] > found["memory_before"]
    if to == "tflite":  # takes one example, and no batch
        assert (found["per_second"], found["batches"]) == (None, 0)
    else:
        assert found["per_second"] > 0
        assert found["batches"] == 1  # a tenth of the repeats, at least one
        assert found["memory_batch"] >= found["memory"]


def test_texts_are_measured(tmp_path):
    given = MODELS["bert"]()
    export.write(given, tmp_path / "m", to="stablehlo")
    found = deployment.measure(tmp_path / "m", given.inputs, repeats=2, batch=40)
    assert (found["batch"], found["batches"]) == (40, 1)  # there are 30, repeated
    assert found["per_second"] > 0
    inputs = {"input_ids": given.inputs["input_ids"]}
    with pytest.raises(ArtefactError, match="takes input_ids, attention_mask, got in"):
        deployment.measure(tmp_path / "m", inputs)


def test_a_second_artefact_takes_the_batch(exported, tmp_path):
    needs("tflite")
    export.write(digits(), tmp_path / "wide", to="tflite", batch_size=6)
    pixels = digits().inputs["images"]
    many = {"many": tmp_path / "wide", "batch": 6, "repeats": 20}
    found = deployment.measure(exported("tflite"), pixels, **many)
    assert (found["batch"], found["batches"]) == (6, 2)
    assert found["per_second"] > 0
    alone = deployment.measure(tmp_path / "wide", pixels[:1], batch=6, repeats=1)
    assert alone["latency_us"] is None
    assert alone["per_second"] > 0


def test_a_cold_start_is_cold(exported, tmp_path, monkeypatch):
    """It finds no programs that were compiled before, and leaves none."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    for name, value in [
        ("JAX_ENABLE_COMPILATION_CACHE", "1"),
        ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"),
        ("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1"),
    ]:
        monkeypatch.setenv(name, value)
    deployment.measure(exported("stablehlo"), digits().inputs, repeats=1)
    assert not (tmp_path / "cache").exists()


def test_batches_go_on_until_seconds_have_passed(exported, monkeypatch):
    monkeypatch.setattr(process, "SECONDS", 0.05)
    found = deployment.measure(exported("stablehlo"), digits().inputs, repeats=1)
    assert found["batches"] > 1
    seconds = found["batches"] * found["batch"] / found["per_second"]
    assert seconds < 1


def test_the_calls_that_are_timed(monkeypatch):
    """Each input in turn, after the warm-up; the clock is read around the call."""
    calls, now = [], [0.0]

    def run(inputs):
        calls.append(inputs)
        now[0] += 2.0
        return inputs

    monkeypatch.setattr(child.time, "perf_counter", lambda: now[0])
    model = runtimes.Model({}, run)
    assert child.timed(model, [1, 2, 3], warmup=2, repeats=4) == [2.0] * 4
    assert calls == [1, 2, 1, 2, 3, 1]
    calls.clear()
    assert child.timed(model, [5], warmup=0, repeats=1, seconds=5.0) == [2.0] * 3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured(options, sentence, exported):
    with pytest.raises(ValueError, match=sentence):
        deployment.measure(exported("stablehlo"), digits().inputs, **options)


def test_an_artefact_that_is_damaged_or_inputs_not_taken(exported, tmp_path):
    for name in ("stablehlo", "stablehlo.json"):
        shutil.copy(exported("stablehlo").with_name(name), tmp_path)
    path = tmp_path / "stablehlo"
    with pytest.raises(ArtefactError, match="images is float64, expected uint8"):
        deployment.measure(path, np.zeros((1, 8, 8)))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactError, match=f"cannot measure {path}: .* is damaged: "):
        deployment.measure(path, digits().inputs)


def test_jobs_take_turns_and_the_first_round_does_not_count():
    calls: list[str] = []

    def job(name):
        def run():
            calls.append(name)
            return {"call": len(calls)}

        return run

    found = deployment.in_turns({name: job(name) for name in "ab"}, rounds=2)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert found == {"a": [{"call": 3}, {"call": 6}], "b": [{"call": 4}, {"call": 5}]}
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        deployment.in_turns({}, rounds=0)


def test_the_measured_process_imports_little():
    """What it imports would be part of a cold start, and of its memory."""
    found = set()
    for node in ast.walk(ast.parse(Path(child.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "jaxdistill" else {node.module}
    known = {"numpy", "jaxdistill.runtimes", "jaxdistill.footprint", "collections.abc"}
    assert found - sys.stdlib_module_names <= known


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What the command needs of a finished run on the digits; one thread is all."""
    monkeypatch.setattr(finished, "cores", lambda: 1)
    log = Run(tmp_path / "run", {"data": "digits", "validation": 900})
    small = models.MLP((4, 10))
    params = small.init(jax.random.key(0), np.zeros((1, 64), np.float32))
    saved.save_model(log, "teacher", trained())
    saved.save_model(log, "distilled", teachers.live(small, params))
    return tmp_path / "run"


def measure(run, *flags) -> dict:
    options = ["--rounds", "1", "--repeats", "3", "--no-progress"]
    cli.main(["benchmark", str(run), *options, *flags])
    return json.loads((run / "deployment" / "summary.json").read_text())


def test_the_command_measures_a_run(run, capsys):
    flags = ["--to", "stablehlo", "--rounds", "2"]
    summary = measure(run, *flags, "--save", str(run.parent / "kept"))
    rows = summary["rows"]
    assert [*rows] == ["teacher stablehlo", "distilled stablehlo"]  # no scratch here
    assert summary["lines"] == {
        "teacher": ["teacher stablehlo"],
        "distilled": ["distilled stablehlo"],
    }
    row = rows["distilled stablehlo"]
    manifest = runtimes.read_manifest(
        run / "deployment" / "artefacts" / "distilled.stablehlo"
    )
    assert row["accuracy"] == {
        "mean": manifest["check"]["accuracy"],
        "std": 0.0,
        "n": 1,
    }
    assert row["examples"] == 797
    assert row["cost"]["parameters"] == 64 * 4 + 4 + 4 * 10 + 10
    assert row["cost"]["flops"] == pytest.approx(2 * (64 * 4 + 4 * 10), rel=0.1)
    assert row["cost"]["bytes"] == manifest["bytes"]
    rounds = row["threads"]["1"]
    assert len(rounds) == 2
    p50 = [each["latency_us"]["p50"] for each in rounds]
    assert row["cost"]["latency_us"] == pytest.approx(sum(p50) / 2)

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
    monkeypatch.setattr(finished, "cores", lambda: 2)
    summary = measure(run, "--to", to, "--rows", "teacher", "--int8", "dynamic")
    whole, int8 = summary["rows"].values()
    assert [whole["kind"], int8["kind"]] == [to, f"{to} int8 dynamic"]
    assert int8["cost"]["bytes"] < whole["cost"]["bytes"]
    assert int8["cost"]["flops"] == whole["cost"]["flops"]
    assert abs(int8["accuracy"]["mean"] - whole["accuracy"]["mean"]) < 0.05
    for row in (whole, int8):
        assert [*row["threads"]] == ["1", "2"]
        for threads, (found,) in row["threads"].items():
            assert found["threads"] == int(threads)
            assert found["runtime"] == RUNTIMES[to]
            assert found["per_second"] > 0
    names = {path.name for path in (run / "deployment" / "artefacts").iterdir()}
    assert (f"teacher-batch64.{to}" in names) == (to == "tflite")


def test_int8_that_cannot_be_had_is_said(run):
    """TensorFlow leaves matrices as small as the student's."""
    needs("tflite")
    flags = ["--to", "tflite", "--rows", "distilled", "--int8", "dynamic"]
    summary = measure(run, *flags)
    assert [*summary["rows"]] == ["distilled tflite"]
    why = summary["deployed"]["left_out"]["distilled tflite int8 dynamic"]
    assert why.startswith("int8 changed nothing")
    said = f"- Left out: distilled tflite int8 dynamic: {why}.\n"
    assert said in deployed.table(summary)


def obtain(run, row="distilled"):
    subject = export.from_run(run, row)
    folder = run / "deployment"
    made = artefacts.obtain(subject, run, folder, row, "stablehlo", None, 64)
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


def test_what_is_of_another_student_or_damaged_is_exported_again(run):
    path, written = obtain(run)
    path.write_bytes(path.read_bytes()[:-1])
    assert obtain(run)[1] > written
    runtimes.read(path)
    _, written = obtain(run)
    saved.save_model(
        Run(run, {"data": "digits", "validation": 900}), "distilled", trained()
    )
    assert obtain(run)[1] > written
    fingerprint = runtimes.read_manifest(path)["student"]["fingerprint"]
    assert fingerprint == teachers.fingerprint(trained())


def test_formats_that_are_not_installed(run, monkeypatch):
    for package in PACKAGES["onnx"][:1] + PACKAGES["tflite"]:
        monkeypatch.setitem(sys.modules, package, None)
    summary = measure(run, "--rows", "distilled")
    assert [*summary["rows"]] == ["distilled stablehlo"]
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
def test_a_row_that_cannot_be_exported_leaves_the_others(failure, run, monkeypatch):
    write = artefact.write

    def fails(subject, path, **options):
        if path.name.startswith("teacher"):
            raise failure("MLP cannot be exported")
        return write(subject, path, **options)

    monkeypatch.setattr(artefact, "write", fails)
    summary = measure(run, "--to", "stablehlo")
    assert [*summary["rows"]] == [*summary["lines"]["distilled"]]
    assert [*summary["lines"]] == ["distilled"]
    assert summary["deployed"]["left_out"] == {
        "teacher stablehlo": "MLP cannot be exported"
    }
    with pytest.raises(SystemExit, match="nothing was exported: MLP cannot be exp"):
        measure(run, "--to", "stablehlo", "--rows", "teacher")


def test_a_file_that_does_not_run_leaves_the_others(run, monkeypatch):
    answer = check.run_fresh

    def fails(path, inputs):
        if path.parent.name == "artefacts" and path.name.startswith("teacher"):
            raise ExportError("it does not run")
        return answer(path, inputs)

    monkeypatch.setattr(check, "run_fresh", fails)
    summary = measure(run, "--to", "stablehlo")
    assert [*summary["rows"]] == ["distilled stablehlo"]
    assert summary["deployed"]["left_out"] == {"teacher stablehlo": "it does not run"}


def test_a_measurement_that_fails_leaves_the_others(run, monkeypatch):
    """As with one thread where JAX cannot be kept to fewer cores than there are."""
    monkeypatch.setattr(finished, "cores", lambda: 2)

    def fails(path, inputs, *, threads, **options):
        if threads == 1 or path.name.startswith("teacher"):
            raise ArtefactError("JAX takes all cores")
        return deployment.measure(path, inputs, threads=threads, **options)

    monkeypatch.setattr(finished, "measure", fails)
    summary = measure(run, "--to", "stablehlo")
    (row,) = summary["rows"].values()
    assert row["row"] == "distilled"
    assert summary["lines"] == {"distilled": ["distilled stablehlo"]}
    assert row["cost"]["latency_us"] is None
    assert row["threads"]["1"] == []
    assert row["threads"]["2"][0]["latency_us"]["p50"] > 0
    labels = [f"{name} stablehlo, {n} threads" for name in ROWS for n in (1, 2)]
    assert summary["deployed"]["left_out"] == dict.fromkeys(
        labels[:3], "JAX takes all cores"
    )
    line = deployed.table(summary).splitlines()[2].split(" | ")
    assert line[6:11] == ["-"] * 5  # cold start, load, memory; p50 and p95
    assert "-" not in line[12:]
    assert (run / "deployment" / "frontier.png").exists()
    with pytest.raises(SystemExit, match="nothing was measured: JAX takes all cores"):
        measure(run, "--to", "stablehlo", "--rows", "teacher")


def test_a_system_that_tells_no_memory(monkeypatch):
    def peak():
        raise ImportError("resource")

    monkeypatch.setattr(child, "peak_memory", peak)
    assert child.memory() is None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (
            ["--rows", "teacher", "other"],
            "run holds no model other; name --rows that it has: distilled, teacher",
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
    said = "holds no model none of teacher, scratch, distilled; name --rows that it has"
    with pytest.raises(SystemExit, match=said):
        cli.main(["benchmark", str(run)])


def test_the_table_says_all_that_the_summary_has():
    """Medians and extremes by hand, of rounds that are made up."""

    def one(p50, cold):
        return {
            "cold_start_s": cold,
            "load_s": 0.012,
            "memory_before": 30e6,
            "memory": 64e6,
            "latency_us": {"p50": p50, "p95": 1234.5},
            "per_second": None,
        }

    row = {
        "row": "label_smoothing",
        "kind": "tflite",
        "runtime": "ai-edge-litert",
        "examples": 1797,
        "accuracy": {"mean": 0.9, "std": 0.0, "n": 1},
        "cost": {"parameters": 1234, "flops": 5678.0, "bytes": 4321},
        "threads": {"1": [one(3.0, 0.5), one(1.0, 0.25), one(2.0, 0.125)]},
    }
    how = {
        "rounds": 3,
        "repeats": 50,
        "warmup": 20,
        "batch": 64,
        "batches": 5,
        "seconds": 0.25,
        "threads": [1],
        "left_out": {},
        "machine": {
            "cpu": "Abacus",
            "cores": 1,
            "system": "Linux",
            "python": "3.11.7",
            "versions": {"ai-edge-litert": "2.3.0"},
        },
    }
    summary = {"rows": {"x": row}, "deployed": how}
    text = deployed.table(summary)
    line = text.splitlines()[2]
    assert line == (
        "| label smoothing | tflite | 90.00 | 1,234 | 5,678 | 4.3 | "
        "0.25 (0.125 to 0.5) | 12 (12 to 12) | 64 (64 to 64) | "
        "2 (1 to 3) | 1,234 (1,234 to 1,234) | - |"
    )
    for said in (
        "on 1,797 test examples, of the model of the first seed alone",
        "of 3 rounds",
        "20 calls to warm up and 50 that are timed",
        "batches of 64, 5 of them at least, and for 0.25 s",
        "imported it was 30.0 MB",
        "a second file, for 64",
        "1 core of Abacus, Linux, Python 3.11.7, ai-edge-litert 2.3.0.",
    ):
        assert said in text
    for each in row["threads"]["1"]:
        each |= {"memory_before": None, "memory": None}
    text = deployed.table(summary)
    assert text.splitlines()[2].split(" | ")[8] == "-"
    assert "libraries included." in text
