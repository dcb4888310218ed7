# SPDX-License-Identifier: Apache-2.0
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxdistill import models, pretrained
from jaxdistill.teachers import fingerprints
from jaxdistill.types import Outputs

torch = pytest.importorskip("torch", reason="converting PyTorch weights needs torch")


class Net(nn.Module):
    """Two convolutions with BatchNorm, then a classifier on the flattened maps."""

    theirs: bool = True

    @nn.compact
    def __call__(self, inputs, mask=None, train=False):
        x = inputs
        for width, stride in ((4, 1), (6, 2)):
            x = nn.Conv(width, (3, 3), (stride, stride), padding=1)(x)
            x = nn.relu(models.BatchNorm()(x, mask, train))
        if self.theirs:  # PyTorch flattens channels first
            x = x.transpose(0, 3, 1, 2)
        return Outputs(nn.Dense(5)(x.reshape(len(x), -1)))


def torch_net():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(6),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 4 * 4, 5),
    )
    with torch.no_grad():  # statistics and scales that are not those of a fresh layer
        for name, value in net.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                value.add_(0.3 * torch.rand_like(value))
    return net.eval()


def torch_mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3)
    )


def shapes(module, inputs):
    return jax.eval_shape(module.init, jax.random.key(0), inputs)


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(3, 8, 8, 2)).astype(np.float32)


def theirs(module, images):
    with torch.no_grad():
        return module(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()


def test_conv_batchnorm_forward_agrees_nhwc_against_nchw(images):
    net = torch_net()
    variables = pretrained.from_torch(net.state_dict(), shapes(Net(), images))
    logits = Net().apply(variables, images).logits
    np.testing.assert_allclose(logits, theirs(net, images), rtol=1e-5, atol=1e-5)


def test_flatten_needs_channels_first(images):
    """The caveat: the same shapes, and another function."""
    net = torch_net()
    like = shapes(Net(theirs=False), images)
    variables = pretrained.from_torch(net.state_dict(), like)
    wrong = Net(theirs=False).apply(variables, images).logits
    assert abs(wrong - theirs(net, images)).max() > 0.1


def test_flatten_by_permuting_the_classifier(images):
    """The other way out: our own flatten, its kernel's rows in our order."""
    net = torch_net()
    variables = pretrained.from_torch(net.state_dict(), shapes(Net(), images))
    kernel = variables["params"]["Dense_0"]["kernel"]
    rows = kernel.reshape(6, 4, 4, 5).transpose(1, 2, 0, 3).reshape(kernel.shape)
    variables["params"]["Dense_0"]["kernel"] = rows
    logits = Net(theirs=False).apply(variables, images).logits
    np.testing.assert_allclose(logits, theirs(net, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "module", "inputs"),
    [
        (torch_mlp, models.MLP((7, 3)), np.zeros((1, 6), np.float32)),
        (torch_net, Net(), np.zeros((1, 8, 8, 2), np.float32)),
    ],
    ids=["mlp", "conv_batchnorm"],
)
def test_round_trips_are_the_identity(build, module, inputs):
    state = build().state_dict()
    variables = pretrained.from_torch(state, shapes(module, inputs))
    back = pretrained.to_torch(variables, state)
    assert set(back) == set(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)
    again = pretrained.from_torch(back, variables)
    assert fingerprints.of_tree(again) == fingerprints.of_tree(variables)
    # Given to PyTorch as the docstring says, with nothing to warn of.
    fresh = build()
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_of_other_ranks(rank):
    layer = getattr(torch.nn, f"Conv{rank}d")(2, 4, 3)
    ours = nn.Conv(4, (3,) * rank, padding="VALID")
    x = np.random.default_rng(0).normal(size=(1, *(5,) * rank, 2)).astype(np.float32)
    names = {"0": "Conv_0"}

    class Wrap(nn.Module):
        @nn.compact
        def __call__(self, inputs):
            return ours.clone(parent=self, name="Conv_0")(inputs)

    state = torch.nn.Sequential(layer).state_dict()
    variables = pretrained.from_torch(state, shapes(Wrap(), x), names)
    with torch.no_grad():
        expected = layer(torch.tensor(np.moveaxis(x, -1, 1)))
    got = np.moveaxis(np.asarray(Wrap().apply(variables, x)), -1, 1)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-5, atol=1e-5)
    back = pretrained.to_torch(variables, state, names)
    np.testing.assert_array_equal(back["0.weight"], state["0.weight"].numpy())


def test_converted_arrays_do_not_share_memory():
    """A network that trains on must not change the teacher made from it."""
    net = torch_mlp()
    like = shapes(models.MLP((7, 3)), np.zeros((1, 6), np.float32))
    variables = pretrained.from_torch(net.state_dict(), like)
    before = fingerprints.of_tree(variables)
    with torch.no_grad():
        for weight in net.parameters():
            weight.zero_()
    assert fingerprints.of_tree(variables) == before


def test_names_pair_layers_by_hand():
    state = {
        "head.weight": np.ones((3, 7), np.float32),
        "head.bias": np.zeros(3, np.float32),
        "body.weight": np.full((7, 6), 2, np.float32),
        "body.bias": np.zeros(7, np.float32),
    }
    like = shapes(models.MLP((7, 3)), np.zeros((1, 6), np.float32))
    with pytest.raises(ValueError, match=r"shape \(7, 3\), the module needs \(6, 7\)"):
        pretrained.from_torch(state, like)  # in order, the head comes first
    names = {"body": "Dense_0", "head": "Dense_1"}
    variables = pretrained.from_torch(state, like, names)
    assert (variables["params"]["Dense_0"]["kernel"] == 2).all()
    back = pretrained.to_torch(variables, state, names)
    np.testing.assert_array_equal(back["head.weight"], state["head.weight"])


class Named(nn.Module):
    """Layers that have names of their own, defined in another order than sorted."""

    names: tuple[str, ...]

    @nn.compact
    def __call__(self, inputs):
        return sum(nn.Dense(6, name=name)(inputs) for name in self.names)


def torch_named(names):
    layers = {name: torch.nn.Linear(6, 6) for name in names}
    for i, layer in enumerate(layers.values()):
        torch.nn.init.constant_(layer.weight, i)
    return torch.nn.ModuleDict(layers).state_dict()


def test_layers_of_the_same_names_are_paired_by_them():
    names = ("query", "key", "value")
    variables = pretrained.from_torch(
        torch_named(names), shapes(Named(names), np.zeros((1, 6), np.float32))
    )
    for i, name in enumerate(names):
        assert (variables["params"][name]["kernel"] == i).all()


def test_names_that_have_no_order_are_not_guessed():
    like = shapes(Named(("up", "down")), np.zeros((1, 6), np.float32))
    state = torch_named(("first", "second"))
    with pytest.raises(ValueError, match="down and up have one shape, and their names"):
        pretrained.from_torch(state, like)
    variables = pretrained.from_torch(state, like, {"first": "up"})
    assert (variables["params"]["down"]["kernel"] == 1).all()


@pytest.mark.parametrize("names", [("up_2", "up_10"), ("block2_up", "block10_up")])
def test_numbers_are_an_order(names):
    like = shapes(Named(names), np.zeros((1, 6), np.float32))
    variables = pretrained.from_torch(torch_named(("first", "second")), like)
    assert (variables["params"][names[1]]["kernel"] == 1).all()


class TestErrors:
    like = shapes(models.MLP((7, 3)), np.zeros((1, 6), np.float32))
    names = {"0": "Dense_0", "2": "Dense_1"}

    def state(self):
        return {k: v.numpy() for k, v in torch_mlp().state_dict().items()}

    def test_left_over_there(self):
        state = {**self.state(), "4.weight": np.ones((2, 2), np.float32)}
        with pytest.raises(ValueError, match=r"1 PyTorch layers .*\(4\) against 0"):
            pretrained.from_torch(state, self.like, self.names)

    def test_a_weight_of_no_layer(self):
        state = {**self.state(), "gate": np.ones(2, np.float32)}
        with pytest.raises(ValueError, match="'gate' has no partner among"):
            pretrained.from_torch(state, self.like)

    def test_numbers_of_layers_differ(self):
        state = {**self.state(), "4.weight": np.ones((2, 2), np.float32)}
        message = r"3 PyTorch layers .*\(0, 2, 4\) against 2 here .*pair them by name"
        with pytest.raises(ValueError, match=message):
            pretrained.from_torch(state, self.like)

    def test_no_place_here(self):
        state = {**self.state(), "0.running_mean": np.ones(7, np.float32)}
        with pytest.raises(ValueError, match="no place batch_stats/Dense_0/mean here"):
            pretrained.from_torch(state, self.like, self.names)

    def test_missing_there(self):
        state = self.state()
        del state["2.bias"]
        with pytest.raises(ValueError, match="no PyTorch weight for .*Dense_1/bias"):
            pretrained.from_torch(state, self.like)

    def test_wrong_shape(self):
        state = {**self.state(), "2.bias": np.zeros(4, np.float32)}
        message = r"'2.bias' gives params/Dense_1/bias the shape \(4,\).* needs \(3,\)"
        with pytest.raises(ValueError, match=message):
            pretrained.from_torch(state, self.like)

    def test_two_layers_of_one_module_must_be_the_same(self):
        state, names = self.state(), {**self.names, "4": "Dense_1"}
        state["4.weight"] = state["2.weight"].copy()
        pretrained.from_torch(state, self.like, names)
        state["4.weight"][0, 0] += 1
        message = "'2.weight' and '4.weight' differ, and both go to params/Dense_1/ker"
        with pytest.raises(ValueError, match=message):
            pretrained.from_torch(state, self.like, names)

    def test_missing_here(self):
        variables = pretrained.from_torch(self.state(), self.like)
        del variables["params"]["Dense_1"]["bias"]
        with pytest.raises(ValueError, match="no weight here for PyTorch's '2.bias'"):
            pretrained.to_torch(variables, self.state())

    def test_left_over_here(self):
        variables = pretrained.from_torch(self.state(), self.like)
        variables["params"]["Dense_1"]["gate"] = np.zeros(3, np.float32)
        with pytest.raises(ValueError, match="nothing in PyTorch takes .*Dense_1/gate"):
            pretrained.to_torch(variables, self.state())

    def test_wrong_shape_there(self):
        variables = pretrained.from_torch(self.state(), self.like)
        like = {**self.state(), "2.bias": np.zeros(4, np.float32)}
        message = r"gives PyTorch's '2.bias' the shape \(3,\), it needs \(4,\)"
        with pytest.raises(ValueError, match=message):
            pretrained.to_torch(variables, like)


class TestFiles:
    def test_torch_file(self, tmp_path):
        state = torch_net().state_dict()
        torch.save(state, tmp_path / "net.pt")
        loaded = pretrained.load_state_dict(tmp_path / "net.pt")
        assert set(loaded) == set(state)
        for key, value in state.items():
            np.testing.assert_array_equal(loaded[key], value.numpy())

    def test_safetensors(self, tmp_path):
        reason = "reading safetensors needs safetensors"
        files = pytest.importorskip("safetensors.torch", reason=reason)
        state = torch_mlp().state_dict()
        files.save_file(state, tmp_path / "net.safetensors")
        loaded = pretrained.load_state_dict(str(tmp_path / "net.safetensors"))
        assert set(loaded) == set(state)
        for key, value in state.items():
            np.testing.assert_array_equal(loaded[key], value.numpy())

    def test_bfloat16_stays_what_it_is(self, tmp_path):
        state = torch_net().bfloat16().state_dict()
        torch.save(state, tmp_path / "net.pt")
        for key, array in pretrained.load_state_dict(tmp_path / "net.pt").items():
            counter = key.endswith("num_batches_tracked")
            assert array.dtype == ("int64" if counter else jnp.bfloat16)
            np.testing.assert_array_equal(
                array.astype(np.float32), state[key].float().numpy()
            )

    @pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + bytes(60)])
    def test_damaged_and_missing_files_are_named(self, tmp_path, name, content):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
        with pytest.raises(ValueError, match=f"{name} does not exist"):
            pretrained.load_state_dict(tmp_path / name)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is (damaged|no file of tens)"):
            pretrained.load_state_dict(tmp_path / name)

    def test_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors", None)
        monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
        with pytest.raises(ValueError, match=r"needs safetensors.*\[huggingface\]"):
            pretrained.load_state_dict(tmp_path / "net.safetensors")

    @pytest.mark.parametrize("writer", ["torch", "pickle"])
    def test_code_in_a_file_never_runs(self, tmp_path, writer):
        path = tmp_path / "net.pt"
        bait = {"weight": _Bait(tmp_path / "ran")}
        if writer == "torch":
            torch.save(bait, path)
        else:
            path.write_bytes(pickle.dumps(bait, protocol=2))  # torch's own
        with pytest.raises(ValueError, match="no file of tensors alone"):
            pretrained.load_state_dict(path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "content", [{"state_dict": {"a": 1}}, [1, 2]], ids=["nested", "list"]
    )
    def test_not_a_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "net.pt")
        with pytest.raises(ValueError, match="does not hold a state_dict"):
            pretrained.load_state_dict(tmp_path / "net.pt")


class _Bait:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_whole_teacher_agrees_in_float64(images):
    with jax.enable_x64(True):
        net = torch_net().double()
        variables = pretrained.from_torch(net.state_dict(), shapes(Net(), images))
        inputs = images.astype(np.float64)
        logits = Net().apply(jax.tree.map(jnp.asarray, variables), inputs).logits
    np.testing.assert_allclose(logits, theirs(net, inputs), rtol=1e-12, atol=1e-12)
