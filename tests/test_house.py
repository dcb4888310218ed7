# SPDX-License-Identifier: Apache-2.0
"""The house: its sizes, which folder imports which, and what an import loads."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house
from tests.conftest import SLOW_CASES, what_would_run

# Imported inside the function that needs them: importing no module costs them.
HEAVY = {"torch", "tensorflow", "tensorflow_datasets", "matplotlib", "transformers"}
HEAVY |= {"grain", "tokenizers"}
HEAVY |= {"jax2onnx", "onnx", "onnxruntime", "ai_edge_litert"}
CORE = "losses, models, data, objectives, teachers, train, parallel"
MODULES = [
    ".".join(source.path.relative_to(house.PACKAGE.parent).with_suffix("").parts)
    for source in house.SOURCES
]
ON_THE_DEVICE = {"augment", "tokens"}
"""Files of `data` that compute with jax, and are not loaded with the folder."""
ON_THE_HOST = [
    source
    for source in house.SOURCES
    if source.folder == "data" and source.path.stem not in ON_THE_DEVICE
]


def test_no_limit_is_passed():
    assert house.passed() == []


def test_the_table_counts_every_line_once(tmp_path):
    path = house.PACKAGE / "losses" / "numerics.py"
    source = house.read(path)
    blank = sum(not line.strip() for line in path.read_text().splitlines())
    assert source.lines == source.code + source.docstring + source.comment + blank
    assert house.table().splitlines()[-1].split()[:2] == ["all", str(len(MODULES))]


@pytest.mark.parametrize("folder", house.ALLOWED)
def test_arrows_point_to_earlier_lines(folder):
    order = [*house.ALLOWED]
    assert {*house.ALLOWED[folder].split()} <= {*order[: order.index(folder)]}


def test_no_arrow_is_allowed_in_vain():
    drawn: dict[str, set[str]] = {name: set() for name in house.ALLOWED}
    for source in house.SOURCES:
        drawn.setdefault(source.folder, set()).update(house.folders_of(source))
    assert {k: {*v.split()} for k, v in house.ALLOWED.items()} == {
        name: drawn[name] for name in house.ALLOWED
    }


@pytest.mark.parametrize(
    "source",
    ON_THE_HOST,
    ids=lambda source: source.path.stem,
)
def test_data_on_the_host_never_imports_jax(source):
    roots = {name.split(".")[0] for name in source.imports}
    assert not roots & {"jax", "jaxlib", "flax", "optax", "orbax"}
    assert not house.folders_of(source)


def imported_by(statement: str) -> set[str]:
    """The top-level packages in a fresh interpreter after a statement."""
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(output.stdout.split())


def test_the_core_imports_nothing_heavy():
    found = imported_by(f"from jaxdistill import {CORE}")
    assert not found & (HEAVY | {"orbax"})


def test_the_package_imports_nothing_but_itself():
    found = imported_by("import jaxdistill") - imported_by("pass")
    assert found - sys.stdlib_module_names == {"jaxdistill"}


def test_no_module_imports_heavy_packages_on_import():
    names = [name.removesuffix(".__init__") for name in MODULES]
    found = imported_by(f"import {', '.join(names)}")
    assert not found & HEAVY


def test_data_needs_no_jax_at_run_time():
    assert not imported_by("import jaxdistill.data") & {"jax", "flax"}


def test_runtimes_need_numpy_alone():
    found = imported_by("import jaxdistill.runtimes") - imported_by("import numpy")
    assert found - sys.stdlib_module_names == {"jaxdistill"}


def test_the_core_imports_little_besides_its_dependencies():
    found = imported_by(f"from jaxdistill import {CORE}")
    theirs = imported_by("import jax, flax.linen, optax, jaxtyping, etils.epath, tqdm")
    # multiprocessing, which data.Stream uses, names __main__ a second time.
    own = {"jaxdistill", "__mp_main__"}
    assert found - theirs - sys.stdlib_module_names <= own


def test_the_last_line_says_what_would_run_skipped_tests():
    said = what_would_run(
        ["PyTorch is not installed", "onnx is not installed", "torch is not installed"]
        + ["JAXDISTILL_DATA names no folder with mnist/"]
    )
    assert said == (
        "4 skipped; to run them: pip install -e '.[torch]' (2), pip install -e "
        "'.[onnx]' (1), a folder of data in JAXDISTILL_DATA (1)"
    )


def test_every_slow_case_is_of_a_test():
    """Its name must not be left behind where a test is renamed."""
    texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    found = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    assert {*SLOW_CASES} <= found
