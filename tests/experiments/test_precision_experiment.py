# SPDX-License-Identifier: Apache-2.0
"""The precision experiment's tables, on a tiny job."""

import pytest

from experiments import precision

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def summary(tmp_path_factory):
    directory = tmp_path_factory.mktemp("precision") / "run"
    arguments = ["--epochs", "4", "--seeds", "2", "--teacher", "32", "--student", "8"]
    arguments += ["--top-k", "3", "10", "--batch-size", "96", "--no-progress"]
    return precision.main([*arguments, "--run-dir", str(directory)])


def test_what_is_kept_whole_has_no_error(summary):
    storage = summary["storage"]
    assert storage["dense, float32"]["error"] < 1e-6
    assert storage["top-10, float32"]["error"] < 1e-5  # all classes there are


def test_fewer_bits_and_fewer_classes_err_more_and_take_less(summary):
    storage = summary["storage"]
    dense = [storage[f"dense, {kind}"] for kind in ("float32", "float16", "bfloat16")]
    assert dense[0]["error"] < dense[1]["error"] < dense[2]["error"]
    assert dense[0]["bytes"] > dense[1]["bytes"]
    # Kept classes decide a part of the KL: never more than all of it.
    assert storage["top-3, float32"]["bias"] < 0
    assert storage["top-3, float32"]["bytes"] < storage["top-10, float32"]["bytes"]


def test_both_types_are_trained_and_compared(summary):
    for row in summary["compute"].values():
        assert row["float32"]["n"] == row["bfloat16"]["n"] == 2
    assert summary["compute"]["teacher"]["bfloat16"]["mean"] > 0.3  # chance is 0.1
    text = precision.compute_table(summary["compute"])
    assert [line.split(" | ")[0] for line in text.splitlines()[2:5]] == [
        "| teacher",
        "| scratch",
        "| distilled",
    ]
