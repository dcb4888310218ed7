# SPDX-License-Identifier: Apache-2.0
"""Every objective trains a small GPT, on text, on its teacher's or on its own."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.text import shakespeare_gpt, shakespeare_task
from jaxdistill.study import script

pytestmark = pytest.mark.slow

SMOKE = ["--smoke", "--no-progress", "--no-compilation-cache"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt")
    shakespeare_gpt.main([*SMOKE, "--run-dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def task(run_dir):
    config = shakespeare_gpt.Config(smoke=True, progress=False, run_dir=str(run_dir))
    return shakespeare_task.Task(script.with_flags(config, shakespeare_gpt.SMOKE))


def test_all_objectives_are_compared_with_scratch(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    names = ["forward_kl", "reverse_kl", "jsd", "total_variation", "top_k"]
    names += ["sequence_level", "on_policy"]
    assert list(summary["arms"]) == ["teacher", "nanogpt", "scratch", *names]
    assert {k: list(v) for k, v in summary["paired"].items()} == {
        name: ["scratch", *shakespeare_gpt.AGAINST.get(name, [])] for name in names
    }
    assert list(summary["paired"]["on_policy"]) == ["scratch", "reverse_kl"]
    assert list(summary["paired"]["top_k"]) == ["scratch", "forward_kl"]
    arm = summary["arms"]["forward_kl"]
    assert arm["kl"]["mean"] > 0
    # Each seed's exponential, before the mean.
    logs = [np.log(seed["perplexity"]) for seed in summary["seeds"]["forward_kl"]]
    nll = [seed["nll"] for seed in summary["seeds"]["forward_kl"]]
    np.testing.assert_allclose(logs, nll, rtol=1e-6)
    assert summary["arms"]["teacher"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_every_row_is_judged_on_what_it_writes_itself(run_dir, task):
    arms = json.loads((run_dir / "summary.json").read_text())["arms"]
    assert arms["teacher"].pop("own_kl")["mean"] == pytest.approx(0, abs=1e-6)
    del arms["teacher"]
    assert all(arm["own_kl"]["mean"] > 0 for arm in arms.values())
    assert "| reverse KL on own text, nats |" in (run_dir / "table.md").read_text()
    # The same again, the key being fixed.
    seed, judged = json.loads((run_dir / "summary.json").read_text())["seeds"], []
    for name in ("teacher", "scratch"):
        judged.append(
            task.study.partitioner.place(task.study.train(name, task.arms[name], 0))
        )
    found = task.judge(judged[1], judged[0])["own_kl"]
    assert found == pytest.approx(seed["scratch"][0]["own_kl"], rel=1e-5)


def test_a_sentence_says_how_much_of_the_text_is_unknown(run_dir, task):
    said = (run_dir / "text.md").read_text().strip()
    letters = len(set(shakespeare_task.SMOKE_TEXT))
    assert said == (
        f"Text: roses. The vocabulary has {letters} tokens; of the held-out text 0.0% "
        "are <unk>."
    )
    # Half of what is held out becomes a word that training has not.
    words = (*task.vocabulary.tokens, "<unk>")
    other = shakespeare_task.Task(task.config)
    other.vocabulary = shakespeare_task.data.Vocabulary(words)
    labels = other.test["labels"]
    labels[: len(labels) // 2] = words.index("<unk>")
    share = (len(labels) // 2) / len(labels)
    assert f"held-out text {share:.1%} are <unk>" in other.about()


def test_the_student_writes_once_it_can(task, tmp_path):
    """No batch of the first 40% of 20 steps is its own, and all later ones are."""
    config = replace(task.config, own_share=1.0, run_dir=str(tmp_path))
    task = shakespeare_task.Task(config)
    arm = task.arms["on_policy"]
    batch = jax.tree.map(lambda x: x[:2], task.train)
    state = task.study.fresh(arm, 0)
    own = jax.jit(
        lambda step: arm.rollout(state.replace(step=step), batch, jax.random.key(0))
    )
    for step, given in ((0, True), (7, True), (8, False), (19, False)):
        found = own(step)
        assert (found["labelled"] == given).all()
        same = found["inputs"]["input_ids"] == batch["inputs"]["input_ids"]
        assert same.all() == given


@pytest.mark.parametrize("name", ["own_share", "own_from"])
def test_a_share_is_a_share(task, tmp_path, name):
    config = replace(task.config, run_dir=str(tmp_path), **{name: 1.5})
    with pytest.raises(ValueError, match=f"{name} is 0 to 1, got 1.5"):
        shakespeare_task.Task(config)


def test_a_preset_without_a_reference_has_no_row_for_it(task, tmp_path):
    config = replace(task.config, run_dir=str(tmp_path), reference_steps=0)
    arms = shakespeare_task.Task(config).arms
    assert list(arms) == [name for name in task.arms if name != "nanogpt"]
    assert shakespeare_gpt.PRESETS["wikitext2"].reference_steps == 0


def test_the_teacher_writes_what_the_sequence_level_row_learns(run_dir, task):
    written = task.written(1)
    ids, labels = written["inputs"]["input_ids"], written["labels"]
    np.testing.assert_array_equal(ids[:, 1:], labels[:, :-1])
    text = task.train["inputs"]["input_ids"]
    np.testing.assert_array_equal(ids[:, :1], text[:, :1])
    assert (ids[:, 1:] != text[:, 1:]).any()
    assert ids.shape == text.shape
    # No mask: every token but the first is drawn, and every label counts.
    assert set(written) == {"inputs", "labels"}
    # Kept: a resumed run learns the same.
    other = shakespeare_task.Task(task.config).written(1)
    np.testing.assert_array_equal(other["labels"], labels)


def test_samples_are_as_long_as_asked(task):
    text = task.samples(("scratch",), windows=3)
    assert text.startswith("scratch:\n\n```\n")
    assert len(text.split("```")[1].strip("\n")) == 8 + 3 * 8


def test_it_resumes_from_what_is_there(run_dir):
    before = json.loads((run_dir / "summary.json").read_text())
    records = (run_dir / "metrics.jsonl").read_bytes()
    shakespeare_gpt.main([*SMOKE, "--run-dir", str(run_dir)])
    after = json.loads((run_dir / "summary.json").read_text())
    assert after["digests"] == before["digests"]
    assert (run_dir / "metrics.jsonl").read_bytes() == records
