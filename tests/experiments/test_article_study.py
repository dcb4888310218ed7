# SPDX-License-Identifier: Apache-2.0
"""The study's protocol: equal trials for every arm, chosen on validation alone."""

import numpy as np
import pytest

from experiments import article_study
from experiments.article_study import ARMS, SEARCH_SEED
from jaxdistill.parallel.sealed import unseal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("any_teacher")]

TRIALS, SEEDS = 2, 1
SMALL = f"""--data digits --validation 200 --teacher 8 --student 4 --epochs 1
    --trials {TRIALS} --seeds {SEEDS} --parallel jit --no-progress""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished study's directory and summary."""
    path = tmp_path_factory.mktemp("study")
    return path, article_study.main([*SMALL, "--run-dir", str(path)])


def test_every_arm_gets_the_same_trials_and_its_best_is_chosen(run):
    path, _ = run
    trials = unseal((path / "search.json").read_bytes())
    assert tuple(trials) == ARMS
    drawn = [trial._asdict() for trial in article_study.draw(TRIALS, 2)]
    chosen = (path / "chosen.md").read_text().splitlines()[2:]
    for line, (arm, scores) in zip(chosen, trials.items(), strict=True):
        assert [{k: s[k] for k in drawn[0]} for s in scores] == drawn
        best = drawn[int(np.argmax([s["accuracy"] for s in scores]))]
        assert line.startswith(f"| {arm.replace('_', ' ')} |")
        assert f"{best['learning_rate']:.1e}" in line


def test_the_search_shares_no_seed_with_the_result(run):
    path, summary = run
    folders = {folder.name for folder in (path / "checkpoints").iterdir()}
    search = {name for name in folders if name.startswith("search_")}
    assert all(name.endswith(f"-{SEARCH_SEED}") for name in search)
    arms = ("teacher", *ARMS)
    assert folders - search == {f"{arm}-{s}" for arm in arms for s in range(SEEDS)}
    assert set(summary["arms"]) == set(arms)
    assert set(summary["paired"]["distilled"]) == set(ARMS) - {"distilled"}


def test_more_trials_keep_those_that_fewer_drew():
    assert article_study.draw(5)[:3] == article_study.draw(3)
