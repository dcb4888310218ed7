# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # jaxdistill: a BERT teaches a small Transformer
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxdistill/jaxdistill/blob/main/colab/bert.ipynb)
#
# The teacher is a DistilBERT of 67 million parameters that somebody fine-tuned to tell
# whether a film review is positive. The student has two layers of a sixth of the width,
# and random weights. It learns from the teacher's distribution over the two
# classes, which is computed once, and from the labels. Beside it: the same student from
# labels alone.
#
# It takes some minutes on a GPU. Run it again and it goes on from where it stopped.

# %% [markdown]
# ## Install
#
# This runtime's own jax stays, as in the quickstart.

# %%
# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util

# %%
if importlib.util.find_spec("jaxdistill") is None:
    JAX = importlib.metadata.version("jax")
    SOURCE = "git+https://github.com/jaxdistill/jaxdistill"
    # !pip install -q "jaxdistill[huggingface,data] @ {SOURCE}" "jax=={JAX}"
    importlib.invalidate_caches()

# %%
import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from jaxdistill import (
    data,
    models,
    objectives,
    parallel,
    pretrained,
    report,
    study,
    train,
)
from jaxdistill.pretrained import weights

print("devices:", jax.devices())

# %% [markdown]
# ## Where the run is kept
#
# With `USE_DRIVE = True` it is on your Google Drive, and survives the runtime.

# %%
USE_DRIVE = False
RUN_DIR = Path("runs/bert")

if USE_DRIVE and "google.colab" in sys.modules:
    from google.colab import drive

    drive.mount("/content/drive")
    RUN_DIR = Path("/content/drive/MyDrive/jaxdistill/bert")

# %% [markdown]
# ## Settings
#
# `teacher` is a hub's id or a folder of a BERT or DistilBERT classifier. None trains
# one here, from scratch: a far weaker teacher.

# %%
FAST = os.environ.get("JAXDISTILL_FAST") == "1"  # for the test of this notebook
SETTINGS = {
    "teacher": "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "student": {"width": 128, "depth": 2, "heads": 2},
    "length": 64,
    "temperature": 2.0,
    "hard_weight": 0.1,
    "soft_weight": 0.9,
    "epochs": 3,
    "batch_size": 128,
    "learning_rate": 5e-4,
    "warm_up": 0.1,
}
if FAST:
    SETTINGS |= {"teacher": None, "length": 8, "epochs": 4, "batch_size": 8}
    SETTINGS["student"] = {"width": 8, "depth": 1, "heads": 2}

# %% [markdown]
# ## Texts
#
# SST-2: phrases of film reviews, a few of them held out; GLUE's dev sentences are the
# test.

# %%
if FAST:
    phrases = ["a fine film", "a dull film", "so fine", "dull again"] * 6
    few = data.Labelled(
        phrases, np.array([int("fine" in p) for p in phrases], np.int32)
    )
    texts = data.Texts("few", few, few, few, 2, "")
else:
    import tensorflow_datasets as tfds

    builder = tfds.builder("glue/sst2", file_format="array_record")
    builder.download_and_prepare()
    texts = data.load_texts("sst2")
print(
    f"{len(texts.train.texts):,} texts to train on, {len(texts.test.texts):,} to test"
)
print(texts.train.labels[0], texts.train.texts[0])

# %% [markdown]
# ## The teacher and its tokenizer

# %%
if SETTINGS["teacher"] is None:
    tokenizer = pretrained.train_wordpiece(texts.train.texts, 40)
    size = models.TransformerConfig(len(tokenizer.get_vocab()), 16, 2, 2)
    teacher, loaded = models.BertClassifier(models.Encoder(size), 2), None
else:
    teacher, loaded = pretrained.load(SETTINGS["teacher"])
    if not isinstance(teacher, models.BertClassifier):
        raise ValueError("the teacher is a BERT or DistilBERT with a head for classes")
    tokenizer = pretrained.load_tokenizer(weights.find(SETTINGS["teacher"]))
    pretrained.check_tokenizer(tokenizer, teacher.encoder.size)


def encoded(split):
    """A split as a model takes it."""
    inputs = pretrained.encode(tokenizer, split.texts, SETTINGS["length"])
    return {"inputs": inputs, "labels": split.labels}


train_split, test = encoded(texts.train), encoded(texts.test)

# %% [markdown]
# ## The arms of the table
#
# An arm is a network, an objective, an optimizer, and who teaches. The pretrained
# teacher takes no step: it stays as it starts.

# %%
student_size = models.TransformerConfig(
    teacher.encoder.size.vocab, **SETTINGS["student"]
)
student = models.BertClassifier(models.Encoder(student_size), num_classes=2)
batches = data.Batches(len(train_split["labels"]), SETTINGS["batch_size"])
STEPS = SETTINGS["epochs"] * batches.steps_per_epoch

hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
both = objectives.combine(
    {
        "hard": (SETTINGS["hard_weight"], objectives.hard_labels()),
        "soft": (
            SETTINGS["soft_weight"],
            objectives.soft_targets(temperature=SETTINGS["temperature"]),
        ),
    }
)
optimizer = optax.adamw(
    optax.cosine_onecycle_schedule(
        STEPS, SETTINGS["learning_rate"], pct_start=SETTINGS["warm_up"]
    )
)


def read(state, teacher, seed):
    """The state with the pretrained parameters."""
    return state.replace(params=loaded["params"])


arms = {
    "teacher": study.Arm(teacher, hard, optimizer)
    if loaded is None
    else study.Arm(teacher, hard, optimizer, start=read, steps=0),
    "scratch": study.Arm(student, hard, optimizer),
    "distilled": study.Arm(student, both, optimizer, teacher="teacher"),
}

# %% [markdown]
# ## Train and compare
#
# `stored=True`: the teacher's outputs on all training texts are computed once, and kept
# in the run directory.

# %%
partitioner = parallel.choose("auto")
experiment = study.Study(
    train.RunDir(RUN_DIR, SETTINGS),
    partitioner=partitioner,
    examples=lambda arm, seed: train_split,
    steps=STEPS,
    batch_size=SETTINGS["batch_size"],
    test=train.Evaluator(partitioner, test),
    stored=True,
    untrained=FAST,  # a teacher of a few steps knows nothing yet
)
study.compare(experiment, arms, seeds=1)
print(report.write(RUN_DIR))

# %% [markdown]
# One seed says little. `experiments/text/sst2_bert.py` has more students, seeds, and
# hidden states and relations of queries, keys and values to learn.

# %% [markdown]
# ## Ask them
#
# The probability that a review is positive.

# %%
REVIEWS = [
    "a fine film",
    "not a dull moment",
    "i would rather watch paint dry",
]
inputs = pretrained.encode(tokenizer, REVIEWS, SETTINGS["length"])
batch = {"inputs": inputs, "mask": np.ones(len(REVIEWS), np.float32)}
known = {"teacher": partitioner.place(experiment.train("teacher", arms["teacher"], 0))}
for name in ("scratch", "distilled"):
    its_teacher = known["teacher"] if arms[name].teacher else None
    known[name] = experiment.train(name, arms[name], 0, its_teacher)
for name, model in known.items():
    positive = jax.nn.softmax(partitioner.fetch(model)(batch).logits)[:, 1]
    print(f"{name:10}", *(f"{p:.2f}" for p in positive))
