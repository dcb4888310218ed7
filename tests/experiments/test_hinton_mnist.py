# SPDX-License-Identifier: Apache-2.0
"""All parts of Hinton's section 3 run, resume, and correct a bias as the paper did."""

import json
import re

import numpy as np
import pytest
from etils import epath

from experiments.hinton import mnist as hinton_mnist
from experiments.hinton import parts as hinton_parts
from jaxdistill import report
from jaxdistill.train.run_dir import read_records

pytestmark = pytest.mark.slow

SMOKE = ["--smoke", "--no-progress", "--no-compilation-cache"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hinton")
    hinton_mnist.main([*SMOKE, "--run-dir", str(folder)])
    return folder


def summary(run_dir, part):
    return json.loads((run_dir / part / "summary.json").read_text())


def minutes(run_dir):
    return json.loads((run_dir / "temperature" / "minutes.json").read_text())["clock"]


def test_each_part_leaves_a_summary_that_report_rebuilds(run_dir):
    arms = summary(run_dir, "triple")["arms"]
    assert list(arms) == ["teacher", "scratch", "distilled"]
    assert arms["teacher"]["errors"]["n"] == 2
    chosen = json.loads((run_dir / "triple" / "chosen.json").read_text())
    assert set(chosen["rates"].values()) <= {1e-3, 3e-3}
    widths = summary(run_dir, "temperature")["series"]
    assert {k: list(v) for k, v in widths.items()} == {
        "8_units": ["1", "4"],
        "16_units": ["1", "4"],
    }
    assert [len(v["1"]) for v in widths.values()] == [2, 1]
    assert len(summary(run_dir, "beyond")["arms"]) == 11
    said = (run_dir / "beyond" / "chosen.md").read_text()
    assert said.startswith("Best on the validation images, in one training without")
    assert re.search(r"temperature and rate of matching 4 and 0\.00[13], conv", said)
    for part in ("triple", "temperature", "transfer", "beyond", "beyond/labels_100"):
        text = (run_dir / part / "table.md").read_text()
        assert report.write(run_dir / part) == text


def test_what_the_search_logged_stays(run_dir):
    names = {
        r["fit"] for r in read_records(epath.Path(run_dir / "triple/metrics.jsonl"))
    }
    assert {"choose_scratch", "choose_distilled", "teacher-0", "matching-1"} <= names


def test_other_settings_are_another_run(run_dir):
    arguments = [*SMOKE, "--part", "triple", "--run-dir", str(run_dir)]
    with pytest.raises(SystemExit, match=r"temperature was 20\.0, is now 4\.0"):
        hinton_mnist.main([*arguments, "--temperature", "4"])


def test_errors_are_counted(run_dir):
    seeds = summary(run_dir, "triple")["seeds"]["scratch"]
    for seed in seeds:
        assert isinstance(seed["errors"], int)
        assert seed["accuracy"] == pytest.approx(1 - seed["errors"] / 797)


def test_a_corrected_bias_is_never_worse_where_it_was_chosen(run_dir):
    found = summary(run_dir, "transfer")["series"]
    for name in ("without_3", "7_and_8_only"):
        before, after = found["errors"][name], found["errors, bias from test"][name]
        assert all(a <= b for a, b in zip(after, before, strict=True))
    assert all(bias >= 0 for bias in found["bias from training"]["without_3"])
    assert all(bias <= 0 for bias in found["bias from training"]["7_and_8_only"])


def test_the_best_bias_by_hand():
    """Raised by less than 0.5, class 1 is missed; by more than 1, class 0 is."""
    logits = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.45, 0.0]])
    labels = np.array([0, 0, 1, 1])
    bias = hinton_parts.best_bias(logits, labels, [1], 1.0)
    assert 0.5 < bias < 1.0
    lowered = hinton_parts.best_bias(logits[:, ::-1], 1 - labels, [1], -1.0)
    assert -1.0 < lowered < -0.45


def test_a_part_goes_on_from_what_is_there(run_dir):
    before, spent = summary(run_dir, "temperature"), minutes(run_dir)
    arguments = [*SMOKE, "--part", "temperature", "--run-dir", str(run_dir)]
    hinton_mnist.main(arguments)
    assert summary(run_dir, "temperature") == before
    assert minutes(run_dir) > spent > 0
    assert "cores" in (run_dir / "temperature" / "minutes.md").read_text()
