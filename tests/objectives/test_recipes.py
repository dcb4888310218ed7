# SPDX-License-Identifier: Apache-2.0
"""Published objectives against their papers' formulas, one sentence at a time."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import losses, models, objectives, teachers, train
from jaxdistill.data.tokens import mask_tokens
from jaxdistill.objectives import recipes
from jaxdistill.train import step as steps
from jaxdistill.types import Factored, Outputs
from tests.builders import RECORDER

LENGTHS = (5, 2, 4, 3)  # the last sentence is padding
WORDS, LONGEST = 7, 5
KEEP = (np.arange(LONGEST)[None] < np.array(LENGTHS)[:, None]).astype(np.int32)
RNG = np.random.default_rng(0)
CHOSEN = np.array(
    [[0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]], np.float32
)
BATCH = {
    "inputs": {"attention_mask": KEEP},
    "labels": RNG.integers(0, WORDS, KEEP.shape),
    "mask": np.array([1, 1, 1, 0], np.float32),
    "token_mask": CHOSEN,
}
LAYERS = ((0, 1), (1, 3))
NAMES = ("queries", "keys", "values")


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def scores(q, k, heads):
    """`q k' / sqrt(d)` of one sentence, `[H, L, L]`."""
    q, k = (x.reshape(len(x), heads, -1).swapaxes(0, 1) for x in (q, k))
    return q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])


def side(seed, width, heads, depth, wide):
    """All that a model returns, in float64; `wide` is the teacher's width."""
    rng = np.random.default_rng(seed)

    def draw(size):
        return rng.normal(size=(*KEEP.shape, size))

    found = {
        name: [draw(width) for _ in range(depth)] for name in (*NAMES, "hidden_states")
    }
    found |= {"embeddings": [draw(width)], "logits": [2 * draw(WORDS)]}
    found |= {"projected": [draw(wide) for _ in range(depth)]}
    found |= {"projected_embeddings": [draw(wide)]}
    maps = rng.normal(size=(depth, len(KEEP), heads, LONGEST, LONGEST))
    keys = np.where(KEEP > 0, 0, -np.inf)[:, None, None]
    return {**found, "attentions": [softmax(x + keys) for x in maps]}


def outputs(arrays, projected=False):
    arrays = {name: tuple(jnp.asarray(x) for x in arrays[name]) for name in arrays}
    extras = {name: arrays[name] for name in (*NAMES, "embeddings")}
    if projected:
        extras["projected_embeddings"] = arrays["projected_embeddings"]
    return Outputs(
        arrays["logits"][0],
        arrays["hidden_states"],
        arrays["attentions"],
        arrays["projected"] if projected else (),
        extras,
    )


def sentences(*sides):
    """Each real sentence's number, and both sides' arrays cut to its length."""
    for b in range(3):
        n = LENGTHS[b]

        def cut(x, b=b, n=n):
            return x[b, :, :n, :n] if x.ndim == 4 else x[b, :n]

        yield b, *({k: [cut(x) for x in v] for k, v in s.items()} for s in sides)


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def tinybert(student, teacher):
    """Equations 7 to 9: of the scores, the hidden states and the embeddings."""
    total = 0.0
    for _, s, t in sentences(student, teacher):
        for i, j in LAYERS:
            mine = scores(s["queries"][i], s["keys"][i], 2)
            theirs = scores(t["queries"][j], t["keys"][j], 2)
            total += ((mine - theirs) ** 2).mean((0, 2)).sum()
            total += ((s["projected"][i] - t["hidden_states"][j]) ** 2).mean(-1).sum()
        gap = s["projected_embeddings"][0] - t["embeddings"][0]
        total += (gap**2).mean(-1).sum()
    return total / sum(LENGTHS[:3])


def prediction(student, teacher):
    """Equation 10 at temperature 1, at the chosen tokens alone."""
    total = 0.0
    for b, s, t in sentences(student, teacher):
        p, log_q = softmax(t["logits"][0]), np.log(softmax(s["logits"][0]))
        total -= CHOSEN[b, : LENGTHS[b]] @ (p * log_q).sum(-1)
    return total / CHOSEN[:3].sum()


def distilbert(student, teacher):
    soft = masked = cosine = 0.0
    for b, s, t in sentences(student, teacher):
        z, v = s["logits"][0], t["logits"][0]
        soft += 4 * kl(softmax(v / 2), softmax(z / 2)).sum()
        at = np.arange(len(z)), BATCH["labels"][b, : len(z)]
        masked -= CHOSEN[b, : len(z)] @ np.log(softmax(z)[at])
        x, y = s["projected"][-1], t["hidden_states"][-1]
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        cosine += (1 - (x * y).sum(-1) / norms).sum()
    tokens = sum(LENGTHS[:3])
    return 5 * soft / tokens + 2 * masked / CHOSEN[:3].sum() + cosine / tokens


def minilm(student, teacher):
    """The sum of the two transfers, `1 / (heads tokens)` before each."""
    total = 0.0
    for _, s, t in sentences(student, teacher):
        total += kl(t["attentions"][-1], s["attentions"][-1]).mean(0).sum()
        x, y = s["values"][-1], t["values"][-1]
        total += kl(softmax(scores(y, y, 2)), softmax(scores(x, x, 2))).mean(0).sum()
    return total / sum(LENGTHS[:3])


def minilm_v2(student, teacher):
    total = 0.0
    for _, s, t in sentences(student, teacher):
        for name in NAMES:
            x, y = s[name][-1], t[name][2]
            relations = softmax(scores(y, y, 3)), softmax(scores(x, x, 3))
            total += kl(*relations).mean(0).sum()
    return total / sum(LENGTHS[:3])


STUDENT = side(1, 6, 2, 2, wide=12)
TEACHER, MANY = (side(seed, 12, heads, 4, wide=1) for seed, heads in ((2, 2), (3, 4)))
CASES = {
    "tinybert": (tinybert, objectives.tinybert_intermediate(LAYERS), TEACHER),
    "prediction": (prediction, objectives.tinybert_prediction(), TEACHER),
    "distilbert": (distilbert, objectives.distilbert(), TEACHER),
    "minilm": (minilm, objectives.minilm(2), TEACHER),
    "minilm_v2": (minilm_v2, objectives.minilm_v2(3, layer=2), MANY),
}
each_case = pytest.mark.parametrize("case", CASES)


def loss(objective, student, teacher, batch=BATCH):
    """As `steps` sums it up."""
    terms = objective(student, teacher, batch, 0).values()
    means = (w * steps.masked_sum(v, m) / m.sum() for w, v, m in terms)
    return sum(means)


def value_and_gradient(case, student, teacher):
    def total(arrays):
        return loss(CASES[case][1], outputs(arrays, True), outputs(teacher))

    arrays = {k: [np.float32(x) for x in v] for k, v in student.items()}
    return jax.jit(jax.value_and_grad(total))(arrays)


@each_case
def test_values_and_gradients_are_the_papers(case):
    """Gradients along a random direction in each array, by central differences."""
    reference, _, teacher = CASES[case]
    found, gradient = value_and_gradient(case, STUDENT, teacher)
    np.testing.assert_allclose(found, reference(STUDENT, teacher), rtol=2e-5)
    rng, moved = np.random.default_rng(5), 0
    for name, arrays in STUDENT.items():
        for i, array in enumerate(arrays):
            # Attention stays a little above 0, and is 0 where it was.
            way = rng.normal(size=array.shape) * (array != 0)

            def at(step, name=name, i=i, way=way):
                changed = [
                    x + step * way * (j == i) for j, x in enumerate(STUDENT[name])
                ]
                return reference({**STUDENT, name: changed}, teacher)

            slope = (at(1e-6) - at(-1e-6)) / 2e-6
            mine = (np.asarray(gradient[name][i], np.float64) * way).sum()
            np.testing.assert_allclose(mine, slope, rtol=2e-4, atol=2e-5)
            moved += abs(slope) > 1e-3
    assert moved >= {"prediction": 1, "distilbert": 2, "minilm": 2}.get(case, 3)


@each_case
def test_what_lies_in_the_padding_changes_nothing(case):
    def spoil(arrays):
        def change(x):
            real = KEEP * BATCH["mask"][:, None] > 0
            both = real[:, None, :, None] & real[:, None, None]
            return np.where(both if x.ndim == 4 else real[..., None], x, 30.0)

        return {name: [change(x) for x in arrays[name]] for name in arrays}

    teacher = CASES[case][2]
    expected = value_and_gradient(case, STUDENT, teacher)
    found = value_and_gradient(case, spoil(STUDENT), spoil(teacher))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        found,
        expected,
    )


@each_case
def test_no_gradient_reaches_the_teacher(case):
    def total(arrays):
        return loss(CASES[case][1], outputs(STUDENT, True), outputs(arrays))

    arrays = {k: [np.float32(x) for x in v] for k, v in CASES[case][2].items()}
    assert not any(x.any() for x in jax.tree.leaves(jax.jit(jax.grad(total))(arrays)))


def test_predictions_learn_as_from_soft_targets():
    term = recipes.on_logits(losses.forward_kl, temperature=3.0)
    pair = [
        jax.grad(lambda z, o=o: loss(o, Outputs(z), outputs(TEACHER)))(
            jnp.float32(STUDENT["logits"][0])
        )
        for o in (
            objectives.tinybert_prediction(temperature=3.0),
            recipes.combine({"soft": (1.0, term)}),
        )
    ]
    np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-6)


def test_factored_logits_are_whole_ones():
    eye = jnp.eye(WORDS)
    for objective in (objectives.distilbert(), objectives.tinybert_prediction()):
        whole = [outputs(STUDENT, True), outputs(TEACHER)]
        parts = [x.replace(logits=Factored(x.logits, eye)) for x in whole]
        np.testing.assert_allclose(
            loss(objective, *parts), loss(objective, *whole), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: objectives.distilbert()(
                outputs(STUDENT, True),
                outputs(TEACHER),
                {k: v for k, v in BATCH.items() if k != "token_mask"},
                0,
            ),
            "distilbert needs to know which tokens are masked.*masking.mask_tokens",
        ),
        (
            lambda: loss(CASES["tinybert"][1], outputs(STUDENT), outputs(TEACHER)),
            r"hint_mse: student states of shape .*6\).* project the student's",
        ),
        (
            lambda: loss(CASES["tinybert"][1], outputs(STUDENT, True), outputs(MANY)),
            "attention_mse: .*of other numbers of heads mean_heads=True",
        ),
        (
            lambda: loss(CASES["minilm"][1], Outputs(None), outputs(TEACHER)),
            "layer -1 of the student, which returns 0 layers",
        ),
        (lambda: objectives.tinybert_intermediate(()), "on_scores needs at least one"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# End to end: a BERT 6 wide from one 12 wide, through projections in training alone.
SIZE = models.TransformerConfig(23, 6, 2, 2)
LARGE = models.BertMaskedLM(
    models.Encoder(models.TransformerConfig(23, 12, 4, 2), scan=True)
)
SMALL = models.with_projector(
    models.BertMaskedLM(models.Encoder(SIZE)),
    models.Projector(((0, 12), (1, 12))),
    models.Projector(((0, 12),)),
)
HEAD = ["bias", "transform", "transform_norm"]
AFTER = ["attention/out", "attention_norm", "feed_forward", "feed_forward_norm"]
LAST = [f"encoder/blocks/layer_1/{name}" for name in AFTER]
PROJECTED = ["embeddings", "projector"]


@lru_cache
def large():
    """The teacher, its parameters three times those of a start: it has opinions."""
    inputs = {"input_ids": np.ones((1, 7), np.int32)}
    variables = jax.jit(LARGE.init)(jax.random.key(2), inputs)
    return teachers.live(LARGE, jax.tree.map(lambda x: 3 * x, variables))


@pytest.mark.parametrize(
    ("objective", "unmoved"),
    [
        (objectives.tinybert_intermediate(objectives.uniform(2, 4)), HEAD),
        (objectives.tinybert_prediction(), PROJECTED),
        (objectives.distilbert(), ["embeddings", "projector/layer_0"]),
        (objectives.minilm(2), [*HEAD, *LAST, *PROJECTED]),
        (objectives.minilm_v2(3, layer=2), [*HEAD, *LAST, *PROJECTED]),
    ],
    ids=list(CASES),
)
def test_a_step_moves_every_part_that_the_objective_sees(objective, unmoved):
    ids = np.random.default_rng(6).integers(3, 23, (8, 7)).astype(np.int32)
    keep = (np.arange(7)[None] < np.arange(1, 9)[:, None]).astype(np.int32)
    inputs = {"input_ids": ids, "attention_mask": keep, "token_type_ids": ids % 2}
    batch = {"inputs": inputs, "mask": np.float32([1, 1, 1, 1, 1, 1, 1, 0])}
    student = models.student(SMALL)
    state = train.init_state(jax.random.key(1), student, RECORDER, batch)
    augment = mask_tokens(2, 23, (0, 1), share=0.5)
    train_step = train.make_train_step(student, objective, RECORDER, augment=augment)
    moved, metrics = jax.jit(train_step)(state, large(), batch)
    assert all(np.isfinite(total) and total > 0 for total, _ in metrics.values())
    if "masked" in metrics:
        assert metrics["soft"][1] == metrics["cosine"][1] == keep[:7].sum()
        assert 0 < metrics["masked"][1] < keep[:7].sum()
    still = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(moved.opt_state)
        if not np.asarray(x).any()
    }
    every = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(moved.opt_state)
    ]
    starts = [n if n.split("/")[0] in PROJECTED else f"student/{n}" for n in unmoved]
    assert still == {
        n for n in every if any(f"{n}/".startswith(f"{s}/") for s in starts)
    }
    finished = models.trained(SMALL, moved)
    assert finished.module == SMALL.student


def test_a_batch_without_a_masked_token_teaches_the_rest():
    given = {**BATCH, "token_mask": np.zeros_like(CHOSEN)}
    found = objectives.distilbert()(outputs(STUDENT, True), outputs(TEACHER), given, 0)
    counts = {name: mask.sum() for name, (_, _, mask) in found.items()}
    assert counts == {"soft": 11, "masked": 0, "cosine": 11}
