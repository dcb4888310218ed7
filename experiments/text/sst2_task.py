# SPDX-License-Identifier: Apache-2.0
"""The texts, networks and arms of sst2_bert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from experiments.text.optimizer import clipped_adamw
from jaxdistill import data, models, objectives, parallel, pretrained, study, train
from jaxdistill.data import tokens
from jaxdistill.data.augment import Augment
from jaxdistill.losses import hint_mse, relation_kl
from jaxdistill.pretrained import weights
from jaxdistill.study import script
from jaxdistill.types import Objective

SMOKE_TEXTS = ("a fine film", "a dull film , again", "so fine", "again dull", "fine !")


class Task:
    """The texts, the networks and how they train, as a configuration says."""

    def __init__(self, config: Any):
        self.config = config
        texts = smoke_texts()
        if not config.smoke:
            texts = data.load_texts(config.preset, config.data_dir)
        self.classes = texts.num_classes
        if config.teacher is None and not config.teacher_epochs:
            raise ValueError("--teacher-epochs 0 needs a --teacher that is trained")
        self.folder = None if config.teacher is None else weights.find(config.teacher)
        who = f"pretrained: {config.teacher}" if self.folder else "trained from scratch"
        self.said = f"The teacher is {who}. Texts: {texts.origin}."
        if self.folder is None:
            self.tokenizer = pretrained.train_wordpiece(texts.train.texts, config.vocab)
        else:
            self.tokenizer = pretrained.load_tokenizer(self.folder)
        self.teacher = self.make_teacher()
        pretrained.check_tokenizer(self.tokenizer, self.teacher.encoder.size)
        self.examples, held_out, tested = (
            self.encode(split) for split in (texts.train, texts.validation, texts.test)
        )
        self.median = median_text(tested["inputs"])
        partitioner = parallel.choose(config.parallel)
        held, test = (
            train.Evaluator(partitioner, split, bucket_lengths=config.bucket_lengths)
            for split in (held_out, tested)
        )
        path = config.run_dir.replace("{preset}", config.preset)
        run_dir = train.RunDir(path, train.settings(config))
        run_dir.write_bytes("tokenizer.json", self.tokenizer.to_str().encode())
        self.study = study.Study(
            run_dir,
            partitioner=partitioner,
            examples=self.examples,
            test=with_validation(test, held),
            validation=held,
            epochs=config.epochs,
            **script.study_options(config, evaluations=4, stored=True),
        )

    def encode(self, split: data.Labelled) -> dict[str, Any]:
        """A split as a study has it."""
        inputs = pretrained.encode(self.tokenizer, split.texts, self.config.length)
        return {"inputs": inputs, "labels": split.labels}

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many passes."""
        return script.steps_of(epochs, self.examples, self.config.batch_size)

    def make_teacher(self) -> models.BertClassifier:
        """The pretrained network, or one of the configuration's size."""
        if self.folder is None:
            return self.bert(*self.config.teacher_size)
        module = self.pretrained(jax.random.key(0))[0]
        if not isinstance(module, models.BertClassifier):
            raise ValueError(f"{self.folder} is no encoder, as BERT and DistilBERT are")
        return module

    def pretrained(self, rng: jax.Array):
        """The folder's module and variables: under a new head, or all as they are.

        Raises:
          ValueError: it is to be taken as it is, and is no classifier of this task.
        """
        assert self.folder is not None
        if self.config.teacher_epochs:
            return pretrained.load_classifier(self.folder, self.classes, rng)
        module, variables = pretrained.load(self.folder)
        found = getattr(module, "num_classes", None)
        if found != self.classes:
            raise ValueError(
                f"{self.folder} has {found or 'no'} classes, the texts {self.classes}: "
                "--teacher-epochs above 0 trains a new head"
            )
        return module, variables

    def bert(self, width: int, depth: int, heads: int) -> models.BertClassifier:
        """A BERT of the tokenizer's vocabulary."""
        vocab = 1 + max(self.tokenizer.get_vocab().values())
        shape, length = (vocab, width, depth, heads), self.config.length
        size = models.TransformerConfig(*shape, positions=length)
        return models.BertClassifier(models.Encoder(size), self.classes)

    def arms(self) -> dict[str, study.Arm]:
        """The table's lines, in the order they train."""
        config, vocab = self.config, self.teacher.encoder.size.vocab
        labels = objectives.combine({"hard": (1.0, objectives.hard_labels())})
        steps = self.steps(config.teacher_epochs)
        arms = {
            "teacher": study.Arm(
                self.teacher,
                labels,
                self.adamw(self.teacher_rate, steps),
                start=None if self.folder is None else self.read,
                steps=steps,
            )
        }
        small = self.bert(*config.transformer)
        hide = self.hide()
        width, hidden = config.bilstm
        students: dict[str, nn.Module] = {
            "transformer": small,
            "bilstm": models.BiLSTM(vocab, width, hidden, self.classes, dropout=0.1),
            "bag": models.BagOfEmbeddings(
                vocab, config.bag[0], self.classes, config.bag[1:], dropout=0.1
            ),
        }
        optimizer = self.adamw(config.rate, self.study.steps)
        for name, module in students.items():
            arms[f"{name}_scratch"] = study.Arm(module, labels, optimizer)
            arms[name] = study.Arm(module, self.soft, optimizer, "teacher")
        for name in ("transformer", "bilstm"):
            scratch, distilled = arms[f"{name}_scratch"], arms[name]
            # The control sees ever new ones: it asks no teacher.
            arms[f"{name}_masked_scratch"] = scratch._replace(augment=hide)
            arms[f"{name}_masked"] = distilled._replace(
                augment=hide, views=config.views
            )
        arms["transformer_stages"] = self.in_stages(small)
        return {**arms, **self.wide()}

    def hide(self) -> Augment:
        """Hides some tokens of a text."""
        names = ("[MASK]", "[CLS]", "[SEP]", "[PAD]")
        mask, *others = map(self.tokenizer.token_to_id, names)
        return tokens.hide_tokens(mask, others, share=self.config.masked)

    def in_stages(self, small: nn.Module) -> study.Arm:
        """TinyBERT's two stages in as many steps as the other arms take.

        The first matches hidden states, projected, and relations of queries, keys and
        values, which are as many as the student's heads on both sides.
        """
        config, size = self.config, self.teacher.encoder.size
        pairs = objectives.uniform(config.transformer[1], size.depth)
        projector = models.Projector(tuple((i, size.width) for i, _ in pairs))
        terms = {"hidden": (1.0, objectives.on_hidden_states(hint_mse, pairs))}
        heads = config.transformer[2]
        for name in ("queries", "keys", "values"):
            terms[name] = (
                1.0,
                objectives.on_extras(relation_kl, name, pairs, heads=heads),
            )
        steps = self.steps(config.stage_epochs)
        rest = self.study.steps - steps
        if rest < 1:
            raise ValueError(
                f"stage_epochs ({config.stage_epochs}) must be fewer than epochs "
                f"({config.epochs}): the rest train on soft targets"
            )
        first = study.Arm(
            models.with_projector(small, projector),
            objectives.combine(terms),
            self.adamw(config.rate, steps),
            live=True,
            steps=steps,
        )

        def start(state, teacher, seed):
            teacher = self.study.partitioner.place(teacher)
            matched = self.study.train("transformer_first_stage", first, seed, teacher)
            return state.replace(params=matched.variables["params"])

        optimizer = self.adamw(config.rate, rest)
        return study.Arm(
            small, self.soft, optimizer, "teacher", start=start, steps=rest
        )

    def wide(self) -> dict[str, study.Arm]:
        """Two networks of two layers as wide as the teacher's: drawn, and its own."""
        encoder = self.teacher.encoder
        chosen = (0, encoder.size.depth - 1)
        size = replace(encoder.size, depth=len(chosen))
        module = self.teacher.clone(encoder=encoder.clone(size=size))
        steps = self.steps(self.config.wide_epochs)

        def start(state, teacher, seed):
            del seed
            params = models.take_layers(teacher.variables["params"], chosen)
            return state.replace(params=params)

        def arm(rate, **options):
            optimizer = self.adamw(rate, steps)
            return study.Arm(
                module, self.soft, optimizer, "teacher", steps=steps, **options
            )

        return {
            "drawn": arm(self.config.rate),
            "layers": arm(self.teacher_rate, start=start),
        }

    @property
    def teacher_rate(self) -> float:
        """The teacher's peak rate: less where it is pretrained."""
        usual = 3e-4 if self.folder is None else 1e-4
        given = self.config.teacher_rate
        return usual if given is None else given

    @property
    def soft(self) -> Objective:
        """Soft targets and labels."""
        weight = self.config.hard_weight
        soft = objectives.soft_targets(temperature=self.config.temperature)
        return objectives.combine(
            {"soft": (1 - weight, soft), "hard": (weight, objectives.hard_labels())}
        )

    def read(self, state, teacher, seed):
        """A state whose parameters are the pretrained ones."""
        del teacher, seed
        return state.replace(params=self.pretrained(state.rng)[1]["params"])

    def adamw(self, rate: float, steps: int) -> optax.GradientTransformation:
        """AdamW, gradients clipped and matrices decayed; a line down to nothing."""
        warm_up = max(1, steps // 10)
        up = optax.linear_schedule(0.0, rate, warm_up)
        down = optax.linear_schedule(rate, 0.0, steps - warm_up)
        schedule = optax.join_schedules([up, down], [warm_up])
        return clipped_adamw(schedule, self.config.weight_decay)


def smoke_texts() -> data.Texts:
    """Five phrases, many times."""
    texts = list(SMOKE_TEXTS * 12)
    labels = np.array([int("fine" in text) for text in texts], np.int32)
    part = data.Labelled(texts, labels)
    return data.Texts("smoke", part, part, part, 2, "five phrases")


def median_text(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The first text of median length, without its padding, as costs are measured."""
    lengths = inputs["attention_mask"].sum(-1)
    length = int(np.sort(lengths)[len(lengths) // 2])
    first = int(np.flatnonzero(lengths == length)[0])
    one = {name: x[first : first + 1, :length] for name, x in inputs.items()}
    return {"inputs": one, "mask": np.ones(1, np.float32)}


def with_validation(test: train.Evaluator, validation: train.Evaluator):
    """An evaluator on the test that also tells the validation accuracy."""

    def evaluate(model: Any, teacher: Any = None) -> Mapping[str, Any]:
        return {**test(model, teacher), "validation": validation(model)["accuracy"]}

    return evaluate
