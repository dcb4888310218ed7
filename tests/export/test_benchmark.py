# SPDX-License-Identifier: Apache-2.0
"""An exported model is measured in a fresh process of its runtime."""

import ast
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxdistill import export, runtimes
from jaxdistill.export import benchmark as deployment
from jaxdistill.export.benchmark import child, process
from jaxdistill.runtimes import ArtefactError
from tests.export.exporting import MODELS, digits, needs

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


@pytest.mark.slow
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
    known = {"numpy", "jaxdistill.runtimes", "collections.abc"}
    assert found - sys.stdlib_module_names <= known
