# SPDX-License-Identifier: Apache-2.0
"""Training in eight bits against its definition in NumPy."""

import sys

import jax
import numpy as np
import pytest

from jaxdistill import models
from jaxdistill.export.quantize import quantized
from jaxdistill.runtimes import ArtefactError

X = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
MODULE = models.MLP((8, 5))


def rounded(array):
    """On 255 levels, as far apart as the largest magnitude allows."""
    step = np.abs(array).max() / 127.5
    return np.clip(np.round(array / step), -128, 127) * step


def test_without_qwix_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ArtefactError, match=r"jaxdistill\[quantize\]"):
        quantized(MODULE)


@pytest.mark.filterwarnings("ignore:'VariableState' was removed")  # qwix's use of flax
class TestQuantized:
    @pytest.fixture(autouse=True)
    def needs_qwix(self):
        pytest.importorskip("qwix", reason="qwix is not installed")

    def test_it_has_the_parameters_of_the_float_module(self):
        rng = jax.random.key(0)
        whole, eight = (m.init(rng, X) for m in (MODULE, quantized(MODULE)))
        jax.tree.map(np.testing.assert_array_equal, whole, eight)

    def test_both_sides_of_each_product_are_rounded(self):
        variables = MODULE.init(jax.random.key(0), X)
        first, last = (
            {k: np.asarray(v) for k, v in variables["params"][f"Dense_{i}"].items()}
            for i in range(2)
        )
        hidden = np.maximum(rounded(X) @ rounded(first["kernel"]) + first["bias"], 0)
        expected = rounded(hidden) @ rounded(last["kernel"]) + last["bias"]
        found = quantized(MODULE).apply(variables, X).logits
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        whole = MODULE.apply(variables, X).logits
        assert 1e-4 < np.abs(found - whole).max() < 0.1 * np.abs(whole).max()

    def test_the_gradient_goes_through_the_rounding(self):
        """That of the last kernel: the hidden layer times what comes back."""
        module = quantized(MODULE)
        variables = MODULE.init(jax.random.key(0), X)
        slope = jax.grad(lambda v: module.apply(v, X).logits.sum())(variables)
        first = variables["params"]["Dense_0"]
        kernel, bias = np.asarray(first["kernel"]), np.asarray(first["bias"])
        hidden = np.maximum(rounded(X) @ rounded(kernel) + bias, 0)
        expected = np.repeat(hidden.sum(0)[:, None], 5, 1)
        found = slope["params"]["Dense_1"]["kernel"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_convolutions_are_rounded_too(self):
        images = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
        module = models.ConvNet((4,), 8, 5)
        variables = module.init(jax.random.key(0), images)
        whole = module.apply(variables, images).logits
        found = quantized(module).apply(variables, images).logits
        assert 1e-5 < np.abs(found - whole).max() < 0.1 * np.abs(whole).max()
