# SPDX-License-Identifier: Apache-2.0
"""The figure of what accuracy costs: where points, lines and the teacher lie."""

import json

import pytest

from jaxdistill import report
from jaxdistill.report import figures
from tests.report.test_report import records, summary


def row(accuracy: float, size: float, latency: float | None = 10.0, **others):
    cost = {"bytes": size}
    if latency is not None:
        cost["latency_us"] = latency
    return {
        "accuracy": {"mean": accuracy, "std": 0.01, "n": 3},
        "cost": cost,
        **others,
    }


ROWS = {
    "teacher": row(0.95, 80_000, 90),
    "kd_large": row(0.93, 8_000, 20),
    "kd_small": row(0.90, 2_000, 5),
    "scratch": row(0.85, 2_000, None),
}
LINES = {"distilled": ["kd_large", "kd_small"]}


@pytest.fixture
def drawn(monkeypatch):
    """The figure itself, in place of its PNG."""
    kept: list = []
    real = figures.to_png
    monkeypatch.setattr(figures, "to_png", lambda figure: kept.append(figure) or b"")

    def draw(rows, lines):
        figures.draw_frontier(rows, lines)
        return kept[-1]

    yield draw
    for figure in kept:
        real(figure)


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def joined(axis) -> list[list[tuple[float, float]]]:
    """The points of each line that joins some, dotted ones left out."""
    lines = [line for line in axis.get_lines() if line.get_linestyle() == "-"]
    return [
        [(round(float(x), 6), round(float(y), 6)) for x, y in line.get_xydata()]
        for line in lines
        if len(line.get_xdata())
    ]


def points(axis) -> dict[str, tuple[float, float, str, float]]:
    """By colour and place: mark and spread of each point."""
    found = {}
    for bar in axis.containers:
        point, _, (stick,) = bar
        ((x, y),) = point.get_xydata()
        (low, high) = stick.get_segments()[0]
        found[round(x, 6), round(y, 6)] = (
            point.get_color(),
            point.get_marker(),
            round(high[1] - low[1], 6),
        )
    return found


def test_lines_join_a_family_from_the_cheapest_on(drawn):
    figure = drawn(ROWS, LINES)
    size, latency = figure.axes
    assert [(2.0, 90.0), (8.0, 93.0)] in joined(size)
    assert [(5.0, 90.0), (20.0, 93.0)] in joined(latency)
    assert labels(figure) == ["teacher", "scratch", "distilled"]
    assert "kB" in size.get_xlabel()
    assert "us" in latency.get_xlabel()


def test_the_teacher_is_marked_and_spread_is_a_bar(drawn):
    size, latency = drawn(ROWS, LINES).axes
    found = points(size)
    assert found[80.0, 95.0] == ("black", "*", 2.0)
    assert found[2.0, 90.0][:2] == found[8.0, 93.0][:2] == ("C1", "o")
    assert len(points(latency)) == 3  # of scratch no latency is known
    for axis in (size, latency):
        (dotted,) = (line for line in axis.get_lines() if line.get_linestyle() == ":")
        assert {round(y, 6) for y in dotted.get_ydata()} == {95.0}


def test_a_teacher_in_a_line_keeps_its_mark(drawn):
    figure = drawn(ROWS, {"all": [*ROWS]})
    assert points(figure.axes[0])[80.0, 95.0][:2] == ("black", "*")
    assert labels(figure) == ["all"]


def test_each_kind_has_its_mark(drawn):
    rows = {
        "teacher onnx": row(0.95, 80, 9, kind="onnx"),
        "teacher tflite": row(0.94, 20, 8, kind="tflite"),
        "small onnx": row(0.9, 8, 2, kind="onnx"),
    }
    lines = {"teacher": ["teacher onnx", "teacher tflite"], "small": ["small onnx"]}
    figure = drawn(rows, lines)
    found = points(figure.axes[0])
    assert found[0.08, 95.0][:2] == ("black", "o")
    assert found[0.02, 94.0][:2] == ("black", "s")
    assert found[0.008, 90.0][:2] == ("C0", "o")
    assert labels(figure) == ["teacher", "small", "onnx", "tflite"]


def test_a_line_of_what_is_no_row():
    with pytest.raises(ValueError, match=r"\Alines join what are no arms: a, b\Z"):
        figures.draw_frontier(ROWS, {"x": ["b", "teacher"], "y": ["a"]})


def test_a_report_draws_it_where_the_summary_has_lines(tmp_path):
    whole = summary()
    lines = "".join(json.dumps(record) + "\n" for record in records())
    (tmp_path / "metrics.jsonl").write_text(lines)
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    report.write(tmp_path)
    assert not (tmp_path / "frontier.png").exists()
    whole["lines"] = {"students": ["scratch", "distilled"]}
    (tmp_path / "summary.json").write_text(json.dumps(whole))
    report.write(tmp_path)
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "comparison.png").exists()
