# SPDX-License-Identifier: Apache-2.0
"""Exported models in the runtimes they were made for: NumPy arrays in, logits out.

model = runtimes.load("student.onnx")
logits = model({"images": pixels})

This file needs NumPy and the artefact's runtime, and nothing else of the package: it
may be copied to where a model runs. As a script it is a fresh process:

    python -P runtimes.py student.onnx inputs.npz logits.npy
"""

import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Of the manifest."""
OPEN = "batch"
"""In the place of a number in a manifest's shapes: any number of examples."""

Named = Mapping[str, np.ndarray]


class ArtefactError(ValueError):
    """An artefact that cannot be used, or inputs it does not take; one sentence."""


@dataclass(frozen=True)
class Model:
    """An artefact that is loaded; it is called.

    Attributes:
      manifest: what the file beside the artefact says.
      run: the runtime's own call, `{name: array} -> logits`, which checks nothing.
    """

    manifest: Mapping[str, Any]
    run: Callable[[Named], np.ndarray]

    def __call__(self, inputs: Any) -> np.ndarray:
        """The logits, float32 `[B, ..., C]`.

        Args:
          inputs: `{name: array}` as the manifest's `inputs` say, or the array alone
            where there is one.

        Raises:
          ArtefactError: a name, a type or a shape is another.
        """
        return self.run(check_inputs(self.manifest["inputs"], inputs))

    @property
    def batch_size(self) -> int | None:
        """The only number of examples it takes, or None where it takes any."""
        first = next(iter(self.manifest["inputs"].values()))["shape"][0]
        return None if first == OPEN else first


def manifest_path(path: str | Path) -> Path:
    """Where an artefact's manifest lies: beside it."""
    return Path(f"{path}.json")


def load(path: str | Path, threads: int | None = None) -> Model:
    """An artefact in its runtime, found to be what was written.

    Args:
      path: of the artefact; the manifest is beside it, with `.json` behind the name.
      threads: that compute; None is what the runtime takes by itself. JAX has no such
        option: the whole process is kept to so many cores (`keep_to_cores`).

    Raises:
      ArtefactError: either file is missing or damaged, the runtime is not installed, or
        it is older than the artefact; the number of threads cannot be had.
    """
    if threads is not None and threads < 1:
        raise ArtefactError(f"threads must be at least 1, got {threads}")
    manifest, content = read(path)
    library, extra, opener = RUNTIMES[manifest["runtime"]]
    need(library, extra)
    try:
        return Model(manifest, opener(content, manifest, threads))
    except ArtefactError:
        raise
    except Exception as error:  # each library raises its own types
        raise ArtefactError(
            f"{manifest['runtime']} cannot load {path}: {_reason(error, manifest)}"
        ) from error


def read(path: str | Path) -> tuple[dict[str, Any], bytes]:
    """An artefact's manifest and its bytes, found to be what was written.

    Raises:
      ArtefactError: either file is missing or damaged.
    """
    path, manifest = Path(path), read_manifest(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtefactError(f"cannot read {path}: {error.strerror}") from error
    if len(content) != manifest["bytes"]:
        raise ArtefactError(
            f"{path} is damaged: it has {len(content):,} bytes, its manifest says "
            f"{manifest['bytes']:,}"
        )
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ArtefactError(
            f"{path} is damaged: its SHA-256 is not the one its manifest says"
        )
    return manifest, content


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What is said beside an artefact.

    Raises:
      ArtefactError: there is no such file, it is damaged, or from a later version.
    """
    beside = manifest_path(path)
    try:
        manifest = json.loads(beside.read_bytes())
        version = manifest["format"]
        said = manifest.pop("checksum", None)
    except OSError as error:
        raise ArtefactError(
            f"cannot read {beside}, the artefact's manifest: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{beside} is damaged: {error}") from error
    if version != FORMAT:
        raise ArtefactError(
            f"{beside} is a manifest of format {version}, expected {FORMAT}"
        )
    wrong = [name for name, kind in NEEDED.items() if not _is(manifest, name, kind)]
    if wrong:
        raise ArtefactError(
            f"{beside} is damaged: it has not, or not as it should be, "
            f"{', '.join(wrong)}"
        )
    if manifest["runtime"] not in RUNTIMES:
        raise ArtefactError(
            f"{beside} names the runtime {manifest['runtime']!r}; known: "
            f"{', '.join(RUNTIMES)}"
        )
    # Manifests of jaxdistill 0.2 and before have none.
    if said is not None and said != checksum(manifest):
        raise ArtefactError(f"{beside} is damaged: it is not what was written")
    return manifest


def checksum(manifest: Mapping[str, Any]) -> str:
    """Of a manifest's other entries, whose last one it is: `checksum`."""
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


NEEDED = {
    "runtime": str,
    "bytes": int,
    "sha256": str,
    "inputs": dict,
    "outputs": dict,
    "versions": dict,
}
"""What every manifest has, and of which type."""


def _is(manifest: Mapping[str, Any], name: str, kind: type) -> bool:
    """Whether a needed value is there, of its type, as are the arrays that it tells."""
    value = manifest.get(name)
    if not isinstance(value, kind) or name not in ("inputs", "outputs"):
        return isinstance(value, kind)
    specs: Any = value
    try:
        return bool(specs) and all(
            len(spec["shape"]) > 0 and np.dtype(spec["dtype"])
            for spec in specs.values()
        )
    except (KeyError, TypeError):
        return False


def check_inputs(specs: Mapping[str, Mapping[str, Any]], inputs: Any) -> dict[str, Any]:
    """The inputs by name, or ArtefactError: a name, a type or a shape is another.

    >>> specs = {"images": {"shape": ["batch", 2], "dtype": "uint8"}}
    >>> check_inputs(specs, np.zeros((3, 2), np.uint8))["images"].shape
    (3, 2)
    """
    names = ", ".join(specs)
    if not isinstance(inputs, Mapping):
        if len(specs) != 1:
            raise ArtefactError(f"the model takes {names}: give a mapping of arrays")
        inputs = {names: inputs}
    if {*inputs} != {*specs}:
        given = ", ".join(inputs) or "nothing"
        raise ArtefactError(f"the model takes {names}, got {given}")
    arrays = {name: np.asarray(inputs[name]) for name in specs}
    sizes = {}
    for name, spec in specs.items():
        array, shape, dtype = arrays[name], spec["shape"], spec["dtype"]
        if array.dtype != dtype:
            raise ArtefactError(f"{name} is {array.dtype}, expected {dtype}")
        fits = array.ndim == len(shape) and all(
            wanted in (OPEN, size)
            for wanted, size in zip(shape, array.shape, strict=True)
        )
        if not fits or not len(array):
            wanted = ", ".join(str(size) for size in shape)
            raise ArtefactError(
                f"{name} has the shape {list(array.shape)}, expected [{wanted}]"
            )
        sizes[name] = len(array)
    if len({*sizes.values()}) > 1:
        said = ", ".join(f"{size} of {name}" for name, size in sizes.items())
        raise ArtefactError(f"the inputs have different numbers of examples: {said}")
    return arrays


def check_examples(specs: Mapping[str, Mapping[str, Any]], inputs: Any) -> dict:
    """As `check_inputs`, of any number of examples, whatever the artefact takes."""
    free = {
        n: {**spec, "shape": [OPEN, *spec["shape"][1:]]} for n, spec in specs.items()
    }
    return check_inputs(free, inputs)


def predict(model: Model, inputs: Any, batch_size: int = 256) -> np.ndarray:
    """The logits of any number of examples, in batches.

    Args:
      model: one of a fixed batch is given that; its last batch repeats a row.
      inputs: see `Model`.
      batch_size: of a model that takes any.

    Raises:
      ArtefactError: see `Model`.
    """
    arrays = check_examples(model.manifest["inputs"], inputs)
    size = model.batch_size or batch_size
    count = len(next(iter(arrays.values())))
    parts = []
    for start in range(0, count, size):
        stop = start + size if model.batch_size else min(start + size, count)
        rows = np.minimum(np.arange(start, stop), count - 1)
        found = model.run({name: array[rows] for name, array in arrays.items()})
        parts.append(found[: count - start])
    return np.concatenate(parts)


def keep_to_cores(threads: int) -> None:
    """Keeps the process to so many cores, before JAX is imported and counts them.

    Raises:
      ArtefactError: there are more, and JAX is imported, or the system cannot do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        count = os.cpu_count() or 1
        if count <= threads:
            return
        raise ArtefactError(
            f"this system keeps no process to {threads} of its {count} cores, and JAX "
            "takes them all"
        )
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= threads:
        return
    if "jax" in sys.modules:
        raise ArtefactError(
            f"JAX counted {len(cores)} cores as it was imported: load with "
            f"threads={threads} in a process that has not imported it"
        )
    os.sched_setaffinity(0, cores[:threads])
    os.environ["NPROC"] = str(threads)  # where it is set, XLA counts no cores


def need(module: str, extra: str) -> Any:
    """A module that an extra of the package brings.

    Raises:
      ArtefactError: it cannot be imported; the sentence names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ArtefactError(
            f"{module.split('.')[0]} is not installed ({error}): "
            f"pip install 'jaxdistill[{extra}]'"
        ) from error


def _open_stablehlo(content: bytes, manifest: Mapping[str, Any], threads: int | None):
    if threads is not None:
        keep_to_cores(threads)
    import jax
    from jax import export

    call = jax.jit(export.deserialize(bytearray(content)).call)
    one = {
        name: np.zeros([1 if n == OPEN else n for n in spec["shape"]], spec["dtype"])
        for name, spec in manifest["inputs"].items()
    }
    call.lower(one)  # a newer jax's operations are found here
    (name,) = manifest["outputs"]
    return lambda inputs: np.asarray(call(dict(inputs))[name])


def _open_onnx(content: bytes, manifest: Mapping[str, Any], threads: int | None):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"]
    )
    (name,) = manifest["outputs"]
    return lambda inputs: session.run([name], dict(inputs))[0]


def _open_tflite(content: bytes, manifest: Mapping[str, Any], threads: int | None):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=threads)
    runner = interpreter.get_signature_runner()
    (name,) = manifest["outputs"]
    return lambda inputs: runner(**inputs)[name]


RUNTIMES: dict[str, tuple[str, str, Callable]] = {
    "jax": ("flatbuffers", "export", _open_stablehlo),
    "onnxruntime": ("onnxruntime", "onnx", _open_onnx),
    "ai-edge-litert": ("ai_edge_litert", "tflite", _open_tflite),
}
"""By the packages' names: what is imported, the extra with it, and how it reads."""


def _reason(error: Exception, manifest: Mapping[str, Any]) -> str:
    """What a runtime said, or that it is older than the artefact."""
    runtime = manifest["runtime"]
    written, here = manifest["versions"].get(runtime), version(runtime)
    if written and here and _numbers(written) > _numbers(here):
        return (
            f"it was written by {runtime} {written}, and {here} is older: "
            f"pip install '{runtime}>={written}'"
        )
    return first_line(error)


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """What an error says first, with its type where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _numbers(spelled: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in spelled.split(".")]


def main(argv: Sequence[str]) -> None:
    """Loads an artefact, runs it on the arrays of a file, stores its logits."""
    artefact, inputs, logits = argv
    try:
        model = load(artefact)
        with np.load(inputs, allow_pickle=False) as stored:
            np.save(logits, predict(model, dict(stored)))
    except ArtefactError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])


def peak_memory() -> int | None:
    """Most bytes that this process had in memory so far; None if the system tells none.

    Linux counts a process's parent in `ru_maxrss`: what it had when it started the
    child, before the child was another program. VmHWM is the program's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    # Bytes on macOS, kilobytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
