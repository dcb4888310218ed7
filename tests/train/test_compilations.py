# SPDX-License-Identifier: Apache-2.0
"""Compiled programs on disk: the second process finds what the first compiled."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdistill import train
from jaxdistill.train import run_dir

SCRIPT = """
import json, sys
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    compilation_cache: bool = True

from jaxdistill.train import parse
parse({"": Config()}, sys.argv[1:], "")
import jax, jax.monitoring
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
jax.jit(lambda x: x * 2)(1.0)
print(json.dumps({
    "folder": jax.config.values["jax_compilation_cache_dir"],
    "hits": sum(name == "/jax/compilation_cache/cache_hits" for name in seen),
}))
"""


def run(home: Path, *flags: str, **settings: str) -> dict:
    """What a script's process says of its cache, with a home of its own."""
    hidden = ("JAX_COMPILATION_CACHE", "JAX_ENABLE_COMPILATION", "JAX_PERSISTENT_CACHE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env = {**kept, "XDG_CACHE_HOME": str(home), **settings}
    command = [sys.executable, "-c", SCRIPT, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    return json.loads(done.stdout)


def test_the_second_process_compiles_nothing(tmp_path):
    first, second = run(tmp_path), run(tmp_path)
    assert first["folder"].startswith(str(tmp_path / "jaxdistill"))
    assert second["folder"] == first["folder"]
    assert first["hits"] == 0
    assert second["hits"] >= 1


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--no-compilation-cache"], {}),
        ([], {"JAX_ENABLE_COMPILATION_CACHE": "0"}),
    ],
)
def test_a_flag_or_the_users_setting_keeps_none(tmp_path, flags, settings):
    assert run(tmp_path, *flags, **settings) == {"folder": None, "hits": 0}
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_users_own_is_left_alone(tmp_path):
    own = str(tmp_path / "own")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=own)["folder"] == own
    assert not (tmp_path / "jaxdistill").exists()


@pytest.mark.parametrize("name", ["baselines.compare_pytorch", "speed.streaming"])
@pytest.mark.parametrize(("flags", "kept"), [([], 1), (["--no-compilation-cache"], 0)])
def test_timing_scripts_have_the_flag_too(name, flags, kept, monkeypatch):
    script = importlib.import_module(f"experiments.{name}")
    calls: list = []
    monkeypatch.setattr(run_dir, "enable_compilation_cache", lambda: calls.append(1))
    monkeypatch.setattr(train, "RunDir", lambda *_: sys.exit("the rest"))
    with pytest.raises(SystemExit):
        script.main([*flags, "--smoke"])
    assert len(calls) == kept
