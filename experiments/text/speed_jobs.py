# SPDX-License-Identifier: Apache-2.0
"""One step's work of a text model on both sides: what text_speed times and compares.

A configuration is a Hugging Face one; the weights are drawn here and moved over.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn

from experiments.speed.loops import one_epoch
from experiments.speed.parts import baseline_module
from jaxdistill import models, objectives, parallel, pretrained, teachers, train
from jaxdistill.data import Batches

THEIRS, OURS = "transformers, sdpa", "jaxdistill"
SCANNED, TRIMMED = "jaxdistill, layers scanned", "jaxdistill, batches cut"
CLASSES, CLOSE = 2, 1e-4
"""Of a classifier; how far the two sides' first losses may lie apart."""


@dataclass(frozen=True)
class Shape:
    """A text model's numbers, and those of a batch."""

    vocab: int
    """tokens there are"""
    width: int
    """of the hidden states"""
    depth: int
    """layers"""
    heads: int
    """of each layer's attention"""
    batch: int
    """sequences in a batch"""
    length: int
    """tokens in a sequence"""
    positions: int
    """the longest sequence"""


@dataclass(frozen=True)
class Rule:
    """How both sides train: the loss, AdamW, dropout."""

    steps: int = 10
    """optimizer steps in a round"""
    temperature: float = 2.0
    """softens both distributions of a distillation"""
    hard_weight: float = 0.5
    """weight of a distillation's labels"""
    soft_weight: float = 0.5
    """weight of the KL to the stored outputs, times temperature squared"""
    learning_rate: float = 1e-4
    """AdamW's rate"""
    weight_decay: float = 0.01
    """AdamW's decay of every parameter"""
    dropout: float = 0.1
    """rate on both sides"""


def bert(shape: Shape, dropout: float) -> dict[str, Any]:
    """The configuration of a classifier."""
    return {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "intermediate_size": 4 * shape.width,
        "max_position_embeddings": shape.positions,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "num_labels": CLASSES,
    }


def gpt(shape: Shape, dropout: float) -> dict[str, Any]:
    """The configuration of a language model."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": shape.vocab,
        "n_embd": shape.width,
        "n_layer": shape.depth,
        "n_head": shape.heads,
        "n_positions": shape.positions,
        "activation_function": "gelu_new",
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def torch_side():
    """The transformers side.

    Raises:
      ValueError: PyTorch or transformers is not installed.
    """
    needed = "comparing with transformers needs it: pip install torch transformers"
    return baseline_module("pytorch_text", ("torch", "transformers"), needed)


class Work:
    """A model, its examples and its loss, the same on both sides."""

    def __init__(
        self,
        make: Callable,
        shape: Shape,
        rule: Rule,
        seed: int,
        lengths: np.ndarray | None = None,
    ):
        """A classifier's texts have these lengths, or all that of the shape."""
        self.shape, self.rule = shape, rule
        self.config = make(shape, rule.dropout)
        self.module: Any = pretrained.module_of(self.config, maps=False)
        self.partitioner = parallel.choose("jit")
        count = shape.batch * rule.steps
        self.examples = draw(shape, make is gpt, count, seed)
        if lengths is not None:
            mask = np.arange(shape.length)[None] < lengths[:, None]
            self.examples["inputs"]["attention_mask"] = mask.astype(np.int32)
        alike = None if lengths is None else tuple(lengths.tolist())
        self.batches = Batches(count, shape.batch, lengths=alike)
        self.optimizer = optax.adamw(rule.learning_rate, weight_decay=rule.weight_decay)
        hard, soft = rule.hard_weight, rule.soft_weight
        self.objective = objectives.combine({"hard": (hard, objectives.hard_labels())})
        if soft:
            self.objective = objectives.hinton(rule.temperature, soft, hard)
        student = models.student(self.module)
        key = jax.random.key(seed)
        self.state = train.init_state(key, student, self.optimizer, self.batch)

    @property
    def batch(self) -> dict[str, Any]:
        """The first batch."""
        first = jax.tree.map(lambda x: x[: self.shape.batch], self.examples)
        return {**first, "mask": np.ones(self.shape.batch, np.float32)}

    @property
    def teacher(self) -> teachers.StoredTeacher | None:
        """Its outputs lie beside the examples, where the loss asks for them."""
        return teachers.StoredTeacher() if self.rule.soft_weight else None

    def ours(
        self, *, scan: bool = False, bucket_lengths: Sequence[int] = ()
    ) -> Callable:
        """A function that trains for an epoch in one dispatch."""
        module, params = self.module, self.state.params
        if scan:
            module = pretrained.module_of(self.config, maps=False, scan=True)
            params = models.stack_layers(params)
        opt_state = self.optimizer.init(params)
        state = replace(self.state, params=params, opt_state=opt_state)
        student = models.student(module)
        step = train.make_train_step(
            student, self.objective, self.optimizer, bucket_lengths=bucket_lengths
        )
        return one_epoch(
            self.partitioner,
            self.partitioner.compile(train.scan_train(step), batch_axis=1),
            state,
            self.batches,
            self.partitioner.place(self.teacher),
            self.partitioner.replicate(self.examples),
        )

    def theirs(self) -> tuple[nn.Module, Callable, Any, dict[str, Any]]:
        """The model with our weights, its loss, its optimizer, and the examples."""
        torch, rule = torch_side(), self.rule
        variables = {"params": self.state.params}
        weights = pretrained.from_linen(variables, self.config)
        model = torch.network(self.config, weights)
        loss = torch.make_loss(rule.temperature, rule.hard_weight, rule.soft_weight)
        optimizer = torch.adamw(model, rule.learning_rate, rule.weight_decay)
        flat = {**self.examples["inputs"], "labels": self.examples["labels"]}
        if rule.soft_weight:
            flat["logits"] = self.examples["teacher"]["logits"][:, 0]
        return model, loss, optimizer, torch.place(flat)

    def losses(self, model: Any, loss: Callable, examples: Mapping) -> dict[str, float]:
        """Both sides' loss on the first batch, without dropout.

        Raises:
          ValueError: they differ, and timing them would compare different work.
        """
        first = {name: x[: self.shape.batch] for name, x in examples.items()}
        found = {
            THEIRS: torch_side().first_loss(model, loss, first),
            OURS: float(jax.jit(self.loss)(self.state.params, self.batch)),
        }
        if not abs(found[THEIRS] - found[OURS]) < CLOSE:
            raise ValueError(
                f"the first batch's loss is {found[THEIRS]:.6f} in transformers and "
                f"{found[OURS]:.6f} here: the two sides do not do the same work"
            )
        return found

    def loss(self, params: Any, batch: Any, rng: Any = None) -> jax.Array:
        """A batch's loss, with dropout where there is a key."""
        rngs = None if rng is None else {"dropout": rng}
        outputs = self.module.apply(
            {"params": params}, batch["inputs"], train=rng is not None, rngs=rngs
        )
        teacher_outputs = None if self.teacher is None else self.teacher(batch)
        terms = self.objective(outputs, teacher_outputs, batch, 0)
        total: Any = sum(weight * values.mean() for weight, values, _ in terms.values())
        return total

    def stages(self) -> dict[str, Callable]:
        """What a step is made of, each stage with those before it."""
        student = models.student(self.module)
        step = train.make_train_step(student, self.objective, self.optimizer)
        whole = jax.jit(step, donate_argnums=0)
        forward, slope = jax.jit(self.loss), jax.jit(jax.grad(self.loss))
        batch, teacher = self.partitioner.place((self.batch, self.teacher))
        state, key = self.partitioner.place(self.state), jax.random.key(0)
        params = self.partitioner.place(self.state.params)

        def move():
            nonlocal state
            state, metrics = whole(state, teacher, batch)
            metrics["loss"][0].block_until_ready()

        return {
            "forward": lambda: jax.block_until_ready(forward(params, batch)),
            "backward": lambda: jax.block_until_ready(slope(params, batch)),
            "dropout": lambda: jax.block_until_ready(slope(params, batch, key)),
            "AdamW": move,
        }

    def generators(self, prompts: int, length: int, count: int) -> dict[str, Callable]:
        """Functions of both sides that write greedily behind the same prompts."""
        drawn = self.examples["inputs"]["input_ids"].reshape(-1)
        prompt = np.resize(drawn, (prompts, length))
        model = teachers.live(self.module, {"params": self.state.params})
        placed = self.partitioner.place(model)
        write = partial(models.generate, steps=count, temperature=0.0)
        given, key = self.partitioner.place({"input_ids": prompt}), jax.random.key(0)
        theirs = torch_side().make_generate(self.theirs()[0], prompt, count)
        return {
            THEIRS: theirs,
            OURS: lambda: np.asarray(write(placed, given, key)["input_ids"]),
        }


def draw(shape: Shape, language: bool, count: int, seed: int) -> dict[str, Any]:
    """Random tokens, labels, and a teacher's logits.

    Args:
      shape: the model's.
      language: whether a label is the next token, and not a class.
      count: examples.
      seed: of all draws.
    """
    rng = np.random.default_rng(seed)
    # Token 0 is BERT's padding, whose embedding gets no gradient in transformers.
    ids = rng.integers(1, shape.vocab, (count, shape.length + 1)).astype(np.int32)
    if language:
        labels, classes = ids[:, 1:], shape.vocab
    else:
        labels, classes = rng.integers(0, CLASSES, count).astype(np.int32), CLASSES
    logits = rng.normal(size=(count, 1, *labels.shape[1:], classes))
    return {
        "inputs": {"input_ids": ids[:, :-1]},
        "labels": labels,
        "teacher": {"logits": logits.astype(np.float32)},
    }
