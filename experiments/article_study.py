# SPDX-License-Identifier: Apache-2.0
"""Is the article's gain knowledge, and when does distillation help the same networks?

Question: with the article's recipe (digits_mlp.py --preset article) a student taught by
an untrained teacher does better than one of a trained teacher. Is there a setting of
the same two networks, MNIST 784-512-256-10 to 784-128-64-10, in which the teacher's
knowledge matters, against controls tuned as hard?

Setting: 1,000 labels for everyone, the teacher included; the other images are the
transfer set, which only soft targets can use. The teacher is regularised (dropout 0.2,
images shifted by up to 2 pixels, cosine schedule). Every arm has the same random-search
trials over learning rate, decay and shift; the distilled ones also draw temperature and
the weight of the soft targets, label smoothing its amount. All train for as many steps.
Trials use one seed and 10,000 validation images split off the training
set; each arm's best by validation accuracy then trains on fresh seeds, and the test set
is looked at once, last epoch.

Two settings with all labels came before it, and are kept beside it. In the first, every
arm may shift its images: there the student from scratch comes close to its teacher, and
the distilled one loses to it. In the second, students see plain images.

  python experiments/article_study.py --data-dir ~/mnist
  ... --labels None --epochs 20 --trials 10 --seeds 10
  ... --labels None --epochs 20 --student-shift 0

With --parallel seeds the search, of one seed, runs on one device.

Cost: about 5 minutes on two cores, then 25, then 15. Hinton et al. 2015, section 3.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxdistill import data, models, objectives, report, study, train
from jaxdistill.data.augment import shift
from jaxdistill.report.figures import words
from jaxdistill.study import script
from jaxdistill.study.sweep import Division, divide

ARMS = ("scratch", "label_smoothing", "distilled", "untrained_teacher")
SEARCH_SEED = 1_000
"""The seed of the search, and the first of the teachers never trained: none of the
final seeds."""


@dataclass(frozen=True)
class Config(script.SharedFlags):
    """Tune four ways to train the article's student equally hard; compare them."""

    data: str = "mnist"
    """mnist or fashion_mnist; digits for a quick look"""
    run_dir: str = "runs/article_study"
    """where the run is kept and resumed from"""
    teacher: tuple[int, ...] = (512, 256)
    """hidden widths of the teacher"""
    student: tuple[int, ...] = (128, 64)
    """hidden widths of the student"""
    validation: int = 10_000
    """training images held out to choose hyperparameters on"""
    labels: int | None = 1_000
    """training images whose label anyone may use, the teacher too; None is all"""
    student_shift: int = 2
    """most pixels that a trial may shift the students' images by, 0 to 2"""
    trials: int = 8
    """random-search trials of each arm"""
    seeds: int = 5
    """fresh seeds of each arm's best"""
    epochs: int = 5
    """passes over the training images, for teacher and students"""
    batch_size: int = 128
    """examples in a batch, over all devices"""
    parallel: Division = "auto"
    """what devices divide: seeds (all in one program), or a batch (mesh, fsdp, pmap);
    auto is seeds on an accelerator, else a mesh where there are several devices"""


class Trial(NamedTuple):
    """One draw of hyperparameters; every arm draws all and uses those it has."""

    learning_rate: float
    weight_decay: float
    shift: int
    label_smoothing: float
    temperature: float
    soft_weight: float


TEACHER = Trial(1e-3, 0.0, 2, 0.0, 1.0, 0.0)


def execute(config: Config) -> dict[str, Any]:
    """Searches with one seed, then compares the arms' best with fresh ones."""
    source = data.load(config.data, config.data_dir)
    train_set, test, held = source.splits(config.validation)
    partitioner, together = divide(config.parallel, config.seeds)
    experiment = study.Study(
        train.RunDir(config.run_dir, train.settings(config)),
        partitioner=partitioner,
        examples=study.few_labels(train_set, config.labels),
        test=test,
        validation=held,
        steps=script.steps_of(config.epochs, train_set, config.batch_size),
        **script.study_options(config, evaluations=3, together=together),
    )
    make = ArmMaker(config, experiment.steps, source.background)
    best, table = search(config, experiment, make)
    experiment.run_dir.write("search.json", table)
    arms = {"teacher": make.arm("teacher", TEACHER)}
    arms |= {name: make.arm(name, best[name]) for name in ARMS}
    summary = study.compare(
        experiment, arms, config.seeds, given=lambda s: untrained(experiment, make, s)
    )
    chosen = describe(best, table)
    experiment.run_dir.write_bytes("chosen.md", chosen.encode())
    script.show(experiment.run_dir, chosen)
    return summary


def search(config: Config, experiment: study.Study, make: "ArmMaker"):
    """Each arm's best trial by validation accuracy, and all trials' scores."""
    place, arm = experiment.partitioner.place, make.arm("teacher", TEACHER)
    teacher = experiment.train("search_teacher", arm, SEARCH_SEED)
    given = {"teacher": place(teacher), **untrained(experiment, make, SEARCH_SEED)}
    best: dict[str, Trial] = {}
    table: dict[str, list] = {name: [] for name in ARMS}
    trials = draw(config.trials, config.student_shift)
    for name in ARMS:
        for number, trial in enumerate(trials):
            arm = make.arm(name, trial)
            its_teacher = None if arm.teacher is None else given[arm.teacher]
            label = f"search_{name}_{number}"
            model = experiment.train(label, arm, SEARCH_SEED, its_teacher)
            assert experiment.validation is not None
            scores = experiment.validation(place(model), its_teacher)
            table[name].append({**trial._asdict(), "accuracy": scores["accuracy"]})
        order = [trial["accuracy"] for trial in table[name]]
        best[name] = trials[int(np.argmax(order))]
    return best, table


def draw(count: int, most_shift: int = 0) -> list[Trial]:
    """The trials: the same for every arm, so that none gets luckier draws."""
    rng = np.random.default_rng(0)
    return [
        Trial(
            learning_rate=float(10 ** rng.uniform(-3.3, -2.3)),
            weight_decay=float(rng.choice([0.0, 1e-4, 1e-2, 1e-1])),
            shift=min(int(rng.choice([0, 1, 2])), most_shift),
            label_smoothing=float(rng.choice([0.02, 0.05, 0.1, 0.2])),
            temperature=float(rng.choice([1.0, 2.0, 4.0, 8.0])),
            soft_weight=float(rng.choice([0.5, 0.9, 1.0])),
        )
        for _ in range(count)
    ]


class ArmMaker:
    """Arms of this study from a name and a trial."""

    def __init__(self, config: Config, steps: int, fill: Any):
        """`fill` is the normalised background, which a shifted image is padded with."""
        self.steps, self.fill = steps, fill
        self.teacher = models.MLP((*config.teacher, 10), dropout=0.2)
        self.student = models.MLP((*config.student, 10))
        self.arm = cache(self._arm)  # the same arm again compiles once

    def _arm(self, name: str, trial: Trial) -> study.Arm:
        """The arm trained with the trial's hyperparameters."""
        rate = optax.cosine_decay_schedule(trial.learning_rate, self.steps)
        smoothing = trial.label_smoothing if name == "label_smoothing" else 0.0
        hard = objectives.hard_labels(label_smoothing=smoothing)
        objective = objectives.combine({"hard": (1.0, hard)})
        by = {"distilled": "teacher", "untrained_teacher": "untrained"}.get(name)
        if by:
            objective = objectives.hinton(trial.temperature, trial.soft_weight)
        return study.Arm(
            self.teacher if name == "teacher" else self.student,
            objective,
            optax.adamw(rate, weight_decay=trial.weight_decay),
            by,
            shift(trial.shift, self.fill) if trial.shift else None,
        )


def untrained(experiment: study.Study, make: ArmMaker, seed: int) -> dict[str, Any]:
    """A teacher as it is drawn, never trained."""
    arm = make.arm("teacher", TEACHER)
    return {"untrained": experiment.untrained(arm, SEARCH_SEED + seed)}


def describe(best: dict[str, Trial], table: dict[str, list]) -> str:
    """What the search chose, as Markdown, with the choice's validation accuracy."""
    lines = []
    for name, trial in best.items():
        own = {
            "scratch": "-",
            "label_smoothing": f"smoothing {trial.label_smoothing}",
        }.get(name, f"T {trial.temperature:g}, soft weight {trial.soft_weight}")
        score = max(entry["accuracy"] for entry in table[name])
        rate, decay = f"{trial.learning_rate:.1e}", f"{trial.weight_decay:g}"
        lines.append(
            [words(name), rate, decay, f"{trial.shift}", own, f"{100 * score:.2f}"]
        )
    head = "arm", "learning rate", "weight decay", "shift", "own", "validation %"
    return report.markdown_table(head, lines, left=(0, 4))


main = script.command(execute, {"": Config()}, __doc__)

if __name__ == "__main__":
    main()
