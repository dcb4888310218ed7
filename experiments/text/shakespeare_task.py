# SPDX-License-Identifier: Apache-2.0
"""The text, networks and arms of shakespeare_gpt."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np
import optax

from experiments.text.optimizer import clipped_adamw
from experiments.text.written import continued, own_kl
from jaxdistill import data, losses, models, objectives, parallel, study, train
from jaxdistill.data.corpus import UNKNOWN
from jaxdistill.parallel import processes
from jaxdistill.study import script
from jaxdistill.teachers import fingerprints

SMOKE_TEXT = "a rose is a rose is a rose, and a daisy is a daisy. " * 40


class Task:
    """The text, the networks and how they train, as a configuration says."""

    def __init__(self, config: Any):
        self.config = config
        if config.smoke:
            corpus = data.Corpus("smoke", SMOKE_TEXT, SMOKE_TEXT[:500], None, "roses")
        else:
            corpus = data.load_corpus(config.preset, config.data_dir)
        self.origin = corpus.origin
        self.joined = "" if isinstance(corpus.train, str) else " "
        self.vocabulary = data.Vocabulary.of(corpus.train, config.at_least)
        held = corpus.validation if corpus.test is None else corpus.test
        self.train, self.test = (
            data.windows(self.vocabulary.encode(part), config.length)
            for part in (corpus.train, held)
        )
        partitioner = parallel.choose(config.parallel)
        self.evaluator = train.Evaluator(
            partitioner, self.test, batch_size=64, metrics=train.language
        )
        path = config.run_dir.replace("{preset}", config.preset)
        run_dir = train.RunDir(path, train.settings(config))
        self.study = study.Study(
            run_dir,
            partitioner=partitioner,
            examples=self.examples,
            test=self.judge,
            steps=config.steps,
            **script.study_options(config, evaluations=5),
        )
        self.arms = self.make_arms()
        others = ("teacher", "nanogpt", "scratch")
        self.students = [name for name in self.arms if name not in others]
        self.written = lru_cache(maxsize=1)(self._written)

    def examples(self, arm: study.Arm, seed: int) -> Mapping[str, Any]:
        """The text's windows; of the sequence-level arm what the teacher wrote."""
        return self.written(seed) if arm is self.arms["sequence_level"] else self.train

    def make_arms(self) -> dict[str, study.Arm]:
        """The table's lines, in the order they train."""
        config = self.config
        teacher = self.network(config.teacher, config.dropout)
        student = self.network(config.student, config.student_dropout)
        labels = objectives.combine({"hard": (1.0, objectives.hard_labels())})

        def arm(module, steps, objective=labels, **options):
            return study.Arm(
                module, objective, self.optimizer(steps), steps=steps, **options
            )

        def distilled(term, **options):
            soft = objectives.combine({"soft": (1.0, term)})
            return arm(student, config.steps, soft, teacher="teacher", **options)

        steps = config.reference_steps
        reference = {"nanogpt": arm(teacher, steps)} if steps else {}
        reverse = objectives.on_logits(losses.reverse_kl)
        return {
            "teacher": arm(teacher, config.teacher_steps),
            **reference,
            "scratch": arm(student, config.steps),
            "forward_kl": distilled(objectives.soft_targets()),
            "reverse_kl": distilled(reverse),
            "jsd": distilled(objectives.on_logits(losses.generalized_jsd)),
            "total_variation": distilled(objectives.on_logits(losses.total_variation)),
            "top_k": distilled(objectives.soft_targets(), top_k=config.top_k),
            "sequence_level": arm(student, config.steps),
            "on_policy": distilled(reverse, rollout=self.own_writing(student)),
        }

    def own_writing(self, student: models.GPT) -> Callable:
        """The arm `on_policy`'s rollout: none of its own before the student can write.

        Raises:
          ValueError: a share that is not 0 to 1.
        """
        config = self.config
        for name in ("own_share", "own_from"):
            if not 0 <= getattr(config, name) <= 1:
                raise ValueError(f"{name} is 0 to 1, got {getattr(config, name)}")
        share = optax.join_schedules(
            [optax.constant_schedule(0.0), optax.constant_schedule(config.own_share)],
            [round(config.own_from * config.steps)],
        )
        # A running text has no end.
        return models.on_policy(student, prompt=config.prompt, end=None, share=share)

    def network(self, shape: tuple[int, int, int], dropout: float) -> models.GPT:
        """A GPT of the vocabulary, as long as a window: width, layers, heads."""
        options: dict[str, Any] = {"dropout": dropout, "attention_dropout": dropout}
        options["positions"] = self.config.length
        size = models.gpt_config(len(self.vocabulary), *shape, **options)
        return models.GPT(size, maps=False, factored=self.config.factored)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """nanoGPT's: AdamW, matrices decayed, gradients clipped, a cosine."""
        config = self.config
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warm_up, steps, config.learning_rate / 10
        )
        return clipped_adamw(rate, config.weight_decay, b2=0.99)

    def teacher(self, seed: int) -> models.BoundModule:
        """A seed's teacher, trained now unless it is there."""
        return self.study.train("teacher", self.arms["teacher"], seed)

    def _written(self, seed: int) -> dict[str, Any]:
        """Windows that the teacher wrote behind their first token: all labels are its.

        As many as the text has, in the run directory once they are written.
        """
        teacher = self.teacher(seed)
        name = f"{fingerprints.of_tree(teacher.variables)[:16]}-{seed}.npy"
        path = self.study.run_dir.path / "outputs" / name
        ids = self.train["inputs"]["input_ids"]

        def write():
            if path.exists():
                return
            rng = jax.random.key(seed)
            drawn = continued(teacher, ids[:, :1], ids.shape[1], rng)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            with partial.open("wb") as file:
                np.save(file, drawn, allow_pickle=False)
            partial.replace(path)

        processes.on_first(write)
        with path.open("rb") as file:
            drawn = np.load(file, allow_pickle=False)
        return {"inputs": {"input_ids": drawn[:, :-1]}, "labels": drawn[:, 1:]}

    def judge(self, model: Any, teacher: Any) -> dict[str, Any]:
        """A placed model's metrics on the test, and on what it writes itself.

        It goes on from the first tokens of windows that are spread over the test, with
        the same key for every model and seed.
        """
        config, fetch = self.config, self.study.partitioner.fetch
        ids = self.test["inputs"]["input_ids"]
        count = min(config.own_prompts, len(ids))
        spread = np.linspace(0, len(ids) - 1, count).astype(int)
        prompts, steps = ids[spread, : config.prompt], config.length + 1 - config.prompt
        found = own_kl(fetch(model), fetch(teacher), prompts, steps, jax.random.key(0))
        return {**self.evaluator(model, teacher), "own_kl": found}

    def about(self) -> str:
        """The text and its vocabulary in two sentences."""
        tokens = np.array(self.vocabulary.tokens)
        unknown = (tokens[self.test["labels"]] == UNKNOWN).mean()
        return (
            f"Text: {self.origin}. The vocabulary has {len(tokens):,} tokens; of the "
            f"held-out text {unknown:.1%} are {UNKNOWN}."
        )

    def samples(self, names: Sequence[str], windows: int = 4) -> str:
        """What models of the first seed write, as Markdown.

        Longer than a window: they go on from its second half.
        """
        length, parts = self.config.length, []
        first = self.test["inputs"]["input_ids"][:1, : length // 2]
        for name in names:
            arm, its_teacher = self.arms[name], None
            if arm.teacher is not None:
                its_teacher = self.study.partitioner.place(self.teacher(0))
            model = self.study.train(name, arm, 0, its_teacher)
            ids = first
            for i in range(windows):
                rng = jax.random.fold_in(jax.random.key(0), i)
                start = ids[:, -(length // 2) :]
                drawn = continued(model, start, length - start.shape[1], rng)
                ids = np.concatenate([ids, drawn[:, start.shape[1] :]], 1)
            text = self.joined.join(self.vocabulary.decode(ids[0]))
            parts.append(f"{name}:\n\n```\n{text}\n```\n")
        return "\n".join(parts)
