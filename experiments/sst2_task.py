# SPDX-License-Identifier: Apache-2.0
"""The texts, networks and rows of sst2_bert."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from jaxdistill import (
    data,
    huggingface,
    layers,
    losses,
    matching,
    models,
    parallel,
    pretrained,
    tokens,
)
from jaxdistill.data import Batches
from jaxdistill.evaluate import Evaluator
from jaxdistill.objectives import combine, hard_labels, soft_targets
from jaxdistill.runs import Run, settings
from jaxdistill.study import Row, Study

SMOKE_TEXTS = ("a fine film", "a dull film , again", "so fine", "again dull", "fine !")


class Task:
    """The texts, the networks and how they train, as a configuration says."""

    def __init__(self, config: Any):
        self.config = config
        texts = (
            smoke_texts()
            if config.smoke
            else data.load_texts(config.preset, config.data_dir)
        )
        self.classes = texts.num_classes
        if config.teacher is None and not config.teacher_epochs:
            raise ValueError("--teacher-epochs 0 needs a --teacher that is trained")
        self.folder = (
            None if config.teacher is None else huggingface.find(config.teacher)
        )
        who = f"pretrained: {config.teacher}" if self.folder else "trained from scratch"
        self.said = f"The teacher is {who}. Texts: {texts.origin}."
        if self.folder is None:
            self.tokenizer = tokens.train_wordpiece(texts.train.texts, config.vocab)
        else:
            self.tokenizer = tokens.load_tokenizer(self.folder)
        self.teacher = self.make_teacher()
        tokens.check_tokenizer(self.tokenizer, self.teacher.encoder.size)
        self.examples = self.encode(texts.train, config.length)
        run = parallel.choose(config.parallel)
        held, test = (
            Evaluator(run, self.encode(split, config.test_length))
            for split in (texts.validation, texts.test)
        )
        log = Run(config.run_dir.format(preset=config.preset), settings(config))
        log.write_bytes("tokenizer.json", self.tokenizer.to_str().encode())
        self.study = Study(
            run,
            log,
            examples=lambda row, seed: self.examples,
            steps=self.steps(config.epochs),
            batch_size=config.batch_size,
            test=with_validation(test, held),
            validation=held,
            evaluations=4,
            stored=True,
            precision=config.precision,
            progress=config.progress,
        )

    def encode(self, split: data.Labelled, length: int) -> dict[str, Any]:
        """A split as a study has it."""
        inputs = tokens.encode(self.tokenizer, split.texts, length)
        return {"inputs": inputs, "labels": split.labels}

    def steps(self, epochs: int) -> int:
        """Optimizer steps of so many passes."""
        size = len(self.examples["labels"])
        return epochs * Batches(size, self.config.batch_size).steps_per_epoch

    def make_teacher(self) -> models.BertClassifier:
        """The pretrained network, or one of the configuration's size."""
        if self.folder is None:
            return self.bert(*self.config.teacher_size)
        return self.pretrained(jax.random.key(0))[0]

    def pretrained(self, rng: jax.Array):
        """The folder's module and variables: under a new head, or all as they are.

        Raises:
          ValueError: it is to be taken as it is, and is no classifier of this task.
        """
        assert self.folder is not None
        if self.config.teacher_epochs:
            return pretrained.load_classifier(self.folder, self.classes, rng)
        module, variables = huggingface.load(self.folder)
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
        length = max(self.config.length, self.config.test_length)
        size = models.Size(vocab, width, depth, heads, positions=length)
        return models.BertClassifier(models.Encoder(size), self.classes)

    def rows(self) -> dict[str, Row]:
        """The table's lines, in the order they train."""
        config, width = self.config, self.teacher.encoder.size.width
        vocab = self.teacher.encoder.size.vocab
        labels = combine({"hard": (1.0, hard_labels())})
        teacher_steps = self.steps(config.teacher_epochs)
        small = self.bert(*config.transformer)
        students: dict[str, nn.Module] = {
            "transformer": small,
            "bilstm": models.BiLSTM(
                vocab, config.bilstm[0], config.bilstm[1], self.classes, dropout=0.1
            ),
            "bag": models.BagOfEmbeddings(
                vocab, config.bag[0], self.classes, config.bag[1:], dropout=0.1
            ),
        }
        rows = {
            "teacher": Row(
                self.teacher,
                labels,
                self.adamw(config.teacher_rate, teacher_steps),
                start=None if self.folder is None else self.read,
                steps=teacher_steps,
            )
        }
        optimizer = self.adamw(config.rate, self.study.steps)
        soft = combine(self.soft())
        for name, module in students.items():
            rows[f"{name}_scratch"] = Row(module, labels, optimizer)
            rows[name] = Row(module, soft, optimizer, "teacher")
        pairs = matching.uniform(config.transformer[1], self.teacher.encoder.size.depth)
        projector = models.Projector(tuple((i, width) for i, _ in pairs))
        rows["transformer_hidden"] = Row(
            models.with_projector(small, projector),
            combine({**self.soft(), **self.matched(pairs)}),
            optimizer,
            "teacher",
            live=True,
        )
        optimizer = self.adamw(config.teacher_rate, self.study.steps)
        wide, some = self.some_layers()
        rows["drawn"] = Row(wide, soft, optimizer, "teacher")
        return {**rows, "layers": rows["drawn"]._replace(start=some)}

    def soft(self) -> dict[str, Any]:
        """Soft targets and labels."""
        config = self.config
        return {
            "soft": (
                1 - config.hard_weight,
                soft_targets(temperature=config.temperature),
            ),
            "hard": (config.hard_weight, hard_labels()),
        }

    def matched(self, pairs: matching.LayerMap) -> dict[str, Any]:
        """Hidden states and value relations, layer to layer."""
        weight, heads = self.config.match_weight, self.config.transformer[2]
        relation = matching.on_extras(losses.relation_kl, "values", pairs, heads=heads)
        return {
            "hidden": (weight, matching.on_hiddens(losses.hint_mse, pairs)),
            "relations": (weight, relation),
        }

    def some_layers(self):
        """A network of two of the teacher's layers, and how it starts as them."""
        encoder = self.teacher.encoder
        depth = encoder.size.depth
        chosen = (0, depth - 1)
        size = replace(encoder.size, depth=len(chosen))
        wide = self.teacher.clone(encoder=encoder.clone(size=size))

        def start(state, teacher):
            params = layers.take_layers(teacher.variables["params"], chosen)
            return state.replace(params=params)

        return wide, start

    def read(self, state, teacher):
        """A state whose parameters are the pretrained ones."""
        del teacher
        return state.replace(params=self.pretrained(state.rng)[1]["params"])

    def adamw(self, rate: float, steps: int) -> optax.GradientTransformation:
        """AdamW, gradients clipped and matrices decayed; a line down to nothing."""
        warm_up = max(1, steps // 10)
        up = optax.linear_schedule(0.0, rate, warm_up)
        down = optax.linear_schedule(rate, 0.0, steps - warm_up)
        adamw = optax.adamw(
            optax.join_schedules([up, down], [warm_up]),
            weight_decay=self.config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def smoke_texts() -> data.Texts:
    """Five phrases, many times."""
    texts = list(SMOKE_TEXTS * 12)
    labels = np.array([int("fine" in text) for text in texts], np.int32)
    part = data.Labelled(texts, labels)
    return data.Texts("smoke", part, part, part, 2, "five phrases")


def with_validation(test: Evaluator, validation: Evaluator):
    """An evaluator on the test that also tells the validation accuracy."""

    def evaluate(model: Any, teacher: Any = None) -> Mapping[str, Any]:
        return {**test(model, teacher), "validation": validation(model)["accuracy"]}

    return evaluate
