# SPDX-License-Identifier: Apache-2.0
"""Evaluation: exact sums over real examples, whatever the batches and devices.

Every metric is a (sum, count) pair until the very end. Sums of a batch are taken on the
device in float32; batches add up on the host in float64 (counts stay exact integers).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdistill.data import tokens
from jaxdistill.data.batches import pad
from jaxdistill.data.examples import DataError, check_examples
from jaxdistill.losses.logits import (
    check_classes,
    check_softmax,
    mean_log_probs,
    of_classes,
)
from jaxdistill.losses.numerics import divergence, promote
from jaxdistill.parallel.partitioner import Partitioner
from jaxdistill.teachers.outputs import StoredTeacher
from jaxdistill.train.step import make_eval_step, masked_sum, scan_eval
from jaxdistill.types import WHOLE, Array, Batch, Metrics, Outputs, TopK, token_mask

ECE_BINS = 15


def classification(student: Outputs, teacher: Outputs | None, batch: Batch) -> Metrics:
    """Sums of the classification metrics over one batch.

    `accuracy`, `nll` (nats) and, given a teacher, `agreement` (same argmax) and `kl`
    (teacher to student, nats, temperature 1; to an ensemble's mean distribution) are
    scalars; `class_error` is `[C]`, and `ece` is `[ECE_BINS]`: the sum of confidence
    minus correctness in equal-width confidence bins, with the bins' counts. The `nll`
    of a label that is no class is NaN.

    References:
      Guo et al. 2017, On Calibration of Modern Neural Networks, section 2 (ECE).
    """
    labels, mask = batch["labels"], batch["mask"]
    log_q, values = _values(student, teacher, labels)
    right = values["accuracy"]
    confidence = jnp.exp(log_q.max(-1))
    bins = jnp.clip((confidence * ECE_BINS).astype(jnp.int32), 0, ECE_BINS - 1)
    in_bin = jax.nn.one_hot(bins, ECE_BINS) * mask[:, None]
    in_class = jax.nn.one_hot(labels, log_q.shape[-1]) * mask[:, None]
    return {
        **{name: (masked_sum(x, mask), mask.sum()) for name, x in values.items()},
        # Products and sums, not a matmul: that would be rounded to bfloat16 on a TPU.
        "ece": (((confidence - right)[:, None] * in_bin).sum(0), in_bin.sum(0)),
        "class_error": (((1 - right)[:, None] * in_class).sum(0), in_class.sum(0)),
    }


def language(student: Outputs, teacher: Outputs | None, batch: Batch) -> Metrics:
    """Sums of a language model's metrics over one batch, by token.

    `labels` `[B, L]` are the tokens to predict; those of padding, and where
    `token_mask` is 0, do not count. `nll` is in nats, `perplexity` its exponential,
    `accuracy` the share of tokens whose label is the most likely one; given a teacher,
    `agreement` (same most likely token) and `kl` (teacher to student, nats, temperature
    1; to an ensemble's mean distribution). `Factored` logits are multiplied out. The
    `nll` of a label that counts and is no class, such as -100, is NaN.
    """
    labels = batch["labels"]
    mask = token_mask(batch, labels.shape)
    _, values = _values(student, teacher, labels)
    values["perplexity"] = values["nll"]
    return {name: (masked_sum(x, mask), mask.sum()) for name, x in values.items()}


def _values(
    student: Outputs, teacher: Outputs | None, labels: Array
) -> tuple[Array, dict[str, Array]]:
    """The student's log-probabilities, and metrics' values at each label."""
    check_softmax("accuracy, nll and kl", student.logits)
    check_answers("the student", student.logits, labels)
    log_q = mean_log_probs(student.logits, labels.ndim + 1)
    guess = log_q.argmax(-1)
    nll = -jnp.take_along_axis(log_q, labels[..., None], -1)[..., 0]
    values = {"accuracy": guess == labels, "nll": of_classes(nll, labels, log_q)}
    if teacher is not None:
        check_answers("the teacher", teacher.logits, labels)
        check_classes("agreement and kl", student.logits, teacher.logits)
        log_p = mean_log_probs(teacher.logits, labels.ndim + 1)
        values["agreement"] = guess == log_p.argmax(-1)
        values["kl"] = divergence(log_p, log_q)
    return log_q, {name: promote(x) for name, x in values.items()}


def check_answers(who: str, logits: Any, labels: Array) -> None:
    """Raise ValueError unless logits `[..., C]` answer these labels, one by one.

    An ensemble's have its members first.
    """
    if isinstance(logits, TopK):
        raise ValueError(
            f"{who} keeps its largest classes alone (top_k), and metrics need all: "
            "store dense logits, or evaluate with the live model"
        )
    if labels.shape not in (logits.shape[:-1], logits.shape[1:-1]):
        raise ValueError(
            f"{who} answers with logits of shape {logits.shape}, and the labels have "
            f"shape {labels.shape}: they must be those of its positions, classes last"
        )


def summarize(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Sums to numbers: means, per-class error rates as a list, ECE over its bins, the
    exponential of a mean for the perplexity.

    Args:
      metrics: `{name: (sum, count)}`, each with or without a leading axis of batches.

    Returns:
      `{name: float}`; `class_error` is a list with NaN-free entries (0 for a class
      without examples).
    """
    result: dict[str, Any] = {}
    for name, (sums, counts) in metrics.items():
        sums, counts = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
        inner = 1 if name in ("ece", "class_error") else 0
        if sums.ndim > inner:
            sums, counts = sums.sum(0), counts.sum(0)
        if sums.ndim > inner:
            raise ValueError(
                f"metric {name!r} has values of shape {sums.shape} for a batch, and "
                "must be one sum and one count: give each entry a name of its own"
            )
        if name == "ece":
            result[name] = float(np.abs(sums).sum() / max(counts.sum(), 1))
        elif name == "class_error":
            result[name] = (sums / np.maximum(counts, 1)).tolist()
        else:
            result[name] = float(sums / counts) if counts > 0 else 0.0
            if name == "perplexity":
                result[name] = float(np.exp(result[name]))
    return result


class Evaluator:
    """Evaluates models on one data set, resident on the devices; compiles once.

    For `classification` the last teacher's log-probabilities are kept, so that it runs
    once for all its students; other metrics ask it each time.
    """

    def __init__(
        self,
        partitioner: Partitioner,
        examples: Mapping[str, np.ndarray],
        *,
        batch_size: int = 512,
        metrics=classification,
        trials: bool = False,
        bucket_lengths: Sequence[int] = (),
        check_finite: bool = True,
    ):
        """Places the examples.

        Args:
          partitioner: see `parallel`.
          examples: `inputs` and `labels`.
          batch_size: rounded up to a multiple of the devices.
          metrics: `(student, teacher, batch) -> {name: (sum, count)}`.
          trials: whether a student is many at once, a sweep's (see `study.sweep`).
          bucket_lengths: lengths in tokens: texts are sorted by length, and a batch is
            cut to the shortest of these that holds it (`data.tokens`).
          check_finite: see `data.check_examples`.

        Raises:
          DataError: as `data.check_examples`, or there are no labels.
        """
        size = check_examples(examples, check_finite=check_finite)
        if "labels" not in examples:
            raise DataError(
                "an evaluation needs labels, and the examples have "
                f"{', '.join(examples)}"
            )
        devices = len(partitioner.devices)
        batch_size = -(-min(batch_size, size) // devices) * devices
        self._run, self._metrics, self._trials = partitioner, metrics, trials
        self._examples = partitioner.replicate(dict(examples))
        self._order = np.arange(size)
        if bucket_lengths:
            self._order = tokens.shortest_first(examples["inputs"])
        indices = pad(self._order, batch_size)
        slot = np.broadcast_to(np.arange(batch_size), indices["index"].shape)
        self._indices = partitioner.split({**indices, "slot": slot}, 1)
        step = make_eval_step(metrics, bucket_lengths)
        self._step = self._compiled(_over_trials(step) if trials else step)
        self._ask = self._compiled(_log_probs_step(batch_size, bucket_lengths))
        self._answered: tuple[Any, Any] = (None, None)

    def __call__(self, student: Any, teacher: Any = None) -> Any:
        """The summary of placed models (see `models.trained`) on the whole set.

        Of a sweep's students a list, a summary for each.
        """
        examples = self._examples
        if teacher is not None and self._metrics is classification:
            examples, teacher = self._taught(teacher), StoredTeacher()
        sums = self._step((student, teacher), examples, self._indices)
        sums = jax.tree.map(np.asarray, self._run.fetch(sums))
        if not self._trials:
            return summarize(sums)
        # Batches first, then trials: each trial's summary from its own sums.
        leaves, tree = jax.tree.flatten(sums)
        by_trial = zip(*(np.moveaxis(x, 1, 0) for x in leaves), strict=True)
        return [summarize(jax.tree.unflatten(tree, trial)) for trial in by_trial]

    def _compiled(self, step: Callable) -> Callable:
        return self._run.compile(scan_eval(step), batch_axis=1, donate=False)

    def _taught(self, teacher: Any) -> Any:
        """The placed examples with a teacher's log-probabilities, as it stores them."""
        if self._answered[0] is not teacher:
            found = self._ask(teacher, self._examples, self._indices)
            found = np.concatenate(np.asarray(self._run.fetch(found)))
            logits = np.empty((len(self._order), 1, *found.shape[1:]), found.dtype)
            logits[self._order, 0] = found[: len(self._order)]
            stored = self._run.replicate({"logits": logits})
            self._answered = (teacher, {**self._examples, "teacher": stored})
        return self._answered[1]


def _log_probs_step(size: int, bucket_lengths: Sequence[int]) -> Callable:
    """A teacher's log-probabilities on a whole batch of `size`, on every device."""

    def step(teacher, batch: Batch, *, replica=WHOLE):
        def log_probs(batch):
            return mean_log_probs(teacher(batch).logits, batch["labels"].ndim + 1)

        own = tokens.bucketed(log_probs, bucket_lengths)(batch)
        whole = jnp.zeros((size, *own.shape[1:]), own.dtype)
        return replica.sum(whole.at[batch["slot"]].set(own))

    return step


def _over_trials(eval_step: Callable) -> Callable:
    """The step on students with a leading axis of trials; metrics gain it."""

    def step(models, batch: Batch, *, replica=WHOLE) -> Metrics:
        students, teacher = models
        return jax.vmap(
            lambda student: eval_step((student, teacher), batch, replica=replica)
        )(students)

    return step
