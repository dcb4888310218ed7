# SPDX-License-Identifier: Apache-2.0
"""What a finished run has to export: an arm's model, its test, and where it is from."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from jaxdistill import data
from jaxdistill.data import texts as text
from jaxdistill.data.examples import some_of
from jaxdistill.export.subject import Pixels, Subject
from jaxdistill.models import apply
from jaxdistill.parallel.lock import folder_at
from jaxdistill.pretrained import tokenizers
from jaxdistill.train import saved
from jaxdistill.train.run_dir import RunError

CALIBRATION = 256
"""Training examples that tell the range of activations."""
CLASSES = {
    "fashion_mnist": (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    "sst2": ("negative", "positive"),
    "ag_news": ("World", "Sports", "Business", "Sci/Tech"),
}
"""Names of classes, where they are not their numbers."""
TOKENIZER = "tokenizer.json"


def from_run(run_dir: Any, arm: str = "distilled", *, data_dir: Any = None) -> Subject:
    """An arm's model of the first seed, with the test of its run.

    Images are taken raw: their normalisation becomes part of the artefact. A run on
    texts needs the tokenizer.json that its script writes; the artefact takes what
    `pretrained.encode` gives, `input_ids` and `attention_mask`.

    Args:
      run_dir: a run directory.
      arm: which of its models; one whose accuracy on the test is not what the run's
        summary says is refused as it is written.
      data_dir: see `data.load` and `data.load_texts`.

    Raises:
      RunError: there is no such model, or no data or tokenizer.
      DataError: the data cannot be read.
    """
    model = saved.load_model(run_dir, arm)
    folder = folder_at(run_dir)
    config, name = saved.read_config(run_dir)
    about: dict[str, Any] = {
        "data": name,
        "run": _run(folder, config, arm),
        "teacher": saved.read_teacher(run_dir, arm),
    }
    accuracy = saved.read_accuracy(run_dir, arm)
    if name in CLASSES:
        about["classes"] = list(CLASSES[name])
    if name in text.CLASSES:
        of = Subject(model, {}, about=about, accuracy=accuracy)
        return _of_texts(folder, config, name, data_dir, of)
    source = data.load(name, data_dir)
    train = source.train
    if config.get("validation"):
        train = data.holdout(train, config["validation"])[0]
    subject = of_images(model, source, train["images"], about)
    return subject._replace(accuracy=accuracy)


def of_images(
    model: apply.BoundModule,
    source: data.Dataset,
    images: np.ndarray,
    about: Mapping[str, Any],
) -> Subject:
    """A model of raw images, with the test of their data set.

    Args:
      model: takes the images normalised.
      source: the data set.
      images: those that the model was trained on, raw; some calibrate int8.
      about: what else the manifest says.
    """
    return Subject(
        model,
        {"inputs": source.test["images"], "labels": source.test["labels"]},
        Pixels(source.peak, source.mean, source.deviation),
        some_of(images, _some(len(images))),
        about,
    )


def _of_texts(
    folder: epath.Path, config: Mapping[str, Any], name: str, data_dir: Any, of: Subject
) -> Subject:
    """The subject with the texts of its run, as tokens."""
    length = config.get("test_length")
    if not isinstance(length, int):
        raise RunError(
            f"{folder / 'config.json'} has no test_length, to which texts are cut"
        )
    if config.get("smoke"):
        raise RunError(f"{folder} is of a smoke run, whose phrases are no data set")
    path = folder / TOKENIZER
    if not path.exists():
        raise RunError(
            f"{path}, which turns texts into tokens, is missing; give the run's "
            "command again to have it written: what is trained is not trained again"
        )
    texts = data.load_texts(name, data_dir)
    tokenizer = tokenizers.load_tokenizer(folder)

    def encode(chosen: Sequence[str]) -> dict[str, np.ndarray]:
        return tokenizers.encode(tokenizer, chosen, length)

    some = [texts.train.texts[i] for i in _some(len(texts.train.texts))]
    preprocessing = {
        "in_artefact": False,
        "formula": "jaxdistill.pretrained.tokenizers.encode(tokenizer, texts, length)",
        "tokenizer": TOKENIZER,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "length": length,
    }
    return of._replace(
        examples={"inputs": encode(texts.test.texts), "labels": texts.test.labels},
        calibration=encode(some),
        about={**of.about, "preprocessing": preprocessing},
    )


def _some(size: int) -> np.ndarray:
    """Random training examples, the same every time."""
    return np.random.default_rng(0).permutation(size)[:CALIBRATION]


def _run(folder: epath.Path, config: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """What a run is known by: SHA-256 of its small files, and what was asked for."""
    whole = hashlib.sha256()
    for name in ("config.json", "summary.json"):
        if (folder / name).exists():
            whole.update((folder / name).read_bytes())
    return {"arm": arm, "digest": whole.hexdigest(), "config": dict(config)}
