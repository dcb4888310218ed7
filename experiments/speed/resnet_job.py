# SPDX-License-Identifier: Apache-2.0
"""A distillation of ResNets by the loops that benchmark compares: one epoch of each.

ResNet-20 teaches ResNet-8 on drawn 32x32 colour images, with the articles' loss and
Adam. All start from the same weights.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

from experiments.speed.article_job import Job, baseline
from experiments.speed.loops import (
    ARTICLE,
    COMPILED,
    LIVE,
    STORED,
    TUNED,
    Loops,
    one_epoch,
    with_outputs,
)
from jaxdistill import models, objectives, parallel, pretrained, teachers, train
from jaxdistill.data import Batches, normalize

CLASSES, NUMBERS = 10, (0.5, 0.25, 255)
"""Classes, and the images' mean, deviation and peak."""
TEACHER, STUDENT = (models.resnet_cifar(depth, CLASSES) for depth in (20, 8))


def all_loops(config: Job, images: int, compiled: bool) -> Loops:
    """PyTorch's three loops, compiled if asked for, and ours, live and stored."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (images, 32, 32, 3), np.uint8)
    labels = draw.integers(0, CLASSES, images).astype(np.int32)
    examples = {"inputs": normalize(pixels, *NUMBERS), "labels": labels}
    variables = jax.jit(TEACHER.init)(jax.random.key(1), examples["inputs"][:1])
    optimizer, student = optax.adam(config.learning_rate), models.student(STUDENT)
    first = {name: x[:1] for name, x in examples.items()}
    first["mask"] = np.ones(1, np.float32)
    state = train.init_state(jax.random.key(0), student, optimizer, first)
    start = {"params": state.params, **state.model_state}
    theirs, skipped = torch_loops(config, variables, start, pixels, labels, compiled)

    soft = objectives.soft_targets(temperature=config.temperature)
    hard = (config.hard_weight, objectives.hard_labels())
    objective = objectives.combine({"hard": hard, "soft": (config.soft_weight, soft)})
    partitioner = parallel.choose("jit")
    step = train.scan_train(train.make_train_step(student, objective, optimizer))
    ours = partial(
        one_epoch, partitioner, partitioner.compile(step, batch_axis=1), state
    )
    batches = Batches(images, config.batch_size)
    live_teacher, placed = (
        partitioner.place(teachers.live(TEACHER, variables)),
        partitioner.replicate(examples),
    )
    jobs = {
        LIVE: ours(batches, live_teacher, placed),
        STORED: ours(
            batches, teachers.StoredTeacher(), with_outputs(placed, live_teacher)
        ),
    }
    return theirs | jobs, skipped


def torch_loops(
    config: Job,
    variables: Any,
    start: Any,
    pixels: np.ndarray,
    labels: np.ndarray,
    compiled: bool,
) -> Loops:
    """The article's loop, a tuned one (channels last), and that under torch.compile.

    Args:
      config: the job's numbers.
      variables: the teacher's variables.
      start: the student's.
      pixels: `[N, 32, 32, 3]` bytes.
      labels: `[N]`.
      compiled: whether to compile.
    """
    try:
        torch = baseline()
    except ValueError as error:
        return {}, dict.fromkeys((ARTICLE, TUNED, COMPILED), str(error))
    from experiments.baselines.pytorch_resnet import ResNet

    torch.torch.set_num_threads(config.threads)

    def network(like: models.ResNet, variables: Mapping[str, Any], layout):
        module = ResNet(like)
        weights = pretrained.to_torch(variables, module.state_dict())
        return torch.load(module, weights).to(memory_format=layout)

    def epoch(make, *images, layout, **options) -> Callable[[], float]:
        networks = [
            network(STUDENT, start, layout),
            network(TEACHER, variables, layout),
        ]
        loss = torch.make_loss(
            config.temperature, config.hard_weight, config.soft_weight
        )
        sizes = {"batch_size": config.batch_size, "learning_rate": config.learning_rate}
        return make(*networks, loss, *images, **sizes, **options)

    raw = torch.Images(pixels, labels, *NUMBERS)
    inputs = normalize(pixels, *NUMBERS).transpose(0, 3, 1, 2)
    tuned = partial(
        epoch,
        torch.tuned,
        np.ascontiguousarray(inputs),
        labels,
        layout=torch.torch.channels_last,
    )
    plain = torch.torch.contiguous_format
    jobs = {ARTICLE: epoch(torch.article, raw, layout=plain), TUNED: tuned()}
    problem = torch.compiler_problem() if compiled else "not asked for"
    if problem:
        return jobs, {COMPILED: problem}
    return {**jobs, COMPILED: tuned(compiled=True)}, {}
