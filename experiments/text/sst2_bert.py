# SPDX-License-Identifier: Apache-2.0
"""A BERT teaches small text classifiers: what does each student gain, and what does it
cost?

Question: sentences of film reviews (SST-2) or news (AG News), one teacher, three kinds
of student. Does the student learn more from its teacher than from the labels alone, and
do hidden states and relations help beside the logits?

Teacher: with --teacher FOLDER (or a hub's id) a pretrained BERT or DistilBERT, fine-
tuned here; without, a BERT TRAINED FROM SCRATCH on the task's own texts, with a
WordPiece vocabulary of them, a far weaker teacher. Its outputs are stored once.

Students, each from scratch and distilled (soft targets and labels):
  transformer  two layers, narrower than the teacher. `transformer_stages` is TinyBERT's
               two (Jiao et al. 2020) in as many steps: first hidden states, projected,
               and relations of queries, keys and values, as heads are not as many, then
               the soft targets.
  bilstm       the network of Tang et al. 2019, Distilling Task-Specific Knowledge from
               BERT into Simple Neural Networks; they match logits, here as all others.
  bag          the mean of embeddings.
`transformer_masked` and `bilstm_masked` see texts of which a tenth of the tokens is
hidden (Tang et al., section 3.3), in four ways each, whose outputs are stored; their
controls the labels of texts hidden anew in each step. Two of two layers are as wide as
the teacher, both distilled in fewer steps: `layers` starts as two of the teacher's
layers, with its embeddings, pooler and head (Sanh et al. 2019, DistilBERT, section 3),
`drawn` from random weights, at the other students' rate. Texts of like length train
together, in batches cut behind their longest.

Nothing is tuned; the last epoch is tested on the labelled test, with the validation
texts beside it, which are SST-2's dev where its files are read. AdamW, a tenth of the
steps up to the rate and a line down to nothing. Costs are those of one test text of
median length without padding.

  python -m experiments.text.sst2_bert --data-dir ~/sst2
  python -m experiments.text.sst2_bert --data-dir ~/sst2 --teacher ~/MiniLM-L6 \
      --teacher-epochs 1
  python -m experiments.text.sst2_bert --preset ag_news --data-dir ~/ag_news \
      --teacher ~/MiniLM-L6
  python -m experiments.text.sst2_bert --smoke

Needs jaxdistill[huggingface]. Cost: with the MiniLM two cores took about an hour a seed
of SST-2, of which the arms of masked texts were a quarter, and 40 minutes of AG News;
with a teacher from scratch 20 minutes of SST-2 and 40 of AG News, beside other work.
Two minutes with --smoke, nearly all of it compilation.
"""

from dataclasses import dataclass
from typing import Any, Literal

from experiments.text.sst2_task import Task
from jaxdistill import study
from jaxdistill.parallel import processes
from jaxdistill.study import script


@dataclass(frozen=True)
class Config(script.StepFlags):
    """Distil a BERT into small text classifiers."""

    preset: Literal["sst2", "ag_news"] = "sst2"
    """where the defaults come from"""
    smoke: bool = False
    """all arms for a few steps, on five phrases repeated"""
    data_dir: str | None = None
    """a folder with the original texts, or TFDS's data folder"""
    run_dir: str = "runs/{preset}_bert"
    """where the run is kept and resumed from"""
    teacher: str | None = None
    """a folder or a hub's id of a pretrained encoder; None trains one from scratch"""
    vocab: int = 8_000
    """pieces of a vocabulary trained here, without --teacher"""
    length: int = 48
    """tokens of a text, special ones included; what is longer is cut"""
    bucket_lengths: tuple[int, ...] = (8, 16, 24, 32)
    """texts of like length train together, in batches cut to the shortest of these
    that holds them, or to `length`"""
    teacher_size: tuple[int, int, int] = (256, 4, 4)
    """width, layers and heads of a teacher from scratch"""
    transformer: tuple[int, int, int] = (128, 2, 2)
    """width, layers and heads of the small Transformer"""
    bilstm: tuple[int, int] = (128, 128)
    """width of the BiLSTM's embeddings, and of each direction"""
    bag: tuple[int, int] = (128, 128)
    """width of the bag's embeddings, and of its hidden layer"""
    batch_size: int = 64
    """texts in a batch, over all devices"""
    teacher_epochs: int = 3
    """passes of the teacher over the training texts; 0 takes --teacher as it is, with
    its head"""
    epochs: int = 4
    """passes of every student"""
    teacher_rate: float | None = None
    """the teacher's peak rate, and that of `layers`; None is 1e-4 with --teacher, else
    3e-4"""
    rate: float = 5e-4
    """every other student's peak rate"""
    weight_decay: float = 0.01
    """AdamW's decay of matrices"""
    temperature: float = 2.0
    """softens both distributions"""
    hard_weight: float = 0.1
    """weight of the labels beside soft targets, whose weight is 0.9"""
    stage_epochs: int = 1
    """passes of these in which `transformer_stages` matches layers"""
    views: int = 4
    """ways in which the arms `masked` see a text"""
    masked: float = 0.1
    """the share of the tokens that is hidden there"""
    wide_epochs: int = 1
    """passes of the students as wide as the teacher"""
    seeds: int = 3
    """trainings of everything"""


PRESETS = {
    "sst2": Config(),
    "ag_news": Config(
        preset="ag_news",
        length=96,
        bucket_lengths=(40, 48, 56, 64, 80),
        teacher_epochs=3,
        epochs=8,
        wide_epochs=3,
    ),
}
SMOKE = """--vocab 60 --length 10 --bucket-lengths 4 6 --teacher-size 16 3 2
    --transformer 8 2 2 --bilstm 8 6 --bag 8 6 --batch-size 16 --teacher-epochs 2
    --epochs 2 --views 2 --seeds 2"""


def execute(config: Config) -> dict[str, Any]:
    """Trains every arm for every seed, resuming what a run directory already holds."""
    task = Task(config)
    if processes.is_first():
        print(task.said, flush=True)
    task.study.run_dir.write_bytes("texts.md", f"{task.said}\n".encode())
    pairs = {
        "transformer": ["transformer_scratch"],
        "transformer_stages": ["transformer_scratch", "transformer"],
        "bilstm": ["bilstm_scratch"],
        "transformer_masked": ["transformer_masked_scratch", "transformer"],
        "bilstm_masked": ["bilstm_masked_scratch", "bilstm"],
        "bag": ["bag_scratch"],
        "layers": ["drawn"],
    }
    summary = study.compare(
        task.study, task.arms(), config.seeds, pairs=pairs, example=task.median
    )
    script.show(task.study.run_dir)
    return summary


main = script.command(execute, PRESETS, __doc__, smoke=SMOKE)

if __name__ == "__main__":
    main()
