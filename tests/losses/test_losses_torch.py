# SPDX-License-Identifier: Apache-2.0
"""Losses beside public PyTorch implementations, in those' own conventions."""

from functools import partial

import numpy as np
import pytest

from tests.losses import references
from tests.losses.losses_table import CASES

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

# `{loss: (what theirs is multiplied by to give our mean, what they are given)}`
ROWS = 6
THEIRS = {
    "cross_entropy": (None, {}),
    "cross_entropy smoothed": (None, {}),
    "forward_kl": (None, {}),
    "forward_kl T=4": (None, {}),
    "reverse_kl": (None, {}),
    "soft_cross_entropy": (None, {}),
    "generalized_jsd even": (None, {}),  # TRL leaves T^2 out; here T is 1
    "ctc": (None, {}),
    "decoupled_kl": (1, {}),
    "dist": (1, {}),
    "hint_mse": (1, {}),
    "patient_mse": (1, {}),
    "attention_transfer": (1, {}),
    "attention_transfer power 4": (1, {}),
    "neuron_selectivity": (1, {}),
    "attention_mse": (1, {}),
    "relational_distance": (ROWS / (ROWS - 1), {}),  # they count i = j
    "relational_angle": (ROWS**2 / ((ROWS - 1) * (ROWS - 2)), {}),
    "similarity_preserving": (1, {}),
    "probabilistic_transfer": (ROWS, {"itself": False}),
    "correlation_congruence": (1, {}),
}


def channels_first(x):
    """Feature maps in PyTorch's order."""
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in THEIRS], ids=lambda case: case.name
)
def test_is_the_public_implementations(case):
    factor, extra = THEIRS[case.name]
    args = case.arguments(3)
    maps = case.loss.__name__ in ("attention_transfer", "neuron_selectivity")
    given = [torch.from_numpy(np.array(channels_first(x) if maps else x)) for x in args]
    theirs = getattr(references, f"torch_{case.loss.__name__}")
    expected = theirs(torch, *given, **case.settings, **extra).numpy()
    values = np.asarray(case(*args)[0])
    if factor is not None:
        values, expected = values.mean(), factor * expected
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=1e-5)


def test_all_rows_are_found():
    assert set(THEIRS) <= {case.name for case in CASES}


def test_contrastive_is_repdistillers():
    """Its critic with a bank, the student's side, without the constant Z."""
    from jaxdistill import losses

    rng = np.random.default_rng(0)
    shapes = ((4, 3), (4, 3), (9, 3))
    student, teacher, bank = (rng.normal(size=s).astype(np.float32) for s in shapes)
    loss = partial(references.torch_contrastive, torch)
    tensors = map(torch.from_numpy, (student, teacher))
    expected = loss(*tensors, bank=torch.from_numpy(bank), dataset_size=50)
    values = losses.contrastive(student, teacher, bank=bank, dataset_size=50)
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-4)
