# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.methods import table as method_table
from experiments.methods.methods import METHODS, Layers, Method
from jaxdistill import models, teachers
from jaxdistill.objectives import combine
from jaxdistill.parallel.sealed import unseal
from jaxdistill.study import compare, comparison
from jaxdistill.teachers import fingerprints
from jaxdistill.train import init_state, make_train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("any_teacher")]

TEACHER = models.ConvNet((4, 6), 8, 10)
STUDENT = models.ConvNet((2, 3), 5, 10)
IMAGES = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
BATCH = {
    "inputs": IMAGES,
    "labels": np.arange(8, dtype=np.int32),
    "mask": np.ones(8, np.float32),
}
SMALL = [
    *("--data", "digits", "--images", "96", "--validation", "100", "--epochs", "1"),
    *("--seeds", "1", "--batch-size", "32", "--parallel", "jit", "--no-progress"),
]


def test_layers_are_read_off_the_teacher():
    assert Layers.of(TEACHER, IMAGES[:1]) == ((0, 1), (1, 6), (2, 8))
    resnet = models.resnet_cifar(8, 10)
    images = jnp.zeros((1, 32, 32, 3))
    assert Layers.of(resnet, images) == ((0, 1, 2), (1, 32), (3, 64))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_step_that_teaches(name):
    """Its term is in the metrics, above 0, and moves the student."""
    method, layers = METHODS[name], Layers.of(TEACHER, IMAGES[:1])
    student = models.student(method.module(STUDENT, layers))
    # Halfway through a training whose twelfth is a warm-up.
    objective = combine(method.terms(method.weight, layers, 10))
    optimizer = optax.sgd(1e-3)
    state = init_state(jax.random.key(0), student, optimizer, BATCH)
    step = make_train_step(student, objective, optimizer)
    teacher = teachers.live(TEACHER, TEACHER.init(jax.random.key(1), IMAGES))
    moved, metrics = jax.jit(step)(state.replace(step=5), teacher, BATCH)
    terms = set(metrics) - {"hard", "loss"}
    assert bool(terms) == (name not in ("scratch", "label_smoothing"))
    for term in {"hard", *terms}:
        total, count = metrics[term]
        assert total > 0
        assert count == 8
    before, after = (jax.tree.leaves(s.params) for s in (state, moved))
    assert all((a != b).any() for a, b in zip(before, after, strict=True))


def test_a_search_and_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(method_table, "TIMED_STEPS", 2)
    folder = tmp_path / "run"
    argv = [*SMALL, "--run-dir", str(folder), "--methods", "kd"]
    methods = {name: METHODS[name] for name in ("scratch", "kd")}
    summary = method_table.main(argv)
    assert list(summary["arms"]) == ["teacher", *methods]
    scores = unseal((folder / "search.json").read_bytes())
    assert set(scores) == set(methods)
    for name, trials in scores.items():
        paper = METHODS[name].weight
        weights = [trial["weight"] for trial in trials]
        assert weights[:3] == [paper, paper / 3, paper * 3]
        assert len(set(weights)) == 5
    assert set(summary["paired"]["kd"]) == {"scratch"}
    assert summary["arms"]["kd"]["cost"]["step_ms"] > 0
    assert "| kd | " in capsys.readouterr().out
    again = method_table.main(argv)  # everything is there already
    assert again["digests"] == summary["digests"]


def test_the_ensemble_has_the_seeds_own_teacher(tmp_path):
    config = method_table.Config(data="digits", images=96, validation=100, epochs=1)
    config = replace(config, run_dir=str(tmp_path), progress=False)
    task = method_table.Task(config)
    members = task.others(0, 1.0)["ensemble_teacher"].members
    own = task.study.train("teacher", task.teacher_arm(), 0)
    assert len(members) == 3
    digests = [fingerprints.of_tree(member.variables) for member in members]
    assert digests[0] == fingerprints.of_tree(own.variables)
    assert len(set(digests)) == 3


def test_a_weight_is_sought_beyond_an_end_or_between():
    method = Method(lambda *_: {}, 9.0)
    tried = {}
    for accuracy in (0.5, 0.6, 0.4, 0.7, 0.65):
        tried[method_table.next_weight(tried, method)] = accuracy
    assert list(tried) == [9.0, 3.0, 27.0, 1.0, 1 / 3]
    tried = {9.0: 0.7, 3.0: 0.5, 27.0: 0.6}
    assert method_table.next_weight(tried, method) == pytest.approx((9 * 27) ** 0.5)


def test_teachers_that_are_no_rows_teach_and_are_timed(tmp_path, monkeypatch):
    """An ensemble, an assistant between the two, and a first generation."""
    timed = {}

    def spy(study, arms, trained, steps):
        timed.update({k: trained.get(arm.teacher) for k, arm in arms.items()})
        return dict.fromkeys(arms, 1.0)

    monkeypatch.setattr(comparison, "_step_ms", spy)
    names = ("ensemble", "assistant", "born_again")
    argv = [*SMALL, "--trials", "1", "--run-dir", str(tmp_path), "--methods", *names]
    arms = method_table.main(argv)["arms"]
    assert list(arms) == ["teacher", "assistant_teacher", "scratch", "kd", *names]
    assert isinstance(timed["ensemble"], teachers.Ensemble)
    widths = {k: v.module.features for k, v in timed.items() if hasattr(v, "module")}
    assert widths["assistant_teacher"] == widths["kd"] == (16, 32)
    assert widths["assistant"] == (12, 24)
    assert widths["born_again"] == (8, 16)


def test_a_given_teacher_is_no_arm(tmp_path):
    config = method_table.Config(data="digits", images=96, validation=100)
    task = method_table.Task(replace(config, run_dir=str(tmp_path)))
    arms, given = {"teacher": task.teacher_arm()}, {"teacher": None}
    with pytest.raises(ValueError, match=r"\['teacher'\] are arms, and given"):
        compare(task.study, arms, 1, given=lambda seed: given)


def test_unknown_methods_are_named(tmp_path):
    argv = [*SMALL, "--run-dir", str(tmp_path), "--methods", "magic"]
    with pytest.raises(
        SystemExit, match=r"unknown methods \['magic'\]; known: scratch"
    ):
        method_table.main(argv)


def test_repdistillers_networks():
    config = method_table.PRESETS["repdistiller"]
    counts = []
    for module in method_table.networks(config, 100):
        images = jnp.zeros((1, 32, 32, 3))
        shapes = jax.eval_shape(module.init, jax.random.key(0), images)
        counts.append(sum(x.size for x in jax.tree.leaves(shapes["params"])))
    assert counts == [861_620, 472_756, 278_324]


def test_remat_reaches_the_residual_networks():
    config = method_table.PRESETS["repdistiller"]
    config = replace(config, remat=True)
    assert all(module.remat for module in method_table.networks(config, 100))
    with pytest.raises(ValueError, match="--remat is for residual networks"):
        method_table.networks(method_table.Config(remat=True), 10)


def test_repdistillers_rates():
    """SGD 0.05, a tenth of it after 150, 180 and 210 of 240 epochs."""
    rate = method_table.step_rate(0.05, steps=2400)
    at = [0, 1499, 1501, 1799, 1801, 2099, 2101, 2399]
    expected = [0.05, 0.05, 5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5]
    np.testing.assert_allclose([rate(step) for step in at], expected, rtol=1e-6)
