# SPDX-License-Identifier: Apache-2.0
"""Several processes train as one does; when one dies all end, and a restart resumes."""

import importlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel, train
from jaxdistill.data import Batches
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.parallel import processes
from jaxdistill.teachers import fingerprints, knowledge
from jaxdistill.train import (
    Checkpoints,
    Evaluator,
    RunDir,
    fit,
    init_state,
    make_train_step,
    scan_train,
)

pytestmark = pytest.mark.usefixtures("any_teacher")

STEPS, EVERY, BATCH, SIZE, HEARTBEAT = 50, 10, 16, 90, 5
SAVES = range(EVERY, STEPS + 1, EVERY)
KINDS = {2: ("mesh", "fsdp", "pmap"), 4: ("mesh",)}
MLP = models.MLP((32, 4))
CPUS = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"


def examples() -> dict:
    draw = np.random.default_rng(0)
    return {
        "inputs": draw.normal(size=(SIZE, 8)).astype(np.float32),
        "labels": draw.integers(0, 4, SIZE).astype(np.int32),
    }


def train_job(kind: str, directory: Path | None = None, pause: float = 0.0, step=None):
    """50 steps of SGD under a live teacher; the state, and its scores on all data."""
    partitioner, data = parallel.choose(kind), examples()
    if kind == "fsdp":
        partitioner = parallel.fsdp(
            rule=parallel.cut_width(len(partitioner.devices), smallest=1)
        )
    student, optimizer = models.student(MLP), optax.sgd(0.3, momentum=0.9)
    batch = next(Batches(SIZE, BATCH).iterate(data, 0))
    state = init_state(jax.random.key(0), student, optimizer, batch)
    other = init_state(jax.random.key(1), student, optimizer, batch)
    teacher = partitioner.place(models.trained(MLP, other))
    objective = combine({"hard": (0.5, hard_labels()), "soft": (0.5, soft_targets())})
    evaluator = Evaluator(partitioner, data)

    def evaluate(placed):
        time.sleep(pause)
        return evaluator(models.trained(MLP, placed), teacher)

    state = fit(
        state,
        step
        or partitioner.compile(
            scan_train(make_train_step(student, objective, optimizer)), batch_axis=1
        ),
        partitioner=partitioner,
        examples=partitioner.replicate(data),
        batches=Batches(SIZE, BATCH),
        steps=STEPS,
        teacher=teacher,
        evaluate=evaluate,
        evaluate_every=EVERY,
        checkpoints=directory and Checkpoints(directory / kind, best="accuracy"),
        run_dir=directory and RunDir(directory, {}),
        name=kind,
        progress=False,
    )
    return jax.device_get(state), evaluate(partitioner.place(state))


def exhausted(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")


def attempt(function) -> str:
    try:
        function()
    except ValueError as error:
        return str(error)
    return ""


def work(job, directory: Path, compiled: Path, port: int, count: int, index: int):
    """One of the processes: begins and ends as a script does, with a job between."""
    run_dir = os.open(
        directory / f"{index}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND
    )
    os.dup2(run_dir, 1)
    os.dup2(run_dir, 2)
    os.environ["XLA_FLAGS"] = CPUS
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
    os.environ["JAX_NUM_PROCESSES"] = str(count)
    os.environ["JAX_PROCESS_ID"] = str(index)
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    processes.start(True, {"count": count}, heartbeat_seconds=HEARTBEAT)
    knowledge.doubt = lambda *_: None  # as `any_teacher` does in one process
    try:
        job(directory, index)
    finally:
        jax.distributed.shutdown()  # what JAX does when a script ends


def train_every_way(directory: Path, index: int) -> None:
    """And what is refused; the findings of each process go into a file of its own."""
    count, partitioner = jax.process_count(), parallel.mesh()

    def fail():
        raise ValueError("on purpose")

    own, rows = partitioner.own(BATCH), np.arange(BATCH, dtype=np.float32)
    squares = partitioner.compile(lambda a, b, x: (x**2).sum(), donate=False)
    settings = {"seed": 0, "learning_rate": 0.1 if index == 1 else 0.2}
    found: dict = {
        "own": [own.start, own.stop],
        "squares": float(partitioner.fetch(squares(0, 0, partitioner.join(rows[own])))),
        "settings": attempt(lambda: processes.start(True, settings)),
        "examples": attempt(lambda: processes.check_examples(count - 1)),
        "first": attempt(lambda: processes.on_first(fail)),
        "jit": attempt(lambda: parallel.choose("jit")),
        "batch": attempt(lambda: partitioner.check_batch(count)),
        "memory": attempt(lambda: train_job("mesh", step=exhausted)),
    }
    for kind in KINDS[count]:
        state, scores = train_job(kind, directory)
        found[kind] = [fingerprints.of_tree(state.params), scores]
        if index == 0:
            np.savez(directory / f"{kind}.npz", *jax.tree.leaves(state.params))
    (directory / f"found{index}.json").write_text(json.dumps(found))


def train_slowly(directory: Path, index: int) -> None:
    state, scores = train_job("mesh", directory, pause=0.2)
    found = {"mesh": [fingerprints.of_tree(state.params), scores]}
    (directory / f"found{index}.json").write_text(json.dumps(found))


SCRIPTS = {
    "article_study": "--data digits --validation 200 --teacher 8 --student 4 "
    "--epochs 1 --trials 1 --seeds 1",
    "hyperparameters": "--temperature 1 4 --soft-weight 0 0.9 --learning-rate 1e-2 "
    "--epochs 2 --seeds 2 --batch-size 48",
    "precision": "--epochs 1 --seeds 1 --teacher 8 --student 4 --top-k 3",
}


def run_scripts(directory: Path, index: int) -> None:
    """Each script as its command starts it, but for the start made already."""
    found = {}
    for name, flags in SCRIPTS.items():
        script = importlib.import_module(f"experiments.{name}")
        where = ["--run-dir", str(directory / name), "--distributed", "--no-progress"]
        found[name] = script.main([*flags.split(), *where])
    (directory / f"found{index}.json").write_text(json.dumps(found, default=str))


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Starts a job in so many processes; imports and compilations are made once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    compiled = tmp_path_factory.mktemp("compilations")

    def start(job, directory: Path, count: int):
        directory.mkdir(exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        shared = (job, directory, compiled, port, count)
        started = [
            context.Process(target=work, args=(*shared, index))
            for index in range(count)
        ]
        for process in started:
            process.start()
        return started

    return start


def log(directory: Path, index: int) -> str:
    return (directory / f"{index}.log").read_text()


def finish(started, directory: Path, seconds: int = 90) -> list[dict]:
    """What each process found, once all have ended well."""
    for index, process in enumerate(started):
        process.join(seconds)
        assert process.exitcode == 0, log(directory, index)[-3000:]
    files = [directory / f"found{index}.json" for index in range(len(started))]
    return [json.loads(file.read_text()) for file in files]


SLOW = pytest.mark.slow


@pytest.fixture(scope="module", params=[pytest.param(n, marks=SLOW) for n in (2, 4)])
def trained(request, begin, tmp_path_factory):
    """A finished run's directory, and what each of its processes found."""
    directory = tmp_path_factory.mktemp("trained")
    started = begin(train_every_way, directory, request.param)
    return directory, finish(started, directory)


@lru_cache
def one_process():
    return train_job("mesh")


def test_several_processes_equal_one(trained):
    directory, found = trained
    expected, expected_scores = one_process()
    for kind in KINDS[len(found)]:
        leaves = np.load(directory / f"{kind}.npz").values()
        pairs = zip(leaves, jax.tree.leaves(expected.params), strict=True)
        assert max(abs(a - b).max() for a, b in pairs) <= 1e-6
        for digest, scores in (process[kind] for process in found):
            assert digest == found[0][kind][0]
            assert scores == found[0][kind][1]
        assert found[0][kind][1]["kl"] == pytest.approx(expected_scores["kl"], rel=1e-5)


def test_one_process_writes(trained):
    directory, found = trained
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    expected = [(kind, s) for kind in KINDS[len(found)] for s in SAVES]
    assert [(record["fit"], record["step"]) for record in records] == expected
    env = json.loads((directory / "env.json").read_text())
    assert env["devices"]["processes"] == len(found)
    assert env["devices"]["count"] == 2 * len(found)


def test_each_process_puts_its_own_rows(trained):
    _, found = trained
    each = BATCH // len(found)
    owned = [process["own"] for process in found]
    assert owned == [[i * each, (i + 1) * each] for i in range(len(found))]
    expected = float(sum(i**2 for i in range(BATCH)))
    assert [process["squares"] for process in found] == [expected] * len(found)


def test_bad_input_gives_every_process_one_sentence(trained):
    _, found = trained
    count = len(found)
    for process in found:
        assert process["settings"] == (
            "process 1 was started with learning_rate 0.1, process 0 with 0.2; give "
            "all the same flags"
        )
        assert process["examples"] == (
            f"{count - 1} examples do not go round {count} processes; start at most "
            f"{count - 1}"
        )
        assert process["jit"].startswith("--parallel jit runs on one device, and")
        assert process["first"].endswith("on purpose")
        assert process["batch"] == (
            f"a batch of {count} does not divide over {2 * count} devices; take a "
            f"multiple of {2 * count}"
        )
        assert process["memory"] == (
            f"out of device memory: a batch of {BATCH} does not fit on a cpu; try "
            f"{BATCH // 2}, which is a guess, or more micro-batches"
        )


def wait_for(path: Path, started) -> None:
    while not path.exists():
        assert all(process.is_alive() for process in started), "ended too early"
        time.sleep(0.01)


def test_when_one_is_killed_all_end_and_a_restart_resumes(begin, trained, tmp_path):
    """Of two the coordinator, after one was told to leave; of four the third."""
    _, found = trained
    count, victim = len(found), {2: 0, 4: 2}[len(found)]
    if count == 2:
        sigterm_to_one(begin, tmp_path)
    started = begin(train_slowly, tmp_path, count)
    wait_for(tmp_path / "mesh" / "30", started)
    started[victim].kill()
    began = time.monotonic()
    survivors = [index for index in range(count) if index != victim]
    for index in survivors:
        started[index].join(60)
        assert started[index].exitcode not in (0, None)
        said = log(tmp_path, index)
        assert f"the others end within {HEARTBEAT} s: start all of them again" in said
        # Whichever comes first: a connection breaks, a heartbeat is missed, or Gloo
        # meets what another survivor sent before it ended and aborts the process.
        assert (
            "one of them has died or left; start all of them again to resume" in said
            or "This most likely indicates that another task died" in said
            or (count > 2 and "terminate called" in said and "gloo" in said)
        ), said[-2000:]
    assert time.monotonic() - began < 4 * HEARTBEAT
    assert not (tmp_path / "mesh" / "50").exists()
    again = finish(begin(train_slowly, tmp_path, count), tmp_path)
    assert [process["mesh"] for process in again] == [p["mesh"] for p in found]


def sigterm_to_one(begin, directory: Path) -> None:
    started = begin(train_slowly, directory, 2)
    wait_for(directory / "mesh" / "10", started)
    started[1].terminate()
    for process in started:
        process.join(60)
        assert process.exitcode == 128 + signal.SIGTERM
    said = "SIGTERM: mesh saved at step"
    assert [log(directory, index).count(said) for index in (0, 1)] == [1, 0]


@pytest.mark.slow
def test_scripts_train_together_and_the_first_writes(begin, tmp_path):
    found = finish(begin(run_scripts, tmp_path, 2), tmp_path, seconds=300)
    # What the models cost is timed in each.
    search, other = (process["article_study"]["digests"] for process in found)
    assert search == other
    for name in ("hyperparameters", "precision"):
        assert found[0][name] == found[1][name]
    for name in SCRIPTS:
        said = f"run directory: {tmp_path / name}"
        assert [log(tmp_path, index).count(said) > 0 for index in (0, 1)] == [1, 0]
    assert re.search(r"precision/float32 \(first 16 steps after", log(tmp_path, 0))
    for path in tmp_path.glob("**/metrics.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [(record["fit"], record["step"]) for record in records]
        assert len(steps) == len(set(steps)) > 0


@dataclass(frozen=True)
class OneProcess:
    compilation_cache: bool = False


@dataclass(frozen=True)
class Several(OneProcess):
    distributed: bool = False


def test_a_command_line_starts_the_processes(monkeypatch):
    given: list = []
    monkeypatch.setattr(processes, "start", lambda *a: given.append(a))
    for flags in ([], ["--distributed"]):
        train.parse({"": Several()}, flags, "")
    settings = {"compilation_cache": False}
    assert given == [(on, {**settings, "distributed": on}) for on in (False, True)]


@pytest.mark.parametrize(
    ("config", "flags", "environment", "sentence"),
    [
        (Several(), ["--distributed"], {}, "error: --distributed needs JAX_COORD"),
        (
            OneProcess(),
            [],
            {"SLURM_STEP_NUM_TASKS": "4"},
            "error: this script is one process's, and several were started; start one",
        ),
    ],
)
def test_a_command_line_refuses(config, flags, environment, sentence, monkeypatch):
    for name in processes.BY_HAND:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=sentence):
        train.parse({"": config}, flags, "")


def test_a_process_alone_may_still_choose_its_devices():
    code = "from jaxdistill.parallel import processes; import jax; "
    code += "processes.start(False, {}); "
    code += "jax.config.update('jax_num_cpu_devices', 3); print(jax.device_count())"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "not set: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (
            {"JAX_NUM_PROCESSES": "2"},
            "not set: JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID must be a number from 0 to JAX_NUM_PROCESSES - 1, got '2' "
            "of '2'",
        ),
    ],
)
def test_a_start_by_hand_names_what_is_missing(environment, sentence, monkeypatch):
    for name in processes.BY_HAND:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(processes.ProcessError, match=sentence):
        processes.start(True, {})


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script, no task of it
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": "cpu"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_on_a_cluster_it_starts_by_itself(environment, joins, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls: list = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    processes.start(False, {})
    assert calls == [()] * joins


def test_one_process_agrees_with_itself():
    processes.start(False, {"seed": 0})
    processes.check_examples(1)
    assert processes.is_first()
    assert processes.on_first(lambda: 3) == 3
    assert processes.any_process(True)
    assert not processes.any_process(False)
