# SPDX-License-Identifier: Apache-2.0
"""Text models beside transformers: the same work on both sides, and what is stored."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.text import speed as text_speed
from experiments.text import speed_storage
from experiments.text.speed import SMOKE, Config
from experiments.text.speed_jobs import (
    OURS,
    THEIRS,
    Rule,
    Shape,
    Work,
    bert,
    gpt,
    torch_side,
)
from jaxdistill.parallel.sealed import unseal

pytestmark = pytest.mark.slow

SHAPE = Shape(vocab=30, width=16, depth=2, heads=2, batch=4, length=6, positions=24)
# One batch an epoch, so that neither side's order matters; no dropout.
RULE = Rule(1, 2.0, 0.5, 0.5, 1e-2, 0.1, 0.0)


@pytest.fixture(scope="module")
def torch():
    """One thread: two would wait for each other on a busy machine."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    side = torch_side()
    side.torch.set_num_threads(1)
    return side


@pytest.fixture(autouse=True, scope="module")
def other_peoples_code():
    """The optimizer's decay and the like broadcast as they like."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("make", [bert, gpt])
@pytest.mark.parametrize("soft", [0.0, 0.5], ids=["labels", "stored"])
def test_both_sides_train_alike(torch, make, soft):
    work = Work(make, SHAPE, replace(RULE, soft_weight=soft), 0)
    model, loss, optimizer, examples = work.theirs()
    first = work.losses(model, loss, examples)
    epochs = [
        torch.make_epoch(model, loss, optimizer, examples, work.batches),
        work.ours(),
        work.ours(scan=True),
    ]
    found = [[epoch() for _ in range(4)] for epoch in epochs]
    assert found[0][0] == pytest.approx(first[THEIRS], abs=1e-5)
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=2e-4)
    assert found[0][-1] < found[0][0]


def test_both_sides_train_alike_on_texts_of_unlike_length(torch):
    work = Work(bert, SHAPE, RULE, 0, np.array([2, 4, 1, 3]))
    model, loss, optimizer, examples = work.theirs()
    work.losses(model, loss, examples)
    epochs = [
        torch.make_epoch(model, loss, optimizer, examples, work.batches),
        work.ours(),
        work.ours(bucket_lengths=(4,)),
    ]
    found = [[epoch() for _ in range(4)] for epoch in epochs]
    for losses in found[1:]:
        np.testing.assert_allclose(losses, found[0], rtol=2e-4)


def test_other_weights_are_not_timed(torch):
    work = Work(gpt, SHAPE, RULE, 0)
    model, loss, _, examples = work.theirs()
    with torch.torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    with pytest.raises(ValueError, match="do not do the same work"):
        work.losses(model, loss, examples)


def test_both_sides_write_the_same(torch):
    work = Work(gpt, replace(SHAPE, vocab=2), RULE, 0)  # 0 would be an end
    jobs = work.generators(3, 5, 9)
    found = {side: np.array(job()) for side, job in jobs.items()}
    assert found[OURS].shape == (3, 14)
    assert (found[OURS][:, 5:] == 0).any()
    text_speed.check_tokens(found[THEIRS], found[OURS])
    found[OURS][1, 7] += 1
    with pytest.raises(ValueError, match="write differently from token 7 on"):
        text_speed.check_tokens(found[THEIRS], found[OURS])


@pytest.fixture(scope="module")
def stored():
    """A drawn pair's outputs, in every way."""
    models = speed_storage.drawn(SHAPE, 3, sharpness=10.0, seed=0)
    options = {"top_k": (2, 8, 30), "temperatures": (1.0,), "name": "random"}
    return speed_storage.measure(*models, **options)["stored"]


def test_more_classes_are_nearer_and_all_are_exact(stored):
    errors = [stored[f"top-{k}, float32"]["error"]["1.0"] for k in (2, 8, 30)]
    assert errors[0] > errors[1] > 1e-3
    assert errors[2] < 1e-5
    assert stored["dense, float32"]["error"]["1.0"] == 0


def test_bytes_are_those_of_the_arrays(stored):
    """Dense: V numbers; top-k: as many tokens and log-probabilities, and a sum."""
    assert stored["dense, float16"]["arrays"] == 30 * 2
    assert stored["top-8, float16"]["arrays"] == 8 * (4 + 2) + 4


def test_models_of_a_text_are_trained():
    corpus = text_speed.data.Corpus("a", "abcd" * 200, "abcd" * 20, None, "")
    training = {"steps": 60, "rate": 1e-2, "seed": 0}
    teacher, student, held = speed_storage.trained_pair(SHAPE, corpus, 1, 4, **training)
    assert teacher.module.size.width == 2 * student.module.size.width
    batch = {**held, "mask": np.ones(4, np.float32)}
    for model in (teacher, student):
        guess = np.asarray(model(batch).logits.argmax(-1))
        assert (guess == held["labels"])[:, 1:].mean() > 0.95


def test_all_parts_leave_their_tables(torch, tmp_path):
    saved = tmp_path / "saved"
    text_speed.execute(
        Config(smoke=True, run_dir=str(tmp_path / "run"), save=saved, progress=False)
    )
    summary = unseal((saved / "summary.json").read_bytes())
    assert set(summary) == set(text_speed.PARTS)
    for part in ("train", "distill", "lengths"):
        all_three = {"bert_mini", "bert_small", "gpt"}
        expected = {"bert_mini"} if part == "lengths" else all_three
        assert set(summary[part]["jobs"]) == expected
        for job in summary[part]["jobs"].values():
            assert {len(t) for t in job["seconds"].values()} == {SMOKE["rounds"]}
            assert job["losses"][THEIRS] == pytest.approx(job["losses"][OURS], abs=1e-4)
    for name in summary:
        rows = [
            r for r in (saved / f"{name}.md").read_text().splitlines() if r[:1] == "|"
        ]
        assert len(rows) > 5
    # Tokens per second are tokens over seconds.
    job = summary["train"]["jobs"]["gpt"]
    assert job["tokens"] == SMOKE["steps"] * 3 * 8


def test_without_transformers_one_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    module = "experiments.baselines.pytorch_text"
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ValueError, match="needs it: pip install torch transformers"):
        text_speed.execute(Config(smoke=True, run_dir=str(tmp_path), part="train"))
