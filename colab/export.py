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
# # jaxdistill: from a run to the device
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxdistill/jaxdistill/blob/main/colab/export.ipynb)
#
# A finished run becomes files that a device runs: its student as ONNX, as floats and in
# eight bits. One cell runs them with ONNX Runtime alone, as the device would; the last
# shows what accuracy costs, in bytes and in microseconds.
#
# Everything takes a minute or two, on a CPU.

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
    # !pip install -q "jaxdistill[onnx] @ {SOURCE}" "jax=={JAX}"
    importlib.invalidate_caches()

# %%
import os

import optax
from IPython.display import Image, display

from jaxdistill import data, export, models, objectives, parallel, study, train
from jaxdistill.export import benchmark

FAST = os.environ.get("JAXDISTILL_FAST") == "1"  # for the test of this notebook

# %% [markdown]
# ## A run
#
# Any run directory will do that names its data set in `config.json`. This one is of the
# 8x8 digits that the package ships; run the cell again and nothing is trained twice.

# %%
RUN_DIR = "runs/export"
SETTINGS = {"data": "digits", "batch_size": 50, "steps": 100 if FAST else 4_000}

digits = data.load(SETTINGS["data"])
train_split, test = digits.inputs(digits.train), digits.inputs(digits.test)
optimizer = optax.adam(optax.cosine_decay_schedule(1e-3, SETTINGS["steps"]))
hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
both = objectives.combine(
    {
        "hard": (0.1, objectives.hard_labels()),
        "soft": (0.9, objectives.soft_targets(temperature=2.0)),
    }
)
teacher, student = models.ConvNet((16, 32), 64), models.MLP((32, 10))
arms = {
    "teacher": study.Arm(teacher, hard, optimizer),
    "scratch": study.Arm(student, hard, optimizer),
    "distilled": study.Arm(student, both, optimizer, teacher="teacher"),
}
partitioner = parallel.choose("auto")
experiment = study.Study(
    train.RunDir(RUN_DIR, SETTINGS),
    partitioner=partitioner,
    examples=lambda arm, seed: train_split,
    steps=SETTINGS["steps"],
    batch_size=SETTINGS["batch_size"],
    test=train.Evaluator(partitioner, test),
    stored=True,
)
summary = study.compare(experiment, arms, seeds=1)

# %% [markdown]
# ## Export the student
#
# As floats, and with weights and activations in eight bits, whose ranges come from
# training images: `jaxdistill export runs/export --to onnx --int8 static` does it too.
# Each file is read again in ONNX Runtime, in a fresh process, and compared with the
# model on the whole test before it is there; its manifest says how it went.

# %%
subject = export.from_run(RUN_DIR, "distilled")
for int8 in (None, "static"):
    path = export.default_path(RUN_DIR, "distilled", "onnx", int8)
    export.obtain(subject, [path], to="onnx", int8=int8, max_drop=100.0)
    print(path, f"{path.stat().st_size:,} bytes")

# %% [markdown]
# ## Run it, without jax
#
# What follows needs NumPy and ONNX Runtime, the file, and raw pixels: their
# normalisation is inside.

# %%
import json
from pathlib import Path

import numpy as np
import onnxruntime

for name in ("distilled.onnx", "distilled-int8-static.onnx"):
    file = Path("runs/export/export") / name
    manifest = json.loads(file.with_name(f"{name}.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": digits.test["images"]})
    guesses = np.array(manifest["classes"])[logits.argmax(-1)]
    right = np.mean(guesses.astype(int) == digits.test["labels"])
    print(f"{name}: {100 * right:.2f}% of {len(guesses)} test images")

# %% [markdown]
# ## What accuracy costs
#
# Teacher and students in every runtime that is installed, each file in fresh processes:
# `jaxdistill benchmark runs/export`. Latency is of one image on one thread.

# %%
options = {"rounds": 1, "repeats": 5, "to": ("onnx",)} if FAST else {}
benchmark.from_run(RUN_DIR, **options)
print(Path(RUN_DIR, "deployment/table.md").read_text(encoding="utf-8"))
display(Image(Path(RUN_DIR, "deployment/frontier.png").read_bytes()))
