# SPDX-License-Identifier: Apache-2.0
"""A sweep's table and heat map, from summaries written by hand."""

import io

import numpy as np
import pytest

from jaxdistill.report import figures

SUMMARY = {
    "axes": {"temperature": [1.0, 2.0], "rate": [0.1, 0.3], "seed": [0.0, 1.0]},
    # By hand: the best mean on validation is temperature 2, rate 0.1; on test another.
    "validation": [0.5, 0.6, 0.7, 0.7, 0.9, 0.7, 0.8, 0.6],
    "test": [0.5, 0.5, 0.9, 0.9, 0.6, 0.4, 0.7, 0.7],
}


def pixels(png):
    image = pytest.importorskip("PIL.Image")
    return np.asarray(image.open(io.BytesIO(png)))


def test_the_best_is_chosen_on_validation():
    assert figures.best_settings(SUMMARY) == {"temperature": 2.0, "rate": 0.1}
    lines = figures.heatmap_table(SUMMARY).splitlines()
    assert lines[0] == "| temperature | rate | validation % | test % |"
    assert lines[2] == "| 2 | 0.1 | 80.00 ± 14.14 | 50.00 ± 14.14 |"
    assert "chosen on validation: temperature 2, rate 0.1." in lines[-1]
    assert figures.draw_heatmap(SUMMARY).startswith(b"\x89PNG")


def test_one_axis_alone_is_a_row():
    summary = {
        "axes": {"rate": [0.1, 0.3, 1.0], "seed": [0.0, 1.0]},
        "validation": [0.5, 0.6, 0.7, 0.7, 0.1, 0.2],
        "test": [0.5, 0.5, 0.9, 0.9, 0.6, 0.4],
    }
    assert figures.best_settings(summary) == {"rate": 0.3}
    height, width, _ = pixels(figures.draw_heatmap(summary)).shape
    assert width > 2 * height


def test_a_setting_that_is_not_a_number_is_never_chosen():
    validation = list(SUMMARY["validation"])
    validation[4] = np.nan  # one seed of the best
    summary = {**SUMMARY, "validation": validation}
    chosen = {"temperature": 1.0, "rate": 0.3}
    assert figures.best_settings(summary) == chosen
    assert "temperature 1, rate 0.3." in figures.heatmap_table(summary)
    assert figures.draw_heatmap(summary).startswith(b"\x89PNG")
    summary["validation"] = [np.nan] * 8
    with pytest.raises(ValueError, match="no setting of the sweep has a validation"):
        figures.best_settings(summary)


def test_seeds_alone_are_no_sweep():
    summary = {"axes": {"seed": [0.0]}, "validation": [0.5], "test": [0.5]}
    with pytest.raises(ValueError, match="needs an axis besides the seed"):
        figures.heatmap_table(summary)
