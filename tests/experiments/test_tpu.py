# SPDX-License-Identifier: Apache-2.0
"""The train step compiles for TPU chips, with one sum of all gradients over them.

In processes of their own: libtpu's settings must stand before jax is imported.
"""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STATE = 3 * 4 * 109_386  # parameters and Adam's two moments, float32
TEACHER = 4 * 535_818
BATCH = 64 * 4 * (784 + 1 + 1)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install 'jaxdistill[tpu]')",
)


def python(code: str) -> subprocess.CompletedProcess:
    """Runs code that may use `main`, the experiment's."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(ROOT)
    code = f"import sys\nfrom experiments.tpu.images import *\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )


@pytest.fixture(scope="module")
def rows():
    done = python("import json; print(json.dumps(main([])))")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    *chips, cpu = found
    assert all(title.startswith("8 x TPU v5") for title in chips)
    assert cpu.startswith("this CPU")
    assert found[cpu]["step_ms"] > 0
    assert found[cpu]["flops"] == pytest.approx(found[cpu]["matmul_flops"], rel=0.05)
    del found[cpu]
    return {title.split(", ")[1]: row for title, row in found.items()}


@needs_libtpu
@pytest.mark.parametrize("kind", ["mesh", "pmap"])
class TestCompiledStep:
    def test_sums_counts_once_and_all_gradients_once(self, rows, kind):
        row = rows[kind]
        assert (row["all-reduce"], row["other collectives"]) == (2, 0)
        assert row["gradients"] == STATE / 3
        assert row["gradients"] <= row["reduced"] < row["gradients"] + 100

    def test_computes_its_own_examples_alone(self, rows, kind):
        assert rows[kind]["flops"] == pytest.approx(
            rows[kind]["matmul_flops"], rel=0.05
        )

    def test_holds_state_teacher_and_its_part_of_the_batch(self, rows, kind):
        assert rows[kind]["arguments"] == pytest.approx(
            STATE + TEACHER + BATCH, rel=0.05
        )

    def test_reuses_the_donated_state(self, rows, kind):
        assert rows[kind]["aliased"] == pytest.approx(STATE, rel=0.05)


def test_topologies_of_equal_count_and_kind_have_a_row_each():
    code = """
    from types import SimpleNamespace
    import experiments.tpu.images as it
    it.importlib.util.find_spec = lambda name: name
    it.find = lambda name: [SimpleNamespace(device_kind="TPU v5 lite")] * 8
    it.costs = lambda *_: {"reduced": 1, "gradients": 1}
    grids = ["v5e:2x4", "v5e:4x2"]
    found = it.main(["--parallel", "mesh", "--no-cpu", "--topology", *grids])
    print(*found, sep=";")
    """
    done = python(textwrap.dedent(code))
    assert done.stdout.splitlines()[-1] == (
        "8 x TPU v5 lite (v5e:2x4), mesh;8 x TPU v5 lite (v5e:4x2), mesh"
    ), done.stderr


@needs_libtpu
def test_unknown_topology_is_named():
    done = python("main(['--topology', 'v5e:3x7'])")
    assert done.returncode == 1
    assert "error: libtpu has no topology 'v5e:3x7': " in done.stderr


@pytest.mark.parametrize(
    ("setup", "arguments", "sentence"),
    [
        (
            "sys.modules['libtpu'] = None",
            [],
            "error: libtpu is not installed: pip install 'jaxdistill[tpu]'",
        ),
        ("", ["--batch-per-chip", "0"], "error: --batch-per-chip is 0, below 1"),
        (
            "",
            ["--remat"],
            "error: --remat is for residual networks: take --job resnet",
        ),
    ],
)
def test_bad_input_gives_one_sentence(setup, arguments, sentence):
    done = python(f"{setup}\nmain({arguments})")
    assert done.returncode == 1
    assert done.stderr.strip() == sentence


def test_collectives_are_read_from_the_program():
    program = """
      %a = f32[]{:T(128)} all-reduce(%b), channel_id=1
      %c = (f32[128]{0:T(128)S(1)}, f32[784,128]{1,0}) all-reduce-start(%d, %e)
      %f = (f32[128]{0:T(128)S(1)}, f32[784,128]{1,0}) all-reduce-done(%c)
      %g = bf16[8]{0} all-gather(%h)
      %i = f32[] add(%all-reduce.1, %all-reduce.2)
    """
    done = python(f"print(collectives({program!r}))")
    expected = {"all-reduce": [4, 4 * (128 + 784 * 128)], "all-gather": [16]}
    assert done.stdout.strip() == str(expected)


def test_what_loops_repeat_is_told_from_what_runs_once():
    """Also in what a loop's body calls."""
    program = """
%called (p: f32[2]) -> f32[4] {
  ROOT %g = f32[4]{0} all-gather(%p)
}

%body (p: f32[2]) -> f32[4] {
  ROOT %a = f32[4]{0} async-start(%p), calls=%called
}

ENTRY %main (p: f32[2]) -> f32[4] {
  %b = f32[2]{0} all-reduce(%p)
  ROOT %w = f32[4]{0} while(%b), condition=%small, body=%body
}
"""
    code = "from experiments.tpu.text import apart\n"
    code += f"print(*(collectives(part) for part in apart({program!r})))"
    assert python(code).stdout.strip() == "{'all-gather': [16]} {'all-reduce': [8]}"
