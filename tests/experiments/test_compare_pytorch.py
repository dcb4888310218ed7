# SPDX-License-Identifier: Apache-2.0
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="comparing with PyTorch needs torch")

from experiments.baselines import compare_pytorch
from experiments.baselines import parity as pytorch_parity
from experiments.baselines.compare_pytorch import Config
from experiments.speed.article_job import Task
from jaxdistill.parallel.sealed import unseal

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"


@pytest.fixture(scope="module")
def task():
    """The article's networks and settings, on the shipped digits.

    One thread: on a busy machine PyTorch's wait for each other.
    """
    return Task(Config(data="digits", epochs=1, seeds=1, threads=1, progress=False))


@pytest.fixture(scope="module")
def parity(task):
    return pytorch_parity.parity(task)


@pytest.mark.parametrize(
    ("comparison", "bar"), [("float64", 1e-9), ("restarted", 1e-4), ("float32", 1e-4)]
)
def test_200_steps_agree(parity, comparison, bar):
    for one in parity[comparison]:
        assert one["steps"] == 200
        first, last = one["first_and_last_loss"]
        assert last < first / 2  # it trained: two constants would agree too
        assert one["loss"] < bar
        assert one["params"] < bar


def test_another_weight_is_seen(task):
    """The bar above is one a wrong loss does not pass."""
    wrong = Task(replace(task.config, parity_steps=2, soft_weight=0.31))
    wrong.torch_loss, wrong.teacher_variables = task.torch_loss, task.teacher_variables
    assert pytorch_parity.side_by_side(wrong, 0, "float64")["loss"] > 1e-4


def test_the_articles_images_are_ours(task):
    from experiments.baselines.pytorch_mlp import Images

    source = task.source
    raw = source.train
    theirs = Images(
        raw["images"], raw["labels"], source.mean, source.deviation, source.peak
    )
    for i in (0, 7, len(theirs) - 1):
        pixels, label = theirs[i]
        assert pixels.shape == (1, *raw["images"].shape[1:])
        np.testing.assert_allclose(
            pixels.numpy().ravel(), task.train["inputs"][i], rtol=1e-6, atol=1e-6
        )
        assert label == raw["labels"][i]


def test_all_parts_and_their_table(tmp_path, capsys):
    folder, saved = tmp_path / "run", tmp_path / "saved"
    folder.mkdir()
    (folder / "summary.json").write_text('{"an earlier part": 1}')
    compare_pytorch.execute(
        Config(smoke=True, run_dir=str(folder), save=saved, threads=1, progress=False)
    )
    summary = unseal((saved / "summary.json").read_bytes())
    assert set(summary) == {"an earlier part", "parity", "accuracy"}
    assert len(summary["accuracy"]["seeds"]["PyTorch"]) == 2
    text = (saved / "table.md").read_text()
    assert re.search(r"^- float64: .*of a loss \d\.\de-\d+ ", text, re.M)
    assert re.search(r"^- test accuracy after 2 epochs, %: jaxdistill ", text, re.M)
    assert text in capsys.readouterr().out
    assert json.loads((folder / "env.json").read_text())["versions"]["torch"]


def test_a_compiler_that_fails_is_said(monkeypatch):
    from experiments.baselines import pytorch_mlp

    def broken(*_, **__):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(pytorch_mlp.torch, "compile", broken)
    problem = pytorch_mlp.compiler_problem()
    assert problem == "torch.compile does not work here: RuntimeError"


def test_missing_torch_is_one_sentence(monkeypatch):
    from experiments import baselines

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "experiments.baselines.pytorch_mlp", raising=False)
    monkeypatch.delattr(baselines, "pytorch_mlp", raising=False)
    message = r"needs it: pip install 'jaxdistill\[torch\]'"
    with pytest.raises(ValueError, match=message):
        compare_pytorch.execute(Config(smoke=True))


def test_the_page_runs(tmp_path, monkeypatch):
    """Every Python block of docs/pytorch.md, in order, in one namespace."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 4
    namespace: dict = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number + 1}", "exec"), namespace)
