# SPDX-License-Identifier: Apache-2.0
"""A grid as a user runs it: table, heat map, the best by validation, resume."""

import numpy as np
import pytest

from experiments import hyperparameters
from jaxdistill import report
from jaxdistill.parallel.sealed import unseal

pytestmark = pytest.mark.slow

SMALL = ["--temperature", "1", "4", "--soft-weight", "0", "0.9"]
SMALL += ["--learning-rate", "1e-2", "--epochs", "10", "--seeds", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sweep") / "run"
    arguments = [*SMALL, "--run-dir", str(directory), "--no-progress"]
    return directory, arguments, hyperparameters.main(arguments)


def test_a_run_leaves_its_table_and_heat_map(finished):
    directory, _, summary = finished
    assert len(summary["validation"]) == len(summary["test"]) == 8
    text = (directory / "table.md").read_text()
    assert (directory / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    (directory / "table.md").unlink()
    assert report.write(directory) == text
    assert (directory / "table.md").read_text() == text


def test_without_soft_targets_the_temperature_is_nothing(finished):
    """Weight 0 is the student from scratch at any temperature; another is not."""
    accuracy = np.reshape(finished[2]["test"], (2, 2, 2))  # temperature, weight, seed
    np.testing.assert_array_equal(accuracy[0, 0], accuracy[1, 0])
    assert (accuracy[0, 1] != accuracy[1, 1]).any()
    assert accuracy[:, 1].mean() > accuracy[:, 0].mean()


def test_the_same_command_again_changes_nothing(finished):
    directory, arguments, summary = finished
    assert hyperparameters.main(arguments) == summary
    stored = unseal((directory / "summary.json").read_bytes())
    assert stored == summary
