# SPDX-License-Identifier: Apache-2.0
"""One owner of a folder: a second process is told who it is, a dead one loses it."""

import builtins
import gc
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from jaxdistill.parallel import lock
from jaxdistill.parallel.lock import InUse, Lock
from jaxdistill.train import RunDir

HOLD = """
    import sys, time
    sys.path[:0] = {path!r}
    from jaxdistill.train import RunDir
    held = RunDir({folder!r}, {{}})
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has a run directory, and the directory."""
    code = HOLD.format(path=[p for p in sys.path if p], folder=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process, tmp_path / "run"
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_has_it(holder, capsys):
    process, folder = holder
    before = (folder / "config.json").read_bytes()
    sentence = rf"run directory {re.escape(str(folder))} is in use by process "
    with pytest.raises(InUse, match=rf"{sentence}{process.pid} on .* since "):
        RunDir(folder, {"other": 1})
    assert (folder / "config.json").read_bytes() == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    RunDir(folder, {})
    said = capsys.readouterr().err
    assert f"taken over from process {process.pid} on " in said


def test_a_process_may_open_its_own_again(tmp_path):
    one, two = RunDir(tmp_path, {}), RunDir(tmp_path, {})
    assert (tmp_path / lock.NAME).exists()
    del one
    gc.collect()
    assert (tmp_path / lock.NAME).exists()
    del two
    gc.collect()
    assert not (tmp_path / lock.NAME).exists()


def test_one_folder_has_one_lock_by_whichever_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    held = [RunDir(path, {}) for path in (tmp_path / "run", "run", "link", "./run")]
    assert {os.path.realpath(run_dir.path) for run_dir in held} == {
        str(tmp_path / "run")
    }


class TestHeartbeat:
    """Where the system has no locks, as in object storage."""

    @pytest.fixture(autouse=True)
    def no_locks(self, monkeypatch):
        real = builtins.__import__

        def refuse(name, *rest):
            if name == "fcntl":
                raise ImportError(name)
            return real(name, *rest)

        monkeypatch.setattr(builtins, "__import__", refuse)

    def other(self, folder, beat: float) -> None:
        owner = {"host": "h", "process": 7, "since": "now", "id": "x", "beat": beat}
        (folder / lock.NAME).write_text(json.dumps(owner))

    def test_a_living_owner_is_named(self, tmp_path):
        self.other(tmp_path, time.time() - 1)
        with pytest.raises(InUse, match="store .* in use by process 7 on h since now"):
            Lock(tmp_path, "store")

    def test_a_dead_one_loses_it(self, tmp_path, capsys):
        self.other(tmp_path, time.time() - 2 * lock.DEAD)
        with Lock(tmp_path, "store"):
            assert "taken over from process 7" in capsys.readouterr().err
            assert json.loads((tmp_path / lock.NAME).read_text())["id"] != "x"
        assert not (tmp_path / lock.NAME).exists()

    def test_of_two_at_once_the_later_has_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(
            lock.time, "sleep", lambda _: self.other(tmp_path, time.time())
        )
        with pytest.raises(InUse, match="process 7"):
            Lock(tmp_path, "store")
