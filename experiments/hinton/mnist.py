# SPDX-License-Identifier: Apache-2.0
"""MNIST with the temperature: Hinton, Vinyals and Dean (2015), section 3, with seeds.

Question: does the paper's only public data set show what the paper says, over seeds?

  triple       A teacher of two layers of 1200 ReLUs (dropout, bounded weights, images
               shifted by up to 2 pixels), a student of 2x800 without regularisation,
               and the same student on soft targets at temperature 20, its images not
               shifted. Published test errors: 67, 146, 74.
  temperature  Students of 30, 300 and 800 units a layer at temperatures from 1 to 20.
               Published: above 8 all alike from 300 units on, with 30 units 2.5 to 4.
  transfer     The student never sees a 3: 206 errors, 133 of them threes; with the bias
               of class 3 raised by 3.5, 109 and 14. It sees 7s and 8s only: 47.3%
               errors; with their bias lowered by 7.6, 13.2%. The paper chose both on
               the test images; here also on the training images.
  beyond       What the paper left out: smoothed labels, shifted images and an untrained
               teacher as controls; no labels; the teacher's view of shifted images
               (function matching, of stored views), also of a convolutional teacher,
               and of the mean of both; 100 and 1,000 labels for everyone.

The paper does not give rates, batches, epochs or weights. Here: Adam, its rate brought
to nothing by a cosine, batch 128, last epoch; the flags below have the rest. The two
students' rates are chosen on validation images, held out of the training images, from
the same three; then all train on all training images. For both students Adam forgets
squared gradients sooner than usual, a choice made on these images for the distilled
one. Of "beyond" the students that see shifted images have their rates, and with a
teacher their temperatures, chosen so too. Which row of it is best is said by another
training of each, and of its teacher, without the validation images.

  python -m experiments.hinton.mnist --data-dir ~/mnist
  python -m experiments.hinton.mnist --data-dir ~/mnist --part temperature
  python -m experiments.hinton.mnist --smoke

A part trains what it needs of the triple, unless that is there. Kill it at any moment:
the same command goes on. Its minutes are in its folder.
"""

from dataclasses import dataclass
from typing import Literal

from experiments.hinton.beyond import beyond
from experiments.hinton.parts import temperature, transfer, triple
from experiments.hinton.task import Task
from jaxdistill.study import script, sweep


@dataclass(frozen=True)
class Config(script.Flags):
    """Reproduce section 3 of Hinton, Vinyals and Dean (2015)."""

    part: Literal["triple", "temperature", "transfer", "beyond", "all"] = "all"
    """what to run"""
    smoke: bool = False
    """all parts for a few steps, on the shipped digits"""
    data: Literal["digits", "mnist"] = "mnist"
    """digits is shipped; MNIST comes from --data-dir or TFDS"""
    run_dir: str = "runs/hinton_mnist"
    """where the run is kept and resumed from, a folder for each part"""
    seeds: int = 5
    """trainings of everything, but for --temperature-seeds"""
    validation: int = 10_000
    """training images held out to choose on"""
    batch_size: int = 128
    """examples in a batch"""
    teacher: tuple[int, ...] = (1200, 1200)
    """hidden widths of the teacher"""
    teacher_epochs: int = 100
    """passes of the teacher over the training images"""
    teacher_rate: float = 1e-3
    """the teacher's first rate"""
    input_dropout: float = 0.1
    """dropout rate on the teacher's inputs"""
    dropout: float = 0.3
    """dropout rate on the teacher's hidden layers"""
    max_norm: float = 3.0
    """the largest norm of a teacher's unit's incoming weights"""
    jitter: int = 2
    """pixels by which the teacher's images are shifted at most"""
    student: tuple[int, ...] = (800, 800)
    """hidden widths of the student"""
    epochs: int = 60
    """passes of a student over the training images"""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """first rates tried for either student"""
    second_moment: float = 0.95
    """Adam's decay of squared gradients, for students; the teachers' is 0.999"""
    temperature: float = 20.0
    """softens both distributions"""
    hard_weight: float = 0.1
    """weight of the labels beside soft targets, whose weight is 1"""
    temperature_values: tuple[float, ...] = (1.0, 2.0, 2.5, 3.0, 4.0, 8.0, 20.0)
    """temperatures of that part"""
    temperature_widths: tuple[int, ...] = (30, 300, 800)
    """units a layer of its students"""
    temperature_seeds: tuple[int, ...] = (5, 5, 3)
    """students of each width and temperature"""
    temperature_epochs: int = 30
    """passes of its students over the training images"""
    transfer_epochs: int = 30
    """as many steps for the students of a transfer set"""
    beyond_epochs: int = 60
    """passes of the students that see shifted images"""
    beyond_temperatures: tuple[float, ...] = (4.0, 20.0)
    """tried for the students that match a teacher on shifted images"""
    beyond_views: int = 25
    """shifted images of each, of which a teacher's outputs are stored"""
    beyond_conv_epochs: int = 20
    """passes of the convolutional teacher"""
    beyond_labels: tuple[int, ...] = (100, 1000)
    """how many labels everyone may use, in turn"""
    beyond_few_epochs: int = 20
    """as many steps of everyone who may use those alone, as passes over all images"""


SMOKE = """--data digits --seeds 2 --validation 200 --batch-size 32 --teacher 32
    --teacher-epochs 4 --jitter 1 --student 16 --epochs 2 --rates 1e-3 3e-3
    --temperature-values 1 4 --temperature-widths 8 16 --temperature-seeds 2 1
    --temperature-epochs 2 --transfer-epochs 2 --beyond-epochs 2 --beyond-conv-epochs 2
    --beyond-temperatures 4 --beyond-views 2 --beyond-labels 100
    --beyond-few-epochs 2"""


def execute(config: Config) -> None:
    """Runs the parts asked for, resuming what the run directory holds."""
    task = Task(config)
    for part in (triple, temperature, transfer, beyond):
        if config.part not in ("all", name := part.__name__):
            continue
        with task.timed(name):
            text = part(task)
        print(f"{name}\n\n{text}", flush=True)


main = script.command(
    execute, {"": Config()}, __doc__, smoke=SMOKE, before=sweep.use_cores
)

if __name__ == "__main__":
    main()
