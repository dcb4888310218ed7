# SPDX-License-Identifier: Apache-2.0
"""The `jaxdistill` command on a finished run and on pages."""

import json

import pytest
from test_report import summary

from jaxdistill import cli, report


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A project with one result, and a README that is not up to date."""
    result = tmp_path / "experiments" / "results" / "tiny"
    result.mkdir(parents=True)
    (result / "summary.json").write_text(json.dumps(summary()))
    record = {"fit": "teacher-0", "step": 1, "loss": 1.0, "accuracy": 0.5}
    (result / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (result / "table.md").write_text("| tiny |\n")
    (tmp_path / "README.md").write_text("<!-- table: tiny/table -->\n<!-- end -->\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RESULT = "experiments/results/tiny"


def test_report_prints_the_table_and_rebuilds_the_figures(folder, capsys):
    cli.main(["report", RESULT])
    table = report.table(summary())
    assert capsys.readouterr().out == f"{table}\n"
    assert (folder / RESULT / "table.md").read_text() == table
    assert (folder / RESULT / "curves.png").is_file()


def test_report_saves_a_run(folder):
    cli.main(["report", RESULT, "--save", "kept/run"])
    saved = {p.name for p in (folder / "kept" / "run").iterdir()}
    assert saved == {p.name for p in (folder / RESULT).iterdir()}


def test_report_of_something_else(folder):
    with pytest.raises(SystemExit) as end:
        cli.main(["report", "nowhere"])
    assert end.value.code.startswith("error: ")
    assert "nowhere/summary.json" in end.value.code


def test_pages(folder, capsys):
    page = folder / "README.md"
    old = page.read_text()
    with pytest.raises(SystemExit) as end:
        cli.main(["pages", "--check"])
    expected = "error: run `jaxdistill pages`: README.md not up to date"
    assert end.value.code == expected
    assert page.read_text() == old

    cli.main(["pages"])
    assert "| tiny |" in page.read_text()
    cli.main(["pages", "--check"])
    said = capsys.readouterr().out.splitlines()
    assert said == ["rebuilt: README.md", "all pages are up to date"]

    (folder / RESULT / "table.md").write_text("| changed |\n")
    with pytest.raises(SystemExit, match="README.md not up to date"):
        cli.main(["pages", "--check"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["other.md"], "error: .*other.md"),
        (
            ["--results", "empty"],
            "error: README.md asks for empty/tiny/table.md, which",
        ),
    ],
)
def test_pages_that_cannot_be_made(folder, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        cli.main(["pages", *arguments])


@pytest.mark.parametrize("arguments", [[], ["serve"]])
def test_unknown_commands_list_the_known(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "report" in said
    assert "pages" in said
