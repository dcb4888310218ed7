# SPDX-License-Identifier: Apache-2.0
"""A distillation of ResNets by the loops that benchmark compares: one epoch of each.

ResNet-20 teaches ResNet-8 on drawn 32x32 colour images, with the articles' loss and
Adam. All start from the same weights.
"""

from functools import partial

import jax
import numpy as np
import optax

from experiments.speed import loops
from experiments.speed.article_job import Job, baseline
from jaxdistill import models, parallel, pretrained, teachers, train
from jaxdistill.data import Batches, normalize

CLASSES, NUMBERS = 10, (0.5, 0.25, 255)
"""Classes, and the images' mean, deviation and peak."""
TEACHER, STUDENT = (models.resnet_cifar(depth, CLASSES) for depth in (20, 8))


def all_loops(config: Job, images: int, compiled: bool) -> loops.Loops:
    """PyTorch's three loops, compiled if asked for, and ours, live and stored."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (images, 32, 32, 3), np.uint8)
    labels = draw.integers(0, CLASSES, images).astype(np.int32)
    examples = {"inputs": normalize(pixels, *NUMBERS), "labels": labels}
    teacher_variables = jax.jit(TEACHER.init)(jax.random.key(1), examples["inputs"][:1])
    optimizer, partitioner = optax.adam(config.learning_rate), parallel.choose("jit")
    state, step = train.begin(
        STUDENT,
        config.objective(),
        optimizer,
        partitioner=partitioner,
        examples=examples,
    )
    start = {"params": state.params, **state.model_state}

    def networks(tuned):
        """Channels last where they are tuned."""
        from experiments.baselines.pytorch_resnet import ResNet

        torch, made = baseline(), []
        layouts = torch.torch.contiguous_format, torch.torch.channels_last
        for like, variables in ((STUDENT, start), (TEACHER, teacher_variables)):
            module = ResNet(like)
            weights = pretrained.to_torch(variables, module.state_dict())
            loaded = torch.load(module, weights)
            made.append(loaded.to(memory_format=layouts[tuned]))
        return made

    inputs = np.ascontiguousarray(examples["inputs"].transpose(0, 3, 1, 2))
    raw, ready = (pixels, labels, *NUMBERS), (inputs, labels)
    theirs, skipped = loops.theirs(config, networks, raw, ready, compiled)
    ours = partial(
        loops.one_epoch, partitioner, step, state, Batches(images, config.batch_size)
    )
    placed = partitioner.replicate(examples)
    live = partitioner.place(teachers.live(TEACHER, teacher_variables))
    stored = teachers.with_logits(live, placed)
    jobs = {
        loops.LIVE: ours(live, placed),
        loops.STORED: ours(teachers.StoredTeacher(), stored),
    }
    return theirs | jobs, skipped
