# SPDX-License-Identifier: Apache-2.0
"""What a function computes, so that two of them can be told apart.

Two optimizers print alike, and so do two schedules, two lambdas and a module before and
after it was edited. What tells them apart is what they compute: their jaxpr, of which
every value gets a digest, from the operation and the digests of its operands. What a
result does not depend on, and how the work is cut into functions or computed again in
the backward pass (remat), changes nothing.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

from jaxdistill.teachers.fingerprints import described

CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
"""Primitives that only call what they hold."""
SAME = ("optimization_barrier", "sharding_constraint", "copy")
"""Primitives whose results are their operands."""
NAMES = {
    "name",
    "debug_info",
    "jvp_jaxpr_fun",
    "fwd_jaxpr_thunk",
    "bwd",
    "policy",
    "prevent_cse",
    "inline",
    "differentiated",
    "keep_unused",
    "donated_invars",
    "ctx_mesh",
    "in_shardings",
    "out_shardings",
    "in_layouts",
    "out_layouts",
}
"""Parameters of primitives that do not change what they compute."""
CONSTANTS = 40
"""At most so many numbers of a program are kept, to say how it differs from another."""


def of_program(function: Callable, *arguments: Any) -> dict[str, Any]:
    """What a function computes of such arguments, as JSON to be compared by `differs`.

    Args:
      function: traced once, and not run.
      arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`), in pytrees; they
        count by their paths.

    Returns:
      `digest`; `constants`, the numbers in it; `jax`, whose version made it: another
      version's programs cannot be compared.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree_util.tree_leaves_with_path(arguments)
    inputs = [
        f"{jax.tree_util.keystr(path)}:{variable.aval}"
        for (path, _), variable in zip(leaves, closed.jaxpr.invars, strict=True)
    ]
    constants: list[float] = []
    results = _values(closed.jaxpr, inputs, closed.consts, constants)
    return {
        "digest": _digest(*results)[:16],
        "constants": constants[:CONSTANTS],
        "jax": jax.__version__,
    }


def of_teacher(teacher: Any, examples: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a teacher's forward pass computes of a batch of such examples.

    Args:
      teacher: see `teachers`; its arrays are arguments, told apart by their digests.
      examples: `inputs` and what else a batch has, `[N, ...]`, or their shapes.

    Returns:
      See `of_program`; None where it cannot be traced on a few examples.
    """
    shapes = {name: x for name, x in examples.items() if name != "teacher"}
    batch = batch_of(shapes, 4)
    try:
        return of_program(lambda teacher, batch: teacher(batch), teacher, batch)
    except Exception:  # whatever a model of the user's raises; the step says it again
        return None


def batch_of(examples: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The shapes of a batch of so many of these examples, `mask` and `index` too."""

    def shape(x):  # of the type that it has on a device: float64 is float32 there
        dtype = jax.dtypes.canonicalize_dtype(x.dtype)
        return jax.ShapeDtypeStruct((size, *x.shape[1:]), dtype)

    batch = jax.tree.map(shape, dict(examples))
    batch["mask"] = jax.ShapeDtypeStruct((size,), np.float32)
    batch["index"] = jax.ShapeDtypeStruct((size,), np.int32)
    return batch


def differs(old: Any, new: Any) -> str | None:
    """How two programs of `of_program` differ, in words; None where they do not.

    Programs of two versions of jax are not compared but for their constants.
    """
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return None if old == new else f"it was {old!r}, is now {new!r}"
    before, after = old.get("constants"), new.get("constants")
    same = old.get("digest") == new.get("digest")
    if same or (old.get("jax") != new.get("jax") and before == after):
        return None
    if before != after and before and after:
        old_numbers, new_numbers = Counter[float](before), Counter[float](after)
        gone, come = old_numbers - new_numbers, new_numbers - old_numbers
        return f"its numbers {[*gone]} became {[*come]}"
    return "it computes something else"


def versions(identity: Any) -> set[str]:
    """The versions of jax that the programs in an identity were traced by."""
    if not isinstance(identity, Mapping):
        return set()
    own = {identity["jax"]} if "digest" in identity and "jax" in identity else set()
    return own.union(*map(versions, identity.values()))


def _digest(*parts: Any) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _of_array(x: Any, constants: list[float]) -> str:
    """A constant's digest; numbers are listed too."""
    if jax.dtypes.issubdtype(getattr(x, "dtype", None), jax.dtypes.extended):
        x = jax.random.key_data(x)
    array = np.asarray(x)
    if array.ndim == 0 and array.dtype.kind in "fiu":
        # As a person wrote it: float32's 0.001 is 0.0010000000474974513, and an
        # optimizer takes a rate times -1.
        constants.append(abs(float(f"{float(array):.7g}")))
    return _digest(array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest())


def _values(jaxpr: Any, inputs: Any, consts: Any, constants: list[float]) -> list[str]:
    """Digests of a jaxpr's results, from those of its inputs."""
    known: dict[Any, str] = dict(zip(jaxpr.invars, inputs, strict=True))
    for variable, value in zip(jaxpr.constvars, consts, strict=True):
        known[variable] = _of_array(value, constants)

    def of(atom: Any) -> str:
        if isinstance(atom, core.Literal):
            return _digest(atom.aval, _of_array(atom.val, constants))
        return known[atom]

    for equation in jaxpr.eqns:
        operands = [of(x) for x in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in SAME:
            results = operands
        elif name in CALLS and (inner := _called(params)) is not None:
            results = _values(inner.jaxpr, operands, inner.consts, constants)
        else:
            settings = [
                f"{key}={_of_setting(value, constants)}"
                for key, value in sorted(params.items())
                if key not in NAMES
            ]
            whole = _digest(name, *settings, *operands)
            results = [f"{whole}{i}" for i in range(len(equation.outvars))]
        known.update(zip(equation.outvars, results, strict=True))
    return [of(x) for x in jaxpr.outvars]


def _called(params: Mapping[str, Any]) -> Any:
    """The closed jaxpr that a call holds."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := params.get(name)) is not None:
            # A remat's jaxpr has no constants, and is not closed.
            return inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, [])
    return None


def _of_setting(value: Any, constants: list[float]) -> str:
    """A primitive's parameter in words; a loop's body by what it computes."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        jaxpr = getattr(value, "jaxpr", value)
        inputs = [f"in{i}:{x.aval}" for i, x in enumerate(jaxpr.invars)]
        results = _values(jaxpr, inputs, getattr(value, "consts", ()), constants)
        return _digest(*results)
    if isinstance(value, tuple | list):
        return f"({', '.join(_of_setting(x, constants) for x in value)})"
    if isinstance(value, np.ndarray | jax.Array):
        return _of_array(value, constants)
    # A function of the host, which a callback holds, is not traced: its code tells it.
    value = getattr(value, "callback_func", value)
    if hasattr(value, "__code__"):
        return _of_code(value.__code__, value.__closure__ or ())
    return described(value)


def _of_code(code: Any, cells: Any = ()) -> str:
    """A digest of a function's code, its constants, and the values it closes over."""
    constants = [
        _of_code(x) if hasattr(x, "co_code") else described(x) for x in code.co_consts
    ]
    values = [
        _of_code(x.__code__, x.__closure__ or ())
        if hasattr(x, "__code__")
        else described(x)
        for x in (cell.cell_contents for cell in cells)
    ]
    return _digest(code.co_name, code.co_code.hex(), code.co_names, constants, values)
