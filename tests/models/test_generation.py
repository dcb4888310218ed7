# SPDX-License-Identifier: Apache-2.0
"""A student's own sequences: drawn as it draws, judged by its teacher alone."""

from functools import lru_cache

import jax
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, parallel, teachers, train
from jaxdistill.models import generate, gpt_config, on_policy
from jaxdistill.objectives import combine, hard_labels, on_logits
from jaxdistill.study import Arm, Study
from jaxdistill.train import Evaluator, RunDir, language
from jaxdistill.train import step as steps

pytestmark = pytest.mark.usefixtures("any_teacher")

LENGTH, PROMPT = 8, 3
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0, "positions": LENGTH}
MODULE = models.GPT(gpt_config(11, 8, 1, 2, **PLAIN))
TEACHER = models.GPT(gpt_config(11, 12, 2, 3, **PLAIN))
OBJECTIVE = combine(
    {"soft": (1.0, on_logits(losses.reverse_kl)), "hard": (0.5, hard_labels())}
)
SGD = optax.sgd(0.5)


def batch(rows=4):
    ids = np.random.default_rng(0).integers(0, 11, (rows, LENGTH + 1)).astype(np.int32)
    return {
        "inputs": {"input_ids": ids[:, :-1]},
        "labels": ids[:, 1:],
        "mask": np.ones(rows, np.float32),
    }


@lru_cache
def state():
    student = models.student(MODULE)
    return train.init_state(jax.random.key(1), student, SGD, batch())


@lru_cache
def teacher():
    variables = jax.jit(TEACHER.init)(jax.random.key(2), batch()["inputs"])
    return teachers.live(TEACHER, jax.tree.map(lambda x: 5 * x, variables))


def test_the_student_goes_on_from_a_prompt():
    rng, given = jax.random.key(5), batch()
    found = on_policy(MODULE, prompt=PROMPT, end=None)(state(), given, rng)
    ids, labels = found["inputs"]["input_ids"], found["labels"]
    np.testing.assert_array_equal(ids[:, :PROMPT], given["inputs"]["input_ids"][:, :3])
    np.testing.assert_array_equal(ids[:, 1:], labels[:, :-1])
    start = {"input_ids": given["inputs"]["input_ids"][:, :PROMPT]}
    model = models.trained(MODULE, state())
    _, draw = jax.random.split(rng)
    own = generate(model, start, draw, steps=LENGTH + 1 - PROMPT)["input_ids"]
    np.testing.assert_array_equal(own[:, 1:], labels)
    # Its draws count: the labels from the last token of the prompt on.
    np.testing.assert_array_equal(found["token_mask"], [[0, 0, 1, 1, 1, 1, 1, 1]] * 4)
    np.testing.assert_array_equal(found["labelled"], 0)


def test_other_batches_stay_as_they_are():
    found = on_policy(MODULE, prompt=PROMPT, end=None, share=0.0)(
        state(), batch(), jax.random.key(5)
    )
    for name in ("inputs", "labels", "mask"):
        jax.tree.map(np.testing.assert_array_equal, found[name], batch()[name])
    assert found["token_mask"].all()
    assert found["labelled"].all()


@pytest.mark.parametrize("share", [0.25, lambda step: 0.25 + 0 * step])
def test_the_share_is_of_the_batches(share):
    rollout = on_policy(MODULE, prompt=LENGTH, end=None, share=share)
    own = jax.jit(lambda rng: rollout(state(), batch(), rng)["labelled"][0] == 0)
    found = jax.lax.map(own, jax.random.split(jax.random.key(0), 400))
    assert 0.18 < found.mean() < 0.32


def test_a_step_learns_from_what_its_student_drew():
    """The same as a step on the sequences that its key gives; labels teach nothing."""
    student = models.student(MODULE)
    step = train.make_train_step(
        student, OBJECTIVE, SGD, rollout=on_policy(MODULE, prompt=PROMPT, end=None)
    )
    moved, metrics = jax.jit(step)(state(), teacher(), batch())
    rng = jax.random.fold_in(jax.random.fold_in(state().rng, 0), steps.GENERATE)
    drawn = on_policy(MODULE, prompt=PROMPT, end=None)(state(), batch(), rng)
    plain = jax.jit(train.make_train_step(student, OBJECTIVE, SGD))
    expected, _ = plain(state(), teacher(), drawn)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        moved.params,
        expected.params,
    )
    assert [int(metrics[name][1]) for name in ("soft", "hard")] == [4 * 6, 0]


@pytest.mark.parametrize("prompt", [0, LENGTH + 1])
def test_a_prompt_leaves_something_to_draw(prompt):
    with pytest.raises(ValueError, match=f"a prompt of {prompt} leaves none to draw"):
        on_policy(MODULE, prompt=prompt, end=None)(state(), batch(), jax.random.key(0))


def test_padded_examples_are_refused():
    given = batch()
    given["inputs"]["attention_mask"] = np.ones((4, LENGTH), np.int32)
    with pytest.raises(ValueError, match="examples without padding"):
        on_policy(MODULE, prompt=PROMPT, end=None)(state(), given, jax.random.key(0))


@pytest.fixture
def study(tmp_path):
    def make(together):
        partitioner = parallel.jit()
        examples = {name: batch(12)[name] for name in ("inputs", "labels")}
        return Study(
            RunDir(tmp_path / str(together), {}),
            partitioner=partitioner,
            examples=lambda row, seed: examples,
            steps=4,
            batch_size=4,
            test=Evaluator(partitioner, examples, metrics=language),
            evaluations=1,
            stored=True,
            together=together,
            progress=False,
        )

    return make


@pytest.mark.slow
def test_seeds_together_draw_as_one_after_another(study):
    """And nothing is stored of a teacher that is asked about new sequences."""
    row = Arm(
        MODULE, OBJECTIVE, SGD, rollout=on_policy(MODULE, prompt=PROMPT, end=None)
    )
    seeds, placed = (0, 1), teacher()
    one, all_at_once = study(False), study(True)
    expected = [one.train("student", row, seed, placed) for seed in seeds]
    found = all_at_once.train_together("student", row, seeds, [placed, placed])
    for a, b in zip(found, expected, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
            a.variables,
            b.variables,
        )
    assert not (one.run_dir.path / "outputs").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"share": 1.5}, "a share of the batches is 0 to 1, got 1.5"),
        ({"temperature": -1.0}, "a temperature of draws is 0 or more, got -1.0"),
    ],
)
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        on_policy(MODULE, prompt=PROMPT, end=None, **options)


@lru_cache
def after_a_step(kind, count):
    """Parameters after a step, and how many tokens the teacher judged."""
    student, partitioner = (
        models.student(MODULE),
        parallel.choose(kind, jax.devices()[:count]),
    )
    step = train.make_train_step(
        student, OBJECTIVE, SGD, rollout=on_policy(MODULE, prompt=PROMPT, end=None)
    )
    placed = partitioner.place(state()), partitioner.place(teacher())
    moved, metrics = partitioner.compile(step)(*placed, partitioner.split(batch(), 0))
    return partitioner.fetch(moved).params, int(partitioner.fetch(metrics)["soft"][1])


@pytest.mark.parametrize("kind", ["mesh", "pmap", "fsdp"])
def test_devices_draw_what_one_does(kind):
    """But under pmap, where each has a key of its own: there it trains, that is all."""
    (found, tokens), (expected, _) = after_a_step(kind, 2), after_a_step("jit", 1)
    assert tokens == 4 * 6
    if kind != "pmap":
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            found,
            expected,
        )


def test_an_integer_mask_is_taken():
    given = {**batch(), "token_mask": np.ones((4, LENGTH), np.int32)}
    found = on_policy(MODULE, prompt=PROMPT, end=None, share=0.5)(
        state(), given, jax.random.key(5)
    )
    assert found["token_mask"].dtype == np.float32
