# SPDX-License-Identifier: Apache-2.0
"""What is damaged in a run's small files is named, and nothing else is lost."""

import json

import pytest
from etils import epath

from jaxdistill.parallel.sealed import Damaged, seal, unseal
from jaxdistill.train import RunDir, RunError, saved
from jaxdistill.train.run_dir import read_records, read_summary

RECORDS = [{"fit": "a-0", "step": step, "loss": 1 / step} for step in (1, 2, 3)]


@pytest.fixture
def run(tmp_path):
    """A run directory with settings, three records and a summary; nobody's now."""
    directory = RunDir(tmp_path, {"rate": 0.1})
    for record in RECORDS:
        directory.log(record)
    directory.write("summary.json", {"arms": {"a": {"accuracy": 0.5}}})
    return tmp_path


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7"])
def test_settings_that_cannot_be_read_are_named(run, content):
    (run / "config.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"config.json is damaged: .*; delete it and giv"):
        RunDir(run, {"rate": 0.1})
    with pytest.raises(RunError, match=r"config.json"):
        saved.read_config(run)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_no_flipped_bit_changes_a_value(run, name):
    content = (run / name).read_bytes()
    expected = unseal(content)
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            found = unseal(bytes(changed))
        except ValueError:
            continue
        # In the name of the checksum itself: the values are whole.
        assert {k: v for k, v in found.items() if k in expected} == expected


def test_a_summary_that_is_cut_or_absent(run):
    content = (run / "summary.json").read_bytes()
    (run / "summary.json").write_bytes(content[: len(content) // 2])
    with pytest.raises(Damaged, match=r"summary.json is damaged: .*give the command"):
        read_summary(run)
    (run / "summary.json").unlink()
    with pytest.raises(RunError, match="there is no .*summary.json: the run is not fi"):
        read_summary(run)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[]",
        b'{"fit": "a-0"}',
        b"",
        json.dumps({**seal(RECORDS[1]), "loss": 0.25}).encode(),
    ],
    ids=["binary", "list", "no step", "empty", "changed"],
)
def test_a_bad_record_in_the_middle_is_named_and_kept(run, line):
    path = epath.Path(run / "metrics.jsonl")
    lines = path.read_bytes().splitlines()
    before = b"\n".join([lines[0], line, *lines[2:], b""])
    path.write_bytes(before)
    with pytest.warns(UserWarning, match="metrics.jsonl is damaged in line 2,"):
        assert read_records(path) == [RECORDS[0], RECORDS[2]]
    with pytest.warns(UserWarning, match="line 2"):
        directory = RunDir(run, {"rate": 0.1})
    directory.rewind("a-0", 1)
    assert read_records(path) == [RECORDS[0]]
    assert (run / "metrics.damaged-0.jsonl").read_bytes() == before


def test_a_last_line_that_a_kill_has_cut_is_dropped(run):
    path = epath.Path(run / "metrics.jsonl")
    path.write_bytes(path.read_bytes()[:-9])
    assert read_records(path) == RECORDS[:2]
    assert RunDir(run, {"rate": 0.1}).records == RECORDS[:2]


def test_files_without_a_checksum_are_read(run):
    """As written by hand, or by versions before."""
    (run / "config.json").write_text('{"rate": 0.1}')
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert RunDir(run, {"rate": 0.1}).records == RECORDS
