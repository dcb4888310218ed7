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

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import tyro
from tqdm.auto import tqdm

from experiments.speed.article_job import machine
from experiments.text import speed_report, speed_storage
from experiments.text.speed_jobs import (
    OURS,
    SCANNED,
    THEIRS,
    TRIMMED,
    Rule,
    Shape,
    Work,
    bert,
    gpt,
    torch_side,
)
from experiments.text.speed_settings import SMOKE, Config, rule
from jaxdistill import data, report, train
from jaxdistill.train import cost

PARTS = ("train", "distill", "lengths", "stages", "generate", "storage")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the parts asked for, prints their tables, returns the summary."""
    config = tyro.cli(Config, args=argv, description=__doc__)
    if hasattr(os, "sched_setaffinity"):  # before any side makes its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: config.threads])
    with train.exit_with_message():
        return execute(config)


def execute(config: Config) -> dict[str, Any]:
    """Runs the parts asked for, beside those the run directory already holds."""
    if config.smoke:
        config = replace(config, **SMOKE)
    free = ("part", "rounds", "run_dir", "data_dir", "save", "progress")
    run_dir = train.RunDir(
        config.run_dir, {k: v for k, v in asdict(config).items() if k not in free}
    )
    path = run_dir.path / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    jobs: dict[str, Callable] = {
        "train": train_steps,
        "distill": distill,
        "lengths": lengths,
        "stages": stages,
        "generate": generate,
        "storage": storage,
    }
    parts = PARTS if config.part == "all" else (config.part,)
    if parts != ("storage",):
        torch_side().torch.set_num_threads(config.threads)
    for part in parts:
        summary[part] = {**jobs[part](config), "machine": versions(config.threads)}
        run_dir.write("summary.json", summary)
    run_dir.write("env.json", train.environment())
    texts = speed_report.tables(summary)
    for name, text in texts.items():
        run_dir.write_bytes(name, text.encode())
    if config.save is not None:
        report.save(run_dir.path, config.save)
    print("\n".join(texts.values()))
    print(run_dir)
    return summary


def train_steps(config: Config) -> dict[str, Any]:
    """Seconds of a round of steps on the labels alone."""
    jobs = epochs(config, "train", rule(config, 1.0, 0.0))
    return {"jobs": jobs, "note": "A round is so many optimizer steps of AdamW."}


def distill(config: Config) -> dict[str, Any]:
    """Seconds of a round of steps on labels and stored outputs."""
    weights = rule(config, config.hard_weight, config.soft_weight)
    note = (
        f"{config.hard_weight:g} of the labels, {config.soft_weight:g} of the stored "
        f"outputs at temperature {config.temperature:g}."
    )
    return {"jobs": epochs(config, "distill", weights), "note": note}


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
    weights = replace(rule(config, 1.0, 0.0), steps=config.length_steps)
    work = Work(bert, shape, weights, config.seed, sizes)
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
    epoch = torch_side().make_epoch(model, loss, optimizer, examples, work.batches)
    seconds = in_turns(config, name, {THEIRS: epoch, **ours})
    return {"seconds": seconds, "tokens": tokens, "losses": losses}


def stages(config: Config) -> dict[str, Any]:
    """Seconds of a step's stages of every model, both sides in turns."""
    found = {}
    for name, make, shape in networks(config):
        work = Work(make, shape, rule(config, 1.0, 0.0), config.seed)
        model, loss, optimizer, examples = work.theirs()
        first = {key: x[: shape.batch] for key, x in examples.items()}
        theirs = torch_side().make_stages(model, loss, optimizer, first)
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
        work = Work(gpt, shape, rule(config, 1.0, 0.0), config.seed)
        for count in config.prompts:
            jobs = work.generators(count, config.prompt, config.tokens)
            check_tokens(*(job() for job in jobs.values()))
            found[f"{name}, {count} at once"] = {
                "seconds": in_turns(config, f"generate {name} {count}", jobs),
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


def networks(config: Config):
    """`(name, configuration, shape)` of every model that trains."""
    return (
        ("bert_mini", bert, config.bert_mini),
        ("bert_small", bert, config.bert_small),
        ("gpt", gpt, config.gpt),
    )


def about(shape: Shape) -> str:
    """A model and its batch in words."""
    return (
        f"{shape.depth} layers {shape.width} wide, {shape.batch} x {shape.length} "
        "tokens a step"
    )


def in_turns(config: Config, name: str, jobs, rounds: int = 0) -> dict[str, list]:
    """`cost.interleave`, with a bar."""
    rounds = rounds or config.rounds
    total = len(jobs) * (rounds + 1)
    with tqdm(desc=name, total=total, disable=not config.progress) as bar:

        def counted(job):
            return lambda: (job(), bar.update())

        return cost.interleave({k: counted(j) for k, j in jobs.items()}, rounds)


def versions(threads: int) -> dict[str, Any]:
    """What a part's numbers depend on."""
    try:
        import transformers
    except ModuleNotFoundError:
        return {**machine(threads), "transformers": None}
    return {**machine(threads), "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
