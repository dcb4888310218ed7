# SPDX-License-Identifier: Apache-2.0
"""Trained models in a run directory: what a finished run can be used for.

models/ARM.msgpack   the variables of the first seed (`cost.weights`)
models/ARM.json      the module that takes them, the fingerprints of the model and of
                     what taught it
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from flax import errors, serialization
from flax import linen as nn

from jaxdistill import data, models
from jaxdistill.models import apply
from jaxdistill.parallel.lock import folder_at
from jaxdistill.parallel.sealed import seal, unseal
from jaxdistill.teachers import fingerprints, store
from jaxdistill.teachers.forward import live
from jaxdistill.train import cost
from jaxdistill.train.run_dir import RunDir, RunError


class StoreSource(NamedTuple):
    """What a store of teacher outputs is written from, and read with
    (`teachers.store`)."""

    teacher: apply.BoundModule
    examples: dict[str, Any]
    manifest: store.Manifest


def save_model(
    run_dir: RunDir,
    arm: str,
    model: apply.BoundModule,
    teacher: tuple[str, Any] | None = None,
) -> None:
    """Writes a trained model below a run directory.

    Args:
      run_dir: the run.
      arm: the model's name in its table.
      model: without what only trained it.
      teacher: the name and the model of what taught it, if anything did.
    """
    source = None
    if teacher is not None:
        source = {"arm": teacher[0], "fingerprint": fingerprints.of_model(teacher[1])}
    run_dir.write_bytes(f"models/{arm}.msgpack", cost.weights(model.variables))
    print_of = fingerprints.of_model(model)
    record = {
        "module": _recipe(model.module),
        "fingerprint": print_of,
        "teacher": source,
    }
    run_dir.write_bytes(
        f"models/{arm}.json", json.dumps(seal(record), indent=1).encode()
    )


def load_model(run_dir: Any, arm: str) -> apply.BoundModule:
    """An arm's trained model, of the first seed.

    Args:
      run_dir: a run directory; object storage works.
      arm: its name in the run's table.

    Raises:
      RunError: there is no such model, it is damaged, or its module is none of
        `jaxdistill.models`.
    """
    folder = folder_at(run_dir) / "models"
    weights, record = folder / f"{arm}.msgpack", folder / f"{arm}.json"
    if not weights.exists():
        there = sorted(path.stem for path in folder.glob("*.msgpack"))
        raise RunError(
            f"{run_dir} holds no model {arm!r}; it has: {', '.join(there) or 'none'}"
        )
    if not record.exists():
        raise RunError(
            f"{record}, which tells the module, is missing; give the run's command "
            "again to have it written: what is trained is not trained again"
        )
    try:
        saved = unseal(record.read_bytes())
        module = _build(saved["module"])
        model = live(module, serialization.msgpack_restore(weights.read_bytes()))
        same = fingerprints.of_model(model) == saved["fingerprint"]
    except RunError:
        raise
    except Exception as error:  # whatever the bytes have become
        raise RunError(f"{weights} or {record.name} is damaged: {error}") from error
    if not same:
        raise RunError(f"{weights} or {record.name} is damaged: it was changed")
    return model


def read_teacher(run_dir: Any, arm: str) -> dict[str, Any] | None:
    """The arm and the fingerprint of what taught an arm's model, or None.

    Older records do not tell: there it is the run's teacher, but for arms whose names
    say that they had none.

    Raises:
      RunError: a record is damaged.
    """
    record = folder_at(run_dir) / "models" / f"{arm}.json"
    try:
        said = unseal(record.read_bytes())
        if said.get("teacher", "unsaid") is None:
            return None
        if "teacher" in said:  # jaxdistill 0.1 called the arm a row
            source = said["teacher"]
            arm = source["arm"] if "arm" in source else source["row"]
            return {"arm": arm, "fingerprint": source["fingerprint"]}
        record = record.with_name("teacher.json")
        if arm == "teacher" or arm.startswith("scratch") or not record.exists():
            return None
        found = unseal(record.read_bytes())["fingerprint"]
        return {"arm": "teacher", "fingerprint": found}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{record} is damaged") from error


def read_accuracy(run_dir: Any, arm: str) -> float | None:
    """An arm's accuracy on the test, of the first seed, if the run's summary tells one.

    Raises:
      RunError: the summary is damaged.
    """
    path = folder_at(run_dir) / "summary.json"
    try:
        seeds = unseal(path.read_bytes()).get("seeds", {}) if path.exists() else {}
        return seeds[arm][0].get("accuracy") if arm in seeds else None
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        raise RunError(f"{path} is damaged") from error


def read_config(run_dir: Any) -> tuple[dict[str, Any], str]:
    """A run's settings, and the data set that they name.

    Scripts on texts name theirs by their preset.

    Raises:
      RunError: config.json is missing or damaged, or names none.
    """
    path = folder_at(run_dir) / "config.json"
    try:
        config = unseal(path.read_bytes())
        if "data" not in config and config.get("preset") in data.texts.CLASSES:
            return config, config["preset"]
        return config, config["data"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path} names no data set ({error!r})") from error


def load_store_source(
    run_dir: Any,
    arm: str = "teacher",
    *,
    split: Literal["train", "test"] = "train",
    data_dir: Any = None,
    batch_size: int | None = None,
    **options: Any,
) -> StoreSource:
    """An arm's model as the teacher of its run's images.

    Args:
      run_dir: a run directory whose config.json names a data set.
      arm: which model.
      split: "train" is without the images that the run held out for validation.
      data_dir: see `data.load`.
      batch_size: of the forward pass; None is that of the run's steps.
      options: others of `store.describe`.

    Raises:
      RunError: as `load_model`, or there is no such data.
    """
    model = load_model(run_dir, arm)
    config, name = read_config(run_dir)
    source = data.load(name, data_dir)
    images, part = getattr(source, split), str(split)
    if split == "train" and config.get("validation"):
        images, held = data.holdout(images, config["validation"])
        part = f"train, {len(held['labels'])} held out"
    examples = source.inputs(images)
    if batch_size is None:
        batch_size = config.get("batch_size", 512) // config.get("micro_batches", 1)
    precision = config.get("precision", "float32")
    try:
        manifest = store.describe(
            model,
            examples,
            data=name,
            split=part,
            transform="normalised",
            batch_size=batch_size,
            compute=None if precision == "float32" else precision,
            **options,
        )
    except (errors.FlaxError, apply.WrongInputs) as error:
        raise RunError(
            f"the model {arm!r} of {run_dir} does not take the images of {name}, "
            f"{examples['inputs'].shape[1:]}: {error}"
        ) from error
    return StoreSource(model, examples, manifest)


def _recipe(value: Any) -> Any:
    """A module of `models` as JSON; of others the class alone."""
    if isinstance(value, tuple | list):
        return [_recipe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    kind = type(value)
    if getattr(models, kind.__name__, None) is not kind:
        return {"class": f"{kind.__module__}.{kind.__qualname__}"}
    fields = [f.name for f in dataclasses.fields(value)]
    return {
        "class": kind.__name__,
        "fields": {
            name: _recipe(getattr(value, name))
            for name in fields
            if name not in ("parent", "name")
        },
    }


def _build(recipe: Any) -> Any:
    if isinstance(recipe, list):  # JSON has no tuples, and a module's fields no lists
        return tuple(_build(item) for item in recipe)
    if not isinstance(recipe, Mapping):
        return recipe
    name = recipe["class"]
    name = "TransformerConfig" if name == "Size" else name  # in jaxdistill 0.1
    kind: Any = getattr(models, name, None)
    known = isinstance(kind, type) and issubclass(
        kind, nn.Module | models.TransformerConfig
    )
    if not known or "fields" not in recipe:
        raise RunError(
            f"{recipe['class']} is no module of jaxdistill.models; make it yourself, "
            "and read its variables with flax.serialization.msgpack_restore"
        )
    return kind(**{name: _build(value) for name, value in recipe["fields"].items()})
