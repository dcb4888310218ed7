# SPDX-License-Identifier: Apache-2.0
"""Out of device memory: one sentence, with a batch that does fit by the compiler."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.data import Batches
from jaxdistill.objectives import combine, hard_labels
from jaxdistill.study import sweep
from jaxdistill.train import (
    OutOfMemory,
    fit,
    init_state,
    make_train_step,
    memory,
    scan_train,
)

SIZE, BATCH, WIDTH = 1024, 256, 96
FULL = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


def exhausted(*_):
    raise jax.errors.JaxRuntimeError(FULL)


class Job:
    """A small training on some way's devices; only their limit is made up."""

    def __init__(self, kind, **settings):
        draw = np.random.default_rng(0)
        self.examples = {
            "inputs": draw.normal(size=(SIZE, WIDTH)).astype(np.float32),
            "labels": draw.integers(0, 4, SIZE).astype(np.int32),
        }
        student = models.student(models.MLP((WIDTH, 4)))
        optimizer, objective = optax.sgd(0.1), combine({"hard": (1.0, hard_labels())})
        first = next(Batches(SIZE, BATCH).iterate(self.examples, 0))
        if kind == "trials":
            trials = sweep.grid(seed=range(4))
            self.partitioner = sweep.choose(trials, jax.devices()[:2])
            step = sweep.make_sweep_step(
                student, lambda c: objective, lambda c: optimizer
            )
            self.step = sweep.compile_sweep(self.partitioner, step, trials)
            self.state = sweep.init_states(trials, student, lambda c: optimizer, first)
            return
        devices = jax.devices()[: 1 if kind == "jit" else 2]
        self.partitioner = parallel.choose(kind, devices)
        step = make_train_step(student, objective, optimizer, **settings)
        self.step = self.partitioner.compile(scan_train(step), batch_axis=1)
        self.state = init_state(jax.random.key(0), student, optimizer, first)

    def given(self, size):
        """A dispatch's arguments, placed."""
        rows = Batches(SIZE, size).indices(0, 2)
        examples = self.partitioner.replicate(self.examples)
        return (
            self.partitioner.place(self.state),
            (None, examples),
            self.partitioner.split(rows, 1),
        )

    def needs(self, size):
        """Bytes of the program itself, from arrays: none of `memory`'s shapes."""
        program = self.step
        if not hasattr(program, "lower"):
            program = jax.jit(program, donate_argnums=0)
        found = program.lower(*self.given(size)).compile().memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            + found.generated_code_size_in_bytes
            - found.alias_size_in_bytes
        )

    def fails(self, batch=BATCH, **stats):
        """What `fit` says when the devices, with these statistics, are full."""

        class Full:
            """The step as it compiles, not as it runs."""

            lower = getattr(self.step, "lower", jax.jit(self.step).lower)
            __call__ = staticmethod(exhausted)

        device = SimpleNamespace(
            process_index=0,
            platform="tpu",
            device_kind="TPU v9",
            memory_stats=lambda: stats or None,
        )
        count = len(self.partitioner.devices)
        with pytest.raises(OutOfMemory) as raised:
            fit(
                self.state,
                Full(),
                partitioner=replace(self.partitioner, devices=(device,) * count),
                examples=self.partitioner.replicate(self.examples),
                batches=Batches(SIZE, batch),
                steps=4,
                progress=False,
            )
        assert FULL in str(raised.value.__cause__)
        return str(raised.value)


@pytest.mark.parametrize("kind", ["jit", "mesh", "fsdp", "pmap", "trials"])
def test_names_nearly_the_largest_batch_that_fits(kind):
    """The limit is what the program takes at 192."""
    job = Job(kind)
    limit = job.needs(192)
    fits = memory.largest(
        job.partitioner, job.step, job.given(BATCH), {"bytes_limit": limit}
    )
    assert 176 <= fits <= 208
    assert fits % (1 if kind == "trials" else len(job.partitioner.devices)) == 0
    assert job.needs(fits) <= 1.01 * limit


@pytest.mark.parametrize("limit", [10_000_000, 9_000_000, 3_000_000, 900_000])
def test_the_count_is_right_where_the_need_has_a_floor(limit, monkeypatch):
    """Whatever the batch, the gradients take 800,000: what fits is never too much."""
    job, asked = Job("jit"), []

    def needs(size):
        return 100_000 + max(800_000, 40_000 * size)

    def count(partitioner, step, given, size):
        asked.append(size)
        if size == 256 and limit == 9_000_000:  # as a TPU's compiler
            exhausted()
        return needs(size), 50_000

    monkeypatch.setattr(memory, "_needs", count)
    fits = memory.largest(
        job.partitioner, job.step, job.given(BATCH), {"bytes_limit": limit}
    )
    assert needs(fits) <= limit < needs(2 * fits + 2)
    assert len(asked) <= 6


def test_fit_says_it_in_one_sentence():
    job = Job("jit")
    limit = job.needs(192)
    said = job.fails(bytes_limit=limit)
    start, found, rest = said.partition(" would, or take more micro-batches")
    assert (found, rest) == (" would, or take more micro-batches", "")
    start, fits = start.split("; by the compiler's count ")
    assert start == (
        "out of device memory: a batch of 256 does not fit on a TPU v9 of "
        f"{limit / 1e9:.3g} GB"
    )
    assert 176 <= int(fits) <= 208


def test_what_else_lies_on_the_device_stays_there():
    job = Job("jit")
    given, limit = job.given(BATCH), job.needs(192)
    alone = memory.largest(job.partitioner, job.step, given, {"bytes_limit": limit})
    arguments = sum(x.nbytes for x in jax.tree.leaves(given))
    stats = {"bytes_limit": limit + 10**9, "bytes_in_use": arguments + 10**9}
    assert abs(memory.largest(job.partitioner, job.step, given, stats) - alone) <= 16


def test_an_unknown_limit_gives_a_guess_that_says_so():
    said = "out of device memory: a batch of 256 does not fit on a TPU v9; try 128, "
    assert Job("jit").fails() == said + "which is a guess, or more micro-batches"


def test_a_count_that_cannot_be_right_gives_a_guess():
    assert "; try 128, which is a guess, or more" in Job("jit").fails(bytes_limit=10**9)


def test_parts_that_do_not_divide_give_a_guess():
    """A batch of 6 in 3 parts: of 2 there are no 3."""
    job = Job("mesh", micro_batches=3)
    said = job.fails(batch=6, bytes_limit=1000)
    assert said.endswith("try 2, which is a guess, or more micro-batches")


@pytest.mark.parametrize(("batch", "limit"), [(BATCH, 1000), (1, 10**9)])
def test_where_no_batch_fits_it_says_so(batch, limit):
    said = Job("jit").fails(batch=batch, bytes_limit=limit)
    assert said.endswith(
        "GB, nor would a smaller one; take a smaller model, remat or fsdp"
    )


def test_a_sweep_may_also_take_fewer_trials():
    assert Job("trials").fails().endswith("try 128, which is a guess, or fewer trials")


def test_another_failure_comes_out_as_itself():
    job = Job("jit")

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fuse blew")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fuse blew"):
        fit(
            job.state,
            broken,
            partitioner=job.partitioner,
            examples=job.partitioner.replicate(job.examples),
            batches=Batches(SIZE, BATCH),
            steps=4,
            progress=False,
        )
