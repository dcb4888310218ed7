# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are exact, keep the last and the best, and never restore damage."""

import gc
import random
import re
import subprocess
import sys
import textwrap
from importlib.metadata import version

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.teachers import fingerprints
from jaxdistill.train import CheckpointError, Checkpoints, init_state

# A restore that fails leaves Orbax's reads of other arrays unfinished; on the newest
# versions Python names them when it collects them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

BATCH = {"inputs": np.ones((2, 6), np.float32), "mask": np.ones(2, np.float32)}


def state_at(step: int, width: int = 5):
    student = models.student(models.MLP((width, 3)))
    state = init_state(jax.random.key(step), student, optax.adam(1e-3), BATCH)
    return state.replace(step=state.step + step)


def arrays(state):
    return fingerprints.of_tree(state.replace(rng=jax.random.key_data(state.rng)))


@pytest.fixture(autouse=True)
def leave_no_garbage():
    yield
    gc.collect()  # here, not in whatever test comes later


@pytest.fixture
def saved(tmp_path):
    """A folder with intact checkpoints of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "c", identity={"seed": 0})
    for step in (1, 2):
        checkpoints.save(state_at(step), {"epoch": step})
    checkpoints.close()
    return tmp_path / "c"


def reopen(folder, **identity):
    return Checkpoints(folder, identity={"seed": 0, **identity})


def test_restores_every_bit_and_the_position(saved):
    state, position = reopen(saved).restore(state_at(0))
    assert arrays(state) == arrays(state_at(2))
    assert position == {"epoch": 2}
    state, _ = reopen(saved).restore(state_at(0), step=1)
    assert arrays(state) == arrays(state_at(1))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "c").restore(state_at(0)) is None


def test_keeps_the_last_two_and_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", best="accuracy")
    for step, accuracy in enumerate([0.5, 0.9, 0.7, 0.8, 0.6], start=1):
        checkpoints.save(state_at(step), {}, {"accuracy": accuracy})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_no_flipped_bit_passes(saved):
    """One bit in each file of the newest step: exact, or the step before; not wrong."""
    draw, outcomes = random.Random(0), {1: 0, 2: 0}
    files = [p for p in (saved / "2").rglob("*") if p.is_file() and p.stat().st_size]
    originals = {path: path.read_bytes() for path in files}
    for path in files * 2:
        damaged = bytearray(originals[path])
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            state, _ = reopen(saved).restore(state_at(0))
        step = int(state.step)
        assert arrays(state) == arrays(state_at(step)), path
        outcomes[step] += 1
        for aside in (saved / "damaged").glob("*") if step == 1 else []:
            aside.rename(saved / "2")
        path.write_bytes(originals[path])
    assert outcomes[1] > 0, "no flip touched anything that matters"


def test_a_state_saved_before_any_evaluation_is_not_the_best(tmp_path):
    """SIGTERM saved one; every later save failed for want of its metric."""
    scores = [{}, {"accuracy": 0.5}, {"accuracy": 0.25}, {"accuracy": 0.125}]
    for step, metrics in enumerate(scores, 1):
        checkpoints = Checkpoints(tmp_path, best="accuracy")
        checkpoints.save(state_at(step), {"epoch": step}, metrics)
        checkpoints.close()
    checkpoints = Checkpoints(tmp_path, best="accuracy")
    assert checkpoints.steps() == [2, 3, 4]
    assert checkpoints.best_step() == 2
    assert int(checkpoints.restore(state_at(0))[0].step) == 4


def truncate(step):
    data = max(step.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def remove_a_file(step):
    max(step.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0).unlink()


def empty(step):
    for path in sorted(step.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def flip_an_array(step):
    for data in step.rglob("d/*"):  # not all of them are read
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)


def change_the_description(step):
    meta = step / "meta" / "metadata"
    assert '"epoch": 2' in meta.read_text()
    meta.write_text(meta.read_text().replace('"epoch": 2', '"epoch": 3'))


@pytest.mark.parametrize(
    "damage", [truncate, remove_a_file, empty, flip_an_array, change_the_description]
)
def test_damage_is_named_and_the_one_before_is_used(damage, saved):
    damage(saved / "2")
    checkpoints = reopen(saved)
    with pytest.warns(UserWarning, match=re.escape(f"{saved}/2 is damaged")):
        state, position = checkpoints.restore(state_at(0))
    assert arrays(state) == arrays(state_at(1))
    assert position == {"epoch": 1}
    assert [path.name for path in (saved / "damaged").iterdir()] == ["2-0"]
    checkpoints.save(state_at(2), {"epoch": 2})  # its place is free again
    checkpoints.close()
    assert reopen(saved).steps() == [1, 2]


def test_a_checkpoint_of_another_model_is_refused(saved):
    message = r"2 is of another model: \['opt_state'\].* is .*5.* there, .*7.* here"
    with pytest.raises(CheckpointError, match=message):
        reopen(saved).restore(state_at(0, width=7))


def test_a_checkpoint_of_another_run_is_refused(saved):
    message = "belongs to another run: teacher was None, is now 'abc' .jaxdistill "
    with pytest.raises(CheckpointError, match=message):
        reopen(saved, teacher="abc").restore(state_at(0))
    assert reopen(saved).steps() == [1, 2]


@pytest.mark.parametrize(
    ("old", "new"), [("mesh", "jit"), ("jit", "mesh"), ("pmap", "mesh")]
)
def test_restores_onto_another_number_of_devices(old, new, tmp_path):
    first = parallel.choose(old, jax.devices()[: 1 if old == "jit" else 4])
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(first.fetch(first.place(state_at(3))), {})
    checkpoints.wait()
    state, _ = checkpoints.restore(state_at(0))
    second = parallel.choose(new, jax.devices()[:2])
    placed = second.place(state)
    assert arrays(second.fetch(placed)) == arrays(state_at(3))
    assert len(placed.step.sharding.device_set) == len(second.devices)
    checkpoints.close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="cannot open checkpoint folder .*file/c"):
        Checkpoints(tmp_path / "file" / "c")


FULL_DISK = """
    import resource, signal, sys
    sys.path[:0] = {path!r}
    from tests.train.test_checkpoint import state_at
    from jaxdistill.train import CheckpointError, Checkpoints
    checkpoints = Checkpoints({folder!r})
    checkpoints.save(state_at(1), {{}})
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        checkpoints.save(state_at(2), {{}})
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    """No file may grow past 100 bytes: what a save meets when the disk is full."""
    folder = str(tmp_path / "c")
    code = textwrap.dedent(FULL_DISK).format(path=sys.path, folder=folder)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = r"could not write .*checkpoint.* \(disk full or no permission\?\): .+"
    assert re.search(message, done.stdout), done.stdout + done.stderr[-2000:]
    assert "steps kept: 1" in done.stdout
    if version("orbax-checkpoint") < "0.12":  # where TensorStore's futures print some
        assert "Traceback" not in done.stdout + done.stderr
    state, _ = Checkpoints(folder).restore(state_at(0))
    assert arrays(state) == arrays(state_at(1))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00"])
def test_whatever_a_file_becomes_the_step_before_is_found(saved, content):
    """Files of the newest step in turn, at opening too: none ends in a traceback."""
    draw = random.Random(1)
    files = [path for path in (saved / "2").rglob("*") if path.is_file()]
    for path in draw.sample(files, min(8, len(files))):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            checkpoints = Checkpoints(saved, identity={"seed": 0}, best="accuracy")
            state, _ = checkpoints.restore(state_at(0))
        assert arrays(state) == arrays(state_at(int(state.step)))
        for aside in (saved / "damaged").glob("*"):
            aside.rename(saved / "2")
        path.write_bytes(before)


def test_the_score_of_the_best_is_inside_the_checksum(tmp_path):
    """57 of 704 flips of Orbax's own file of metrics made another step the best."""
    checkpoints = Checkpoints(tmp_path, best="accuracy")
    for step, accuracy in enumerate([0.9, 0.5, 0.7], start=1):
        checkpoints.save(state_at(step), {}, {"accuracy": accuracy})
    checkpoints.close()
    assert not list(tmp_path.rglob("metrics"))
    meta = tmp_path / "1" / "meta" / "metadata"
    text = meta.read_text()
    assert '"accuracy": 0.9' in text
    meta.write_text(text.replace('"accuracy": 0.9', '"accuracy": 0.1'))
    assert Checkpoints(tmp_path, best="accuracy").best_step() == 3
