# SPDX-License-Identifier: Apache-2.0
"""Which distillation method helps, at equal steps and equal tuning?

Question: same teacher, same student, same images, steps and optimizer: what does each
loss of the field add to training from scratch, and to plain knowledge distillation?

Presets:
  fashion        Fashion-MNIST: a convolutional teacher, a student with an eighth of
                 its weights, Adam with a cosine schedule.
  repdistiller   CIFAR-100, ResNet-56 to ResNet-20, with RepDistiller's recipe (Tian et
                 al. 2020, section 4.1): SGD, 240 epochs, rate / 10 at 150, 180, 210,
                 crop and flip. For a GPU or TPU; needs --data-dir.

The learning rate is chosen for the student from scratch, and used for all. Every method
gets as many trials, on one seed and the validation images: its weight from its recipe,
a third of it and three times it (for label smoothing the amount, half and double it),
then on beyond the best where that lies at an end, or else between it and the better of
its neighbours. The best trains on fresh seeds, all methods of a seed from one teacher,
and the test set is looked at once, last epoch. Steps are equal for every student; a
teacher has its own number. What a method trains beside its student is not counted: two
more teachers for the ensemble, an assistant, a first generation for the born-again
student, a second student for mutual learning. The differences to scratch and to plain
distillation are paired by seed, their p-values corrected for their number (Holm 1979).

  python -m experiments.methods.table --data-dir ~/fashion_mnist
  python -m experiments.methods.table --smoke
  python -m experiments.methods.table --preset repdistiller --data-dir ~/cifar

Cost: an hour and a half on two cores; a minute or two with --smoke, nearly all of it
compilation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import optax

from experiments.methods.methods import METHODS, Layers, Method, Terms
from jaxdistill import data, models, objectives, parallel, report, study, train
from jaxdistill.data.augment import chain, flip, shift
from jaxdistill.report.figures import words
from jaxdistill.study import script
from jaxdistill.teachers import ensemble

SEARCH_SEED = 1_000
"""The seed of the search: none of the final seeds."""
OTHERS = (10_000, 20_000)
"""Added to a seed for what else it trains: the ensemble's other teachers, and the first
generation, which a born-again student must not start as."""
TIMED_STEPS = 50
"""Steps in a dispatch whose time is taken, five times in turns."""


@dataclass(frozen=True)
class Config(script.StepFlags):
    """Compare distillation methods on one teacher and one student."""

    preset: Literal["fashion", "repdistiller"] = "fashion"
    """where the defaults come from"""
    smoke: bool = False
    """all methods for a few steps, on the shipped digits"""
    data: Literal["digits", "mnist", "fashion_mnist", "cifar100"] = "fashion_mnist"
    """digits is shipped; the others come from --data-dir or TFDS"""
    data_dir: str | None = None
    """the original files, or TFDS's data folder"""
    run_dir: str = "runs/method_table"
    """where the run is kept and resumed from"""
    methods: tuple[str, ...] = tuple(METHODS)
    """which arms, beside the teacher; scratch and kd are always there"""
    images: int | None = 25_000
    """training images for everyone, validation apart; None is all"""
    validation: int = 10_000
    """training images held out to choose weights on; some, or the search cannot"""
    epochs: int = 3
    """passes of a student over the training images"""
    teacher_epochs: int = 10
    """passes of a teacher"""
    batch_size: int = 64
    """examples in a batch, over all devices"""
    learning_rate: float = 6e-3
    """the peak rate"""
    trials: int = 5
    """weights tried for each method; 1 takes the paper's"""
    seeds: int = 5
    """fresh seeds of each method's best"""
    remat: bool = False
    """compute residual blocks again in the backward pass: less memory, more time"""


PRESETS = {
    "fashion": Config(),
    "repdistiller": Config(
        preset="repdistiller",
        data="cifar100",
        run_dir="runs/repdistiller",
        images=None,
        validation=0,
        epochs=240,
        teacher_epochs=240,
        learning_rate=0.05,
        trials=1,
    ),
}
SMOKE = """--data digits --images 128 --validation 100 --epochs 1 --seeds 2 --trials 1
    --batch-size 32"""


def execute(config: Config) -> dict[str, Any]:
    """Searches each method's weight, then compares their best on fresh seeds."""
    if unknown := sorted({*config.methods} - {*METHODS}):
        raise ValueError(f"unknown methods {unknown}; known: {', '.join(METHODS)}")
    task = Task(config)
    weights, scores = search(task)
    task.study.run_dir.write("search.json", scores)
    rate = weights["scratch"]
    arms = {"teacher": task.teacher_arm()}
    if "assistant" in weights:
        arms["assistant_teacher"] = task.assistant_arm()
    arms |= {name: task.arm(name, weight, rate) for name, weight in weights.items()}
    summary = study.compare(
        task.study,
        arms,
        config.seeds,
        given=lambda seed: task.others(seed, rate),
        pairs=comparisons(weights),
        timed_steps=TIMED_STEPS,
    )
    chosen = describe(weights, scores)
    task.study.run_dir.write_bytes("chosen.md", chosen.encode())
    script.show(task.study.run_dir, chosen)
    return summary


class Task:
    """The data, the networks and how they train, as a configuration says."""

    def __init__(self, config: Config):
        self.config = config
        source = data.load(config.data, config.data_dir)
        examples, test, held = source.splits(config.validation or None)
        partitioner = parallel.choose(config.parallel)
        self.validation = train.Evaluator(partitioner, held) if held else None
        if config.images is not None and config.images < len(examples["labels"]):
            _, examples = data.holdout(examples, config.images, seed=1)
        self.study = study.Study(
            train.RunDir(config.run_dir, train.settings(config)),
            partitioner=partitioner,
            examples=examples,
            test=test,
            epochs=config.epochs,
            **script.study_options(config, evaluations=1),
        )
        steps = script.steps_of(config.teacher_epochs, examples, config.batch_size)
        self.teacher_steps, classes = steps, source.num_classes
        self.teacher, self.assistant, self.student = networks(config, classes)
        self.layers = Layers.of(self.teacher, examples["inputs"][:1])
        crop = {"cifar100": 4, "digits": 0}.get(config.data, 2)
        augmentations = [shift(crop, source.background)] if crop else []
        if config.data == "cifar100":
            augmentations.append(flip())
        self.augment = chain(*augmentations) if augmentations else None
        # The same arm again is the same object: it compiles once.
        self.arm, self.teacher_arm = cache(self._arm), cache(self._teacher_arm)
        self.assistant_arm = cache(self._assistant_arm)

    def _made(self, module, terms, teacher=None, factor=1.0, steps=None) -> study.Arm:
        """An arm as all are made; its rate is the preset's times a factor."""
        optimizer = self.optimizer(factor, steps or self.study.steps)
        objective = objectives.combine(terms)
        return study.Arm(
            module, objective, optimizer, teacher, self.augment, steps=steps
        )

    def _teacher_arm(self) -> study.Arm:
        """The teacher, trained on the labels."""
        hard = {"hard": (1.0, objectives.hard_labels())}
        return self._made(self.teacher, hard, steps=self.teacher_steps)

    def _assistant_arm(self) -> study.Arm:
        """A network between the two, taught as plain distillation does (Mirzadeh et
        al. 2020, Improved Knowledge Distillation via Teacher Assistant)."""
        terms = self._terms("kd", METHODS["kd"].weight)
        return self._made(self.assistant, terms, "teacher")

    def _arm(self, name: str, weight: float, rate: float) -> study.Arm:
        """The student, trained with a method at a weight, its rate times a factor."""
        method = METHODS[name]
        module = method.module(self.student, self.layers)
        return self._made(module, self._terms(name, weight), method.teacher, rate)

    def _terms(self, name: str, weight: float) -> Terms:
        return METHODS[name].terms(weight, self.layers, self.study.steps)

    def optimizer(self, factor: float, steps: int) -> optax.GradientTransformation:
        """As the preset trains for so many steps, its rate times a factor."""
        rate = factor * self.config.learning_rate
        if self.config.preset == "fashion":
            return optax.adam(optax.cosine_decay_schedule(rate, steps))
        decay = optax.add_decayed_weights(5e-4)
        return optax.chain(decay, optax.sgd(step_rate(rate, steps), momentum=0.9))

    def others(self, seed: int, rate: float, first: str = "teacher") -> dict[str, Any]:
        """Teachers that are no arms: an ensemble, a first generation of the student.

        The ensemble has the seed's own teacher, by the name it is trained under.
        """
        fit, place, given = self.study.train, self.study.partitioner.place, {}
        if "ensemble" in self.config.methods:
            arm = self.teacher_arm()
            members = [fit(first, arm, seed)]
            members += [fit("other_teacher", arm, seed + i) for i in OTHERS]
            given["ensemble_teacher"] = place(ensemble(members))
        if "born_again" in self.config.methods:
            arm = self.arm("scratch", rate, rate)
            model = fit("first_generation", arm, seed + OTHERS[0])
            given["first_generation"] = place(model)
        return given


def step_rate(rate: float, steps: int) -> optax.Schedule:
    """A tenth after 150, 180 and 210 of 240 epochs, whatever the epochs' number."""
    at = [steps * epoch // 240 for epoch in (150, 180, 210)]
    return optax.piecewise_constant_schedule(rate, dict.fromkeys(at, 0.1))


def networks(config: Config, num_classes: int):
    """Teacher, assistant and student of a preset."""
    if config.preset == "repdistiller":
        return [
            models.resnet_cifar(depth, num_classes).clone(remat=config.remat)
            for depth in (56, 32, 20)
        ]
    if config.remat:
        raise ValueError("--remat is for residual networks: take preset repdistiller")
    return [
        models.ConvNet((16, 32), 128, num_classes, dropout=0.3),
        models.ConvNet((12, 24), 64, num_classes),
        models.ConvNet((8, 16), 32, num_classes),
    ]


def search(task: Task) -> tuple[dict[str, float], dict[str, list]]:
    """Each method's best weight by validation accuracy, and all trials' scores.

    Scratch comes first: its weight is the factor of the rate, which all then train at.
    """
    names = dict.fromkeys(("scratch", "kd", *task.config.methods))
    best = {name: METHODS[name].weight for name in names}
    if task.config.trials == 1:
        return best, {}
    experiment, scores = task.study, {}
    teacher = experiment.train("search_teacher", task.teacher_arm(), SEARCH_SEED)
    given = {"teacher": experiment.partitioner.place(teacher)}
    for name in names:
        tried: dict[float, float] = {}
        while len(tried) < task.config.trials:
            weight = next_weight(tried, METHODS[name])
            tried[weight] = trial(task, name, weight, best, given)
        scores[name] = [{"weight": w, "accuracy": a} for w, a in tried.items()]
        # The first of equals: the paper's.
        best[name] = max(tried, key=lambda weight: tried[weight])
        if name == "scratch":
            given |= task.others(SEARCH_SEED, best["scratch"], "search_teacher")
    return best, scores


def next_weight(tried: dict[float, float], method: Method) -> float:
    """What to try after these weights' accuracies: the paper's, a factor below and
    above it, then beyond the best at an end, or between it and its better neighbour."""
    weight, factor = method.weight, method.factor
    first = [weight, weight / factor, weight * factor]
    if len(tried) < len(first):
        return first[len(tried)]
    line = sorted(tried)
    at = line.index(max(tried, key=lambda weight: tried[weight]))
    if at == 0:
        return line[0] / factor
    if at == len(line) - 1:
        return line[-1] * factor
    neighbour = max(line[at - 1], line[at + 1], key=lambda weight: tried[weight])
    return (line[at] * neighbour) ** 0.5


def trial(task: Task, name: str, weight: float, best, given) -> float:
    """Validation accuracy of a method at a weight."""
    experiment, validation = task.study, task.validation
    if validation is None:
        raise ValueError("a search needs --validation images, or --trials 1")
    arm = task.arm(name, weight, weight if name == "scratch" else best["scratch"])
    if arm.teacher == "assistant_teacher" and arm.teacher not in given:
        model = experiment.train(
            "search_assistant", task.assistant_arm(), SEARCH_SEED, given["teacher"]
        )
        given[arm.teacher] = experiment.partitioner.place(model)
    its_teacher = None if arm.teacher is None else given[arm.teacher]
    label = f"search_{name}_{weight:g}".replace(".", "_")
    model = experiment.train(label, arm, SEARCH_SEED, its_teacher)
    experiment.forget(arm)
    return validation(experiment.partitioner.place(model), its_teacher)["accuracy"]


def comparisons(names) -> dict[str, list[str]]:
    """Each method against the student from scratch, and against plain distillation."""
    return {
        name: [other for other in ("scratch", "kd") if other != name]
        for name in names
        if name != "scratch"
    }


def describe(weights: dict[str, float], scores: dict[str, list]) -> str:
    """What the search chose, as Markdown, with every trial's validation accuracy."""
    lines = []
    for name, weight in weights.items():
        tried = ", ".join(
            f"{trial['weight']:g}: {100 * trial['accuracy']:.2f}"
            for trial in scores.get(name, [])
        )
        lines.append([words(name), f"{weight:g}", tried or "-"])
    head = "method", "weight chosen", "validation % by weight"
    return report.markdown_table(head, lines, left=(0, 2))


main = script.command(execute, PRESETS, __doc__, smoke=SMOKE)

if __name__ == "__main__":
    main()
