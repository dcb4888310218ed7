# SPDX-License-Identifier: Apache-2.0
"""The streaming experiment times equal work, and its records hold what it trains on."""

import pytest

pytest.importorskip("grain", reason="grain is not installed")
pytest.importorskip("array_record", reason="array_record is not installed")

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from experiments.speed import streaming

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("encoding", ["png", "raw"])
def test_records_decode_to_the_resident_examples(encoding, tmp_path):
    config = streaming.Config(encoding=encoding, images=5)
    path = tmp_path / "images.array_record"
    examples = streaming.write(path, config)
    decode = {"png": streaming.decode_png, "raw": streaming.decode_raw}[encoding]
    for i, record in enumerate(ArrayRecordDataSource(str(path))):
        for name, value in decode(record).items():
            assert value.dtype == examples[name].dtype
            np.testing.assert_array_equal(value, examples[name][i])


def test_smoke(tmp_path, capsys, monkeypatch):
    trained = []
    train = streaming.Job.train

    def spy(job, examples, batches, start):
        trained.append((bool(examples), start % streaming.STREAMED_PER_DISPATCH))
        return train(job, examples, batches, start)

    monkeypatch.setattr(streaming.Job, "train", spy)
    path = tmp_path / "run"
    flags = ["--smoke", "--workers", "0", "--parallel", "jit"]
    summary = streaming.main([*flags, "--run-dir", str(path)])
    assert trained == [(True, 0), (False, 0)] * 2  # one round is not counted
    assert {k: len(v) for k, v in summary["seconds"].items()} == {
        "resident": 1,
        "read 0": 1,
        "streamed 0": 1,
    }
    said = capsys.readouterr().out
    assert (path / "table.md").read_text() in said
    assert "| a thread |" in said


def test_steps_that_are_no_whole_dispatches(tmp_path):
    with pytest.raises(SystemExit, match="--steps must be a multiple of 8"):
        streaming.main(["--steps", "12", "--run-dir", str(tmp_path)])
