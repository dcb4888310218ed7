# SPDX-License-Identifier: Apache-2.0
"""How fast do text models train and write, beside transformers, and what do we store?

Question: tokens per second of the same text model, weights and batches, in transformers
(eager PyTorch, sdpa attention, fused AdamW) and here (many steps in one dispatch).

  train     an optimizer step of a BERT classifier at two published sizes and of
            nanoGPT's small GPT, float32, dropout on: ours with the layers one after
            another, and with the layers scanned.
  distill   the same steps, the loss being labels and a teacher's stored outputs.
  lengths   the steps of the smaller classifier on texts of 4 to 64 tokens, all lengths
            as likely, those of like length together: each batch padded to its longest
            in transformers, and here to 64, or cut to one of a few lengths.
  stages    where a step's time goes: the loss, its gradient, dropout, AdamW.
  generate  greedy tokens behind a prompt with a key and value cache on both sides.
  storage   bytes of a token's stored outputs, dense and top-k, against the error of a
            student's KL, in nats: of drawn models, or of two trained on a text
            (--corpus).

The sides take turns on the same cores; a ratio is taken pair by pair. Nothing is timed
before both have the same loss on the first batch without dropout, or write the same
tokens. Compilation is not timed, nor is the first round.

Expected: 1.3 times the tokens of transformers and more in training, 2 in writing.

The torch side needs `pip install torch transformers`. A run directory keeps the parts
it has: run one again at a quiet time. Cost on two cores: about 20 minutes, a minute
with --smoke.

  python -m experiments.text.speed
  python -m experiments.text.speed --part train --rounds 11
  python -m experiments.text.speed --part storage --corpus shakespeare --data-dir DIR
  python -m experiments.text.speed --smoke
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.speed.parts import in_turns, keep_to_threads, run_parts
from experiments.text import speed_jobs, speed_report, speed_storage
from experiments.text.speed_jobs import (
    OURS,
    SCANNED,
    THEIRS,
    TRIMMED,
    Rule,
    Shape,
    Work,
)
from jaxdistill import data
from jaxdistill.study import script


@dataclass(frozen=True)
class Config(Rule):
    """Time text models beside transformers, and measure what storing them costs."""

    part: Literal[
        "train", "distill", "lengths", "stages", "generate", "storage", "all"
    ] = "all"
    """what to run"""
    smoke: bool = False
    """everything in a minute, with tiny models"""
    run_dir: str = "runs/text_speed"
    """where the results are kept"""
    bert_mini: Shape = Shape(30_522, 256, 4, 4, 32, 64, 512)
    """a classifier of Turc et al. (2019), and its batch"""
    bert_small: Shape = Shape(30_522, 512, 4, 8, 16, 128, 512)
    """a wider one"""
    gpt: Shape = Shape(65, 128, 4, 4, 12, 64, 256)
    """nanoGPT's small setting"""
    writer: Shape = Shape(50_257, 384, 6, 6, 12, 64, 256)
    """DistilGPT-2 at half its width, for generation"""
    length_steps: int = 40
    """those in a round of the part `lengths`"""
    bucket_lengths: tuple[int, ...] = (16, 24, 32, 48)
    """what batches of like length are cut to there"""
    rounds: int = 7
    """rounds timed of each side, after one that is not counted"""
    prompts: tuple[int, ...] = (1, 16)
    """sequences written at once"""
    prompt: int = 32
    """tokens in a prompt"""
    tokens: int = 128
    """tokens to write behind it"""
    corpus: Literal["drawn", "shakespeare", "wikitext2"] = "drawn"
    """what the stored outputs are of: drawn models, or two trained on a text"""
    data_dir: str | None = None
    """a folder with the original text"""
    at_least: int = 1
    """how often a token must occur in the text; others are <unk>"""
    text_steps: int = 2_000
    """optimizer steps of the two models of a text"""
    windows: int = 64
    """sequences of which outputs are stored"""
    top_k: tuple[int, ...] = (4, 8, 16, 32)
    """how many classes a sparse store keeps"""
    sharpness: float = 10.0
    """what multiplies the logits of drawn models"""
    seed: int = 0
    """of weights and tokens"""
    threads: int = 2
    """cores for either side"""
    save: Path | None = None
    """also copy the small files there, below experiments/results"""
    progress: bool = True
    """show progress bars"""


SMOKE: dict[str, Any] = {
    # With one core for two sides' threads, as on a busy machine, the torch side waits.
    "threads": 1,
    "bert_mini": Shape(50, 16, 1, 2, 4, 8, 16),
    "bert_small": Shape(50, 24, 1, 3, 2, 12, 16),
    "gpt": Shape(40, 16, 1, 2, 3, 8, 24),
    "writer": Shape(90, 16, 1, 2, 3, 8, 24),
    "steps": 2,
    "length_steps": 3,
    "bucket_lengths": (6,),
    "rounds": 2,
    "prompts": (1, 2),
    "prompt": 4,
    "tokens": 8,
    "text_steps": 20,
    "windows": 8,
    "top_k": (4, 16),
}


def execute(config: Config) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds."""
    if config.smoke:
        config = replace(config, **SMOKE)
    if config.part != "storage":
        speed_jobs.torch_side().torch.set_num_threads(config.threads)
    jobs = {name: partial(job, config) for name, job in PARTS.items()}
    return run_parts(config, jobs, speed_report.tables, packages=PACKAGES)


def train_steps(config: Config) -> dict[str, Any]:
    """Seconds of a round of steps on the labels alone."""
    jobs = epochs(config, "train", on_labels(config))
    return {"jobs": jobs, "note": "A round is so many optimizer steps of AdamW."}


def distill(config: Config) -> dict[str, Any]:
    """Seconds of a round of steps on labels and stored outputs."""
    note = (
        f"{config.hard_weight:g} of the labels, {config.soft_weight:g} of the stored "
        f"outputs at temperature {config.temperature:g}."
    )
    return {"jobs": epochs(config, "distill", config), "note": note}


def epochs(config: Config, part: str, weights: Rule) -> dict[str, Any]:
    """Seconds of a round of every model, both sides in turns."""
    found = {}
    for name, make, shape in networks(config):
        work = Work(make, shape, weights, config.seed)
        tokens = weights.steps * shape.batch * shape.length
        ours = {OURS: work.ours(), SCANNED: work.ours(scan=True)}
        found[name] = rounds_of(config, f"{part} {name}", work, ours, tokens)
        found[name]["about"] = about(shape)
    return found


def lengths(config: Config) -> dict[str, Any]:
    """Seconds of a round on texts of unlike length; tokens without their padding."""
    shape, count = config.bert_mini, config.bert_mini.batch * config.length_steps
    sizes = np.random.default_rng(config.seed).integers(4, shape.length + 1, count)
    weights = replace(on_labels(config), steps=config.length_steps)
    work = Work(speed_jobs.bert, shape, weights, config.seed, sizes)
    ours = {OURS: work.ours(), TRIMMED: work.ours(bucket_lengths=config.bucket_lengths)}
    found = rounds_of(config, "lengths", work, ours, int(sizes.sum()))
    found["about"] = (
        f"{shape.depth} layers {shape.width} wide, {shape.batch} texts a step of 4 to "
        f"{shape.length} tokens"
    )
    cuts = ", ".join(map(str, config.bucket_lengths))
    note = f"Real tokens; batches of like length, ours cut to {cuts} or not at all."
    return {"jobs": {"bert_mini": found}, "note": note}


def rounds_of(config: Config, name: str, work: Work, ours, tokens: int):
    """Seconds of rounds of transformers and of ours, once their first losses agree."""
    model, loss, optimizer, examples = work.theirs()
    losses = work.losses(model, loss, examples)
    torch = speed_jobs.torch_side()
    epoch = torch.make_epoch(model, loss, optimizer, examples, work.batches)
    seconds = in_turns(config, name, {THEIRS: epoch, **ours}, config.rounds)
    return {"seconds": seconds, "tokens": tokens, "losses": losses}


def stages(config: Config) -> dict[str, Any]:
    """Seconds of a step's stages of every model, both sides in turns."""
    found = {}
    for name, make, shape in networks(config):
        work = Work(make, shape, on_labels(config), config.seed)
        model, loss, optimizer, examples = work.theirs()
        first = {key: x[: shape.batch] for key, x in examples.items()}
        theirs = speed_jobs.torch_side().make_stages(model, loss, optimizer, first)
        ours, seconds = work.stages(), {}
        for stage in ours:
            sides = {THEIRS: theirs[stage], OURS: ours[stage]}
            rounds = config.steps * config.rounds
            seconds[stage] = in_turns(config, f"{name} {stage}", sides, rounds)
        found[name] = {"seconds": seconds}
    return {"jobs": found}


def generate(config: Config) -> dict[str, Any]:
    """Seconds in which both sides write behind the same prompts."""
    found = {}
    for name, shape in (("gpt", config.gpt), ("writer", config.writer)):
        work = Work(speed_jobs.gpt, shape, on_labels(config), config.seed)
        for count in config.prompts:
            jobs = work.generators(count, config.prompt, config.tokens)
            check_tokens(*(job() for job in jobs.values()))
            said = f"generate {name} {count}"
            found[f"{name}, {count} at once"] = {
                "seconds": in_turns(config, said, jobs, config.rounds),
                "tokens": count * config.tokens,
                "about": f"{shape.depth} layers {shape.width} wide, {shape.vocab:,} "
                "tokens in the vocabulary",
            }
    note = f"{config.tokens} tokens behind {config.prompt}, greedy, all the same."
    return {"jobs": found, "note": note}


def check_tokens(theirs: np.ndarray, ours: np.ndarray) -> None:
    """Raise ValueError unless both sides wrote the same."""
    if not np.array_equal(theirs, ours):
        at = int(np.argmax((theirs != ours).any(0)))
        raise ValueError(
            f"transformers and jaxdistill write differently from token {at} on; where "
            "two tokens are equally likely to rounding, take another --seed"
        )


def storage(config: Config) -> dict[str, Any]:
    """Bytes of a token's stored outputs, and the error of a student's KL."""
    if config.corpus == "drawn":
        teacher, student, examples = speed_storage.drawn(
            config.gpt, config.windows, config.sharpness, config.seed
        )
        name = "random tokens, models drawn and sharpened"
    else:
        teacher, student, examples = speed_storage.trained_pair(
            config.gpt,
            data.load_corpus(config.corpus, config.data_dir),
            config.at_least,
            config.windows,
            steps=config.text_steps,
            rate=1e-3,
            seed=config.seed,
        )
        name = f"{config.corpus}, models trained for {config.text_steps:,} steps"
    top_k = [k for k in config.top_k if k <= student.module.size.vocab]
    temperatures = sorted({1.0, config.temperature})
    return speed_storage.measure(
        teacher, student, examples, top_k=top_k, temperatures=temperatures, name=name
    )


def on_labels(config: Config) -> Config:
    """The same without a distillation."""
    return replace(config, hard_weight=1.0, soft_weight=0.0)


def networks(config: Config):
    """`(name, configuration, shape)` of every model that trains."""
    return (
        ("bert_mini", speed_jobs.bert, config.bert_mini),
        ("bert_small", speed_jobs.bert, config.bert_small),
        ("gpt", speed_jobs.gpt, config.gpt),
    )


def about(shape: Shape) -> str:
    """A model and its batch in words."""
    return (
        f"{shape.depth} layers {shape.width} wide, {shape.batch} x {shape.length} "
        "tokens a step"
    )


PACKAGES = ("torch", "keras", "transformers")
PARTS: dict[str, Callable] = {
    "train": train_steps,
    "distill": distill,
    "lengths": lengths,
    "stages": stages,
    "generate": generate,
    "storage": storage,
}
main = script.command(execute, {"": Config()}, __doc__, begin=keep_to_threads)

if __name__ == "__main__":
    main()
