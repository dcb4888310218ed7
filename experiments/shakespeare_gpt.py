# SPDX-License-Identifier: Apache-2.0
"""A GPT of characters teaches a smaller one: which objective, at equal tokens?

Question: a decoder's student can learn the teacher's distribution at each token of the
text (forward or reverse KL, Jensen-Shannon, total variation, the teacher's largest
probabilities and their tail), from text that the teacher wrote, or from its teacher's
judgement of what it writes itself. Which of these is nearest to the teacher, and which
predicts the text best, beside the same student from scratch?

  nanogpt        The teacher's network and budget of nanoGPT's small setting (README, "I
                 only have a macbook"): published validation loss 1.88.
  forward_kl, reverse_kl, jsd, total_variation
                 At temperature 1, without labels.
  top_k          Forward KL to stored probabilities, the largest and the rest as one.
  sequence_level Cross-entropy on what the teacher wrote behind the first tokens of each
                 window (Kim and Rush 2016, Sequence-Level Knowledge Distillation,
                 section 3.2, with samples for the mode).
  on_policy      Reverse KL, half of the batches being the student's own continuations
                 (Agarwal et al. 2024, GKD, algorithm 1).

Every student takes the same steps on windows of the same length, with nanoGPT's AdamW
and rate; nothing is tuned. Where a corpus has no test, the table is of its validation
text, on which nothing was chosen. Last step. Presets: `shakespeare`, characters;
`wikitext2`, words, where logits are never multiplied out but by the losses that must.

  python -m experiments.shakespeare_gpt --data-dir ~/tiny_shakespeare
  python -m experiments.shakespeare_gpt --preset wikitext2 --data-dir ~/wikitext2
  python -m experiments.shakespeare_gpt --smoke

Cost: about an hour on two cores; a minute with --smoke.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from jaxdistill import data, losses, models, parallel, processes, report, teachers
from jaxdistill.comparison import compare
from jaxdistill.evaluate import Evaluator, language
from jaxdistill.generate import generate, on_policy
from jaxdistill.models.gpt import gpt_size
from jaxdistill.objectives import combine, hard_labels, on_logits, soft_targets
from jaxdistill.parallel import Kind
from jaxdistill.precision import Precision
from jaxdistill.runs import Run, parse, settings
from jaxdistill.study import FAILURES, Row, Study

SMOKE_TEXT = "a rose is a rose is a rose, and a daisy is a daisy. " * 40


@dataclass(frozen=True)
class Config:
    """Compare objectives for a small GPT taught by a larger one."""

    preset: Literal["shakespeare", "wikitext2"] = "shakespeare"
    """where the defaults come from"""
    smoke: bool = False
    """all rows for a few steps, on a sentence repeated"""
    data_dir: Path | None = None
    """a folder with the original text, or TFDS's data folder"""
    run_dir: str = "runs/{preset}_gpt"
    """where the run is kept and resumed from"""
    at_least: int = 1
    """how often a token must occur in the training text; others are <unk>"""
    length: int = 64
    """tokens in a window, and positions of the networks"""
    prompt: int = 16
    """tokens of a window behind which teacher or student go on by themselves"""
    teacher: tuple[int, int, int] = (128, 4, 4)
    """width, layers and heads of the teacher"""
    student: tuple[int, int, int] = (64, 2, 4)
    """those of the student"""
    dropout: float = 0.0
    """the teacher's rate"""
    batch_size: int = 12
    """windows in a batch, over all devices"""
    teacher_steps: int = 10_000
    """optimizer steps of the teacher"""
    reference_steps: int = 2_000
    """those of the row `nanogpt`"""
    steps: int = 5_000
    """those of every student"""
    learning_rate: float = 1e-3
    """AdamW's peak rate, brought to a tenth by a cosine"""
    warm_up: int = 100
    """steps to the peak rate"""
    weight_decay: float = 0.1
    """AdamW's decay of matrices"""
    top_k: int = 8
    """probabilities that the row `top_k` stores of each token"""
    own_share: float = 0.5
    """of the row `on_policy`'s batches, how many the student writes"""
    seeds: int = 3
    """trainings of everything"""
    stored: bool = True
    """compute the teacher's outputs on the text once"""
    factored: bool = False
    """take the vocabulary a part at a time, in the losses that can"""
    precision: Precision = "float32"
    """what the steps compute in; parameters and losses are float32 either way"""
    parallel: Kind = "auto"
    """how a step runs: a mesh where there are several devices, else jit"""
    distributed: bool = False
    """one of several, see jaxdistill.processes; SLURM and TPU pods need no flag"""
    compilation_cache: bool = True
    """keep compiled programs on disk, for the next run"""
    progress: bool = True
    """show progress bars"""


PRESETS = {
    "shakespeare": Config(),
    "wikitext2": Config(
        preset="wikitext2",
        at_least=3,
        dropout=0.2,
        teacher_steps=4_000,
        steps=3_000,
        top_k=32,
        stored=False,
        factored=True,
    ),
}
SMOKE: dict[str, Any] = {
    "batch_size": 16,
    "length": 16,
    "prompt": 4,
    "teacher": (16, 2, 2),
    "student": (8, 1, 2),
    "teacher_steps": 30,
    "reference_steps": 10,
    "steps": 20,
    "warm_up": 5,
    "seeds": 2,
    "at_least": 1,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the experiment, prints its table, returns its summary."""
    config = parse(PRESETS, argv, __doc__)
    try:
        return execute(config)
    except FAILURES as error:
        sys.exit(f"error: {error}")


def execute(config: Config) -> dict[str, Any]:
    """Trains every row for every seed, resuming what a run directory already holds."""
    if config.smoke:
        config = replace(config, **SMOKE)
    task = Task(config)
    summary = compare(
        task.study,
        task.rows,
        config.seeds,
        pairs={name: ["scratch"] for name in task.students if name != "scratch"},
        measure="nll",
    )
    written = task.samples(("teacher", "scratch", "forward_kl", "on_policy"))
    task.study.log.write_bytes("samples.md", written.encode())
    text = processes.on_first(lambda: report.write(task.study.log.path))
    if processes.is_first():
        print(text, written, task.study.log, sep="\n")
    return summary


class Task:
    """The text, the networks and how they train, as a configuration says."""

    def __init__(self, config: Config):
        self.config = config
        if config.smoke:
            corpus = data.Corpus("smoke", SMOKE_TEXT, SMOKE_TEXT[:500], None, "")
        else:
            corpus = data.load_corpus(config.preset, config.data_dir)
        self.joined = "" if isinstance(corpus.train, str) else " "
        self.vocabulary = data.Vocabulary.of(corpus.train, config.at_least)
        held = corpus.validation if corpus.test is None else corpus.test
        self.train, self.test = (
            data.windows(self.vocabulary.encode(part), config.length)
            for part in (corpus.train, held)
        )
        run = parallel.choose(config.parallel)
        self.study = Study(
            run,
            Run(config.run_dir.format(preset=config.preset), settings(config)),
            examples=self.examples,
            steps=config.steps,
            batch_size=config.batch_size,
            test=Evaluator(run, self.test, batch_size=64, metrics=language),
            evaluations=5,
            stored=config.stored,
            precision=config.precision,
            progress=config.progress,
        )
        self.rows = self.make_rows()
        self.students = [
            name for name in self.rows if name not in ("teacher", "nanogpt")
        ]
        self.written = lru_cache(maxsize=1)(self._written)

    def examples(self, row: Row, seed: int) -> Mapping[str, Any]:
        """The text's windows; of the sequence-level row what the teacher wrote."""
        return self.written(seed) if row is self.rows["sequence_level"] else self.train

    def make_rows(self) -> dict[str, Row]:
        """The table's lines, in the order they train."""
        config = self.config
        teacher, student = self.network(*config.teacher, config.dropout), self.student
        labels = combine({"hard": (1.0, hard_labels())})

        def row(module, steps, objective=labels, **options):
            return Row(module, objective, self.optimizer(steps), steps=steps, **options)

        def taught(term, **options):
            soft = combine({"soft": (1.0, term)})
            return row(student, config.steps, soft, teacher="teacher", **options)

        own = on_policy(student, prompt=config.prompt, share=config.own_share)
        reverse = on_logits(losses.reverse_kl)
        return {
            "teacher": row(teacher, config.teacher_steps),
            "nanogpt": row(teacher, config.reference_steps),
            "scratch": row(student, config.steps),
            "forward_kl": taught(soft_targets()),
            "reverse_kl": taught(reverse),
            "jsd": taught(on_logits(losses.generalized_jsd)),
            "total_variation": taught(on_logits(losses.total_variation)),
            "top_k": taught(soft_targets(), top_k=config.top_k),
            "sequence_level": row(student, config.steps),
            "on_policy": taught(reverse, rollout=own),
        }

    @property
    def student(self) -> models.GPT:
        """The student's network."""
        return self.network(*self.config.student, 0.0)

    def network(self, width: int, depth: int, heads: int, dropout: float) -> models.GPT:
        """A GPT of the vocabulary, as long as a window."""
        size = gpt_size(
            len(self.vocabulary),
            width,
            depth,
            heads,
            positions=self.config.length,
            dropout=dropout,
            attention_dropout=dropout,
        )
        return models.GPT(size, maps=False, factored=self.config.factored)

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """nanoGPT's: AdamW, matrices decayed, gradients clipped, a cosine."""
        config = self.config
        rate = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, config.warm_up, steps, config.learning_rate / 10
        )
        adamw = optax.adamw(
            rate,
            b2=0.99,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        )
        return optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def teacher(self, seed: int) -> teachers.Live:
        """A seed's teacher, trained now unless it is there."""
        return self.study.train("teacher", self.rows["teacher"], seed)

    def _written(self, seed: int) -> dict[str, Any]:
        """Windows that the teacher wrote behind their first tokens, which do not count.

        As many as the text has, in the run directory once they are written.
        """
        teacher, prompt = self.teacher(seed), self.config.prompt
        name = f"{teachers.digest(teacher.variables)[:16]}-{prompt}-{seed}.npy"
        path = self.study.log.path / "outputs" / name
        ids = self.train["inputs"]["input_ids"]
        if not path.exists():
            rng = jax.random.key(seed)
            drawn = continued(teacher, ids[:, :prompt], ids.shape[1] + 1 - prompt, rng)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                np.save(file, drawn, allow_pickle=False)
        with path.open("rb") as file:
            drawn = np.load(file, allow_pickle=False)
        counts = np.arange(ids.shape[1]) >= prompt - 1
        return {
            "inputs": {"input_ids": drawn[:, :-1]},
            "labels": drawn[:, 1:],
            "token_mask": np.tile(counts.astype(np.float32), (len(ids), 1)),
        }

    def samples(self, names: Sequence[str], windows: int = 4) -> str:
        """What models of the first seed write, as Markdown.

        Longer than a window: they go on from its second half.
        """
        length, parts = self.config.length, []
        first = self.test["inputs"]["input_ids"][:1, : length // 2]
        for name in names:
            row, taught_by = self.rows[name], None
            if row.teacher is not None:
                taught_by = self.study.run.place(self.teacher(0))
            model = self.study.train(name, row, 0, taught_by)
            ids = first
            for i in range(windows):
                rng, start = jax.random.fold_in(jax.random.key(0), i), ids[:, -length:]
                start = start[:, -(length // 2) :]
                drawn = continued(model, start, length - start.shape[1], rng)
                ids = np.concatenate([ids, drawn[:, start.shape[1] :]], 1)
            text = self.joined.join(self.vocabulary.decode(ids[0]))
            parts.append(f"{name}:\n\n```\n{text}\n```\n")
        return "\n".join(parts)


def continued(model: teachers.Live, ids: Any, steps: int, rng: Any, size: int = 512):
    """`[N, L + steps]` integers: prompts `[N, L]`, and what a model writes behind them.

    Raises:
      ValueError: the model's logits are not finite.
    """
    parts = []
    for i in range(0, len(ids), size):
        part = np.resize(ids[i : i + size], (min(size, len(ids)), ids.shape[1]))
        drawn = generate(
            model, {"input_ids": part}, jax.random.fold_in(rng, i), steps=steps
        )
        parts.append(np.asarray(drawn["input_ids"])[: len(ids[i : i + size])])
    written = np.concatenate(parts)
    if (written < 0).any():
        raise ValueError("the model cannot write: its logits are not finite")
    return written


if __name__ == "__main__":
    main()
