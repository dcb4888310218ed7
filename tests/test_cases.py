# SPDX-License-Identifier: Apache-2.0
"""What people tried on the package: a wrong use is a sentence, no plausible number.

Each class is a kind of fault; each test failed on version 0.2.
"""

import gc
import io
import os
import subprocess
import sys
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from jaxdistill import (
    data,
    export,
    losses,
    models,
    objectives,
    parallel,
    pretrained,
    teachers,
    train,
    types,
)
from jaxdistill.data import Batches, DataError, augment
from jaxdistill.study import Arm, Study, sweep
from jaxdistill.teachers import (
    StoredOutputs,
    StoredTeacher,
    TeacherError,
    View,
    fingerprints,
)
from jaxdistill.train import (
    CheckpointError,
    Checkpoints,
    Evaluator,
    RunDir,
    run_dir,
)
from jaxdistill.types import TopK

LABELS = objectives.combine({"hard": (1.0, objectives.hard_labels())})
HINTON = objectives.hinton(2.0, 0.5, 0.5)
DIGITS = data.load("digits")
EXAMPLES = {k: v[:240] for k, v in DIGITS.inputs(DIGITS.train).items()}
MODULE = models.MLP((8, 10))


@pytest.fixture(scope="module")
def teacher():
    """A teacher that knows the digits."""
    found = fit(LABELS, steps=120, optimizer=optax.adam(1e-2))
    return models.trained(MODULE, found)


def fit(
    objective=LABELS,
    examples=EXAMPLES,
    *,
    optimizer=None,
    module=MODULE,
    steps=6,
    batch_size=24,
    teacher=None,
    checkpoints=None,
    seed=0,
    check_finite=True,
    batches=None,
    **options,
):
    """A small training through `train.fit`, as a user writes it."""
    partitioner = parallel.jit()
    state, step = train.begin(
        module,
        objective,
        optax.adam(1e-3) if optimizer is None else optimizer,
        partitioner=partitioner,
        examples={k: v for k, v in examples.items() if k != "teacher"},
        seed=seed,
        **options,
    )
    return train.fit(
        state,
        step,
        partitioner=partitioner,
        examples=partitioner.replicate(dict(examples)),
        batches=batches or Batches(len(examples["labels"]), batch_size),
        steps=steps,
        teacher=None if teacher is None else partitioner.place(teacher),
        checkpoints=checkpoints,
        progress=False,
        check_finite=check_finite,
    )


def study(path, examples=EXAMPLES, **options):
    given = {"steps": 6, "batch_size": 24, "progress": False, "test": EXAMPLES}
    return Study(path, examples=examples, **{**given, **options})


class TestOneClass:
    """A1: the softmax of one logit is 1, and its loss and KL are 0."""

    ONE = jnp.array([[0.3], [-1.0]])

    @pytest.mark.parametrize(
        "loss",
        [
            losses.forward_kl,
            losses.reverse_kl,
            losses.soft_cross_entropy,
            losses.generalized_jsd,
            losses.total_variation,
            losses.dist,
        ],
    )
    def test_losses_refuse_it(self, loss):
        with pytest.raises(ValueError, match="over one class is always 1.*two logits"):
            loss(self.ONE, self.ONE)

    def test_labels_and_standardized_logits_refuse_it(self):
        with pytest.raises(ValueError, match="one class"):
            losses.cross_entropy(self.ONE, jnp.zeros(2, int))
        with pytest.raises(ValueError, match="one class"):
            losses.standardize(self.ONE)

    def test_metrics_refuse_it(self):
        module = models.MLP((4, 1))
        variables = module.init(jax.random.key(0), EXAMPLES["inputs"][:1])
        model = teachers.live(module, variables)
        with pytest.raises(ValueError, match="one class"):
            Evaluator(parallel.jit(), EXAMPLES)(model)

    def test_one_kept_class_without_a_tail_refuses(self):
        kept = TopK(jnp.zeros((2, 1), int), jnp.zeros((2, 1)), jnp.zeros(2))
        with pytest.raises(ValueError, match="one class alone"):
            losses.sparse_forward_kl(jnp.zeros((2, 3)), kept, tail=False)

    @pytest.mark.parametrize(
        ("loss", "least"),
        [
            (losses.relational_distance, 3),
            (losses.relational_angle, 3),
            (losses.probabilistic_transfer, 3),
            (losses.linear_cka, 3),
            (losses.similarity_preserving, 2),
            (losses.correlation_congruence, 2),
            (losses.contrastive, 2),
        ],
    )
    def test_too_few_examples_to_compare(self, loss, least):
        """Of fewer every student is perfect; of that many there is a value above 0."""
        draw = np.random.default_rng(0)
        student, other = draw.normal(size=(2, least, 4)).astype(np.float32)
        with pytest.raises(ValueError, match="batch"):
            loss(student[:-1], other[:-1])
        assert float(loss(student, other).max()) > 1e-6

    @pytest.mark.parametrize(
        "loss", [losses.attention_transfer, losses.neuron_selectivity]
    )
    def test_maps_of_one_position(self, loss):
        with pytest.raises(ValueError, match="one position"):
            loss(jnp.ones((2, 1, 1, 3)), jnp.ones((2, 4, 4, 3)))

    @pytest.mark.parametrize("traced", [False, True])
    def test_a_temperature_for_each_example(self, traced):
        """With as many examples as classes it divided the classes."""

        def value(temperature):
            return losses.forward_kl(jnp.eye(3), jnp.eye(3), temperature=temperature)

        call = jax.jit(value) if traced else value
        assert call(jnp.float32(2)).shape == (3,)
        with pytest.raises(ValueError, match="must be one number"):
            call(jnp.ones(3))

    def test_a_weight_for_each_example(self):
        term = objectives.hard_labels()
        with pytest.raises(ValueError, match="weight must be one number"):
            objectives.combine({"hard": (jnp.ones(3), term)})


class TestStoredViews:
    """A2: stored outputs of other images than the student sees."""

    SHIFT = staticmethod(augment.shift(1, 0.0))

    def stored(self, teacher, path, views=1, seed=0, shift=None):
        examples = dict(EXAMPLES)
        options = {"views": views, "seed": seed, "batch_size": 24}
        manifest = teachers.store.describe(
            teacher, examples, data="digits", split="train", transform="", **options
        )
        given = {"augment": shift, "progress": False}
        teachers.store.write(path, teacher, examples, manifest, **given)
        return {**examples, "teacher": teachers.store.read(path, manifest)}

    def refuses(self, examples, match, **options):
        with pytest.raises(ValueError, match=match):
            fit(HINTON, examples, teacher=StoredTeacher(), **options)

    def test_an_augmentation_over_plain_outputs(self, teacher, tmp_path):
        examples = self.stored(teacher, tmp_path)
        assert fit(HINTON, examples, teacher=StoredTeacher()).step == 6
        self.refuses(examples, "draws other views", augment=self.SHIFT)

    def test_arrays_of_ones_own_are_of_the_examples_as_they_are(self, teacher):
        examples = teachers.with_logits(teacher, EXAMPLES)
        own = {**examples, "teacher": dict(examples["teacher"])}
        self.refuses(own, "draws other views", augment=self.SHIFT)
        said = augment.unseen(lambda batch, rng: {**batch, "extra": batch["labels"]})
        assert fit(HINTON, own, teacher=StoredTeacher(), augment=said).step == 6

    def test_views_and_how_they_are_replayed(self, teacher, tmp_path):
        examples = self.stored(teacher, tmp_path, views=4, shift=self.SHIFT)
        right = augment.replay(self.SHIFT, 0, 4)
        assert fit(HINTON, examples, teacher=StoredTeacher(), augment=right).step == 6
        self.refuses(examples, "without augmentation")
        self.refuses(examples, "draws other views", augment=self.SHIFT)
        for wrong in (
            augment.replay(self.SHIFT, 1, 4),
            augment.replay(self.SHIFT, 0, 20),
            augment.replay(augment.shift(3, 0.0), 0, 4),
            augment.replay(augment.flip(), 0, 4),
        ):
            self.refuses(examples, "other views|for each example", augment=wrong)

    def test_views_of_ones_own_say_which_they_are(self, teacher):
        views = View.of(self.SHIFT, 0, 2, EXAMPLES)
        logits = np.repeat(
            teachers.with_logits(teacher, EXAMPLES)["teacher"]["logits"], 2, 1
        )
        examples = {
            **EXAMPLES,
            "teacher": StoredOutputs({"logits": logits}, view=views),
        }
        replay = augment.replay(self.SHIFT, 0, 2)
        assert fit(HINTON, examples, teacher=StoredTeacher(), augment=replay).step == 6
        plain = {**EXAMPLES, "teacher": {"logits": logits}}
        self.refuses(plain, "of arrays of your own say it", augment=replay)


class TestArrays:
    """A3, A10, A11 and their kind: examples that do not fit together."""

    TOO_FEW = {**EXAMPLES, "inputs": EXAMPLES["inputs"][:120]}

    def every_way_in(self, examples, path):
        """What each way in says of these examples."""
        partitioner = parallel.jit()
        model = teachers.live(
            MODULE, MODULE.init(jax.random.key(0), EXAMPLES["inputs"][:1])
        )
        own = teachers.control(model)
        trials = sweep.grid(seed=range(2))
        run_dir = train.RunDir(path / "sweep", {})
        ways = {
            "fit": lambda: fit(LABELS, examples),
            "study": lambda: study(path / "study", examples).train(
                "a", Arm(MODULE, LABELS, optax.sgd(0.1)), 0
            ),
            "evaluator": lambda: Evaluator(partitioner, examples),
            "sweep": lambda: sweep.train(
                trials,
                MODULE,
                lambda trial: LABELS,
                lambda trial: optax.sgd(0.1),
                run_dir=run_dir,
                name="s",
                examples=examples,
                batches=Batches(len(examples["labels"]), 24),
                steps=2,
                progress=False,
            ),
            "store": lambda: teachers.store.describe(
                own, examples, data="d", split="train", transform=""
            ),
            "outputs": lambda: teachers.with_logits(own, examples),
            "iterate": lambda: next(
                Batches(len(examples["labels"]), 24).iterate(examples, 0)
            ),
        }
        said = {}
        for name, way in ways.items():
            with pytest.raises(DataError) as error:
                way()
            said[name] = str(error.value)
        return said

    def test_unlike_lengths(self, tmp_path):
        for said in self.every_way_in(self.TOO_FEW, tmp_path).values():
            assert "inputs has 120 examples and labels 240" in said

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"inputs": np.full_like(EXAMPLES["inputs"], np.nan)}, "example 0 holds"),
            ({"labelled": np.full(240, 2)}, "labelled says what counts.*holds 2"),
            ({"labelled": np.zeros(240)}, "none counts"),
            ({"labels": np.eye(10)[EXAMPLES["labels"]]}, "one-hot"),
            ({"labels": EXAMPLES["labels"][:, None]}, r"labels\[..., 0\]"),
            (
                {"labels": EXAMPLES["labels"] + 1},
                "label 10 at .* out of range",
            ),
            (
                {"labels": EXAMPLES["labels"] - 1},
                "label -1 at .* out of range",
            ),
            ({"labels": EXAMPLES["labels"] * 1.0}, "labels must be integers"),
            ({"inputs": EXAMPLES["inputs"].astype(str)}, "holds no numbers"),
            ({"inputs": EXAMPLES["inputs"].tolist()}, "must be an array"),
            ({"mask": np.arange(240) % 2}, "which each batch makes itself"),
            ({"teacher": {"logits": np.zeros((200, 1, 10))}}, "labels 240|200"),
            ({"teacher": {"logits": np.zeros((240, 10))}}, "no axis of views"),
            ({"teacher": {"logits": np.full((240, 1, 10), np.nan)}}, "a NaN"),
            ({"teacher": {"probs": np.zeros((240, 1, 10))}}, "stored outputs have"),
        ],
    )
    def test_what_a_step_cannot_use(self, change, match):
        with pytest.raises(DataError, match=match):
            fit(LABELS, {**EXAMPLES, **change})

    def test_infinite_on_purpose(self):
        inputs = EXAMPLES["inputs"].copy()
        inputs[3] = np.inf
        with pytest.raises(train.NonFiniteLoss):
            fit(steps=10, examples={**EXAMPLES, "inputs": inputs}, check_finite=False)

    def test_a_class_may_be_ruled_out(self):
        logits = np.zeros((240, 1, 10), np.float32)
        logits[..., 3] = -np.inf
        assert data.check_examples({**EXAMPLES, "teacher": {"logits": logits}}) == 240

    def test_batches_of_another_size(self):
        with pytest.raises(DataError, match="240 examples.*drawn from 480"):
            fit(LABELS, batches=Batches(480, 24))

    def test_an_index_beyond_the_end_is_nan_in_a_step_of_ones_own(self):
        """It took the last example's."""
        partitioner = parallel.jit()
        state, step = train.begin(
            MODULE, LABELS, optax.sgd(0.1), partitioner=partitioner, examples=EXAMPLES
        )
        index = np.array([[0, 1, 240, 2], [0, 1, -1, 2]], np.int32)
        at = {"index": index, "mask": np.ones((2, 4), np.float32)}
        placed = partitioner.replicate(EXAMPLES)
        found, metrics = step(partitioner.place(state), (None, placed), at)
        assert np.isnan(metrics["loss"][0]).all()
        jax.tree.map(np.testing.assert_array_equal, found.params, state.params)

    def test_a_mask_is_a_truth_value(self):
        """Integers other than 0 and 1 weighed the loss by their value."""
        student = models.student(MODULE)
        step = jax.jit(train.make_train_step(student, LABELS, optax.sgd(0.1)))
        batch = {k: v[:4] for k, v in EXAMPLES.items()}
        state = train.init_state(
            jax.random.key(0), student, optax.sgd(0.1), {**batch, "mask": np.ones(4)}
        )
        found = [
            step(state, None, {**batch, "mask": np.array(mask)})[1]["hard"]
            for mask in ([1, 1, 0, 1], [3, 1, 0, 7])
        ]
        np.testing.assert_array_equal(*found)

    def test_ids_of_another_tools_file(self, teacher):
        outputs = teachers.with_logits(teacher, EXAMPLES)["teacher"]
        logits = np.asarray(outputs["logits"])
        order = np.argsort(-logits, -1)[..., :3]
        total = np.asarray(jax.nn.logsumexp(logits, -1))
        log_probs = np.take_along_axis(logits, order, -1) - total[..., None]
        ids = order.astype(np.int32)
        ids[5, 0, 2] = -1
        kept = {"ids": ids, "log_probs": log_probs, "logsumexp": total}
        with pytest.raises(DataError, match="a stored id is -1"):
            fit(HINTON, {**EXAMPLES, "teacher": kept}, teacher=StoredTeacher())

        @jax.jit
        def value(ids):
            kept = TopK(ids, log_probs[:, 0], total[:, 0])
            return losses.sparse_forward_kl(jnp.zeros((240, 10)), kept)

        found = value(ids[:, 0])
        assert np.isnan(found[5])
        assert np.isfinite(found[:5]).all()

    def test_a_loader_of_torch_is_no_order_of_examples(self):
        loader = [({"inputs": EXAMPLES["inputs"]}, EXAMPLES["labels"])]
        with pytest.raises(DataError, match="data.Batches or a data.Stream"):
            fit(LABELS, batches=loader)

    def test_a_streamed_label_that_is_no_class_is_named(self):
        pytest.importorskip("grain", reason="grain is not installed")
        labels = EXAMPLES["labels"].copy()
        labels[17] = 10
        source = {**EXAMPLES, "labels": labels}
        partitioner = parallel.jit()
        state, step = train.begin(
            MODULE, LABELS, optax.sgd(0.1), partitioner=partitioner, examples=EXAMPLES
        )
        with (
            data.Stream(source, Batches(240, 24)) as stream,
            pytest.raises(DataError, match="record 17: label 10 at .* out of range"),
        ):
            train.fit(
                state,
                step,
                partitioner=partitioner,
                examples={},
                batches=stream,
                steps=10,
                progress=False,
            )

    def test_a_batch_without_a_mask(self):
        step = train.make_train_step(models.student(MODULE), LABELS, optax.sgd(0.1))
        with pytest.raises(ValueError, match="needs a mask"):
            step(None, None, EXAMPLES)

    def test_a_module_that_returns_logits(self):
        class Bare(nn.Module):
            @nn.compact
            def __call__(self, inputs, mask=None, train=False):
                return nn.Dense(10)(inputs.reshape(len(inputs), -1))

        with pytest.raises(ValueError, match="must return jaxdistill.types.Outputs"):
            fit(LABELS, module=Bare())


class TestTeachers:
    """A teacher that knows nothing, and one whose classes are not the student's."""

    def refused(self, teacher, match="the teacher is right on", **options):
        with pytest.raises(TeacherError, match=match):
            fit(HINTON, teacher=teacher, **options)

    def test_its_score_is_told(self, teacher, capsys):
        teachers.knowledge._SAID.clear()
        found = teachers.check_knowledge(teacher, EXAMPLES)
        assert found > 0.5
        assert "teacher: right on" in capsys.readouterr().err

    def test_a_fresh_head(self):
        fresh = teachers.live(
            MODULE, MODULE.init(jax.random.key(1), EXAMPLES["inputs"][:1])
        )
        self.refused(fresh)
        assert fit(HINTON, teacher=teachers.control(fresh)).step == 6

    def test_permuted_classes(self, teacher):
        self.refused(teachers.with_classes(teacher, [*range(1, 10), 0]))
        back = teachers.with_classes(
            teachers.with_classes(teacher, [*range(1, 10), 0]), [9, *range(9)]
        )
        assert fit(HINTON, teacher=back).step == 6

    def test_other_inputs_than_it_was_trained_on(self, teacher):
        inverted = {**EXAMPLES, "inputs": -EXAMPLES["inputs"]}
        with pytest.raises(TeacherError):
            fit(HINTON, inverted, teacher=teacher)

    def test_stored_outputs_in_another_order(self, teacher):
        outputs = teachers.with_logits(teacher, EXAMPLES)["teacher"]
        order = np.random.default_rng(0).permutation(240)
        shuffled = {"logits": np.asarray(outputs["logits"])[order]}
        examples = {**EXAMPLES, "teacher": shuffled}
        with pytest.raises(TeacherError):
            fit(HINTON, examples, teacher=StoredTeacher())

    def test_a_store_and_a_study_refuse_it_too(self, tmp_path):
        fresh = teachers.live(
            MODULE, MODULE.init(jax.random.key(1), EXAMPLES["inputs"][:1])
        )
        manifest = teachers.store.describe(
            fresh, EXAMPLES, data="d", split="train", transform=""
        )
        with pytest.raises(TeacherError):
            teachers.store.write(tmp_path / "s", fresh, EXAMPLES, manifest)
        arm = Arm(MODULE, HINTON, optax.sgd(0.1), "teacher")
        with pytest.raises(TeacherError):
            study(tmp_path / "r").train("a", arm, 0, fresh)

    def test_a_teacher_that_cannot_be_stored_stays_live_aloud(self, teacher, tmp_path):
        several = teachers.ensemble([teacher, teacher])
        arm = Arm(MODULE, HINTON, optax.sgd(0.1), "teacher")
        with pytest.warns(UserWarning, match="an? Ensemble stays live"):
            study(tmp_path, stored=True).train("a", arm, 0, several)


class TestIdentity:
    """A4, A5: what is there is of another training than the one asked for."""

    def trained(self, path, **change):
        checkpoints = Checkpoints(path)
        found = fit(**{"objective": LABELS, "checkpoints": checkpoints, **change})
        checkpoints.close()
        return found

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"optimizer": optax.adam(3e-3)}, r"optimizer: .*0.001\] became \[0.003"),
            ({"optimizer": optax.sgd(1e-3)}, "optimizer: "),
            (
                {"optimizer": optax.adam(optax.cosine_decay_schedule(1e-3, 50))},
                "optimizer: ",
            ),
            (
                {"examples": {**EXAMPLES, "labels": EXAMPLES["labels"][::-1].copy()}},
                "labels",
            ),
            ({"examples": {**EXAMPLES, "inputs": EXAMPLES["inputs"] + 1}}, "inputs"),
            (
                {
                    "objective": objectives.combine(
                        {"hard": (2.0, objectives.hard_labels())}
                    )
                },
                "student",
            ),
            (
                {
                    "objective": objectives.combine(
                        {
                            "hard": (
                                lambda step: 1 / (1 + step),
                                objectives.hard_labels(),
                            )
                        }
                    )
                },
                "student",
            ),
            (
                {
                    "objective": objectives.combine(
                        {"hard": (1.0, objectives.hard_labels(label_smoothing=0.1))}
                    )
                },
                "student",
            ),
            ({"augment": augment.shift(1, 0.0)}, "augment"),
            ({"batch_size": 12}, "batch_size was 24, is now 12"),
            ({"micro_batches": 2}, "micro_batches was 1, is now 2"),
            ({"dtype": jnp.bfloat16}, "dtype"),
            ({"seed": 1}, "start key"),
        ],
    )
    def test_another_training_is_refused(self, change, match, tmp_path):
        self.trained(tmp_path)
        with pytest.raises(CheckpointError, match=f"another run: .*{match}"):
            self.trained(tmp_path, **change)
        self.trained(tmp_path)  # and the first one is still there

    def test_functions_are_told_apart_by_what_they_compute(self, tmp_path):
        """Two lambdas print alike, and so does a module before and after an edit."""

        def net(act):
            class Net(nn.Module):
                @nn.compact
                def __call__(self, inputs, mask=None, train=False):
                    x = nn.Dense(8)(inputs.reshape(inputs.shape[0], -1))
                    return types.Outputs(nn.Dense(10)(act(x)))

            return Net()

        self.trained(tmp_path / "m", module=net(nn.relu))
        self.trained(tmp_path / "m", module=net(nn.relu))
        with pytest.raises(CheckpointError, match="student"):
            self.trained(tmp_path / "m", module=net(nn.tanh))

        def scaled(by):
            return lambda batch, rng: {**batch, "inputs": by * batch["inputs"]}

        self.trained(tmp_path / "a", augment=scaled(2.0))
        with pytest.raises(CheckpointError, match=r"augment: .*2.0\] became \[3.0"):
            self.trained(tmp_path / "a", augment=scaled(3.0))

    def test_functions_of_the_host_are_told_apart_by_their_code(self, tmp_path):
        """They are not traced: only a call of them is."""

        def noisy(change):
            def augment(batch, rng):
                inputs = batch["inputs"]
                shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
                found = jax.pure_callback(change, shape, inputs)
                return {**batch, "inputs": found}

            return augment

        def scaled(by):
            return lambda x: np.float32(by) * np.asarray(x)

        self.trained(tmp_path, augment=noisy(scaled(2.0)))
        self.trained(tmp_path, augment=noisy(scaled(2.0)))
        for other in (scaled(3.0), lambda x: np.asarray(x) + np.float32(2.0)):
            with pytest.raises(CheckpointError, match="augment"):
                self.trained(tmp_path, augment=noisy(other))

    def test_another_teacher_and_other_outputs(self, teacher, tmp_path):
        given = {"objective": HINTON, "teacher": teacher}
        self.trained(tmp_path, **given)
        other = models.BoundModule(
            jax.tree.map(lambda x: 1.01 * x, teacher.variables), teacher.module
        )
        with pytest.raises(CheckpointError, match="teacher model"):
            self.trained(tmp_path, objective=HINTON, teacher=other)
        stored = teachers.with_logits(teacher, EXAMPLES)
        self.trained(
            tmp_path, **{**given, "teacher": StoredTeacher(), "examples": stored}
        )
        own = {
            **stored,
            "teacher": {"logits": 2 * np.asarray(stored["teacher"]["logits"])},
        }
        with pytest.raises(CheckpointError, match="teacher"):
            self.trained(
                tmp_path, **{**given, "teacher": StoredTeacher(), "examples": own}
            )

    @pytest.mark.slow  # two residual networks
    def test_how_and_where_it_runs_is_free(self, tmp_path):
        module = models.resnet_cifar(8, 10)
        images = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
        examples = {"inputs": images, "labels": np.arange(16, dtype=np.int32) % 10}
        given = {"examples": examples, "batch_size": 8, "steps": 2}
        whole = self.trained(tmp_path, module=module, **given)
        again = self.trained(tmp_path, module=module.clone(remat=True), **given)
        assert fingerprints.of_tree(whole.params) == fingerprints.of_tree(again.params)

    def test_another_version_of_jax_is_told(self, tmp_path, monkeypatch):
        """Its programs are other ones for the same function; their numbers are not."""
        self.trained(tmp_path)
        monkeypatch.setattr(jax, "__version__", "0.1.0")
        with pytest.warns(UserWarning, match="compared by their numbers alone"):
            self.trained(tmp_path)
        with (
            pytest.warns(UserWarning, match="numbers alone"),
            pytest.raises(CheckpointError, match="optimizer: its numbers"),
        ):
            self.trained(tmp_path, optimizer=optax.adam(3e-3))

    def test_fewer_steps_than_are_there(self, tmp_path):
        self.trained(tmp_path, steps=6)
        with pytest.raises(CheckpointError, match="6 steps, more than the 3 asked for"):
            self.trained(tmp_path, steps=3)

    def test_settings_that_were_lost_are_in_the_checkpoint(self, tmp_path):
        arm = Arm(MODULE, LABELS, optax.sgd(0.1))
        settings = {"rate": 0.1}
        study(RunDir(tmp_path, settings)).train("a", arm, 0)
        gc.collect()
        for name in ("config.json", "metrics.jsonl"):
            (tmp_path / name).unlink()
        other = study(RunDir(tmp_path, {"rate": 0.3}))
        with pytest.raises(CheckpointError, match="settings rate was 0.1, is now 0.3"):
            other.train("a", arm, 0)

    def test_a_run_of_an_earlier_version_is_told_what_to_do(self, tmp_path):
        checkpoints = Checkpoints(tmp_path, identity={"seed": 0})
        state, _ = train.begin(
            MODULE,
            LABELS,
            optax.adam(1e-3),
            partitioner=parallel.jit(),
            examples=EXAMPLES,
        )
        checkpoints.save(state, {})
        checkpoints.close()
        with pytest.raises(CheckpointError, match="does not say what made it.*finish"):
            self.trained(tmp_path)

    def test_mended_labels_in_the_same_process(self, tmp_path):
        """The arrays are the same objects: placed, they were the old ones."""
        examples = {k: v.copy() for k, v in EXAMPLES.items()}
        one = study(tmp_path, examples)
        arm = Arm(MODULE, LABELS, optax.sgd(0.1))
        before = one.train("a", arm, 0)
        examples["labels"][:] = (examples["labels"] + 1) % 10
        with pytest.raises(CheckpointError, match="labels"):
            one.train("a", arm, 0)
        after = one.train("b", arm, 0)
        assert fingerprints.of_tree(before.variables) != fingerprints.of_tree(
            after.variables
        )


class TestImages:
    """A7: what lies on an image's pixels moves with them, or nothing moves."""

    BATCH: ClassVar = {
        "inputs": jnp.ones((2, 4, 4, 3)),
        "labels": jnp.zeros((2, 4, 4), int),
        "mask": jnp.ones(2),
    }

    @pytest.mark.parametrize(
        "moves", [augment.flip(), augment.shift(1, 0.0), augment.crop(2, 2)]
    )
    def test_a_label_for_each_pixel(self, moves):
        with pytest.raises(ValueError, match="moves the images .* not 'labels'"):
            moves(self.BATCH, jax.random.key(0))

    def test_mixup_forgets_nothing(self):
        mixup, key = augment.mixup(), jax.random.key(0)
        with pytest.raises(ValueError, match="one label for each example"):
            mixup(self.BATCH, key)
        given = {"labels": jnp.zeros(2, int), "weight": jnp.ones(2)}
        with pytest.raises(ValueError, match=r"entries \['weight'\]"):
            mixup({**self.BATCH, **given}, key)

    def test_texts_are_no_images(self):
        texts = {**self.BATCH, "inputs": {"input_ids": jnp.ones((2, 4), int)}}
        with pytest.raises(ValueError, match="takes inputs that are images"):
            augment.flip()(texts, jax.random.key(0))


class TestTexts:
    """A8, A9, A13, A14: what a student draws, and what a folder says of it."""

    GPT = models.GPT(models.gpt_config(16, 8, 1, 2, positions=8), maps=False)

    def live(self, module, seed=0):
        ids = {"input_ids": np.zeros((1, 4), np.int32)}
        return teachers.live(module, module.init(jax.random.key(seed), ids))

    def test_the_end_of_a_text_is_to_be_said(self):
        with pytest.raises(TypeError, match="end"):
            models.on_policy(self.GPT, prompt=2)

    def test_what_lies_behind_the_end_does_not_count(self):
        model = self.live(self.GPT)
        ids = np.ones((64, 8), np.int32)
        batch = {"inputs": {"input_ids": ids}, "labels": ids, "mask": np.ones(64)}
        state = types.TrainState(0, model.variables["params"], {}, (), None)
        rollout = models.on_policy(self.GPT, prompt=2, end=5)
        found = rollout(state, batch, jax.random.key(0))
        tokens = np.concatenate([ids[:, :1], found["labels"]], 1)
        for row, counts in zip(tokens, np.asarray(found["token_mask"]), strict=True):
            ends = np.flatnonzero(row[2:] == 5)
            last = 2 + ends[0] if len(ends) else 8  # the end counts, and no more
            np.testing.assert_array_equal(
                counts, [2 <= place <= last for place in range(1, 9)]
            )

    def test_draws_that_the_teacher_has_not(self):
        small = self.GPT.clone(size=models.gpt_config(12, 8, 1, 2, positions=8))
        soft = objectives.combine(
            {"soft": (1.0, objectives.first_classes(12, objectives.soft_targets()))}
        )
        ids = np.ones((4, 8), np.int32)
        examples = {"inputs": {"input_ids": ids}, "labels": ids}
        given = {"examples": examples, "module": self.GPT, "batch_size": 4, "steps": 3}
        given["teacher"] = teachers.control(self.live(small))
        rollout = partial(models.on_policy, self.GPT, prompt=2, end=None)
        with pytest.raises(ValueError, match=r"on_policy\(..., vocab=12\)"):
            fit(soft, rollout=rollout(), **given)
        found = fit(soft, rollout=rollout(vocab=12), **given)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found.params))

    def test_a_configuration_of_another_module(self, tmp_path):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": 16,
            "n_embd": 8,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 8,
            "activation_function": "gelu_new",
        }
        model = self.live(pretrained.module_of(config))
        pretrained.save(tmp_path, model, config)
        for change in ({"n_head": 4}, {"activation_function": "relu"}):
            with pytest.raises(ValueError, match="of another model: size"):
                pretrained.save(tmp_path, model, {**config, **change})
        with pytest.raises(ValueError, match="its module with its variables"):
            pretrained.save(tmp_path, model.variables, config)

    def test_classes_in_another_order_have_a_way(self):
        with pytest.raises(ValueError, match="teachers.with_classes"):
            losses.forward_kl(jnp.zeros((2, 3)), jnp.zeros((2, 5)))


class TestErrorsOfOthers:
    """B: what another package raises has a sentence in front."""

    def test_a_student_that_is_too_large(self, monkeypatch):
        def exhausted(*_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        huge = optax.GradientTransformation(exhausted, optax.sgd(0.1).update)
        with pytest.raises(train.OutOfMemory, match="the student's 610 parameters"):
            fit(optimizer=huge)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"steps": 2**31}, "as many as an int32 counts"),
            ({"steps": -1}, "takes 0 to"),
        ],
    )
    def test_numbers_have_bounds(self, change, match):
        with pytest.raises(ValueError, match=match):
            fit(**change)

    def test_a_thousand_million_evaluations(self):
        assert train.interval(2**31 - 1, 10**9) >= 1
        with pytest.raises(ValueError, match="at least 1 evaluation"):
            train.interval(10, 0)

    def test_no_home(self, monkeypatch):
        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr("pathlib.Path.home", homeless)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        setting = jax.config.values.get("jax_compilation_cache_dir")
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            run_dir.enable_compilation_cache()
            assert jax.config.values["jax_compilation_cache_dir"] is None
        finally:
            jax.config.update("jax_compilation_cache_dir", setting)

    @pytest.mark.parametrize("platform", ["nonsense", "cuda"])
    def test_no_such_platform(self, platform):
        code = (
            "import jax; from jaxdistill.train.run_dir import exit_with_message\n"
            "with exit_with_message(): jax.devices()"
        )
        env = {**os.environ, "JAX_PLATFORMS": platform}
        found = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True
        )
        assert found.returncode == 1
        assert f"no device of JAX_PLATFORMS={platform}: " in found.stderr
        assert "Traceback" not in found.stderr

    @pytest.mark.parametrize(
        ("variables", "match"),
        [
            ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS must be a number"),
            (
                {"SLURM_STEP_NUM_TASKS": "4"},
                "not how they meet: .*start them with srun",
            ),
        ],
    )
    def test_half_a_cluster(self, variables, match, monkeypatch):
        def initialize(*args, **kwargs):
            raise ValueError("coordinator_address should be defined.")

        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        with pytest.raises(parallel.processes.ProcessError, match=match):
            parallel.processes.start(False, {})

    def test_an_ascii_locale(self, monkeypatch):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
        with run_dir.exit_with_message():
            print("89.4 \u00b1 0.3", flush=True)
        assert written.getvalue().split() == [b"89.4", b"?", b"0.3"]

    @pytest.mark.parametrize("folder", ["", "s3://bucket/run", "http://host/run"])
    def test_where_no_folder_can_be(self, folder, teacher, tmp_path):
        with pytest.raises(ValueError, match=r"a folder, or gs://..., is wanted"):
            RunDir(folder, {})
        with pytest.raises(ValueError, match=r"a folder, or gs://..., is wanted"):
            Checkpoints(folder)
        with pytest.raises(ValueError, match=r"a folder, or gs://..., is wanted"):
            train.load_model(folder, "teacher")
        source = (teacher, EXAMPLES)
        manifest = teachers.store.describe(
            *source, data="digits", split="train", transform="", batch_size=48
        )
        with pytest.raises(ValueError, match=r"a folder, or gs://..., is wanted"):
            teachers.store.write(folder, *source, manifest)
        RunDir(tmp_path, {})
        with pytest.raises(
            teachers.StoreError, match="is a run directory; give a store"
        ):
            teachers.store.write(tmp_path, *source, manifest)

    def test_an_infinite_temperature(self):
        logits = jnp.zeros((2, 3))
        with pytest.raises(ValueError, match="temperature must be finite, got inf"):
            losses.forward_kl(logits, logits, temperature=jnp.inf)

    def test_metrics_of_a_users_own(self, teacher):
        partitioner = parallel.jit()

        def vector(student, other, batch):
            del other
            return {"each": (student.logits.sum(0), batch["mask"].sum())}

        evaluate = Evaluator(partitioner, EXAMPLES, metrics=vector)
        with pytest.raises(ValueError, match=r"metric 'each' has values of shape"):
            evaluate(teacher)
        with pytest.raises(DataError, match="an evaluation needs labels"):
            Evaluator(partitioner, {"inputs": EXAMPLES["inputs"]})

    @pytest.mark.parametrize(
        ("pool", "to", "match"),
        [
            (False, "stablehlo", r"write x.shape\[0\], or -1, in reshape"),
            (True, "onnx", "takes settings by name alone"),
        ],
    )
    def test_what_an_exporter_cannot_take(self, pool, to, match, tmp_path):
        if to == "onnx":
            pytest.importorskip("jax2onnx", reason="jax2onnx is not installed")

        class Net(nn.Module):
            @nn.compact
            def __call__(self, inputs, mask=None, train=False):
                x = inputs[..., None]
                x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x
                size = x.shape[0] if pool else len(x)
                return types.Outputs(nn.Dense(10)(x.reshape(size, -1)))

        variables = Net().init(jax.random.key(0), EXAMPLES["inputs"][:1])
        model = teachers.live(Net(), variables)
        subject = export.of_images(model, DIGITS, DIGITS.test["images"], {})
        with pytest.raises(export.ExportError, match=match):
            export.write(subject, tmp_path / "m", to=to)
