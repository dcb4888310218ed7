# SPDX-License-Identifier: Apache-2.0
"""What a study's students see of their teachers."""

import jax
import numpy as np
import optax
import pytest

from jaxdistill import data, models, parallel, train
from jaxdistill.data.augment import shift
from jaxdistill.data.tokens import hide_tokens
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.study import Arm, Study, compare
from jaxdistill.teachers import ensemble, fingerprints, mean_logits
from jaxdistill.train import CheckpointError, Evaluator, RunDir, RunError, saved

pytestmark = pytest.mark.usefixtures("any_teacher")

MODULE = models.MLP((8, 10))
SOURCE = data.load("digits")
EXAMPLES = {k: v[:48] for k, v in SOURCE.inputs(SOURCE.train).items()}
LABELS = combine({"hard": (1.0, hard_labels())})
ARM = Arm(
    MODULE,
    combine({"soft": (1.0, soft_targets())}),
    optax.sgd(0.0),
    augment=shift(2, SOURCE.background),
    views=3,
)


def halved(state):
    return jax.tree.map(lambda x: x / 2, state.params)


@pytest.fixture
def study(tmp_path):
    partitioner = parallel.jit()
    return Study(
        RunDir(tmp_path, {}),
        partitioner=partitioner,
        examples=lambda arm, seed: EXAMPLES,
        steps=12,
        batch_size=16,
        test=Evaluator(partitioner, EXAMPLES),
        evaluations=2,
        stored=True,
        progress=False,
    )


def loss(study, name):
    return [r["loss"] for r in study.run_dir.records if r["fit"] == f"{name}-0"]


def test_stored_views_are_those_that_the_student_sees(study):
    """A student that is its own teacher, and stays it, differs on other images only."""
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    study.train("same", ARM, 0, itself)
    np.testing.assert_allclose(loss(study, "same"), 0, atol=1e-6)
    study.train("unshifted", ARM._replace(augment=None, views=0), 0, itself)
    np.testing.assert_allclose(loss(study, "unshifted"), 0, atol=1e-6)
    assert len(list((study.run_dir.path / "outputs").iterdir())) == 2


def test_each_augmentation_has_its_own_views(study):
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    arms = {"two": ARM, "one": ARM._replace(augment=shift(1, SOURCE.background))}
    arms["still"] = ARM._replace(augment=None, views=0)
    for name, arm in arms.items():
        study.train(name, arm._replace(views=min(arm.views, 1)), 0, itself)
        np.testing.assert_allclose(loss(study, name), 0, atol=1e-6)
    assert len(list((study.run_dir.path / "outputs").iterdir())) == 3


def test_another_number_of_steps_is_another_training(study):
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    study.train("same", ARM, 0, itself)
    for arm in (ARM._replace(steps=15), ARM._replace(views=2)):
        with pytest.raises(CheckpointError):
            study.train("same", arm, 0, itself)


def test_steps_are_timed_on_stored_views(study):
    arms = {"teacher": ARM._replace(teacher=None, augment=None, views=0)}
    arms["teacher"] = arms["teacher"]._replace(
        objective=combine({"hard": (1.0, hard_labels())})
    )
    arms["distilled"] = ARM._replace(teacher="teacher")
    summary = compare(study, arms, 1, pairs={}, timed_steps=2)
    assert summary["arms"]["distilled"]["cost"]["step_ms"] > 0
    # What source each is kept beside it.
    fingerprint = fingerprints.of_model(train.load_model(study.run_dir.path, "teacher"))
    source = {"arm": "teacher", "fingerprint": fingerprint}
    assert saved.read_teacher(study.run_dir.path, "distilled") == source
    assert saved.read_teacher(study.run_dir.path, "teacher") is None


def test_the_mean_of_two_teachers_has_views(study):
    members = [models.trained(MODULE, study.fresh(ARM, seed)) for seed in (0, 1)]
    mean = study.partitioner.place(mean_logits(members))
    study.train("mean", ARM, 0, mean)
    assert min(loss(study, "mean")) > 1e-3


@pytest.mark.parametrize(
    ("arm", "teacher"),
    [(ARM, lambda model: ensemble([model])), (ARM, lambda model: None)]
    + [(ARM._replace(augment=None), lambda model: model)],
)
def test_views_need_what_is_stored(study, arm, teacher):
    model = models.trained(MODULE, study.fresh(ARM, 0))
    with pytest.raises(ValueError, match="views needs an augmentation and one teacher"):
        study.train("bad", arm, 0, study.partitioner.place(teacher(model)))


def test_texts_are_trained_on_unless_one_is_all_padding(tmp_path):
    rng = np.random.default_rng(0)
    keep = (np.arange(5)[None] <= rng.integers(0, 5, (32, 1))).astype(np.int32)
    ids = rng.integers(0, 9, (32, 5)).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": keep}
    examples = {"inputs": inputs, "labels": (ids[:, 0] > 4).astype(np.int32)}
    partitioner = parallel.jit()
    study = Study(
        RunDir(tmp_path, {}),
        partitioner=partitioner,
        examples=lambda arm, seed: examples,
        steps=40,
        batch_size=16,
        test=Evaluator(partitioner, examples),
        evaluations=2,
        progress=False,
    )
    hard = combine({"hard": (1.0, hard_labels())})
    arm = Arm(models.BagOfEmbeddings(9, 4, 2), hard, optax.adam(0.05))
    study.train("scratch", arm, 0)
    assert loss(study, "scratch")[-1] < loss(study, "scratch")[0]
    keep[3] = 0
    with pytest.raises(data.DataError, match="row 3 is all padding"):
        study.train("other", arm, 0)


@pytest.fixture
def of_texts(tmp_path):
    """A study on texts of 2 to 9 tokens: `make(**options)`."""
    rng = np.random.default_rng(0)
    mask = (np.arange(9) < rng.integers(2, 10, (48, 1))).astype(np.int32)
    ids = rng.integers(3, 20, (48, 9)).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": mask}
    examples = {"inputs": inputs, "labels": rng.integers(0, 2, 48).astype(np.int32)}
    partitioner = parallel.jit()

    def make(**options):
        run_dir = RunDir(tmp_path, {})
        test, shared = Evaluator(partitioner, examples), {"steps": 12, "batch_size": 8}
        shared |= {"evaluations": 2, "stored": True, "progress": False, **options}
        return Study(
            run_dir,
            partitioner=partitioner,
            examples=lambda *_: examples,
            test=test,
            **shared,
        )

    return make


@pytest.mark.parametrize("views", [0, 2])
def test_texts_may_be_cut_and_their_teachers_outputs_with_them(of_texts, views):
    """A student that is its own teacher, and stays it, differs by rounding."""
    hide = hide_tokens(2, (), share=0.5) if views else None
    bag = models.BagOfEmbeddings(20, 4, 2)
    arm = ARM._replace(module=bag, augment=hide, views=views)
    study = of_texts(bucket_lengths=(4, 6))
    itself = study.partitioner.place(models.trained(bag, study.fresh(arm, 0)))
    trained = study.train("same", arm, 0, itself)
    np.testing.assert_allclose(loss(study, "same"), 0, atol=1e-6)
    again = of_texts(bucket_lengths=(4, 6)).train("same", arm, 0, itself)
    jax.tree.map(np.testing.assert_array_equal, trained, again)
    with pytest.raises(CheckpointError):
        of_texts(bucket_lengths=(5,)).train("same", arm, 0, itself)


def test_seeds_together_are_not_cut(of_texts):
    with pytest.raises(
        ValueError, match="together and bucket_lengths exclude each other"
    ):
        of_texts(bucket_lengths=(4,), together=True)


def test_a_row_may_keep_the_largest_probabilities_alone(study):
    """With all of ten classes kept it learns as from all logits; with two it does not.

    And a live arm asks the teacher, whatever the study does.
    """
    teacher = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 1)))
    arm = ARM._replace(augment=None, views=0, optimizer=optax.sgd(0.1))
    arms = {"whole": arm, "live": arm._replace(live=True)}
    arms |= {f"top_{k}": arm._replace(top_k=k) for k in (10, 2)}
    for name, each in arms.items():
        study.train(name, each, 0, teacher)
    whole = loss(study, "whole")
    np.testing.assert_allclose(loss(study, "live"), whole, rtol=1e-5)
    np.testing.assert_allclose(loss(study, "top_10"), whole, rtol=1e-4)
    assert loss(study, "top_2")[0] < 0.9 * whole[0]
    assert len(list((study.run_dir.path / "outputs").iterdir())) == 3


@pytest.mark.parametrize(
    "change", [{"views": 0}, {"live": True}, {"rollout": lambda *given: given[1]}]
)
def test_top_k_needs_one_teachers_logits(study, change):
    arm = ARM._replace(top_k=2, **change)
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    with pytest.raises(
        ValueError, match="an arm with top_k needs one teacher's logits"
    ):
        study.train("bad", arm, 0, itself)


@pytest.mark.parametrize(
    "change", [{"live": True}, {"rollout": lambda state, batch, rng: batch}]
)
def test_views_of_a_live_teacher_are_ever_new(study, change):
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    study.train("live", ARM._replace(**change), 0, itself)
    np.testing.assert_allclose(loss(study, "live"), 0, atol=1e-6)
    assert not (study.run_dir.path / "outputs").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 2},
        {"start": lambda state, teacher, seed: state.replace(params=halved(state))},
        {"objective": combine({"soft": (0.5, soft_targets())})},
    ],
    ids=["top_k", "start", "objective"],
)
def test_another_lesson_is_another_training(study, change):
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 0)))
    arm = ARM._replace(augment=None, views=0)
    study.train("same", arm, 0, itself)
    with pytest.raises(CheckpointError):
        study.train("same", arm._replace(**change), 0, itself)


def test_a_live_teacher_goes_on_where_its_stored_outputs_stopped(study):
    """Its steps are equal to the bit: it is the same training."""
    itself = study.partitioner.place(models.trained(MODULE, study.fresh(ARM, 1)))
    arm = ARM._replace(augment=None, views=0)
    study.train("same", arm, 0, itself)
    study.train("same", arm._replace(live=True), 0, itself)
    assert len(loss(study, "same")) == 2


def test_no_steps_leave_a_row_as_it_starts(study):
    arm = ARM._replace(augment=None, views=0, steps=0)
    found = study.train("still", arm, 3)
    expected = study.fresh(arm, 3).params
    jax.tree.map(np.testing.assert_array_equal, found.variables["params"], expected)


def test_what_opens_a_finished_run_is_not_what_trained_it(study):
    arm = ARM._replace(augment=None, views=0, objective=LABELS)
    study.train("alone", arm, 0)
    before = (study.run_dir.path / "env.json").read_bytes()
    assert b"first_dispatch" in before
    RunDir(study.run_dir.path, {})
    assert (study.run_dir.path / "env.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"student": ARM._replace(teacher=None)}, "none of .* is called 'teacher'"),
        (
            {"teacher": ARM._replace(teacher=None), "kd": ARM._replace(teacher="tea")},
            "kd is taught by 'tea', which is no arm before it, and not given",
        ),
    ],
)
def test_who_is_taught_by_nobody_is_named_before_anything_trains(study, arms, said):
    with pytest.raises(ValueError, match=said):
        compare(study, arms, 1)
    assert not study.run_dir.records


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measure": "kl"}, "arms cannot be compared by 'kl'; known: accuracy, nll"),
        (
            {"pairs": {"other": ["teacher"]}},
            r"\['other'\] are to be compared, and are no",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_before_anything_trains(study, options, said):
    with pytest.raises(ValueError, match=said):
        compare(study, {"teacher": ARM._replace(teacher=None)}, 1, **options)
    assert not study.run_dir.records


def test_a_row_may_start_from_its_teacher(study):
    teacher = models.trained(MODULE, study.fresh(ARM, 5))
    arm = ARM._replace(
        augment=None,
        views=0,
        start=lambda state, teacher, _: state.replace(
            params=teacher.variables["params"]
        ),
    )
    student = study.train("started", arm, 0, study.partitioner.place(teacher))
    jax.tree.map(np.testing.assert_array_equal, student.variables, teacher.variables)
    np.testing.assert_allclose(loss(study, "started"), 0, atol=1e-6)


def test_arrays_and_epochs_are_enough(tmp_path):
    """As evaluators, a partitioner and steps would have it."""
    given = {"examples": EXAMPLES, "test": EXAMPLES, "validation": EXAMPLES}
    short = Study(tmp_path, **given, epochs=2, batch_size=16, progress=False)
    assert short.steps == 2 * -(-len(EXAMPLES["labels"]) // 16)
    model = short.partitioner.place(models.trained(MODULE, short.fresh(ARM, 0)))
    expected = Evaluator(parallel.choose("auto"), EXAMPLES)(model)
    assert short.test(model) == expected == short.validation(model)
    short.run_dir.log({"fit": "teacher-0", "step": 1})
    with pytest.raises(RunError, match="steps was"):
        Study(tmp_path, **given, epochs=3, batch_size=16)


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ({}, "steps or epochs, one of them: got None and None"),
        ({"steps": 1, "epochs": 1}, "steps or epochs, one of them: got 1 and 1"),
        ({"epochs": 1}, "examples that depend on the arm need steps"),
    ],
)
def test_how_long_is_said_in_one_way(tmp_path, lengths, said):
    with pytest.raises(ValueError, match=said):
        Study(
            tmp_path,
            examples=lambda arm, seed: EXAMPLES,
            test=EXAMPLES,
            batch_size=16,
            **lengths,
        )
