# SPDX-License-Identifier: Apache-2.0
"""A measure by row and column prints its mean and spread, and draws numbers alone."""

import json

from jaxdistill import report
from jaxdistill.report import figures

SUMMARY = {
    "measure": "test errors",
    "across": "temperature",
    "series": {"30_units": {"1": [7.0, 9.0], "2.5": [3.0]}, "800_units": {"1": [4.0]}},
    "note": "One teacher.",
}


def test_the_table_has_means_and_deviations():
    assert figures.series_table(SUMMARY).splitlines() == [
        "| temperature | 1 | 2.5 |",
        "| --- | --: | --: |",
        "| 30 units | 8.0 ± 1.4 | 3.0 ± 0.0 |",
        "| 800 units | 4.0 ± 0.0 | - |",
        "",
        "Test errors: mean ± sample deviation over 1 or 2 seeds. One teacher.",
    ]


def test_a_report_rebuilds_table_and_figure(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert report.write(tmp_path) == (tmp_path / "table.md").read_text()
    assert (tmp_path / "series.png").read_bytes().startswith(b"\x89PNG")


def test_columns_that_are_words_have_no_figure():
    assert (
        figures.draw_series({**SUMMARY, "series": {"without 3": {"before": [1.0]}}})
        == {}
    )
