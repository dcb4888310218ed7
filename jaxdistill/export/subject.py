# SPDX-License-Identifier: Apache-2.0
"""What is exported: a trained student as a function of plain arrays, and its test."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn

from jaxdistill.data import normalize, pad
from jaxdistill.data.examples import some_of
from jaxdistill.models.apply import BoundModule, strip
from jaxdistill.models.transformer import unstack_layers
from jaxdistill.runtimes import first_line
from jaxdistill.types import Array, whole_logits

Int8 = Literal["dynamic", "static"]
LOGITS = "logits"
BATCH = 256


class ExportError(ValueError):
    """A model that cannot be exported, or differs once it is; one sentence."""


class Pixels(NamedTuple):
    """How raw images become a model's inputs: `(images / peak - mean) / deviation`.

    Attributes:
      peak: the largest value of an image.
      mean: one value, or one a channel.
      deviation: likewise.
    """

    peak: int
    mean: Any
    deviation: Any


class Subject(NamedTuple):
    """A model with what its artefact is checked by.

    Attributes:
      model: the trained student, as `train.load_model` gives it; without a projector.
      examples: the test split as a user has it: `inputs`, raw images or a mapping of
        token arrays, and `labels`.
      pixels: becomes part of the artefact; None where inputs are the model's own.
      calibration: inputs of training examples, for `int8="static"` alone.
      about: what else the manifest says, by name.
      accuracy: what its run recorded on the test, if anything; another is refused.
    """

    model: BoundModule
    examples: Mapping[str, Any]
    pixels: Pixels | None = None
    calibration: Any = None
    about: Mapping[str, Any] = {}
    accuracy: float | None = None

    @property
    def student(self) -> BoundModule:
        """The model without what only trains it."""
        module, variables = strip(self.model.module, self.model.variables)
        return BoundModule(variables, module)

    @property
    def name(self) -> str:
        """The class of the student's module."""
        return type(self.student.module).__name__

    def named(self, inputs: Any) -> dict[str, np.ndarray]:
        """Inputs by the names they have in an artefact, in types of 32 bits or less."""
        if not isinstance(inputs, Mapping):
            inputs = {"inputs" if self.pixels is None else "images": inputs}
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        with jax.enable_x64(False):
            kind = jax.dtypes.canonicalize_dtype
            return {k: x.astype(kind(x.dtype), copy=False) for k, x in arrays.items()}

    def prepare(self, inputs: Any) -> Any:
        """Inputs as the model itself takes them: raw images normalised."""
        if self.pixels is None:
            return inputs
        peak, mean, deviation = self.pixels
        return normalize(np.asarray(inputs), mean, deviation, peak)

    @property
    def inputs(self) -> dict[str, np.ndarray]:
        """The test's, by name."""
        return self.named(self.examples["inputs"])

    @property
    def labels(self) -> np.ndarray:
        """The test's."""
        return np.asarray(self.examples["labels"])

    @property
    def calibrations(self) -> int:
        """How many calibration examples there are."""
        return (
            0 if self.calibration is None else len(jax.tree.leaves(self.calibration)[0])
        )

    def calibrate(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Whole batches of the calibration inputs, by name."""
        arrays = self.named(self.calibration)
        for start in range(0, self.calibrations - size + 1, size):
            yield {name: x[start : start + size] for name, x in arrays.items()}

    def shapes(self, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """What an artefact takes, of so many examples; a symbolic number works."""
        return {
            name: jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)
            for name, array in self.inputs.items()
        }


def make_forward(subject: Subject) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
    """The student as `{name: array} -> {"logits": array}`, its weights inside.

    An export cannot return `Outputs`; hidden states and attention maps are left out.
    """
    module, variables = _unscanned(subject.student)
    variables = jax.tree.map(np.asarray, variables)
    several = isinstance(subject.examples["inputs"], Mapping)

    def forward(named: Mapping[str, Array]) -> dict[str, Array]:
        inputs: Any = dict(named)
        if not several:
            (inputs,) = named.values()
        if subject.pixels is not None:
            peak, mean, deviation = subject.pixels
            inputs = normalize(inputs, mean, deviation, peak)
        outputs: Any = module.apply(variables, inputs, mask=None, train=False)
        return {LOGITS: whole_logits(outputs.logits).astype(jnp.float32)}

    return forward


def _unscanned(student: BoundModule) -> tuple[nn.Module, Any]:
    """A text model without its scan over layers, which jax2onnx does not take."""
    module, variables = student.module, student.variables
    for name in ("encoder", "decoder"):
        body: Any = getattr(module, name, None)
        if getattr(body, "scan", False):
            module = module.clone(**{name: body.clone(scan=False)})
    if getattr(module, "scan", False):
        module = module.clone(scan=False)
    if module is student.module:
        return module, variables
    return module, {**variables, "params": unstack_layers(variables["params"])}


def logits_of(subject: Subject) -> np.ndarray:
    """The linen model's logits on the test, on a CPU, in float32 `[N, ..., C]`.

    Raises:
      ExportError: the model does not take the examples.
    """
    inputs = subject.prepare(subject.examples["inputs"])
    count, parts = len(subject.labels), []

    @jax.jit
    def forward(model: BoundModule, inputs: Any, mask: Array) -> Array:
        logits = whole_logits(model({"inputs": inputs, "mask": mask}).logits)
        return logits.astype(jnp.float32)

    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ExportError(
            "an artefact is compared on a CPU, which JAX_PLATFORMS leaves out: add cpu "
            f"to it ({first_line(error)})"
        ) from error
    # Arrays that a training placed stay where they are, whatever the default is.
    model = jax.device_put(subject.model, cpu)
    with jax.default_device(cpu):
        rows = pad(np.arange(count), min(BATCH, count))
        for index, mask in zip(rows["index"], rows["mask"], strict=True):
            try:
                found = forward(model, some_of(inputs, index), mask)
            except (errors.FlaxError, TypeError, ValueError) as error:
                raise ExportError(_misfit(subject, error)) from error
            parts.append(np.asarray(found)[mask > 0])
    return np.concatenate(parts)


def _misfit(subject: Subject, error: Exception) -> str:
    shapes = [f"{name} {list(x.shape)}" for name, x in subject.inputs.items()]
    return (
        f"{subject.name} does not take the examples, "
        f"{', '.join(shapes)}: {first_line(error)}"
    )
