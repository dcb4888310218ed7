# SPDX-License-Identifier: Apache-2.0
"""What scripts share: how they begin, and how they end."""

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from jaxdistill.study import script


@dataclass(frozen=True)
class Config(script.Flags):
    epochs: int = 20
    """passes over the examples"""
    smoke: bool = False
    """a few steps"""


def run(execute, *argv, **options):
    main = script.command(execute, {"": Config()}, "A test.", **options)
    return main(["--no-compilation-cache", *argv])


def test_smoke_stands_for_flags():
    given = run(lambda config: config, "--smoke", smoke="--epochs 1 --no-progress")
    assert (given.epochs, given.progress, given.smoke) == (1, False, True)
    given = run(lambda config: config, smoke="--epochs 1")
    assert (given.epochs, given.progress) == (20, True)


def test_before_and_begin_come_before_the_work():
    calls: list = []
    options = {"before": lambda: calls.append("before"), "begin": calls.append}
    run(calls.append, "--epochs", "3", **options)
    config = Config(epochs=3, compilation_cache=False)
    assert calls == ["before", config, config]


def test_a_scripts_error_is_a_sentence_and_a_programs_is_not():
    def refuse(config):
        raise ValueError("--epochs must be 1 or more")

    with pytest.raises(SystemExit, match="error: --epochs must be 1 or more"):
        run(refuse)
    with pytest.raises(ValueError, match="invalid literal"):
        run(lambda config: int("three"))
    with pytest.raises(ValueError, match="--epochs must be"):
        run(lambda config: None, begin=refuse)


@pytest.mark.parametrize("folder", ["", "work/"], ids=["in its folder", "in a package"])
def test_a_scripts_other_files_explain_themselves_too(tmp_path, folder):
    """A file beside the script, and one in another folder of its package."""
    (tmp_path / folder / "other").mkdir(parents=True)
    other = f"{folder}other/part.py" if folder else "part.py"
    (tmp_path / other).write_text("def refuse():\n    raise ValueError('take more')\n")
    path = other.removesuffix(".py").replace("/", ".")
    (tmp_path / folder / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        f"from {path} import refuse\n"
        "from jaxdistill.study import script\n"
        "@dataclass(frozen=True)\n"
        "class Config(script.Flags):\n"
        "    pass\n"
        "def execute(config):\n"
        "    refuse()\n"
        "script.command(execute, {'': Config()}, __doc__)()\n"
    )
    module = "work.mine" if folder else "mine"
    command = [sys.executable, "-m", module, "--no-compilation-cache"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: take more\n"


def test_steps_of_passes():
    examples = {"labels": np.zeros(10, np.int32)}
    assert script.steps_of(3, examples, 5) == 6
