# SPDX-License-Identifier: Apache-2.0
"""Small classifiers of texts: PyTorch's values, sizes, padding that changes nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, models, objectives, teachers, train
from jaxdistill.models import cast_to_compute
from jaxdistill.objectives import combine, hard_labels, soft_targets

BAG = models.BagOfEmbeddings(19, 6, 3, hidden=(5, 4))
LSTM = models.BiLSTM(19, 6, 4, 3, inner=7)
TEACHER = models.BertClassifier(
    models.Encoder(models.TransformerConfig(19, 12, 2, 4)), 3
)
LENGTHS = np.array([7, 4, 1, 6])


def batch(garbage=0, length=7):
    """Four texts, the last a padded row; what lies in the padding may be anything."""
    rng = np.random.default_rng(0)
    keep = (np.arange(length)[None] < LENGTHS[:, None]).astype(np.int32)
    ids = np.where(keep > 0, rng.integers(0, 19, (4, length)), garbage)
    return {
        "inputs": {"input_ids": ids.astype(np.int32), "attention_mask": keep},
        "labels": np.array([0, 2, 1, 1], np.int32),
        "mask": np.array([1, 1, 1, 0], np.float32),
    }


def variables_of(module):
    """Weights large enough to matter."""
    variables = jax.jit(module.init)(jax.random.key(0), batch()["inputs"])
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


@pytest.mark.parametrize("hidden", [(), (5,), (5, 4)])
def test_a_bag_of_embeddings_is_its_formula(hidden):
    module = models.BagOfEmbeddings(19, 6, 3, hidden)
    variables = variables_of(module)
    found = module.apply(variables, batch(garbage=11)["inputs"])
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    words, ids = params["words"]["embedding"], batch()["inputs"]["input_ids"]
    for row, length in enumerate(LENGTHS):
        x = words[ids[row, :length]].mean(0)
        states = [x]
        for i in range(len(hidden) + 1):
            x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
            logits, x = x, np.maximum(x, 0)
            states.append(x)
        for mine, theirs in zip(found.hidden_states, states[:-1], strict=True):
            np.testing.assert_allclose(mine[row], theirs, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found.logits[row], logits, rtol=1e-5, atol=1e-5)


def test_parameter_counts():
    """V W embeddings; a dense layer has its bias; an LSTM four gates of one bias."""
    counts = {
        BAG: 19 * 6 + (6 + 1) * 5 + (5 + 1) * 4 + (4 + 1) * 3,
        models.BagOfEmbeddings(19, 6, 3): 19 * 6 + (6 + 1) * 3,
        LSTM: 19 * 6 + 2 * 4 * (6 * 4 + 4 * 4 + 4) + (8 + 1) * 7 + (7 + 1) * 3,
        models.BiLSTM(19, 6, 4, 3): 19 * 6 + 352 + (8 + 1) * 4 + (4 + 1) * 3,
    }
    for module, count in counts.items():
        shapes = jax.eval_shape(module.init, jax.random.key(0), batch()["inputs"])
        assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def torch_lstm(torch, params):
    """PyTorch's LSTM with the same weights; of its two biases one is zero."""
    lstm = torch.nn.LSTM(6, 4, bidirectional=True, batch_first=True)
    state = {}
    for ours, theirs in (("forward", ""), ("backward", "_reverse")):
        cell = jax.tree.map(np.asarray, params[ours])
        gates = "ifgo"  # in PyTorch's order
        parts = {
            "weight_ih": [cell[f"i{gate}"]["kernel"].T for gate in gates],
            "weight_hh": [cell[f"h{gate}"]["kernel"].T for gate in gates],
            "bias_ih": [cell[f"h{gate}"]["bias"] for gate in gates],
        }
        for name, arrays in parts.items():
            state[f"{name}_l0{theirs}"] = torch.tensor(np.concatenate(arrays))
        state[f"bias_hh_l0{theirs}"] = torch.zeros(16)
    lstm.load_state_dict(state)
    return lstm


def test_the_lstm_is_pytorchs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    variables = variables_of(LSTM)
    given = batch(garbage=11)["inputs"]
    found = jax.jit(LSTM.apply)(variables, given)
    params = jax.tree.map(np.asarray, variables["params"])
    words = torch.tensor(params["words"]["embedding"][given["input_ids"]])
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        words, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
    with torch.no_grad():
        outputs, (last, _) = torch_lstm(torch, params)(packed)
    states, _ = torch.nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)
    np.testing.assert_allclose(found.hidden_states[0], states, rtol=1e-5, atol=1e-5)
    both = np.concatenate([last[0], last[1]], axis=-1)
    inner = both @ params["inner"]["kernel"] + params["inner"]["bias"]
    inner = np.maximum(inner, 0)
    np.testing.assert_allclose(found.hidden_states[1], inner, rtol=1e-5, atol=1e-5)
    head = params["classifier"]
    logits = inner @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [BAG, LSTM], ids=["bag", "lstm"])
class TestPadding:
    def gradient(self, module, given):
        """Of every output at once, and their sum."""
        weights = jax.random.normal(jax.random.key(2), (64,))

        def total(variables, given):
            outputs = module.apply(variables, given)
            flat = [x.reshape(-1, x.shape[-1]) for x in jax.tree.leaves(outputs)]
            return sum((jnp.sin(x) @ weights[: x.shape[-1]]).sum() for x in flat)

        return jax.jit(jax.value_and_grad(total))(variables_of(module), given)

    @pytest.mark.parametrize("garbage", [18, 400])
    def test_tokens_in_it_change_nothing(self, module, garbage):
        """Not a bit of outputs and gradient, even where they are out of range."""
        plain, other = (self.gradient(module, batch(g)["inputs"]) for g in (0, garbage))
        for a, b in zip(*map(jax.tree.leaves, (plain, other)), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_array_equal(a, b)

    def test_more_of_it_changes_nothing(self, module):
        variables, short = variables_of(module), batch()["inputs"]
        long = {k: np.pad(v, ((0, 0), (0, 5))) for k, v in short.items()}
        apply = jax.jit(module.apply)
        one, other = (apply(variables, given) for given in (short, long))
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-6)
        gradients = [self.gradient(module, given)[1] for given in (short, long)]
        for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_a_text_alone_is_as_in_a_batch(self, module):
        variables, given = variables_of(module), batch()["inputs"]
        apply = jax.jit(module.apply)
        together = apply(variables, given).logits[1]
        alone = {"input_ids": given["input_ids"][1:2, : LENGTHS[1]]}
        found = apply(variables, alone).logits[0]
        np.testing.assert_allclose(found, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [BAG, LSTM], ids=["bag", "lstm"])
def test_dropout_is_of_training_alone(module):
    module = module.clone(dropout=0.5)
    variables, given = variables_of(module), batch()["inputs"]
    plain = jax.jit(module.apply)(variables, given).logits
    apply = jax.jit(partial(module.apply, train=True))
    one, other = (
        apply(variables, given, rngs={"dropout": jax.random.key(i)}).logits
        for i in (0, 1)
    )
    assert (one != other).any()
    still = module.clone(dropout=0.0)
    apply = jax.jit(partial(still.apply, train=True))
    found = apply(variables, given).logits
    np.testing.assert_allclose(plain, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [BAG, LSTM], ids=["bag", "lstm"])
def test_half_precision_is_of_all_layers(module):
    variables, given = variables_of(module), batch()["inputs"]
    plain = jax.jit(module.apply)(variables, given)
    found = jax.jit(module.apply)(cast_to_compute(variables, "bfloat16"), given)
    assert {x.dtype for x in (found.logits, *found.hidden_states)} == {
        jnp.bfloat16.dtype
    }
    np.testing.assert_allclose(found.logits, plain.logits, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("module", [BAG, LSTM], ids=["bag", "lstm"])
def test_a_bert_teaches_classes_and_hidden_states(module):
    given = batch()
    terms = {
        "hard": (1.0, hard_labels()),
        "soft": (1.0, soft_targets(temperature=2.0)),
    }
    if module is LSTM:  # hidden states by token, through a projection
        module = models.with_projector(module, models.Projector(((0, 12),)))
        terms["hint"] = (1.0, objectives.on_hidden_states(losses.hint_mse, ((0, 1),)))
    student, optimizer = models.student(module), optax.adam(0.03)
    state = train.init_state(jax.random.key(1), student, optimizer, given)
    teacher = teachers.live(
        TEACHER, jax.jit(TEACHER.init)(jax.random.key(2), given["inputs"])
    )
    step = jax.jit(train.make_train_step(student, combine(terms), optimizer))
    totals = []
    for _ in range(30):
        state, metrics = step(state, teacher, given)
        totals.append(float(metrics["loss"][0]))
    assert set(metrics) == {*terms, "loss"}
    assert totals[-1] < 0.9 * totals[0]
