# SPDX-License-Identifier: Apache-2.0
"""A notebook is its .py file, runs from top to bottom, and resumes its own run."""

import json
import os
import shutil
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).parents[1]
NAMES = ("quickstart", "bert", "export")
TRAININGS = ["teacher", "scratch", "distilled"]


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def paths(name: str) -> tuple[Path, Path]:
    """A notebook's script, and itself."""
    folder = ROOT / "colab"
    return folder / f"{name}.py", folder / f"{name}.ipynb"


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_in_sync(name):
    script, notebook = (jupytext.read(path) for path in paths(name))
    assert cells(script) == cells(notebook), f"run: jupytext --to ipynb colab/{name}.py"
    assert script.metadata["kernelspec"] == notebook.metadata["kernelspec"]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_notebook_is_small_and_without_outputs(name):
    path = paths(name)[1]
    assert path.stat().st_size < 100_000
    for cell in jupytext.read(path).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder, and tells what it printed."""
    monkeypatch.setenv("JAXDISTILL_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    flags = os.environ["XLA_FLAGS"].split()  # but one device, as in Colab
    flags = [flag for flag in flags if "device_count" not in flag]
    monkeypatch.setenv("XLA_FLAGS", " ".join(flags))

    def run(name: str) -> str:
        notebook = jupytext.read(paths(name)[1])
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
        return "".join(out["text"] for out in outputs if out.get("name") == "stdout")

    return run


def records(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saves(directory: Path) -> dict[str, int]:
    """Checkpoints by path, with the time they were written."""
    found = directory.glob("checkpoints/*/[0-9]*")
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in found}


@pytest.mark.slow
def test_it_runs_and_resumes_from_its_run_directory(execute, tmp_path):
    directory = tmp_path / "runs" / "quickstart"
    said = execute("quickstart")
    assert "a fresh run" in said
    assert "distilled minus scratch" in said
    logged, summary = records(directory), (directory / "summary.json").read_text()
    assert [(r["fit"], r["step"]) for r in logged] == [
        (name, step) for name in TRAININGS for step in (10, 20, 30, 40)
    ]

    # As after an interruption in the last training, between its two last saves.
    shutil.rmtree(directory / "checkpoints" / "distilled" / "40")
    before = saves(directory)
    assert len(before) == 5
    said = execute("quickstart")
    assert "resuming from" in said
    assert {k: v for k, v in saves(directory).items() if k in before} == before
    assert records(directory) == logged
    assert (directory / "summary.json").read_text() == summary


@pytest.mark.slow
def test_a_bert_teaches_a_small_transformer(execute, tmp_path):
    """Without a network: its teacher is trained in the notebook."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    said = execute("bert")
    assert "| distilled |" in said
    assert "distilled minus scratch" in said
    stores = list((tmp_path / "runs" / "bert" / "outputs").iterdir())
    assert len(stores) == 1


@pytest.mark.slow
def test_a_student_is_exported_and_measured(execute, tmp_path):
    for package in ("jax2onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    said = execute("export")
    assert "distilled.onnx: " in said
    assert "distilled-int8-static.onnx: " in said
    assert "| distilled | onnx int8 static |" in said
    assert (tmp_path / "runs/export/deployment/frontier.png").exists()
