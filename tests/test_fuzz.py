# SPDX-License-Identifier: Apache-2.0
"""Random misuse: the result equals the untouched one, or there is one sentence.

Examples with one thing wrong go into every way in; a small run is damaged, killed,
given other settings, started twice. `JAXDISTILL_DRAWN=10000 pytest tests/test_fuzz.py`
draws as many examples, and a hundredth of it as many runs. With `JAXDISTILL_KILLED=200`
as many processes are really killed.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from functools import cache
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdistill import data, models, parallel, teachers
from jaxdistill.data import Batches
from jaxdistill.study import Arm, Study
from jaxdistill.teachers import fingerprints
from jaxdistill.train import Evaluator, RunDir, run_dir
from tests.test_cases import EXAMPLES, HINTON, LABELS, MODULE, fit

DRAWN = int(os.environ.get("JAXDISTILL_DRAWN", "60"))
KILLED = int(os.environ.get("JAXDISTILL_KILLED", "0"))
SIZE = 48
SMALL = {name: values[:SIZE] for name, values in EXAMPLES.items()}
QUICK = settings(
    max_examples=DRAWN,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=DRAWN < 1000,
    database=None,
)


def is_a_sentence(error: BaseException) -> bool:
    """Whether a command would end in this error's message alone."""
    said = str(error)
    return run_dir._explains_itself(error, fit) and 0 < len(said) < 2000


@cache
def knowing():
    """A teacher's logits that know the labels, exactly."""
    return 5 * np.eye(10, dtype=np.float32)[SMALL["labels"]][:, None]


class TestExamples:
    """One thing wrong in examples that are right otherwise."""

    FAULTS = st.sampled_from(
        [
            "cut",
            "grow",
            "nan",
            "inf",
            "text",
            "list",
            "scalar",
            "off",
            "float",
            "one-hot",
            "column",
            "weights",
            "nothing",
            "gone",
            "extra",
            "object",
            "empty",
        ]
    )

    def wrong(self, fault: str, name: str, at: int) -> dict:
        examples = {**SMALL, "teacher": {"logits": knowing().copy()}}
        examples["labelled"] = np.ones(SIZE, np.float32)
        holder = examples["teacher"] if name == "logits" else examples
        array = np.array(holder[name])
        row = at % SIZE
        changed = {
            "cut": lambda: array[: max(1, row)],
            "grow": lambda: np.concatenate([array, array[: row + 1]]),
            "nan": lambda: self.put(array.astype(float), row, np.nan),
            "inf": lambda: self.put(array.astype(float), row, np.inf),
            "text": lambda: array.astype(str),
            "list": array.tolist,
            "scalar": lambda: array.reshape(-1)[0],
            "off": lambda: self.put(array, row, 17),
            "float": lambda: array + 0.5,
            "one-hot": lambda: np.eye(10)[examples["labels"]],
            "column": lambda: array[:, None],
            "weights": lambda: self.put(array, row, 3),
            "nothing": lambda: np.zeros_like(array),
            "object": lambda: array.astype(object),
            "empty": lambda: array[:0],
        }
        if fault == "gone":
            del holder[name]
        elif fault == "extra":
            examples["mask"] = (np.arange(SIZE) != row).astype(np.float32)
        else:
            holder[name] = changed[fault]()
        return examples

    @staticmethod
    def put(array: np.ndarray, row: int, value: float) -> np.ndarray:
        array[row] = value
        return array

    @QUICK
    @given(
        FAULTS,
        st.sampled_from(["inputs", "labels", "labelled", "logits"]),
        st.integers(0, SIZE - 1),
        st.sampled_from(["gate", "evaluator", "store", "batches", "outputs"]),
    )
    def test_a_way_in_refuses_it_or_does_not_mind(self, fault, name, at, way):
        examples = self.wrong(fault, name, at)
        try:
            if way == "gate":
                data.check_examples(examples, logits=(10,))
            elif way == "evaluator":
                Evaluator(parallel.jit(), examples)
            elif way == "store":
                other = {"data": "d", "split": "s", "transform": ""}
                teachers.store.describe(drawn_model(), examples, **other)
            elif way == "outputs":
                teachers.with_logits(drawn_model(), examples)
            else:
                next(Batches(SIZE, 12).iterate(examples, 0))
        except Exception as error:
            if not is_a_sentence(error):
                raise
            return
        # What passes has one length, and its masks and ids say what they may.
        leaves = jax.tree.leaves(examples)
        assert {len(leaf) for leaf in leaves} == {SIZE}
        assert np.isin(examples.get("labelled", 1), (0, 1)).all()
        if way == "gate":
            assert (examples.get("labels", np.zeros(1)) >= 0).all()
            assert np.all(examples.get("labels", 0) < 10)

    @settings(QUICK, max_examples=max(8, DRAWN // 100))
    @given(
        FAULTS,
        st.sampled_from(["inputs", "labels", "labelled", "logits"]),
        st.integers(0, SIZE - 1),
    )
    def test_a_training_refuses_it_or_ends_as_without(self, fault, name, at):
        examples = self.wrong(fault, name, at)
        try:
            found = fit(
                HINTON,
                examples,
                batches=Batches(SIZE, 12),
                steps=4,
                teacher=teachers.StoredTeacher(),
            )
        except Exception as error:
            if not is_a_sentence(error):
                raise
            return
        # Other values of a valid form are another training; unlike ones are not.
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))


@cache
def drawn_model():
    """A network as it is drawn."""
    module = models.MLP((4, 10))
    variables = module.init(jax.random.key(0), SMALL["inputs"][:1])
    return teachers.control(teachers.live(module, variables))


def small_run(path: Path, rate: float = 0.1, labels=None, interrupt: int | None = None):
    """Two arms of a small study; the digests of their students.

    Args:
      path: of the run.
      rate: of the optimizer, also among the run's settings.
      labels: others than usual.
      interrupt: the step of the student at which the training stops, as by Ctrl-C.
    """
    examples = SMALL if labels is None else {**SMALL, "labels": labels}
    student = Arm(MODULE, HINTON, optax.sgd(rate), "teacher")
    teacher = Arm(MODULE, LABELS, optax.adam(3e-2), steps=40)

    def validate(state_or_model, other=None):
        del other
        validate.calls += 1
        if interrupt is not None and validate.calls > interrupt:
            raise KeyboardInterrupt
        return {"accuracy": 1.0 / validate.calls}

    validate.calls = 0
    study = Study(
        RunDir(path, {"rate": rate}),
        examples=examples,
        test=lambda *_: {},
        validation=validate,
        partitioner=parallel.jit(),
        steps=6,
        batch_size=12,
        evaluations=3,
        progress=False,
    )
    known = study.train("teacher", teacher, 0)
    placed = study.partitioner.place(known)
    found = study.train("student", student, 0, placed)
    return [fingerprints.of_tree(x.variables) for x in (known, found)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run and its digests."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, small_run(path)


class TestRuns:
    """Sequences of damage, interruption, other settings and a second owner."""

    def do(self, path: Path, action: str, draw: random.Random) -> None:
        """One thing that happens to a run between two commands."""
        if action == "interrupt":
            with contextlib.suppress(KeyboardInterrupt):
                small_run(path, interrupt=draw.randrange(5))
            return
        if action == "settings":
            small_run(path, rate=0.2)
            return
        if action == "labels":
            small_run(path, labels=SMALL["labels"][::-1].copy())
            return
        files = (
            sorted(p for p in path.rglob("*") if p.is_file()) if path.exists() else []
        )
        if not files:
            return
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        if action == "delete":
            file.unlink()
        elif action == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif action == "flip" and content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            file.write_bytes(content)
        elif action == "garbage":
            file.write_bytes(b"\xff\x00garbage")

    @settings(QUICK, max_examples=max(4, DRAWN // 100))
    @given(
        st.lists(
            st.sampled_from(
                [
                    "interrupt",
                    "interrupt",
                    "settings",
                    "labels",
                    "delete",
                    "cut",
                    "flip",
                    "flip",
                    "garbage",
                ]
            ),
            min_size=1,
            max_size=4,
        ),
        st.integers(0, 2**32),
        st.booleans(),
    )
    def test_what_happens_to_a_run_is_mended_or_told(self, whole, actions, seed, begun):
        finished, digests = whole
        draw = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder) / "run"
            if begun:
                shutil.copytree(finished, path)
                (path / "lock.json").unlink(missing_ok=True)
            for action in actions:
                try:
                    self.do(path, action, draw)
                except Exception as error:
                    if not is_a_sentence(error):
                        raise
            try:
                found = small_run(path)
            except Exception as error:
                if not is_a_sentence(error):
                    raise
                return
            assert found == digests


SCRIPT = """
    import sys
    sys.path[:0] = {path!r}
    from tests.test_fuzz import small_run
    print(small_run({folder!r}))
"""


@pytest.mark.skipif(not KILLED, reason="JAXDISTILL_KILLED=200 kills so many processes")
def test_killed_processes_end_as_if_nothing_had_been(tmp_path):
    """SIGKILL at random moments, until the command has come to its end."""
    expected = str(small_run(tmp_path / "whole"))
    draw, kills, runs = random.Random(0), 0, 0
    while kills < KILLED:
        folder, runs = tmp_path / f"run-{runs}", runs + 1
        code = SCRIPT.format(path=[p for p in sys.path if p], folder=str(folder))
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
        for attempt in range(1000):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(command, text=True, **pipes)
            if attempt < 6 and kills < KILLED:
                try:  # most of it imports; where it trains is drawn
                    process.wait(draw.uniform(0.7, 1.7))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
            said, errors = process.communicate()
            if process.returncode == 0:
                assert said.strip() == expected
                break
            assert process.returncode == -signal.SIGKILL, errors
