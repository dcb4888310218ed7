# SPDX-License-Identifier: Apache-2.0
"""One step, three ways to run it: the same gradients wherever the padding falls."""

from contextlib import nullcontext
from functools import lru_cache, partial

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxdistill import losses, models, parallel
from jaxdistill.data import Batches
from jaxdistill.models.convolution import convolve
from jaxdistill.objectives import combine, hard_labels, on_logits, soft_targets
from jaxdistill.train import fit, make_train_step, scan_train
from jaxdistill.types import Outputs
from tests.builders import (
    CLASSES,
    HARD_AND_SOFT,
    RECORDER,
    NormNet,
    TokenNet,
    largest_difference,
    live,
    make_batch,
    start,
    train_step,
)

pytestmark = pytest.mark.usefixtures("any_teacher")


class PixelNet(nn.Module):
    """Convolutions of stride 1 and 2 over inputs as images of 2 x 3 pixels."""

    @nn.compact
    def __call__(self, inputs, mask=None, train=False) -> Outputs:
        conv = partial(nn.Conv, conv_general_dilated=convolve, padding=1)
        x = nn.relu(conv(4, (3, 3))(inputs.reshape(-1, 2, 3, 1)))
        x = nn.relu(conv(5, (3, 3))(x))
        x = nn.relu(conv(6, (3, 3), strides=2)(x))
        return Outputs(nn.Dense(CLASSES)(x.reshape(x.shape[0], -1)))


MLP = models.MLP((8, CLASSES))
DROPPING = models.MLP((32, CLASSES), dropout=0.5)
# Of two devices the second, of eight the last four see nothing but padding.
MASK = np.array([1, 1, 1, 0, 1, 1, 0, 1] + 8 * [0])
KINDS = ["jit", "mesh", "pmap"]
SOME = [
    pytest.param(kind, count, id=f"{kind}-{count}")
    for kind in KINDS
    for count in ([1] if kind == "jit" else [1, 2, 8])
]


def choose(kind, count=1):
    return parallel.choose(kind, jax.devices()[:count])


def brevity(student, teacher, batch, step):
    """A term of one value per example, beside those of one per token."""
    return (student.logits**2).mean((1, 2)), batch["mask"]


MIXED = combine(
    {
        "tokens": (0.7, hard_labels()),
        "soft": (0.3, soft_targets(temperature=2.0)),
        "brevity": (0.1, brevity),
    }
)


@lru_cache
def problem(name, kind="jit"):
    """`(train step, state, teacher, batch)` of a case."""
    tokens = 3 if name == "mixed" else None
    batch = make_batch(0, 16, mask=MASK, tokens=tokens)
    batch["inputs"][MASK == 0] *= 100  # seen, if a mask were forgotten
    axis = parallel.AXIS if kind == "pmap" else None
    module = {
        "mlp": MLP,
        "batch norm": NormNet(axis),
        "mixed": TokenNet(),
        "dropout": DROPPING,
        "convolution": PixelNet(),
    }[name]
    # The state is drawn outside pmap, where the axis has no name.
    state = start(NormNet() if name == "batch norm" else module, batch)
    objective = MIXED if name == "mixed" else HARD_AND_SOFT
    step = make_train_step(models.student(module), objective, RECORDER)
    return step, state, live(TokenNet() if tokens else MLP, tokens=tokens), batch


@lru_cache
def after_a_step(name, kind, count=1):
    """The state (opt_state is the gradient) and metrics, on the host."""
    partitioner = choose(kind, count)
    step, state, teacher, batch = problem(name, kind)
    state, teacher, batch = (
        partitioner.place(state),
        partitioner.place(teacher),
        partitioner.split(batch),
    )
    return jax.device_get(
        partitioner.fetch(partitioner.compile(step)(state, teacher, batch))
    )


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        (name, kind, count)
        for name in ("mlp", "batch norm", "mixed", "dropout", "convolution")
        for kind in ("mesh", "pmap")
        for count in (1, 2, 8)
        if (name, kind) != ("dropout", "pmap")  # draws are each device's own there
    ],
)
def test_the_gradient_is_the_same_everywhere(name, kind, count):
    state, metrics = after_a_step(name, kind, count)
    expected, expected_metrics = after_a_step(name, "jit")
    assert largest_difference(state.opt_state, expected.opt_state) <= 1e-6
    assert state.step == expected.step == 1
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7),
        (metrics, state.params, state.model_state),
        (expected_metrics, expected.params, expected.model_state),
    )


def test_dropout_under_pmap_draws_on_each_device_its_own():
    """One row everywhere: equal draws would give equal gradients on 1 and 2 devices."""
    batch = {k: np.repeat(v[:1], 2, axis=0) for k, v in make_batch(0, 2).items()}
    sizes = []
    for count in (1, 2):
        partitioner = choose("pmap", count)
        rows = {key: value[:count] for key, value in batch.items()}
        state = partitioner.place(start(DROPPING, batch))
        step = partitioner.compile(train_step(DROPPING))
        state, _ = step(state, partitioner.place(live(MLP)), partitioner.split(rows))
        sizes.append(partitioner.fetch(state).opt_state)
    assert largest_difference(*sizes) > 0.01


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
@pytest.mark.parametrize("count", [1, 2])
def test_comparing_examples_within_devices_warns(kind, count):
    """Warnings are errors here: a mesh compares all, and so does one device."""
    partitioner, batch = choose(kind, count), make_batch(0, 8)
    objective = combine({"dist": (1.0, on_logits(losses.dist))})
    step = partitioner.compile(
        make_train_step(models.student(MLP), objective, RECORDER)
    )
    arguments = (
        partitioner.place(start(MLP, batch)),
        partitioner.place(live(MLP)),
        partitioner.split(batch),
    )
    said = r"^dist: .* 2 parts of a batch \(micro-batches 1, devices under pmap 2\)"
    warns = (kind, count) == ("pmap", 2)
    with pytest.warns(UserWarning, match=said) if warns else nullcontext():
        step(*arguments)


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_many_steps_in_one_dispatch_agree(kind):
    """Over a resident data set, the last batch of an epoch being padded."""
    examples = make_batch(3, 27)
    rows = Batches(27, 8, seed=1).indices(0, 6)

    def trained(partitioner):
        resident = partitioner.place({k: examples[k] for k in ("inputs", "labels")})
        step = partitioner.compile(scan_train(train_step(MLP)), batch_axis=1)
        state, teacher = (
            partitioner.place(start(MLP, examples)),
            partitioner.place(live(MLP)),
        )
        return partitioner.fetch(
            step(state, (teacher, resident), partitioner.split(rows, 1))
        )

    state, metrics = trained(choose(kind, 2))
    expected, expected_metrics = trained(choose("jit"))
    assert state.step == 6
    np.testing.assert_array_equal(metrics["hard"][1], rows["mask"].sum(1))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        (state.params, metrics),
        (expected.params, expected_metrics),
    )


@pytest.mark.parametrize("count", [1, 2, 8])
def test_pmap_adds_up_over_devices(count):
    partitioner = choose("pmap", count)

    def add(whole, scale, split, *, replica):
        local = scale * split["x"].sum(0)
        key = jax.random.key_data(replica.key(whole["rng"]))
        place = jnp.eye(count)[jax.lax.axis_index(parallel.AXIS)]
        keys = place[:, None] * key.astype(jnp.float32)[None]
        return replica.sum({"sum": local, "devices": jnp.ones(()), "keys": keys})

    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    whole = partitioner.place({"rng": jax.random.key(0)})
    found = partitioner.fetch(
        partitioner.compile(add)(
            whole, partitioner.place(2.0), partitioner.split({"x": x})
        )
    )
    np.testing.assert_allclose(found["sum"], 2 * x.sum(0), rtol=1e-5)
    assert found["devices"] == count
    assert len(np.unique(found["keys"], axis=0)) == count


@pytest.mark.parametrize(("kind", "count"), SOME)
def test_donation_does_not_eat_the_callers_arrays(kind, count):
    partitioner = choose(kind, count)
    mine = {"host": np.arange(4.0, dtype=np.float32), "device": jnp.arange(8.0)}
    step = partitioner.compile(
        lambda x, _, y, *, replica=None: jax.tree.map(lambda v: v + 1, x)
    )
    x, placed = partitioner.split(np.zeros(8, np.float32)), partitioner.place(mine)
    first = step(placed, None, x)
    second = step(first, None, x)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((placed, first)))
    np.testing.assert_array_equal(mine["host"], np.arange(4))
    np.testing.assert_array_equal(mine["device"], np.arange(8))
    np.testing.assert_array_equal(partitioner.fetch(second)["device"], np.arange(8) + 2)
    again = partitioner.compile(lambda x, _, y, *, replica=None: x, donate=False)
    again(second, None, x)
    np.testing.assert_array_equal(partitioner.fetch(second)["host"], np.arange(4) + 2)


def test_split_gives_each_device_its_rows():
    x = np.arange(24.0).reshape(2, 12)
    for kind in ("mesh", "pmap"):
        for axis, count in ((0, 2), (1, 4)):
            shards = choose(kind, count).split(x, axis).addressable_shards
            parts = [np.asarray(shard.data).reshape(-1) for shard in shards]
            expected = np.split(x, count, axis)
            np.testing.assert_array_equal(parts, [part.ravel() for part in expected])


@pytest.mark.parametrize("kind", ["mesh", "pmap"])
def test_a_batch_must_divide_over_the_devices(kind):
    partitioner = choose(kind, 8)
    partitioner.check_batch(16)
    with pytest.raises(
        ValueError,
        match="a batch of 12 does not divide over 8 devices; take a multiple",
    ):
        partitioner.check_batch(12)
    with pytest.raises(ValueError, match="does not divide over 8 devices"):
        fit(
            start(MLP, make_batch(0, 8)),
            None,
            partitioner=partitioner,
            examples=None,
            batches=Batches(24, 12),
            steps=2,
        )


def test_the_way_is_chosen_by_name():
    assert parallel.choose("auto", jax.devices()[:1]).name == "jit"
    assert parallel.choose("auto").name == "mesh"
    for kind in KINDS:
        assert choose(kind).name == kind
    assert len(parallel.choose("pmap").devices) == 8
    with pytest.raises(ValueError, match="auto, jit, mesh, fsdp or pmap, got 'ddp'"):
        parallel.choose("ddp")


@pytest.fixture
def compilations():
    """A list that grows by one with each compilation by XLA."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(("kind", "count"), [("jit", 1), ("mesh", 2)])
def test_nothing_compiles_after_the_first_epoch(kind, count, compilations):
    """Dispatches of 2 and 3 steps, five to an epoch, an evaluation each: the step is
    traced once per shape, and later epochs compile nothing."""
    partitioner, examples, traced, so_far = (
        choose(kind, count),
        make_batch(0, 38),
        [],
        [],
    )
    single = train_step(MLP, optax.adam(0.01))

    def counted(state, resident, rows):
        traced.append(rows["mask"].shape)
        return scan_train(single)(state, resident, rows)

    def evaluate(state):
        so_far.append(len(compilations))
        return {"norm": float(score(state.params))}

    score = jax.jit(optax.tree.norm)
    fit(
        start(MLP, examples, optax.adam(0.01)),
        partitioner.compile(counted, batch_axis=1),
        partitioner=partitioner,
        examples=partitioner.place({k: examples[k] for k in ("inputs", "labels")}),
        batches=Batches(38, 8),
        steps=20,
        teacher=partitioner.place(live(MLP)),
        evaluate=evaluate,
        steps_per_dispatch=3,
        progress=False,
    )
    assert sorted(traced) == [(2, 8), (3, 8)]
    assert so_far[0] >= 2
    assert len(so_far) == 4
    # The first evaluation itself compiles after it has looked.
    assert so_far[1] == so_far[-1] == len(compilations) == so_far[0] + 1
