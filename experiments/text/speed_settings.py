# SPDX-License-Identifier: Apache-2.0
"""The settings of text_speed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.text.speed_jobs import Rule, Shape


@dataclass(frozen=True)
class Config:
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
    steps: int = 10
    """optimizer steps in a round"""
    length_steps: int = 40
    """those in a round of the part `lengths`"""
    bucket_lengths: tuple[int, ...] = (16, 24, 32, 48)
    """what batches of like length are cut to there"""
    rounds: int = 7
    """rounds timed of each side, after one that is not counted"""
    dropout: float = 0.1
    """rate on both sides"""
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


def rule(config: Config, hard: float, soft: float) -> Rule:
    """How both sides train, with these weights of the loss's terms."""
    return Rule(
        config.steps,
        config.temperature,
        hard,
        soft,
        config.learning_rate,
        config.weight_decay,
        config.dropout,
    )
