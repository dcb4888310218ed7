# SPDX-License-Identifier: Apache-2.0
"""Students of stored outputs are the live teacher's, however the steps run."""

import json

import jax
import numpy as np
import optax
import pytest

from jaxdistill import models, parallel
from jaxdistill.study.stores import TeacherStores
from jaxdistill.teachers import StoredTeacher
from jaxdistill.train import make_train_step, scan_train
from tests.builders import (
    CLASSES,
    HARD_AND_SOFT,
    assert_identical,
    live,
    make_batch,
    start,
)
from tests.experiments.test_digits_mlp import run

pytestmark = pytest.mark.usefixtures("any_teacher")

SIZE, BATCH, SGD = 40, 8, optax.sgd(0.1)
EXAMPLES = {k: v for k, v in make_batch(0, SIZE).items() if k in ("inputs", "labels")}
TEACHER, STUDENT = live(models.MLP((7, CLASSES))), models.MLP((4, CLASSES))


@pytest.mark.parametrize(
    ("kind", "dtype", "parts"),
    [
        ("jit", None, 1),
        ("jit", None, 4),
        ("jit", "bfloat16", 1),
        ("mesh", None, 1),
        ("mesh", "bfloat16", 2),
        ("pmap", None, 1),
    ],
)
def test_a_step_is_bit_equal_to_live(kind, dtype, parts, tmp_path):
    way = parallel.choose(kind, jax.devices()[:2])
    step = make_train_step(
        models.student(STUDENT), HARD_AND_SOFT, SGD, micro_batches=parts, dtype=dtype
    )
    step = way.compile(scan_train(step), batch_axis=1)
    teacher = way.place(TEACHER)
    stores = TeacherStores(way, tmp_path, dtype, (), progress=False)
    stored = stores.of(EXAMPLES, teacher, BATCH // parts)
    assert stores.of(EXAMPLES, teacher, BATCH // parts) is stored

    def train(teacher, examples):
        index = np.random.default_rng(1).permutation(SIZE).reshape(-1, BATCH)
        rows = {"index": index, "mask": np.ones(index.shape, np.float32)}
        state = way.place(start(STUDENT, make_batch(0, 1), SGD))
        resident = (teacher, way.replicate(examples))
        return way.fetch(step(state, resident, way.split(rows, 1))[0]).params

    assert_identical(train(StoredTeacher(), stored), train(teacher, EXAMPLES))
    manifest = json.loads(next(tmp_path.glob("*/manifest.json")).read_text())
    found = [manifest[name] for name in ("batch_size", "devices", "compute")]
    assert found == [BATCH // parts, len(way.devices), dtype]


def test_other_devices_have_outputs_of_their_own(tmp_path):
    for count in (1, 2):
        way = parallel.choose("auto", jax.devices()[:count])
        stores = TeacherStores(way, tmp_path, None, (), progress=False)
        stores.of(EXAMPLES, way.place(TEACHER), BATCH)
        assert len(list(tmp_path.iterdir())) == count


@pytest.mark.slow
def test_a_script_stores_what_its_steps_compute(tmp_path):
    flags = ["--precision", "bfloat16", "--micro-batches", "3", "--epochs", "1"]
    flags += ["--evaluations", "1"]
    expected = run(tmp_path / "live", *flags)["digests"]
    assert run(tmp_path / "stored", *flags, "--stored")["digests"] == expected
    (store,) = (tmp_path / "stored" / "outputs").iterdir()
    manifest = json.loads((store / "manifest.json").read_text())
    assert (manifest["batch_size"], manifest["compute"]) == (16, "bfloat16")
