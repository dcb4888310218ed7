# SPDX-License-Identifier: Apache-2.0
"""Statistics, tables, figures and pages from files alone, and the run directory."""

import json
import math
import struct

import numpy as np
import pytest
from etils import epath
from scipy import stats

from jaxdistill import report
from jaxdistill.parallel.sealed import unseal
from jaxdistill.report import figures, holm, paired, spread
from jaxdistill.train import RunDir, RunError
from jaxdistill.train.run_dir import read_records

ACCURACY = {
    "teacher": [0.95, 0.97, 0.96],
    "scratch": [0.80, 0.82, 0.78],
    "distilled": [0.85, 0.86, 0.84],
}


def summary(accuracy=None, agreement: bool = True) -> dict:
    rows = accuracy or ACCURACY
    results = {
        name: [
            {
                "accuracy": value,
                "nll": 1 - value,
                "ece": 0.01,
                "class_error": [1 - value, 0.0],
                **({"agreement": value / 2} if agreement else {}),
            }
            for value in values
        ]
        for name, values in rows.items()
    }
    cost = {"parameters": 1234, "flops": 5678.0, "latency_us": 9.6, "bytes": 4321}
    costs = dict.fromkeys(results, cost)
    return report.summarize(results, costs, pairs={"distilled": ["scratch"]})


def records(accuracy=0.5) -> list[dict]:
    return [
        {"fit": f"{row}-{seed}", "step": step, "loss": 1 / step + seed, "epoch": step}
        | {"accuracy": accuracy + 0.1 * seed}
        for row in ACCURACY
        for seed in (0, 1)
        for step in (1, 2)
    ]


@pytest.fixture
def directory(tmp_path):
    """A finished run of which only the logs are left."""
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    lines = [json.dumps(record) + "\n" for record in records()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("size", [2, 3, 20])
def test_spread_and_paired_are_scipys(size):
    a, b = np.random.default_rng(size).normal(size=(2, size))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    pair = paired(a, b)
    np.testing.assert_allclose([pair["low"], pair["high"]], interval, rtol=1e-9)
    assert pair["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (pair["mean"], pair["n"]) == (pytest.approx((a - b).mean()), size)
    one = spread(a)
    assert one["std"] == pytest.approx(stats.tstd(a))
    assert (one["mean"], one["n"]) == (pytest.approx(a.mean()), size)


def test_holm_is_as_in_his_paper():
    """Seeds of no difference at all count as p = 1."""
    found = holm({"a": 0.01, "b": math.nan, "c": 0.02, "d": 0.011})
    assert found == pytest.approx({"a": 0.04, "d": 0.04, "c": 0.04, "b": 1.0})


def test_one_seed_has_no_interval():
    assert spread([0.5]) == {"mean": 0.5, "std": 0, "n": 1}
    pair = paired([0.5], [0.25])
    assert pair["mean"] == 0.25
    assert math.isnan(pair["low"])
    assert math.isnan(pair["high"])


class TestTable:
    def test_text(self):
        assert report.table(summary()).splitlines() == [
            "|  | accuracy % | agreement % | NLL, nats | ECE % | parameters | FLOPs "
            "| latency, us | kB |",
            "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
            "| teacher | 96.00 ± 1.00 | 48.00 ± 0.50 | 0.0400 ± 0.0100 | 1.00 ± 0.00 "
            "| 1,234 | 5,678 | 10 | 4.3 |",
            "| scratch | 80.00 ± 2.00 | 40.00 ± 1.00 | 0.2000 ± 0.0200 | 1.00 ± 0.00 "
            "| 1,234 | 5,678 | 10 | 4.3 |",
            "| distilled | 85.00 ± 1.00 | 42.50 ± 0.50 | 0.1500 ± 0.0100 "
            "| 1.00 ± 0.00 | 1,234 | 5,678 | 10 | 4.3 |",
            "",
            # gaps 5, 4, 6: mean 5, deviation 1, t(2, .975) / sqrt 3 = 2.48
            "- distilled minus scratch: +5.00 points, 95% interval +2.52 to +7.48 "
            "(3 paired seeds)",
        ]

    def test_many_comparisons_are_a_table_corrected_for_their_number(self):
        rng = np.random.default_rng(0)
        accuracy = {"scratch": 0.8 + 0.001 * rng.normal(size=5)}
        accuracy["kd"] = accuracy["scratch"] + 0.02 + 0.001 * rng.normal(size=5)
        for i in range(3):
            accuracy[f"m{i}"] = accuracy["kd"] + 0.004 * rng.normal(size=5)
        gaps = {}
        for name in list(accuracy)[1:]:
            others = ["scratch"] if name == "kd" else ["scratch", "kd"]
            gaps[name] = {o: paired(accuracy[name], accuracy[o]) for o in others}
        text = report.table({"arms": {}, "paired": gaps})
        lines = text.splitlines()
        assert "| points above (5 paired seeds) | scratch | kd |" in lines
        (kd,) = [line for line in lines if line.startswith("| kd |")]
        gap = gaps["kd"]["scratch"]
        cell = f"{100 * gap['mean']:+.2f} ({100 * gap['low']:+.2f} to"
        assert kd.startswith(f"| kd | {cell}")
        assert kd.endswith("\\* | - |")
        assert any(line.startswith("- above scratch: kd") for line in lines)
        assert "- above kd: none" in lines

    def test_of_a_loss_what_is_below_is_better(self):
        rng, nll = np.random.default_rng(0), {"scratch": np.full(5, 2.0)}
        for i, change in enumerate((-0.1, -0.2, 0.1, 0.2, 0.0)):
            nll[f"m{i}"] = 2.0 + change + 0.001 * rng.normal(size=5)
        gaps = {k: {"scratch": paired(v, nll["scratch"])} for k, v in nll.items()}
        del gaps["scratch"]
        text = report.table({"measure": "nll", "arms": {}, "paired": gaps})
        assert "| nats above, lower is better (5 paired seeds) | scratch |" in text
        assert "\n- below scratch: m0, m1\n- above scratch: m2, m3\n" in text

    def test_few_of_many_pairs_are_a_list(self):
        rng, gaps = np.random.default_rng(0), {}
        for i in range(5):
            scratch = 0.8 + 0.001 * rng.normal(size=5)
            better = scratch + (0.02 if i else 0.0) + 0.001 * rng.normal(size=5)
            gaps[f"kd_{i}"] = {f"scratch_{i}": paired(better, scratch)}
        lines = report.table({"arms": {}, "paired": gaps}).splitlines()
        assert "|  | against | points above (5 paired seeds) |" in lines
        listed = [line for line in lines if line.startswith("| kd ")]
        assert len(listed) == 5
        assert [line.endswith("\\* |") for line in listed] == [False] + 4 * [True]
        gap = gaps["kd_4"]["scratch_4"]
        assert listed[4].startswith(f"| kd 4 | scratch 4 | {100 * gap['mean']:+.2f} (")
        assert lines[-1].startswith("\\* p < 0.05 after Holm's correction")

    def test_one_seed_shows_neither_spread_nor_interval(self):
        text = report.table(summary({name: [v[0]] for name, v in ACCURACY.items()}))
        assert "±" not in text
        assert text.endswith("+5.00 points (one seed: no interval)\n")

    def test_what_was_not_measured_is_a_dash(self):
        found = summary()
        del found["arms"]["teacher"]["agreement"]
        assert "| teacher | 96.00 ± 1.00 | - | 0.0400" in report.table(found)
        assert "agreement" not in report.table(summary(agreement=False))

    def test_class_errors_are_means_over_seeds(self):
        rows = summary()["arms"]
        np.testing.assert_allclose(rows["teacher"]["class_error"], [0.04, 0])


class TestFigures:
    @pytest.mark.parametrize("name", ["curves.png", "comparison.png"])
    def test_are_pngs_of_some_size(self, directory, name):
        png = figures.draw_run(directory)[name]
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", png[16:24])
        assert width > 300
        assert height > 300
        assert png.endswith(b"IEND\xaeB`\x82")

    def test_show_the_data(self, directory):
        """Equal data draw equal figures; other data, another figure."""
        first = figures.draw_run(directory)
        assert figures.draw_run(directory) == first
        other = summary({**ACCURACY, "scratch": [0.7, 0.7, 0.7]})
        (directory / "summary.json").write_text(json.dumps(other))
        second = figures.draw_run(directory)
        assert second["comparison.png"] != first["comparison.png"]
        assert second["curves.png"] == first["curves.png"]
        lines = [json.dumps(record) + "\n" for record in records(accuracy=0.6)]
        (directory / "metrics.jsonl").write_text("".join(lines))
        assert figures.draw_run(directory)["curves.png"] != first["curves.png"]

    def test_without_validation_the_losses_carry_the_legend(self, directory):
        kept = [{k: r[k] for k in r if k != "accuracy"} for r in records()]
        lines = [json.dumps(record) + "\n" for record in kept]
        first = figures.draw_run(directory)["curves.png"]
        (directory / "metrics.jsonl").write_text("".join(lines))
        assert figures.draw_run(directory)["curves.png"] != first


class TestWrite:
    def test_rebuilds_from_logs_alone(self, directory):
        text = report.write(directory)
        made = {name: (directory / name).read_bytes() for name in MADE}
        assert made["table.md"].decode() == text == report.table(summary())
        for name in MADE:
            (directory / name).unlink()
        report.write(str(directory))
        assert {name: (directory / name).read_bytes() for name in MADE} == made

    def test_save_keeps_what_report_needs(self, directory, tmp_path_factory):
        (directory / "models").mkdir()
        (directory / "tokenizer.json").write_text("{}")
        target = tmp_path_factory.mktemp("results") / "new" / "run"
        report.save(directory, target)
        assert {p.name for p in target.iterdir()} == {
            *MADE,
            "summary.json",
            "metrics.jsonl",
        }
        assert report.write(target) == report.write(directory)

    def test_a_scripts_own_tables_are_kept_as_they_are(self, tmp_path):
        folder, target = tmp_path / "run", tmp_path / "kept"
        folder.mkdir()
        (folder / "summary.json").write_text('{"storage": 1, "compute": 2}')
        with pytest.raises(ValueError, match="no table, .* but storage, compute"):
            report.write(folder)
        for name, text in {"a.md": "first\n", "b.md": "second\n"}.items():
            (folder / name).write_text(text)
        (folder / "a.png").write_bytes(b"figure")
        report.save(folder, target)
        assert report.write(target) == "first\n\nsecond\n"
        assert (target / "a.png").read_bytes() == b"figure"

    def test_a_summary_of_the_first_version_is_read(self, directory):
        """It called the arms rows; the table is the same."""
        expected = report.write(directory)
        path = directory / "summary.json"
        older = json.loads(path.read_text())
        older["rows"] = older.pop("arms")
        path.write_text(json.dumps(older))
        assert report.write(directory) == expected

    def test_save_refuses_large_files(self, directory, tmp_path_factory):
        (directory / "metrics.jsonl").write_text(" " * (report.tables.LARGEST + 1))
        with pytest.raises(
            ValueError, match="metrics.jsonl has 500001 bytes, too many"
        ):
            report.save(directory, tmp_path_factory.mktemp("results"))


MADE = ("table.md", "curves.png", "comparison.png")


class TestPages:
    PAGE = "# A\n<!-- table: one -->\nold\n<!-- end -->\ntext\n"
    PAGE += "<!-- table: deep/two -->\n<!-- end -->\nlast\n"
    FILLED = "# A\n<!-- table: one -->\n| 1 |\n<!-- end -->\ntext\n"
    FILLED += "<!-- table: deep/two -->\n| 2 |\\d\n<!-- end -->\nlast\n"

    @pytest.fixture
    def page(self, tmp_path):
        (tmp_path / "results" / "deep").mkdir(parents=True)
        (tmp_path / "results" / "one.md").write_text("| 1 |\n\n")
        (tmp_path / "results" / "deep" / "two.md").write_text("| 2 |\\d\n")
        (tmp_path / "page.md").write_text(self.PAGE)
        return tmp_path / "page.md"

    def test_fill(self, page):
        results = page.parent / "results"
        assert report.fill(page, results, write=False)
        assert page.read_text() == self.PAGE
        assert report.fill(page, results)
        assert page.read_text() == self.FILLED
        assert not report.fill(page, results)

    def test_a_file_that_is_not_there(self, page):
        (page.parent / "results" / "one.md").unlink()
        with pytest.raises(ValueError, match=r"page.md asks for .*one.md, which does"):
            report.fill(page, page.parent / "results")
        assert page.read_text() == self.PAGE

    @pytest.mark.parametrize(
        "text", [PAGE.replace("<!-- end -->\ntext", "text"), "<!-- table: one -->\n"]
    )
    def test_a_block_that_is_not_closed(self, page, text):
        """The text up to another block's end must not be taken for a table."""
        page.write_text(text)
        with pytest.raises(ValueError, match="page.md: each .* needs its <!-- end -->"):
            report.fill(page, page.parent / "results")
        assert page.read_text() == text


class TestRun:
    def test_a_line_cut_short_is_dropped(self, tmp_path):
        run_dir = RunDir(tmp_path, {"seed": 0})
        for step in (1, 2):
            run_dir.log({"fit": "a", "step": step})
        path = tmp_path / "metrics.jsonl"
        path.write_text(path.read_text()[:-5])
        again = RunDir(tmp_path, {"seed": 0})
        assert again.records == [{"fit": "a", "step": 1}]
        again.rewind("a", 1)
        again.log({"fit": "a", "step": 2})
        assert read_records(epath.Path(path)) == again.records
        assert [r["step"] for r in again.records] == [1, 2]

    def test_rewind_touches_one_training(self, tmp_path):
        run_dir = RunDir(tmp_path, {})
        for fit in ("a", "b"):
            for step in (1, 2, 3):
                run_dir.log({"fit": fit, "step": step})
        run_dir.rewind("a", 1)
        kept = [(r["fit"], r["step"]) for r in RunDir(tmp_path, {}).records]
        assert kept == [("a", 1), ("b", 1), ("b", 2), ("b", 3)]

    def test_another_configuration(self, tmp_path):
        old = {"seed": 0, "widths": (8, 9), "gone": 1}
        RunDir(tmp_path, old).log({"fit": "a", "step": 1})
        RunDir(tmp_path, {**old, "widths": [8, 9]})  # JSON has no tuples
        with pytest.raises(RunError) as said:
            RunDir(tmp_path, {"seed": 1, "widths": (8, 9), "new": None, "more": "x"})
        assert str(said.value) == (
            f"run directory {tmp_path} holds another run: gone was 1, is now None; "
            "more was None, is now 'x'; seed was 0, is now 1; give another --run-dir, "
            "or the first command again to resume it"
        )

    def test_nothing_trained_is_no_other_run(self, tmp_path):
        RunDir(tmp_path, {"seed": 0})
        RunDir(tmp_path, {"seed": 1})
        assert unseal((tmp_path / "config.json").read_bytes()) == {"seed": 1}

    def test_files_are_replaced_whole(self, tmp_path):
        run_dir = RunDir(tmp_path, {})
        run_dir.write("summary.json", {"a": 1})
        with pytest.raises(TypeError):
            run_dir.write("summary.json", {"a": object()})
        assert unseal((tmp_path / "summary.json").read_bytes()) == {"a": 1}
        run_dir.write_bytes("models/a.bin", b"\0\1")
        assert (tmp_path / "models" / "a.bin").read_bytes() == b"\0\1"
