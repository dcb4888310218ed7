# SPDX-License-Identifier: Apache-2.0
"""A run killed at any moment and started again ends as if it had never been killed."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KILLS, INSIDE_A_SAVE = 20, 6
SETTINGS = ["--seeds", "1", "--epochs", "4", "--evaluations", "8", "--parallel", "jit"]
PRELOAD = ["experiments.digits_mlp", "matplotlib.pyplot", "scipy.special"]


def run(directory: str, run_dir: str) -> None:
    """What a user's command does but for its figures, in a process of its own."""
    from experiments import digits_mlp
    from jaxdistill.report import tables

    tables.write = lambda directory: ""
    with open(run_dir, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    digits_mlp.main([*SETTINGS, "--run-dir", directory, "--no-progress"])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts the command in a directory; imports and compilations are made once."""
    cache = tmp_path_factory.mktemp("compilations")
    settings = {
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    patch = pytest.MonkeyPatch()
    for name, value in settings.items():
        patch.setenv(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)

    def begin(directory: Path):
        arguments = (str(directory), str(directory.with_suffix(".log")))
        process = context.Process(target=run, args=arguments)
        process.start()
        return process

    yield begin
    patch.undo()


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """Digests of an uninterrupted run, and its seconds once everything is compiled."""
    for name in ("first", "second"):
        directory = tmp_path_factory.mktemp("reference") / name
        began = time.monotonic()
        finish(start(directory), directory)
    return digests(directory), time.monotonic() - began


def finish(process, directory: Path) -> None:
    process.join(120)
    assert process.exitcode == 0, directory.with_suffix(".log").read_text()[-3000:]


def digests(directory: Path) -> dict:
    return json.loads((directory / "summary.json").read_text())["digests"]


def wait_for_save(process, directory: Path, count: int) -> None:
    """Returns while the `count`-th save since the start is being written."""
    seen: set[Path] = set()
    while process.is_alive() and len(seen) < count:
        seen |= set(directory.glob("checkpoints/*/*.orbax-checkpoint-tmp*"))


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_run_ends_bit_identical(trial, start, reference, tmp_path):
    expected, whole = reference
    draw = random.Random(trial)
    directory = tmp_path / "run"
    process = start(directory)
    if trial < INSIDE_A_SAVE:
        wait_for_save(process, directory, draw.randint(1, 20))
    else:
        process.join(draw.uniform(0, whole))
    process.kill()
    process.join()
    assert trial >= INSIDE_A_SAVE or process.exitcode == -signal.SIGKILL
    finish(start(directory), directory)
    assert digests(directory) == expected


def test_sigterm_saves_and_says_how_to_resume(start, reference, tmp_path):
    directory = tmp_path / "run"
    process = start(directory)
    wait_for_save(process, directory, 3)
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    said = directory.with_suffix(".log").read_text()
    assert "run the same command again to resume" in said
    finish(start(directory), directory)
    assert digests(directory) == reference[0]
