# SPDX-License-Identifier: Apache-2.0
"""Every student of a BERT trains, from scratch or pretrained, and the run resumes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from experiments.text import sst2_bert, sst2_task
from jaxdistill import models, pretrained, teachers
from jaxdistill.study import script
from jaxdistill.train import load_model

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("any_teacher")]

SMOKE = ["--smoke", "--no-progress", "--no-compilation-cache"]
ARMS = ["teacher", "transformer_scratch", "transformer", "bilstm_scratch", "bilstm"]
ARMS += ["bag_scratch", "bag", "transformer_masked_scratch", "transformer_masked"]
ARMS += ["bilstm_masked_scratch", "bilstm_masked"]
ARMS += ["transformer_stages", "drawn", "layers"]


def small(**options):
    config = sst2_bert.Config(smoke=True, progress=False)
    return replace(script.with_flags(config, sst2_bert.SMOKE), **options)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sst2")
    sst2_bert.main([*SMOKE, "--run-dir", str(folder)])
    return folder


def test_all_students_are_compared(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert list(summary["arms"]) == ARMS
    assert summary["arms"]["layers"]["validation"]["n"] == 2
    assert set(summary["paired"]["transformer_stages"]) == {
        "transformer_scratch",
        "transformer",
    }
    digests = summary["digests"]
    assert len(set(digests.values())) == len(digests)  # no two trainings are one
    pretrained.load_tokenizer(run_dir)  # what export needs


def test_outputs_are_stored_once_a_teacher(run_dir):
    stores = [path.name for path in (run_dir / "outputs").iterdir()]
    # A seed's texts, and their views; hidden states are asked of a live teacher.
    assert len(stores) == 4


def test_a_pretrained_teacher_is_where_the_students_start(tmp_path):
    """Its layers and its head's start; the tokenizer is the folder's."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    folder, tokenizer = (
        tmp_path / "bert",
        pretrained.train_wordpiece(["a fine film"], 60),
    )
    size = models.TransformerConfig(len(tokenizer.get_vocab()), 8, 3, 2, positions=16)
    module = models.BertClassifier(models.Encoder(size), 2)
    variables = module.init(jax.random.key(3), {"input_ids": np.zeros((1, 2), int)})
    config = {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "vocab_size": size.vocab,
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "type_vocab_size": 2,
    }
    pretrained.save(folder, teachers.live(module, variables), config)
    tokenizer.save(str(folder / "tokenizer.json"))
    options = {"teacher": str(folder), "run_dir": str(tmp_path)}
    task = sst2_task.Task(small(**options))
    arms = task.arms()
    start = task.study.fresh(arms["teacher"], 0)
    of_file = variables["params"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, start.params["encoder"], of_file)
    teacher = task.study.train("teacher", arms["teacher"], 0)
    student = task.study.fresh(arms["layers"], 0, teacher)
    expected = models.take_layers(teacher.variables["params"], (0, 2))
    jax.tree.map(np.testing.assert_array_equal, student.params, expected)

    options |= {"teacher_epochs": 0, "run_dir": str(tmp_path / "as it is")}
    task = sst2_task.Task(small(**options))
    teacher = task.study.train("teacher", task.arms()["teacher"], 0)
    jax.tree.map(np.testing.assert_array_equal, teacher.variables, variables)
    task.classes = 3
    with pytest.raises(ValueError, match="has 2 classes, the texts 3"):
        task.make_teacher()


def test_a_decoder_is_no_teacher_here(tmp_path):
    """Its students have its tokens and layers, a [MASK] and a first token's state."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    module = models.GPT(models.gpt_config(60, 8, 1, 2))
    variables = module.init(jax.random.key(3), {"input_ids": np.zeros((1, 2), int)})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    config |= {"vocab_size": 60, "n_embd": 8, "n_layer": 1, "n_head": 2}
    pretrained.save(tmp_path, teachers.live(module, variables), config)
    tokenizer = pretrained.train_wordpiece(["a fine film"], 60)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    options = {"teacher": str(tmp_path), "run_dir": str(tmp_path)}
    with pytest.raises(ValueError, match="is no encoder, as BERT and DistilBERT are"):
        sst2_task.Task(small(**options))


def test_the_second_stage_starts_as_the_first_ended(run_dir):
    task = sst2_task.Task(small(run_dir=str(run_dir)))
    arms = task.arms()
    teacher = task.study.train("teacher", arms["teacher"], 0)
    arm = arms["transformer_stages"]
    drawn = task.study.fresh(arms["transformer"], 0)
    found = task.study.fresh(arm, 0, teacher)
    words = [state.params["encoder"]["words"]["embedding"] for state in (drawn, found)]
    assert not np.array_equal(*words)
    assert jax.tree.structure(drawn.params) == jax.tree.structure(found.params)
    # Both stages together are as long as any other student's training.
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last = {record["fit"]: record["step"] for record in records}
    stages = last["transformer_first_stage-0"], last["transformer_stages-0"]
    assert sum(stages) == last["transformer-0"]


def test_costs_are_of_a_text_of_median_length():
    ids = np.arange(12).reshape(3, 4)
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    one = sst2_task.median_text({"input_ids": ids, "attention_mask": mask})
    np.testing.assert_array_equal(one["inputs"]["input_ids"], [[4, 5]])


def test_it_resumes_from_what_is_there(run_dir):
    before = (run_dir / "summary.json").read_bytes()
    records = (run_dir / "metrics.jsonl").read_bytes()
    sst2_bert.main([*SMOKE, "--run-dir", str(run_dir)])
    after = json.loads((run_dir / "summary.json").read_text())
    assert after["digests"] == json.loads(before)["digests"]
    assert (run_dir / "metrics.jsonl").read_bytes() == records
    model = load_model(run_dir, "bilstm")
    assert isinstance(model.module, models.BiLSTM)


def test_a_second_stage_without_steps_is_refused(tmp_path):
    config = small(stage_epochs=2, run_dir=str(tmp_path))
    message = r"stage_epochs \(2\) must be fewer than epochs \(2\)"
    with pytest.raises(ValueError, match=message):
        sst2_task.Task(config).arms()


def test_no_texts_is_one_sentence(tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: no sst2 in .*: looked for train\.tsv"
    ):
        sst2_bert.main(
            ["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]
        )
