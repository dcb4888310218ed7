# SPDX-License-Identifier: Apache-2.0
"""Which errors end a command in a sentence, and which are mistakes in a program."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdistill import losses, train
from jaxdistill.train import CheckpointError, RunError

ONES = np.ones((2, 5), np.float32)


def refuse():
    raise ValueError("--epochs must be 1 or more")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (refuse, "error: --epochs must be 1 or more"),
        (lambda: losses.forward_kl(ONES, ONES, temperature=0.0), "error: temperature "),
        (lambda: Path("/nowhere/at/all").read_text(), "error: .*No such file"),
    ],
    ids=["of the script", "of the package", "of the system"],
)
def test_what_the_user_can_mend_ends_in_a_sentence(call, sentence):
    with pytest.raises(SystemExit, match=sentence), train.exit_with_message():
        call()


@pytest.mark.parametrize("kind", [RunError, CheckpointError])
def test_the_packages_own_types_end_in_a_sentence(kind):
    with (
        pytest.raises(SystemExit, match="error: so it is"),
        train.exit_with_message(),
    ):
        raise kind("so it is")


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: jnp.ones(3).reshape(2), TypeError),
        (lambda: jnp.linspace(0.0, 1.0, -1), ValueError),
        (lambda: optax.cosine_decay_schedule(0.1, -1), ValueError),
        (lambda: int("three"), ValueError),
    ],
)
def test_a_programs_mistake_keeps_its_traceback(call, kind):
    with pytest.raises(kind), train.exit_with_message():
        call()


def test_a_script_that_jax_refuses_shows_where(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import jax.numpy as jnp\n"
        "from jaxdistill import train\n"
        "with train.exit_with_message():\n"
        "    jnp.linspace(0.0, 1.0, -1)  # my mistake\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "# my mistake" in done.stderr
