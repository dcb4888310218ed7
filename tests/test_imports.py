# SPDX-License-Identifier: Apache-2.0
"""The house's floors: which module may import which, and what that loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxdistill"

# Imports point down; from floor 2 up, neighbours may import each other.
FLOORS = {
    "types": 0,
    "runtimes": 1,
    "footprint": 1,
    "failures": 1,
    "losses": 1,
    "models": 1,
    "data": 1,
    "schedules": 2,
    "accumulate": 2,
    "fingerprints": 2,
    "precision": 2,
    "terms": 2,
    "objectives": 2,
    "matching": 2,
    "parts": 2,
    "recipes": 2,
    "masking": 2,
    "trimming": 2,
    "teachers": 2,
    "convert": 2,
    "augment": 2,
    "generate": 2,
    "layers": 1,
    "quantize": 2,
    "huggingface": 2,
    "huggingface_config": 2,
    "huggingface_files": 2,
    "huggingface_names": 2,
    "huggingface_tensors": 2,
    "pretrained": 2,
    "tokens": 2,
    "added_tokens": 2,
    "processes": 2,
    "sharding": 2,
    "steps": 3,
    "parallel": 3,
    "checkpoint": 3,
    "evaluate": 3,
    "benchmark": 3,
    "memory": 3,
    "compilations": 2,
    "constraints": 2,
    "runs": 3,
    "saved": 3,
    "export": 3,
    "lessons": 4,
    "journal": 4,
    "loop": 4,
    "sweep": 4,
    "statistics": 3,
    "measures": 3,
    "zarr": 1,
    "views": 2,
    "manifest": 2,
    "stored_outputs": 2,
    "cache": 2,
    "figures": 4,
    "heatmap": 4,
    "series": 4,
    "frontier": 4,
    "deployed": 4,
    "deployment": 4,
    "report": 4,
    "row": 3,
    "study": 4,
    "comparison": 4,
    "cli": 5,
}
# Imported inside the function that needs them: importing no module costs them.
HEAVY = {"torch", "tensorflow", "tensorflow_datasets", "matplotlib", "transformers"}
HEAVY |= {"grain", "tokenizers"}
HEAVY |= {"jax2onnx", "onnx", "onnxruntime", "ai_edge_litert"}
CORE = ["losses", "models", "data", "objectives", "teachers", "steps", "parallel"]


def unit(module: str) -> str:
    """`jaxdistill.losses.logits` -> `losses`."""
    return module.split(".")[1]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its floor"
            if node.module == "jaxdistill":  # from jaxdistill import losses
                found |= {f"jaxdistill.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    me = unit(module)
    assert me in FLOORS, f"{module} has no floor: put it on one in FLOORS"
    own = {m for m in imports(FILES[module]) if m.startswith("jaxdistill.")}
    for other in {unit(m) for m in own} - {me}:
        if FLOORS[me] == 1:
            assert other == "types", f"{module} imports its sibling {other}"
        assert FLOORS[other] <= FLOORS[me], f"{module} imports {other}, floors above"


@pytest.mark.parametrize("module", [m for m in FILES if unit(m) == "data"])
def test_data_never_imports_jax(module):
    roots = {m.split(".")[0] for m in imports(FILES[module])}
    assert not roots & {"jax", "jaxlib", "flax", "optax", "orbax"}


def imported_by(statement: str) -> set[str]:
    """The top-level packages in a fresh interpreter after a statement."""
    code = f"{statement}; import sys; print(*{{m.split('.')[0] for m in sys.modules}})"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(output.stdout.split())


def test_the_core_imports_nothing_heavy():
    modules = ", ".join(f"jaxdistill.{name}" for name in CORE)
    found = imported_by(f"import jaxdistill, {modules}")
    assert not found & (HEAVY | {"orbax"})


def test_no_module_imports_heavy_packages_on_import():
    found = imported_by(f"import {', '.join(FILES)}")
    assert not found & HEAVY


def test_data_needs_no_jax_at_run_time():
    assert not imported_by("import jaxdistill.data") & {"jax", "flax"}


def test_runtimes_need_numpy_alone():
    found = imported_by("import jaxdistill.runtimes") - imported_by("import numpy")
    assert found - sys.stdlib_module_names == {"jaxdistill"}


def test_the_core_imports_little_besides_its_dependencies():
    modules = ", ".join(f"jaxdistill.{name}" for name in CORE)
    found = imported_by(f"import jaxdistill, {modules}")
    theirs = imported_by("import jax, flax.linen, optax, jaxtyping")
    # multiprocessing, which data.Stream uses, names __main__ a second time.
    own = {"jaxdistill", "__mp_main__"}
    assert found - theirs - sys.stdlib_module_names <= own
