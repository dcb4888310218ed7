# SPDX-License-Identifier: Apache-2.0
"""A teacher's outputs in every form that a store has: what is read back, and its KL."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdistill import objectives, teachers
from jaxdistill.parallel import processes
from jaxdistill.teachers import store
from jaxdistill.teachers.manifest import DTYPES
from jaxdistill.types import Outputs


def forms(
    teacher: Any,
    student: Any,
    examples: Mapping[str, Any],
    *,
    top_k: Sequence[int],
    temperatures: Sequence[float],
    folder: Path,
    progress: bool = False,
    **about: Any,
) -> Iterator[tuple[str, Mapping[str, Any], int, dict[float, Any]]]:
    """Dense, and the `top_k` largest classes, in each type.

    Yields:
      The form's name, its arrays as they are read, their bytes on disk, and by
      temperature the KL of each example or token from them to the student.
    """
    teacher = teachers.control(teacher)  # what is stored is asked, not what it knows
    logits = teachers.with_logits(student, examples)["teacher"]["logits"][:, 0]
    for kept in (None, *top_k):
        for dtype in DTYPES:
            name = "dense" if kept is None else f"top-{kept}"
            manifest = store.describe(
                teacher, examples, top_k=kept, dtype=dtype, **about
            )
            path = folder / f"{name}-{dtype}"
            store.write(path, teacher, examples, manifest, progress=progress)
            # The first process finishes the store, and the others wait until then.
            processes.on_first(partial(store.check, path, manifest))
            found = store.read(path, manifest)
            files = [f for f in path.rglob("*") if f.is_file() and f.suffix != ".json"]
            kl = {t: divergence(logits, found, t) for t in temperatures}
            yield f"{name}, {dtype}", found, sum(f.stat().st_size for f in files), kl


def divergence(logits: Any, stored: Mapping[str, Any], temperature: float) -> Any:
    """The KL of each example or token against stored outputs of one view."""
    outputs = teachers.StoredTeacher()(
        {"teacher": jax.tree.map(jnp.asarray, dict(stored))}
    )
    term = objectives.soft_targets(temperature=temperature)
    return term(Outputs(logits), outputs, {"mask": jnp.ones(len(logits))}, 0)[0]
