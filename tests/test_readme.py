# SPDX-License-Identifier: Apache-2.0
"""What the README prints works as printed."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.startswith("python3 -m venv")
]


def test_the_model_of_ones_own_trains_and_streams():
    own, streamed = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    scope: dict = {}
    exec(compile(own, "README.md", "exec"), scope)
    assert int(scope["state"].step) == scope["batches"].steps_per_epoch
    assert np.isfinite(scope["metrics"]["loss"][0])
    moved = jax.tree.leaves(scope["run"].fetch(scope["state"]).params)
    assert any(np.abs(leaf).max() > 0 for leaf in moved)

    pytest.importorskip("grain", reason="grain is not installed")
    exec(compile(streamed, "README.md", "exec"), scope)
    assert int(scope["state"].step) == 2 * scope["batches"].steps_per_epoch


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

    assert [name for name in losses.__all__ if f"`{name}`" not in README] == []
