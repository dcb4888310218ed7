# SPDX-License-Identifier: Apache-2.0
"""A GPT of characters teaches a smaller one: which objective, at equal steps?

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
  sequence_level Cross-entropy on what the teacher wrote behind the first token of each
                 window (Kim and Rush 2016, Sequence-Level Knowledge Distillation,
                 section 3.2, with samples for the mode).
  on_policy      Reverse KL; after the first 40% of the steps half of the batches are
                 the student's own continuations (Agarwal et al. 2024, GKD, algorithm 1,
                 which starts from a student that already writes).

Every student takes the same steps on as many windows, with nanoGPT's AdamW and rate;
nothing is tuned. All 64 tokens of a window count, but of the student's own
continuations the 49 it drew behind 16: over its training `on_policy` learns from 93% of
the tokens. Unlike nanoGPT's the networks have biases, and windows do not overlap. Where
a corpus has no test, the table is of its validation text, on which nothing was chosen.
Last step.

KL to the teacher is KL(teacher || student) on the held-out text. The reverse KL on own
text, which only `on_policy` trains on, is KL(student || teacher) by token of what each
model itself writes behind 512 prompts of that text. Intervals are of the NLL.

Presets: `shakespeare`, characters; `wikitext2`, words, whose logits only those losses
multiply out that must. It is meant for the corpus without its train.txt: 246 thousand
words to train on, of which students make 3 to 4 passes and the teacher 5, all with
dropout. It has no `nanogpt`, whose loss is of characters.

  python -m experiments.text.shakespeare_gpt --data-dir ~/tiny_shakespeare
  python -m experiments.text.shakespeare_gpt --preset wikitext2 --data-dir ~/wikitext2
  python -m experiments.text.shakespeare_gpt --smoke

Cost: `shakespeare` two hours and a quarter on one core, with other work on the second;
`wikitext2` an hour and a quarter on two, with other work there. A minute with --smoke.
"""

from dataclasses import dataclass
from typing import Any, Literal

from experiments.text.shakespeare_task import Task
from jaxdistill import study
from jaxdistill.study import script


@dataclass(frozen=True)
class Config(script.StepFlags):
    """Compare objectives for a small GPT taught by a larger one."""

    preset: Literal["shakespeare", "wikitext2"] = "shakespeare"
    """where the defaults come from"""
    smoke: bool = False
    """all arms for a few steps, on a sentence repeated"""
    data_dir: str | None = None
    """a folder with the original text, or TFDS's data folder"""
    run_dir: str = "runs/{preset}_gpt"
    """where the run is kept and resumed from"""
    at_least: int = 1
    """how often a token must occur in the training text; others are <unk>"""
    length: int = 64
    """tokens in a window, and positions of the networks"""
    prompt: int = 16
    """tokens of a window behind which a student goes on by itself"""
    teacher: tuple[int, int, int] = (128, 4, 4)
    """width, layers and heads of the teacher"""
    student: tuple[int, int, int] = (64, 2, 4)
    """those of the student"""
    dropout: float = 0.0
    """the teacher's rate"""
    student_dropout: float = 0.0
    """the students'"""
    batch_size: int = 12
    """windows in a batch, over all devices"""
    teacher_steps: int = 10_000
    """optimizer steps of the teacher"""
    reference_steps: int = 2_000
    """those of the arm `nanogpt`; 0 leaves it out"""
    steps: int = 5_000
    """those of every student"""
    learning_rate: float = 1e-3
    """AdamW's peak rate, brought to a tenth by a cosine"""
    warm_up: int = 100
    """steps to the peak rate"""
    weight_decay: float = 0.1
    """AdamW's decay of matrices"""
    top_k: int = 8
    """probabilities that the arm `top_k` stores of each token"""
    own_share: float = 0.5
    """of the arm `on_policy`'s batches, how many the student writes"""
    own_from: float = 0.4
    """before this part of its steps, it writes none"""
    own_prompts: int = 512
    """windows of the test behind whose first tokens every model is judged"""
    seeds: int = 5
    """trainings of everything"""
    stored: bool = True
    """compute the teacher's outputs on the text once"""
    factored: bool = False
    """take the vocabulary a part at a time, in the losses that can"""


PRESETS = {
    "shakespeare": Config(),
    "wikitext2": Config(
        preset="wikitext2",
        at_least=2,
        dropout=0.2,
        student_dropout=0.2,
        teacher_steps=1_600,
        reference_steps=0,
        steps=1_100,
        top_k=32,
        seeds=3,
        stored=False,
        factored=True,
    ),
}
SMOKE = """--batch-size 16 --length 16 --prompt 4 --teacher 16 2 2 --student 8 1 2
    --teacher-steps 30 --reference-steps 10 --steps 20 --warm-up 5 --own-prompts 8
    --seeds 2 --at-least 1"""
AGAINST = {"top_k": ["forward_kl"], "on_policy": ["reverse_kl"]}
"""What an arm is compared with beside `scratch`: its loss without its difference."""


def execute(config: Config) -> dict[str, Any]:
    """Trains every arm for every seed, resuming what a run directory already holds."""
    task = Task(config)
    summary = study.compare(
        task.study,
        task.arms,
        config.seeds,
        pairs={name: ["scratch", *AGAINST.get(name, ())] for name in task.students},
        measure="nll",
    )
    written = task.samples(("teacher", "scratch", "forward_kl", "on_policy"))
    task.study.run_dir.write_bytes("samples.md", written.encode())
    task.study.run_dir.write_bytes("text.md", f"{task.about()}\n".encode())
    script.show(task.study.run_dir, written, task.about())
    return summary


main = script.command(execute, PRESETS, __doc__, smoke=SMOKE)

if __name__ == "__main__":
    main()
