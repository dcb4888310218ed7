# SPDX-License-Identifier: Apache-2.0
"""The speed benchmark: what it compares is the same work, and its tables are right."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.speed import bare_jax, loops, resnet_job
from experiments.speed import images as benchmark
from experiments.speed import report as speed_report
from experiments.speed.article_job import Job, Task
from jaxdistill.parallel.sealed import unseal

pytestmark = pytest.mark.slow

JOB = Job(
    data="digits", teacher=(32,), student=(16, 8), epochs=4, threads=1, progress=False
)


@pytest.fixture(autouse=True, scope="module")
def other_peoples_code():
    """Loops that are not ours broadcast as they like."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def task():
    return Task(JOB)


def test_the_scan_by_hand_trains_as_ours_does(task):
    variables, rows = task.drawn("teacher"), task.batches(0).indices(0, 20)
    state, step, data = loops.bare(task, variables)
    (params, _), metrics = jax.jit(bare_jax.scan(step))(state, *data, rows)
    live = task.partitioner.place(task.teacher(variables))
    ours = task.partitioner.place(task.fresh("student", 0))
    ours, found = task.step("student")(ours, (live, task.placed), rows)
    np.testing.assert_allclose(metrics[0], found["loss"][0], rtol=1e-4)
    for i, (kernel, bias) in enumerate(params):
        layer = ours.params[f"Dense_{i}"]
        np.testing.assert_allclose(kernel, layer["kernel"], atol=1e-4)
        np.testing.assert_allclose(bias, layer["bias"], atol=1e-4)


def test_ours_costs_what_the_scan_by_hand_does(task):
    """At most 1% more FLOPs and bytes, at the article's size but for the pixels."""
    wide = dataclasses.replace(JOB, teacher=(512, 256), student=(128, 64))
    programs = benchmark.programs(Task(wide), Task(wide).drawn("teacher"))
    by_hand, live = programs[loops.SCANNED], programs[loops.LIVE]
    for key in ("flops", "bytes"):
        assert live[key] < 1.01 * by_hand[key], key


def test_every_loop_trains(task):
    """Each epoch's loss falls: the loops do the work they are timed on."""
    variables = task.teacher_variables(0)
    jobs = {}
    for found, _ in (
        loops.torch_loops(task, variables, compiled=False),
        loops.keras_loops(task, variables),
        loops.bare_loops(task, variables),
        loops.our_loops(task, variables, students=4),
    ):
        jobs |= found
    assert {loops.STEPS, loops.SCANNED, loops.LIVE, loops.STORED} <= set(jobs)
    firsts = {}
    for name, epoch in jobs.items():
        first, last = epoch(), [epoch() for _ in range(3)][-1]
        if name.startswith(loops.SWEPT):
            assert len(last) == 4
            assert np.mean([c["nll"] for c in last]) < np.mean(
                [c["nll"] for c in first]
            )
        else:
            assert last < 0.9 * first, name
            firsts[name] = first
    # The same weights, teacher and loss; orders differ.
    assert max(firsts.values()) < 1.1 * min(firsts.values()), firsts


@pytest.mark.parametrize("students", [1, 4, 8, 16, 32])
def test_a_sweep_has_as_many_students_as_it_is_asked_for(students):
    trials = loops.cells_for(students)
    assert {len(values) for values in trials.values()} == {students}


def test_the_resnets_loops_do_the_same_work():
    """An epoch of one batch has no order: their losses are equal, step after step."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    jobs, _ = resnet_job.all_loops(Job(batch_size=16, threads=1), 16, compiled=False)
    assert len(jobs) == 4
    for rtol in (1e-5, 1e-3):
        found = [job() for job in jobs.values()]
        np.testing.assert_allclose(found, found[0], rtol=rtol)


def test_all_parts_and_their_tables(tmp_path):
    folder, saved = tmp_path / "run", tmp_path / "saved"
    benchmark.execute(
        benchmark.Config(
            smoke=True, run_dir=str(folder), save=saved, threads=1, progress=False
        )
    )
    summary = unseal((saved / "summary.json").read_bytes())
    assert set(summary) == {"loops", "resnet", "scaling", "cold"}
    assert {len(times) for times in summary["loops"]["seconds"].values()} == {2}
    assert summary["loops"]["programs"][loops.LIVE]["flops"] > 0
    accuracy = [r["accuracy"] for r in summary["cold"]["processes"]["jaxdistill"]]
    assert min(accuracy) > 0.2  # chance is 0.1
    for name in ("loops.md", "resnet.md", "scaling.md", "cold.md"):
        rows = [r for r in (saved / name).read_text().splitlines() if r[:1] == "|"]
        assert len(rows) > 2
    for name in ("loops.png", "resnet.png", "scaling.png"):
        assert (saved / name).read_bytes().startswith(b"\x89PNG")


def test_ratios_are_pair_by_pair_and_skipped_loops_are_said():
    part = {
        "seconds": {
            loops.TUNED: [2.0, 4.0, 9.0],
            loops.SCANNED: [1.0, 1.0, 1.0],
            loops.LIVE: [1.0, 2.0, 3.0],
            loops.STORED: [0.5, 1.0, 1.0],
            f"{loops.SWEPT}, each of 4": [0.25, 0.25, 0.25],
        },
        "skipped": {loops.KERAS: "needs it"},
        "programs": dict.fromkeys(
            (loops.SCANNED, loops.LIVE, loops.STORED), {"flops": 1e9, "bytes": 2e6}
        ),
        "peak_gflops": 100.0,
        "images": 10,
        "steps": 20,
        "batch_size": 2,
        "students": 4,
        "machine": {"threads": 2, "cpu": "a", "jax": "b", "torch": None, "keras": None},
    }
    text = speed_report.tables({"loops": part})["loops.md"]
    assert "| PyTorch, tuned | 4 (2 to 9) | 2 (2 to 3) |" in text
    assert "| Keras Distiller | needs it |" in text
    # 1 GFLOP a step, 20 steps in 2 s.
    assert "| jaxdistill, live | 1000.00 | 2.00 | 10 | 10 |" in text
    assert "FLOPs +0.00%, bytes +0.00%, time +100.0%" in text
    assert "2 threads of a, jax b." in text
