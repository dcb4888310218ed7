# SPDX-License-Identifier: Apache-2.0
"""The articles' job from a cold start to a saved student, as a process of its own.

A folder holds `job.json` (`article_job.Job`) and `teacher.npz` (a trained teacher's
PyTorch weights). The side named imports what it needs, reads the images and the
teacher, trains the student, evaluates it on the test images, saves it in the folder
OUTPUT, and prints its accuracy and the process's peak memory. `benchmark` takes the
time of the whole.

  python -m experiments.speed.whole_job pytorch FOLDER OUTPUT
"""

import json
import sys
from pathlib import Path
from typing import Any

from jaxdistill import models, pretrained, train
from jaxdistill.runtimes import peak_memory


def pytorch(job: dict[str, Any], weights, output: Path) -> float:
    """The article's script, with a trained teacher; the student's accuracy."""
    import torch

    from experiments.baselines import pytorch_mlp
    from jaxdistill import data

    torch.set_num_threads(job["threads"])
    source = data.load(job["data"], job["data_dir"])
    train_split, test = source.train, source.test
    pixels = train_split["images"][0].size
    student, teacher = (
        pytorch_mlp.mlp((pixels, *job[name], source.num_classes))
        for name in ("student", "teacher")
    )
    pytorch_mlp.load(teacher, weights)
    numbers = source.mean, source.deviation, source.peak
    loss = pytorch_mlp.make_loss(
        job["temperature"], job["hard_weight"], job["soft_weight"]
    )
    sizes = job["batch_size"], job["learning_rate"]
    images = pytorch_mlp.Images(train_split["images"], train_split["labels"], *numbers)
    epoch = pytorch_mlp.article(student, teacher, loss, images, *sizes)
    for _ in range(job["epochs"]):
        epoch()
    test_images = pytorch_mlp.Images(test["images"], test["labels"], *numbers)
    loader: Any = torch.utils.data.DataLoader(
        test_images,  # type: ignore[arg-type]  # has what a loader asks for
        batch_size=job["batch_size"],
    )
    student.eval()
    right = 0
    with torch.no_grad():
        for inputs, labels in loader:
            guess = student(inputs.to(pytorch_mlp.DEVICE)).argmax(-1).cpu()
            right += int((guess == labels).sum())
    torch.save(student.state_dict(), output / "student.pt")
    return right / len(test["labels"])


def ours(job: dict[str, Any], weights, output: Path) -> float:
    """The same by jaxdistill, the teacher in every step; the student's accuracy."""
    import jax

    from experiments.speed.article_job import Job, Task

    task = Task(Job(**job))
    module = task.modules["teacher"]
    like = jax.eval_shape(module.init, jax.random.key(0), task.first()["inputs"])
    teacher = task.partitioner.place(task.teacher(pretrained.from_torch(weights, like)))
    checkpoints = train.Checkpoints(output / "checkpoints")
    state = task.fit("student", 0, teacher, checkpoints)
    model = models.trained(task.modules["student"], state)
    accuracy = train.Evaluator(task.partitioner, task.test)(
        task.partitioner.place(model)
    )["accuracy"]
    checkpoints.close()
    return accuracy


SIDES = {"pytorch": pytorch, "jaxdistill": ours}


def main(side: str, folder: Path, output: Path) -> None:
    """Runs a side and prints what it reached, as a line of JSON."""
    import numpy as np

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    output.mkdir()
    accuracy = SIDES[side](job, dict(np.load(folder / "teacher.npz")), output)
    print(json.dumps({"accuracy": accuracy, "peak_bytes": peak_memory()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
