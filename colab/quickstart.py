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
# # jaxdistill: a teacher, a student, and what passes between them
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxdistill/jaxdistill/blob/main/colab/quickstart.ipynb)
#
# Three networks learn to read 8x8 handwritten digits: a teacher, a small student that
# has only labels (from scratch), and the same small student that also has the teacher.
# Only 100 training images have a label, for everyone. The teacher's answers need no
# label, so the distilled student learns from all training images.
#
# It takes about a minute on a CPU. Run it again and it goes on from where it stopped.

# %% [markdown]
# ## Install
#
# This runtime's own jax stays: its version is named in the install command, and the
# package asks only for the oldest versions that its tests pass on. If pip says that
# it finds no matching versions, the runtime's jax is older than that.

# %%
# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util

# %%
if importlib.util.find_spec("jaxdistill") is None:
    JAX = importlib.metadata.version("jax")
    # !pip install -q "git+https://github.com/jaxdistill/jaxdistill" "jax=={JAX}"
    importlib.invalidate_caches()

# %%
import os
import sys
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxdistill import data, models, objectives, parallel, train
from jaxdistill.teachers import fingerprints
from jaxdistill.train import cost

for package in ("jaxdistill", "jax", "flax", "optax", "orbax-checkpoint", "numpy"):
    print(f"{package:17} {importlib.metadata.version(package)}")
print("devices:", jax.devices())

# %% [markdown]
# ## Where the run is kept
#
# Checkpoints and logs go to `RUN_DIR`. A Colab disk is gone when the runtime ends; with
# `USE_DRIVE = True` the directory is on your Google Drive and survives. Run all cells
# again, there or here, and training resumes from the last checkpoint.

# %%
USE_DRIVE = False
RUN_DIR = Path("runs/quickstart")

if USE_DRIVE and "google.colab" in sys.modules:
    from google.colab import drive

    drive.mount("/content/drive")
    RUN_DIR = Path("/content/drive/MyDrive/jaxdistill/quickstart")

# %% [markdown]
# ## Settings
#
# Change them as you like, with another `RUN_DIR`: a directory holds one configuration.

# %%
FAST = os.environ.get("JAXDISTILL_FAST") == "1"  # for the test of this notebook
SETTINGS = {
    "teacher": (256, 128, 10),
    "student": (8, 10),
    "labels": 100,
    "validation": 300,
    "temperature": 2.0,
    "steps": 40 if FAST else 2000,
    "evaluations": 4 if FAST else 10,
    "batch_size": 64,
    "learning_rate": 1e-3,
    "seed": 0,
}
run_dir = train.RunDir(RUN_DIR, SETTINGS)
already = {r["fit"]: r["step"] for r in run_dir.records}
print(f"{RUN_DIR}:", f"resuming from steps {already}" if already else "a fresh run")

# %% [markdown]
# ## Data
#
# 1,797 real digits come with the package. `labelled` says whose label may be used.

# %%
digits = data.load("digits")
train_split, validation = data.holdout(digits.train, SETTINGS["validation"])
train_split, validation, test = map(
    digits.inputs, (train_split, validation, digits.test)
)

size = len(train_split["labels"])
order = np.random.default_rng([SETTINGS["seed"], 0, 1]).permutation(size)
chosen = np.sort(order[: SETTINGS["labels"]])
few = {key: value[chosen] for key, value in train_split.items()}
everything = {
    **train_split,
    "labelled": np.isin(np.arange(size), chosen).astype(np.float32),
}
print(f"{size} training images, {len(chosen)} with a label; {len(test['labels'])} test")

# %% [markdown]
# ## Train
#
# An objective is a sum of named terms, each with its weight. `soft_targets` is the
# temperature-scaled KL divergence to the teacher (Hinton, Vinyals, Dean 2015). The step
# is one pure function, run on one device or on all of them, whatever is there.

# %%
hard = objectives.combine({"hard": (1.0, objectives.hard_labels())})
both = objectives.combine(
    {
        "hard": (0.1, objectives.hard_labels()),
        "soft": (0.9, objectives.soft_targets(temperature=SETTINGS["temperature"])),
    }
)
teacher_module = models.MLP(SETTINGS["teacher"], dropout=0.3)
student_module = models.MLP(SETTINGS["student"])

STEPS = SETTINGS["steps"]
optimizer = optax.adam(optax.cosine_decay_schedule(SETTINGS["learning_rate"], STEPS))
partitioner = parallel.choose("auto")
validate, final_test = (
    train.Evaluator(partitioner, validation),
    train.Evaluator(partitioner, test),
)


# %%
def learn(name, module, objective, examples, teacher=None):
    """Trains a model, or resumes it, and returns it in evaluation mode."""
    student = models.student(module)
    step = train.scan_train(train.make_train_step(student, objective, optimizer))
    example = {"inputs": examples["inputs"][:1], "mask": np.ones(1, np.float32)}
    state = train.init_state(
        jax.random.key(SETTINGS["seed"]), student, optimizer, example
    )
    digest = (
        None
        if teacher is None
        else fingerprints.of_tree(partitioner.fetch(teacher.variables))
    )
    checkpoints = train.Checkpoints(
        RUN_DIR / "checkpoints" / name, identity={**SETTINGS, "teacher": digest}
    )
    state = train.fit(
        state,
        partitioner.compile(step, batch_axis=1),
        partitioner=partitioner,
        examples=partitioner.replicate(examples),
        batches=data.Batches(len(examples["labels"]), SETTINGS["batch_size"]),
        steps=STEPS,
        teacher=teacher,
        evaluate=lambda state: validate(models.trained(module, state), teacher),
        evaluate_every=train.interval(STEPS, SETTINGS["evaluations"]),
        checkpoints=checkpoints,
        run_dir=run_dir,
        name=name,
    )
    checkpoints.close()
    return partitioner.place(models.trained(module, state))


teacher = learn("teacher", teacher_module, hard, few)
scratch = learn("scratch", student_module, hard, few)
distilled = learn("distilled", student_module, both, everything, teacher)

# %% [markdown]
# ## Learning curves
#
# Accuracy on the validation images, from the run directory's log.

# %%
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name in ("teacher", "scratch", "distilled"):
    points = [r for r in run_dir.records if r["fit"] == name]
    accuracy = [100 * r["accuracy"] for r in points]
    axis.plot([r["step"] for r in points], accuracy, label=name)
axis.set(xlabel="step", ylabel="validation accuracy, %")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# ## What a teacher says
#
# A label names one digit. The teacher's distribution also says which other digits this
# one looks like. At temperature 1 most of it hides behind the winner; a higher
# temperature brings it out. Four test images, from one the teacher is sure of to one
# that it is not.

# %%
batch = {"inputs": test["inputs"], "mask": np.ones(len(test["labels"]), np.float32)}
logits = np.asarray(partitioner.fetch(teacher)(batch).logits)
surest_last = np.argsort(jax.nn.softmax(logits).max(-1))
shown = surest_last[(np.array([0.5, 0.25, 0.12, 0.04]) * len(logits)).astype(int)]

figure, axes = plt.subplots(
    4, 3, figsize=(7, 6), layout="constrained", width_ratios=(1, 2, 2)
)
for (image, *bars), i in zip(axes, shown, strict=True):
    image.imshow(digits.test["images"][i], cmap="gray_r")
    image.set(xticks=[], yticks=[], ylabel=f"label {test['labels'][i]}")
    for axis, temperature in zip(bars, (1, 4), strict=True):
        axis.bar(range(10), jax.nn.softmax(logits[i] / temperature))
        axis.set(xticks=range(10), ylim=(0, 1))
        if i == shown[0]:
            axis.set_title(f"temperature {temperature}")
plt.show()

# %% [markdown]
# ## Compare
#
# On the test images, after the last step. Agreement: how often a model gives the
# teacher's answer. NLL: the mean of minus log the probability of the label, in nats.

# %%
trained = {"teacher": teacher, "scratch": scratch, "distilled": distilled}
scores = {name: final_test(model, teacher) for name, model in trained.items()}
run_dir.write("summary.json", scores)

print(f"{'':10} {'parameters':>10} {'accuracy':>9} {'agreement':>9} {'NLL':>7}")
for name, row in scores.items():
    size = cost.parameters(partitioner.fetch(trained[name]).variables)
    accuracy, agreement = 100 * row["accuracy"], 100 * row["agreement"]
    print(f"{name:10} {size:10,} {accuracy:8.2f}% {agreement:8.2f}% {row['nll']:7.3f}")
gain = 100 * (scores["distilled"]["accuracy"] - scores["scratch"]["accuracy"])
print(f"distilled minus scratch: {gain:+.2f} points, one seed")

# %% [markdown]
# One seed says little. `experiments/digits_mlp.py` repeats this over seeds, with spread
# and intervals, and the README shows the result.
