# SPDX-License-Identifier: Apache-2.0
"""The notebook is its .py file, runs from top to bottom, and resumes its own run."""

import json
import shutil
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = (ROOT / "colab" / f"quickstart{end}" for end in (".py", ".ipynb"))
TRAININGS = ["teacher", "scratch", "distilled"]


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_pair_is_in_sync():
    script, notebook = jupytext.read(SCRIPT), jupytext.read(NOTEBOOK)
    assert cells(script) == cells(notebook), (
        "run: jupytext --to ipynb colab/quickstart.py"
    )
    assert script.metadata["kernelspec"] == notebook.metadata["kernelspec"]


def test_the_committed_notebook_is_small_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 100_000
    for cell in jupytext.read(NOTEBOOK).cells:
        assert not cell.get("outputs")
        assert not cell.get("execution_count")


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs the notebook in an empty folder; what it printed, and its run directory."""
    monkeypatch.setenv("JAXDISTILL_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # one device, as in Colab

    def run() -> str:
        notebook = jupytext.read(NOTEBOOK)
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=120, resources=where).execute()
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
        return "".join(out["text"] for out in outputs if out.get("name") == "stdout")

    return run, tmp_path / "runs" / "quickstart"


def records(directory: Path) -> list[dict]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def saves(directory: Path) -> dict[str, int]:
    """Checkpoints by path, with the time they were written."""
    found = directory.glob("checkpoints/*/[0-9]*")
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in found}


def test_it_runs_and_resumes_from_its_run_directory(execute):
    run, directory = execute
    said = run()
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
    said = run()
    assert "resuming from" in said
    assert {k: v for k, v in saves(directory).items() if k in before} == before
    assert records(directory) == logged
    assert (directory / "summary.json").read_text() == summary
