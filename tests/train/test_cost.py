# SPDX-License-Identifier: Apache-2.0
"""Costs against closed forms; timing that is fair to both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from jaxdistill import models, teachers
from jaxdistill.teachers import fingerprints
from jaxdistill.train import cost as benchmark

WIDTHS = (64, 128, 32, 10)
WEIGHTS = sum(a * b for a, b in zip(WIDTHS, WIDTHS[1:], strict=False))
BIASES = sum(WIDTHS[1:])


@pytest.fixture(scope="module")
def model():
    module = models.MLP(WIDTHS[1:])
    variables = module.init(jax.random.key(0), np.zeros((1, WIDTHS[0])))
    return teachers.live(module, variables)


def batch(size: int) -> dict:
    inputs = np.random.default_rng(0).normal(size=(size, WIDTHS[0])).astype(np.float32)
    return {"inputs": inputs, "mask": np.ones(size, np.float32)}


def test_parameters_are_weights_and_biases(model):
    assert benchmark.parameters(model.variables) == WEIGHTS + BIASES
    statistics = {"batch_stats": {"mean": np.zeros(1000)}}
    both = {**model.variables, **statistics}
    assert benchmark.parameters(both) == WEIGHTS + BIASES


@pytest.mark.parametrize("size", [1, 16])
def test_flops_are_two_a_weight_and_example(model, size):
    """Beside the products, XLA counts biases and ReLUs: no more than three a unit."""
    forward = jax.jit(lambda model, batch: model(batch).logits)
    compiled = forward.lower(model, batch(size)).compile()
    extra = benchmark.flops(compiled) - 2 * size * WEIGHTS
    assert 0 <= extra <= 3 * size * BIASES


def text(length: int) -> dict:
    ids = np.ones((1, length), np.int32)
    return {"inputs": {"input_ids": ids}, "mask": np.ones(1, np.float32)}


def forward_of(module, batch):
    variables = module.init(jax.random.key(0), batch["inputs"])
    return benchmark.compile_forward(teachers.live(module, variables), batch)


def test_each_turn_of_a_loop_counts():
    """An LSTM's step is four products of its input and four of its state."""
    width, hidden, length = 12, 16, 20
    module = models.BiLSTM(50, width, hidden, 3)
    found = forward_of(module, text(length)).flops
    loops = 2 * length * 2 * 4 * hidden * (width + hidden)
    dense = 2 * (2 * hidden * hidden + 3 * hidden)
    assert loops + dense < found < 1.15 * (loops + dense)


@pytest.mark.slow
def test_scanned_layers_count_as_a_row_of_them():
    size = models.TransformerConfig(50, 64, 5, 2, positions=20)
    counts = [
        forward_of(models.BertClassifier(models.Encoder(size, scan=scan), 3), text(20))
        for scan in (False, True)
    ]
    assert counts[1].flops == pytest.approx(counts[0].flops, rel=0.1)


def test_cost(model):
    cost = benchmark.cost(model, batch(3), repeats=5)
    assert set(cost) == {"parameters", "flops", "latency_us", "bytes"}
    assert cost["parameters"] == WEIGHTS + BIASES
    assert cost["flops"] == pytest.approx(2 * WEIGHTS, rel=0.05)  # of one example
    assert cost["bytes"] == len(benchmark.weights(model.variables))
    assert 0 < cost["latency_us"] < 1e6


def test_latency_is_the_median_of_the_best_round(model, monkeypatch):
    times = iter([5.0, 6.0, 7.0, 1.0, 2.0, 9.0, *[8.0] * 9])
    monkeypatch.setattr(benchmark, "seconds", lambda _: next(times))
    assert benchmark.cost(model, batch(1), repeats=3)["latency_us"] == 2e6


def test_weights_come_back_bit_for_bit(model):
    stored = benchmark.weights(model.variables)
    assert 4 * (WEIGHTS + BIASES) < len(stored) < 4 * (WEIGHTS + BIASES) + 500
    restored = serialization.msgpack_restore(stored)
    assert fingerprints.of_tree(restored) == fingerprints.of_tree(model.variables)
    again = teachers.live(model.module, restored)
    np.testing.assert_array_equal(again(batch(4)).logits, model(batch(4)).logits)


def test_memory_is_the_arrays(model):
    step = jax.jit(lambda x, y: x + y.sum(), donate_argnums=0)
    one = jax.ShapeDtypeStruct((1000,), jnp.float32)
    memory = benchmark.memory(step.lower(one, one).compile())
    assert memory["arguments"] == 8000
    assert memory["outputs"] == memory["aliased"] == 4000


def test_interleaved_jobs_take_turns_both_ways():
    calls: list[str] = []
    jobs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = benchmark.interleave(jobs, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # the first to warm up
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleaved_seconds_are_each_jobs_own(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def takes(seconds):
        def job():
            clock[0] += seconds

        return job

    times = benchmark.interleave({"slow": takes(3.0), "fast": takes(2.0)}, rounds=2)
    assert times == {"slow": [3.0, 3.0], "fast": [2.0, 2.0]}
    ratios = benchmark.ratios(times["slow"], times["fast"])
    assert ratios == {"median": 1.5, "min": 1.5, "max": 1.5}


def test_ratios_are_pairwise():
    """The median of ratios, not the ratio of medians: both sides of a round drifted."""
    ratios = benchmark.ratios([2.0, 30.0, 400.0], [1.0, 10.0, 100.0])
    assert ratios == {"median": 3.0, "min": 2.0, "max": 4.0}
    with pytest.raises(ValueError, match="zip"):
        benchmark.ratios([1.0], [1.0, 2.0])
