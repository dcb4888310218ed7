# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices, strict shapes, and the data sets that are not shipped."""

import os
import tempfile
from fnmatch import fnmatch
from importlib.metadata import version

# Before jax is imported. NPROC: with few cores, jax 0.10 gives the collectives of eight
# virtual devices too few threads to meet, and aborts the process.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("NPROC", "16")
# Many tests compile the same programs: each is kept while they run, for all workers and
# the scripts they start, in a folder of their own, not in the user's cache.
if "JAXDISTILL_COMPILED" not in os.environ:  # CI has one for several runs
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxdistill-compiled-")
    os.environ["JAXDISTILL_COMPILED"] = COMPILED.name
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["JAXDISTILL_COMPILED"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Tests compile much and run little: LLVM need optimise little. Not 0: there XLA's CPU
# compiler (0.8 to 0.12) gave NaN, or wrong numbers in bfloat16, for a convolution's
# gradient below BatchNorm.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",  # of two workers on two cores
        os.environ.get("XLA_FLAGS", ""),  # the last word
    ]
)
if tuple(int(x) for x in version("jaxlib").split(".")[:2]) < (0, 11):
    # The CPU's older emitters, which newer versions lack, take a third less time.
    os.environ["XLA_FLAGS"] = (
        f"--xla_cpu_use_fusion_emitters=false {os.environ['XLA_FLAGS']}"
    )

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with `mnist/` and `fashion_mnist/`, each of original IDX files."""
    folder = os.environ.get("JAXDISTILL_DATA")
    if not folder:
        pytest.skip("JAXDISTILL_DATA names no folder with mnist/ and fashion_mnist/")
    missing = [
        name
        for name in ("mnist", "fashion_mnist")
        if not (Path(folder) / name).is_dir()
    ]
    if missing:
        pytest.skip(f"JAXDISTILL_DATA={folder} has no {' and no '.join(missing)}")
    return Path(folder)


@pytest.fixture(scope="module")
def any_teacher():
    """Networks as they are drawn may teach random labels, where that is not the point.

    That they may not is for tests/teachers/test_knowledge.py.
    """
    from jaxdistill.teachers import knowledge

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge, "doubt", lambda *_: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """A process keeps every program it compiled, and with thousands mapping is slow."""
    yield
    jax.clear_caches()


def pytest_addoption(parser):
    parser.addoption(
        "--one-case",
        action="store_true",
        help="run the first case alone of each test that has several",
    )


SLOW_CASES = {
    "test_a_bert_teaches_classes_and_hidden_states": ("lstm",),
    "test_a_cache_changes_nothing": ("scan",),
    "test_a_language_model_trains_on_factored_logits_as_on_whole": ("bert-*", "*-tied"),
    "test_a_language_models_loss_is_the_same": ("True-4",),
    "test_a_model_gives_its_logits_in_the_runtime": (
        "resnet-stablehlo",
        "bert-stablehlo",
        "deit-stablehlo",
        "convnet-stablehlo",
    ),
    "test_a_layer_is_xlas": ("1-*", "2-*"),
    "test_a_step_is_bit_equal_to_live": ("*-4", "*-2"),
    "test_a_step_is_the_same": ("bert-*", "*-classes"),
    "test_a_step_moves_every_part_that_the_objective_sees": ("*bert", "minilm"),
    "test_a_sweep_trains_evaluates_and_resumes_in_fit": ("8",),
    "test_a_training_is_the_same": ("jit-2", "fsdp-*"),
    "test_devices_draw_what_one_does": ("*",),
    "test_each_trial_may_have_its_own_labels_teacher_and_batches": ("2-*", "4-*"),
    "test_equals_one_device": ("8-*",),
    "test_evaluation_of_cut_batches_is_the_same": ("pmap",),
    "test_it_is_xlas_in_float64": (
        "1-*",
        "*-padding4-*",
        "*-padding6-*",
        "*-forward over*",
    ),
    "test_many_at_once": ("1-*", "*-padding2-*", "*-other axes-*"),
    "test_names_nearly_the_largest_batch_that_fits": ("mesh", "fsdp"),
    "test_padding_changes_nothing": ("5", "22"),
    "test_remat_changes_nothing": ("resnet", "group norm"),
    "test_resumes_in_the_middle_of_an_epoch": ("2",),
    "test_the_gradient_is_the_same_everywhere": (
        "mixed-*",
        "dropout-*",
        "convolution-*-8",
    ),
    "test_what_the_sentence_offers_a_bilstm": ("stablehlo",),
    "test_wide_types_become_those_that_jax_has": ("stablehlo",),
    "test_with_workers": ("1", "3"),
}
"""Cases that compile for seconds; in the fast run their neighbours show the same."""


@pytest.hookimpl(tryfirst=True)  # before -m deselects by the marks
def pytest_collection_modifyitems(config, items):
    for item in items:
        name, _, case = item.name.removesuffix("]").partition("[")
        if case and any(fnmatch(case, slow) for slow in SLOW_CASES.get(name, ())):
            item.add_marker(pytest.mark.slow)
    # The longest file comes first: one worker ends as late as it does.
    items.sort(key=lambda item: "test_resume.py" not in item.nodeid)
    if not config.getoption("--one-case"):
        return
    first: dict[str, pytest.Item] = {}
    # Slow cases are counted last: where they are left out, the others' first one runs.
    for item in sorted(items, key=lambda item: bool(item.get_closest_marker("slow"))):
        first.setdefault(item.nodeid.split("[")[0], item)
    kept = [*first.values()]
    config.hook.pytest_deselected(items=[x for x in items if x not in kept])
    items[:] = kept


INSTALLS = {
    "transformers": "transformers",
    "scikit_learn": "scikit-learn",
    "safetensors": "-e '.[huggingface]'",
    "tokenizers": "-e '.[huggingface]'",
    "torch": "-e '.[torch]'",
    "onnx": "-e '.[onnx]'",
    "tflite": "-e '.[tflite]'",
    "ai_edge_litert": "-e '.[tflite]'",
    "tensorflow": "-e '.[tflite]'",
    "stablehlo": "-e '.[export]'",
    "flatbuffers": "-e '.[export]'",
    "qwix": "-e '.[quantize]'",
    "keras": "-e '.[keras]'",
    "libtpu": "-e '.[tpu]'",
}
"""What a reason for skipping names, in lower case, and what pip installs for it."""


def what_would_run(reasons: list[str]) -> str:
    """A sentence on skipped tests: which commands and variables would run how many."""
    counts: dict[str, int] = {}
    for reason in reasons:
        if "JAXDISTILL_DATA" in reason:
            way = "a folder of data in JAXDISTILL_DATA"
        else:
            lower = reason.lower().replace("pytorch", "torch").replace("-", "_")
            found = [what for name, what in INSTALLS.items() if name in lower]
            way = f"pip install {found[0]}" if found else "nothing"
        counts[way] = counts.get(way, 0) + 1
    ways = sorted(counts.items(), key=lambda item: -item[1])
    return f"{len(reasons)} skipped; to run them: " + ", ".join(
        f"{way} ({count})" for way, count in ways
    )


def pytest_unconfigure(config):
    """The last line of a run; a file that is skipped whole counts as one."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(config, "workerinput") or reporter is None:
        return
    skipped = [report.longrepr for report in reporter.stats.get("skipped", [])]
    reasons = [what[2].removeprefix("Skipped: ") for what in skipped]
    if reasons:
        reporter.write_line(what_would_run(reasons))
