# SPDX-License-Identifier: Apache-2.0
"""What the README prints works as printed."""

import ast
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tyro

from jaxdistill import cli, data, models, pretrained, teachers, train
from jaxdistill.pretrained import module_of
from jaxdistill.train import RunDir, init_state

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.startswith("python3 -m venv")
]


def test_a_comparison_of_ones_own_needs_eight_names(tmp_path, monkeypatch):
    tree = ast.parse(BLOCKS[0])
    names = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("models", "objectives", "report", "study")
    }
    assert len(names) <= 8
    monkeypatch.chdir(tmp_path)
    fewer = BLOCKS[0].replace("epochs=30", "epochs=1").replace("seeds=3", "seeds=2")
    scope: dict = {}
    exec(compile(fewer, "README.md", "exec"), scope)
    table = (tmp_path / "runs" / "mine" / "table.md").read_text()
    assert "- distilled minus scratch: " in table
    assert "(2 paired seeds)" in table


def test_the_model_of_ones_own_trains_and_streams():
    _, own, _, streamed, _ = BLOCKS
    scope: dict = {}
    exec(compile(own, "README.md", "exec"), scope)
    assert int(scope["state"].step) == scope["batches"].steps_per_epoch
    assert np.isfinite(scope["metrics"]["loss"][0])
    moved = jax.tree.leaves(scope["partitioner"].fetch(scope["state"]).params)
    assert any(np.abs(leaf).max() > 0 for leaf in moved)

    pytest.importorskip("grain", reason="grain is not installed")
    exec(compile(streamed, "README.md", "exec"), scope)
    assert int(scope["state"].step) == 2 * scope["batches"].steps_per_epoch


def test_a_bert_of_ones_own_teaches(tmp_path, monkeypatch):
    """A folder as Hugging Face's library writes it, of a small model."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    numbers = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 4}
    numbers |= {"vocab_size": 30_522, "type_vocab_size": 2, "intermediate_size": 8}
    config = {"model_type": "bert", **numbers, "max_position_embeddings": 16}
    config["architectures"] = ["BertForSequenceClassification"]
    ids = np.arange(6, dtype=np.int32).reshape(2, 3)
    batch = {
        "inputs": {"input_ids": ids, "attention_mask": np.ones_like(ids)},
        "labels": np.array([0, 1], np.int32),
        "mask": np.ones(2, np.float32),
    }
    module = module_of(config)
    variables = jax.jit(module.init)(jax.random.key(0), batch["inputs"])
    model = teachers.live(module, variables)
    pretrained.save(tmp_path / "bert-sst2", model, config)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    _, own, text, *_ = BLOCKS
    exec(compile(own, "README.md", "exec"), scope)
    exec(compile(text, "README.md", "exec"), scope)
    student, optimizer = scope["text_student"], scope["optimizer"]
    state = init_state(jax.random.key(0), student, optimizer, batch)
    teacher = teachers.live(scope["module"], scope["variables"])
    _, metrics = jax.jit(scope["text_step"])(state, teacher, batch)
    assert all(total > 0 for total, _ in metrics.values())


def test_a_runtime_alone_runs_what_is_exported(tmp_path, monkeypatch):
    for package in ("jax2onnx", "onnx", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    digits = data.load("digits")
    module = models.MLP((4, 10))
    params = module.init(jax.random.key(0), digits.inputs(digits.test)["inputs"])
    run_dir = RunDir(tmp_path / "runs" / "digits", {"data": "digits"})
    train.save_model(run_dir, "distilled", teachers.live(module, params))
    export, benchmark = re.findall(
        r"^jaxdistill (.*runs/digits.*)$", README, flags=re.M
    )
    monkeypatch.chdir(tmp_path)
    cli.main(export.split())
    scope: dict = {}
    exec(compile(BLOCKS[-1], "README.md", "exec"), scope)
    assert scope["classes"].shape == (5,)
    command = tyro.cli(cli.Command, args=benchmark.split())
    assert command == cli.Benchmark("runs/digits")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/pytorch.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing


def test_every_generated_table_has_its_results():
    names = re.findall(r"<!-- table: (\S+) -->", README)
    assert names
    missing = [n for n in names if not (ROOT / f"experiments/results/{n}.md").is_file()]
    assert not missing


def test_ci_installs_and_tests_with_the_printed_commands():
    main_job, tests = COMMANDS
    ci = (ROOT / ".ci" / "run").read_text()
    assert main_job.endswith("python experiments/digits_mlp.py")
    assert tests.split(" && ")[2] in ci
    assert tests.split(" && ")[3] == "pytest"
    assert re.search(r"\bpytest\b", ci)


def test_every_loss_is_listed():
    from jaxdistill import losses

    names = [name for name, value in vars(losses).items() if callable(value)]
    missing = [name for name in names if f"`{name}`" not in README]
    assert not missing, f"not in the README's list of losses: {', '.join(missing)}"
