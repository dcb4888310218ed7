# SPDX-License-Identifier: Apache-2.0
"""The table of a benchmark of exported models."""

from jaxdistill.report import deployed


def test_the_table_says_all_that_the_summary_has():
    """Medians and extremes by hand, of rounds that are made up."""

    def one(p50, cold):
        return {
            "cold_start_s": cold,
            "load_s": 0.012,
            "memory_before": 30e6,
            "memory": 64e6,
            "latency_us": {"p50": p50, "p95": 1234.5},
            "per_second": None,
        }

    arm = {
        "arm": "label_smoothing",
        "kind": "tflite",
        "runtime": "ai-edge-litert",
        "examples": 1797,
        "accuracy": {"mean": 0.9, "std": 0.0, "n": 1},
        "cost": {"parameters": 1234, "flops": 5678.0, "bytes": 4321},
        "threads": {"1": [one(3.0, 0.5), one(1.0, 0.25), one(2.0, 0.125)]},
    }
    how = {
        "rounds": 3,
        "repeats": 50,
        "warmup": 20,
        "batch": 64,
        "batches": 5,
        "seconds": 0.25,
        "threads": [1],
        "left_out": {},
        "machine": {
            "cpu": "Abacus",
            "cores": 1,
            "system": "Linux",
            "python": "3.11.7",
            "versions": {"ai-edge-litert": "2.3.0"},
        },
    }
    summary = {"arms": {"x": arm}, "deployed": how}
    text = deployed.table(summary)
    line = text.splitlines()[2]
    assert line == (
        "| label smoothing | tflite | 90.00 | 1,234 | 5,678 | 4.3 | "
        "0.25 (0.125 to 0.5) | 12 (12 to 12) | 64 (64 to 64) | "
        "2 (1 to 3) | 1,234 (1,234 to 1,234) | - |"
    )
    for said in (
        "on 1,797 test examples, of the model of the first seed alone",
        "of 3 rounds",
        "20 calls to warm up and 50 that are timed",
        "batches of 64, 5 of them at least, and for 0.25 s",
        "imported it was 30.0 MB",
        "a second file, for 64",
        "1 core of Abacus, Linux, Python 3.11.7, ai-edge-litert 2.3.0.",
    ):
        assert said in text
    for each in arm["threads"]["1"]:
        each |= {"memory_before": None, "memory": None}
    text = deployed.table(summary)
    assert text.splitlines()[2].split(" | ")[8] == "-"
    assert "libraries included." in text
