# SPDX-License-Identifier: Apache-2.0
"""Artefacts in their runtimes: what is damaged, older, or not taken is said."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdistill import export, models, runtimes, teachers
from jaxdistill.runtimes import ArtefactError

pytest.importorskip("flatbuffers", reason="flatbuffers is not installed")

SIZE = models.TransformerConfig(20, 8, 1, 2, positions=6)
BERT = models.BertClassifier(models.Encoder(SIZE), 3)
TOKENS = {
    "input_ids": np.arange(40, dtype=np.int32).reshape(8, 5) % 20,
    "attention_mask": np.ones((8, 5), np.int32),
}
PIXELS = (np.arange(8 * 2 * 3) % 7).reshape(8, 2, 3).astype(np.uint8)


def write(folder: Path, module, inputs, pixels=None) -> Path:
    first = jax.tree.map(lambda x: x[:1] * 1.0 if pixels else x[:1], inputs)
    variables = jax.jit(module.init)(jax.random.key(0), first)
    examples = {"inputs": inputs, "labels": np.zeros(8, np.int32)}
    model = teachers.live(module, variables)
    given = export.Subject(model, examples, pixels)
    export.write(given, folder / "student", to="stablehlo")
    return folder / "student"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An artefact of images and one of texts; never changed."""
    images, texts = (tmp_path_factory.mktemp(name) for name in ("images", "texts"))
    pixels = export.Pixels(6, 0.5, 0.25)
    mlp = write(images, models.MLP((3, 4)), PIXELS, pixels)
    return {"images": mlp, "texts": write(texts, BERT, TOKENS)}


@pytest.fixture
def artefact(written, tmp_path):
    """A copy of the images' artefact, to be damaged."""
    for path in written["images"].parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "student"


def test_an_array_or_a_mapping_is_taken(written):
    model = runtimes.load(written["images"])
    logits = model(PIXELS)
    assert (logits.shape, logits.dtype) == ((8, 4), np.float32)
    np.testing.assert_array_equal(model({"images": PIXELS}), logits)
    parts = runtimes.predict(model, PIXELS, batch_size=3)
    np.testing.assert_allclose(parts, logits, rtol=1e-5, atol=1e-6)
    assert model.batch_size is None


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (PIXELS.astype(np.float32), "images is float32, expected uint8"),
        (PIXELS[0], r"images has the shape \[2, 3\], expected \[batch, 2, 3\]"),
        (PIXELS[:, :1], r"images has the shape \[8, 1, 3\], expected \[batch, 2, 3\]"),
        (PIXELS[:0], r"images has the shape \[0, 2, 3\], expected \[batch, 2, 3\]"),
        ({"pixels": PIXELS}, "the model takes images, got pixels"),
        ({}, "the model takes images, got nothing"),
    ],
)
def test_inputs_that_are_not_taken(written, inputs, sentence):
    model = runtimes.load(written["images"])
    with pytest.raises(ArtefactError, match=rf"\A{sentence}\Z"):
        model(inputs)
    with pytest.raises(ArtefactError, match=rf"\A{sentence}\Z"):
        runtimes.predict(model, inputs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"attention_mask": TOKENS["attention_mask"][:7]},
            "the inputs have different numbers of examples: 8 of input_ids, 7 of atte",
        ),
        (
            {"input_ids": TOKENS["input_ids"].astype(np.int64)},
            "input_ids is int64, exp",
        ),
        (
            {"labels": np.zeros(8)},
            "takes input_ids, attention_mask, got input_ids, att",
        ),
    ],
)
def test_texts_that_are_not_taken(written, change, sentence):
    model = runtimes.load(written["texts"])
    with pytest.raises(ArtefactError, match=sentence):
        model({**TOKENS, **change})
    with pytest.raises(
        ArtefactError, match="takes input_ids, attention_mask: give a m"
    ):
        model(TOKENS["input_ids"])


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(folder):
    path = folder / "student"
    path.write_bytes(path.read_bytes()[:-9])


def flip(folder):
    content = bytearray((folder / "student").read_bytes())
    content[len(content) // 2] ^= 4
    (folder / "student").write_bytes(content)


def rename(folder):
    path = folder / "student.json"
    path.write_text(path.read_text().replace("jaxlib", "jaxlix"))


def change(**values):
    def damage(folder):
        path = folder / "student.json"
        manifest = {**json.loads(path.read_text()), **values}
        manifest.pop("checksum", None)  # as of version 0.2
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("student"), "cannot read .*student: No such file"),
        (
            remove("student.json"),
            "cannot read .*student.json, the artefact's manifest: ",
        ),
        (cut, "student is damaged: it has .* bytes, its manifest says "),
        (flip, "student is damaged: its SHA-256 is not the one its manifest says"),
        (replace("student.json", b"{"), "student.json is damaged: "),
        (replace("student.json", b"[]"), "student.json is damaged: "),
        (
            replace("student.json", b'{"format": 1}'),
            "student.json is damaged: it has not, or not as it should be, runtime, by",
        ),
        (rename, "student.json is damaged: it is not what was written"),
        (change(format=2), "student.json is a manifest of format 2, expected 1"),
        (
            change(runtime="abacus"),
            "student.json names the runtime 'abacus'; known: jax, onnxruntime, ai-ed",
        ),
        *(
            (change(**{name: value}), f"is damaged: .* not as it should be, {name}$")
            for name, value in [
                ("runtime", []),
                ("bytes", "x"),
                ("sha256", None),
                ("versions", ["jax"]),
                ("inputs", {}),
                ("inputs", {"images": {"dtype": "uint8"}}),
                ("inputs", {"images": {"shape": ["batch"], "dtype": "abacus"}}),
                ("outputs", {"logits": []}),
            ]
        ),
    ],
)
def test_a_damaged_artefact(artefact, damage, sentence):
    damage(artefact.parent)
    with pytest.raises(ArtefactError, match=sentence):
        runtimes.load(artefact)


RUNTIMES = {
    "jax": "flatbuffers",
    "onnxruntime": "onnxruntime",
    "ai-edge-litert": "ai_edge_litert",
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_that_a_runtime_cannot_read(runtime, artefact):
    """Of a newer runtime it may be; of this one it is damaged, whatever its sum."""
    pytest.importorskip(RUNTIMES[runtime], reason=f"{runtime} is not installed")
    content = b"no model"
    artefact.write_bytes(content)
    here = runtimes.version(runtime)
    known = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    known |= {"runtime": runtime}
    change(**known, versions={runtime: here})(artefact.parent)
    with pytest.raises(
        ArtefactError, match=f"{runtime} cannot load .*student: "
    ) as end:
        runtimes.load(artefact)
    assert "older" not in str(end.value)
    change(**known, versions={runtime: "99.1.0"})(artefact.parent)
    said = f"it was written by {runtime} 99.1.0, and {here} is older: pip install "
    with pytest.raises(ArtefactError, match=said + f"'{runtime}>=99.1.0'"):
        runtimes.load(artefact)


def test_a_runtime_that_is_not_installed(artefact, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    said = r"flatbuffers is not installed .*: pip install 'jaxdistill\[export\]'"
    with pytest.raises(ArtefactError, match=said):
        runtimes.load(artefact)


def test_threads_are_the_runtimes_own_option(artefact, monkeypatch):
    """ONNX Runtime's and LiteRT's; those are told what is asked for."""
    given: dict = {}

    def keep(runtime):
        def session(content, options, providers):
            given[runtime] = options.intra_op_num_threads

        return session

    class Interpreter:
        def __init__(self, model_content, num_threads):
            given["ai-edge-litert"] = num_threads

        def get_signature_runner(self):
            return None

    for runtime in ("onnxruntime", "ai-edge-litert"):
        pytest.importorskip(RUNTIMES[runtime], reason=f"{runtime} is not installed")
    from ai_edge_litert import interpreter

    monkeypatch.setattr("onnxruntime.InferenceSession", keep("onnxruntime"))
    monkeypatch.setattr(interpreter, "Interpreter", Interpreter)
    for runtime in ("onnxruntime", "ai-edge-litert"):
        change(runtime=runtime)(artefact.parent)
        runtimes.load(artefact, threads=3)
    assert given == {"onnxruntime": 3, "ai-edge-litert": 3}
    with pytest.raises(ArtefactError, match="threads must be at least 1, got 0"):
        runtimes.load(artefact, threads=0)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not on this system")
def test_jax_is_kept_to_cores_before_it_is_imported(artefact, monkeypatch):
    code = (
        "import os, sys; from jaxdistill import runtimes; "
        "runtimes.load(sys.argv[1], threads=1); "
        "print(len(os.sched_getaffinity(0)), os.environ['NPROC']); "
        "import jax; print(jax.__version__)"
    )
    root = str(Path(runtimes.__file__).parents[1])
    ended = subprocess.run(
        [sys.executable, "-c", code, str(artefact)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root, "NPROC": "16"},
    )
    assert ended.stdout.split() == ["1", "1", jax.__version__]
    # Here it is imported, with all the cores there are.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    runtimes.load(artefact, threads=2)
    said = "JAX counted 2 cores as it was imported: load with threads=1 in a process"
    with pytest.raises(ArtefactError, match=said):
        runtimes.load(artefact, threads=1)
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    runtimes.load(artefact, threads=2)  # all there are: nothing is to be kept
    said = "this system keeps no process to 1 of its 2 cores, and JAX takes them all"
    with pytest.raises(ArtefactError, match=said):
        runtimes.load(artefact, threads=1)


def test_the_file_runs_where_the_package_is_not(artefact, tmp_path):
    """Copied elsewhere, in an interpreter that finds no jaxdistill."""
    script = tmp_path / "elsewhere" / "runtimes.py"
    script.parent.mkdir()
    script.write_bytes(Path(runtimes.__file__).read_bytes())
    np.savez(tmp_path / "inputs.npz", images=PIXELS)
    code = "import sys; sys.modules['jaxdistill'] = None; sys.argv = {!r}\n"
    code += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    files = [artefact, tmp_path / "inputs.npz", tmp_path / "logits.npy"]
    command = [sys.executable, "-c", code.format([*map(str, [script, *files])])]
    subprocess.run(command, check=True)
    expected = runtimes.load(artefact)(PIXELS)
    np.testing.assert_allclose(np.load(files[-1]), expected, rtol=1e-5, atol=1e-6)

    cut(artefact.parent)
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: {artefact} is damaged: it has ")
