# SPDX-License-Identifier: Apache-2.0
"""Several processes of one program: their start, their agreement, their one writer.

Every process runs the same script with the same flags, sees the devices of all, and
puts only its own part of a batch on its own. The first one alone writes logs, tables
and figures; all take part in saving and restoring. The run directory and the data must
be the same for all: a shared file system or object storage.

    by hand   JAX_COORDINATOR_ADDRESS=host0:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 \\
                python experiments/digits_mlp.py --distributed
              and on the other machine the same with JAX_PROCESS_ID=1
    SLURM     srun --ntasks=4 python experiments/digits_mlp.py
    TPU pod   gcloud compute tpus tpu-vm ssh NAME --worker=all --command="python ..."

When a process dies, the others cannot go on: they end at once where the connection
breaks, else within `HEARTBEAT_SECONDS`, and say so; on CPUs the transport (Gloo) may
abort one of several before it can. Start all of them again to resume from the last
checkpoint: each said so when it joined.
"""

import glob
import importlib.util
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 20
"""How long a process may be silent before the others take it for dead."""
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
"""Environment variables of a start by hand: host:port of the first process, how many
there are, and which this one is."""
_TPU_HOSTS = (
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
    "worker-network-endpoints"
)


class ProcessError(ValueError):
    """Processes that cannot work together; one sentence says why."""


def start(
    distributed: bool,
    settings: Mapping[str, Any],
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> None:
    """Joins the other processes, if there are any; before any device is touched.

    Args:
      distributed: join as the environment variables above say. On a TPU pod and in a
        SLURM step of several tasks the processes join in any case.
      settings: the command's; they must be the same in every process.
      heartbeat_seconds: see `HEARTBEAT_SECONDS`; a process that leaves waits as long
        for the others to leave too. A first call may set it for a script.

    Raises:
      ProcessError: the environment does not say who the others are, or the settings
        differ.
    """
    if not jax.distributed.is_initialized():
        if not (distributed or _in_a_cluster()):
            return  # and nothing has touched a device
        who: tuple[Any, ...] = () if _in_a_cluster() else _by_hand()
        names = ("heartbeat_timeout_seconds", "shutdown_timeout_seconds")
        timeouts: dict[str, Any] = dict.fromkeys(names, heartbeat_seconds)
        try:
            jax.distributed.initialize(*who, **timeouts)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ProcessError(
                "the environment names several processes and not how they meet: "
                f"{error!r}; start them with srun, or unset SLURM_STEP_NUM_TASKS, "
                "MEGASCALE_NUM_SLICES and TPU_WORKER_HOSTNAMES for one process"
            ) from error
        print(
            f"process {jax.process_index()} of {jax.process_count()}, "
            f"{jax.device_count()} devices; if one process dies, the others end within "
            f"{heartbeat_seconds} s: start all of them again to resume",
            file=sys.stderr,
            flush=True,
        )
    _check_same(settings)


def check_alone() -> None:
    """Raise ProcessError where a cluster runs a script of one process several times."""
    if _in_a_cluster():
        raise ProcessError(
            "this script is one process's, and several were started; start one task "
            "of it, on one machine"
        )


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def on_first(function: Callable[[], Any]) -> Any:
    """What a function returns in the first process, None in the others, which wait.

    An exception is raised in all of them, of the same type where that is possible.
    """
    if jax.process_count() == 1:
        return function()
    result, failure = None, None
    if is_first():
        try:
            result = function()
        except Exception as error:
            failure = error
    said = _gather("" if failure is None else str(failure) or repr(failure))[0]
    if failure is not None:
        raise failure
    if said:
        raise ProcessError(f"the first process failed: {said}")
    return result


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes; all must ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


@contextmanager
def fail_together():
    """Ends this process where a computation with the others fails: one of them died.

    Not where a device of its own ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
        print(
            f"process {jax.process_index()} of {jax.process_count()}: a computation "
            f"with the others failed, one of them has died or left; start all of them "
            f"again to resume ({reason})",
            file=sys.stderr,
            flush=True,
        )
        # Any clean-up would wait for the dead, or talk past those who still live.
        os._exit(1)


def out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX's says that a device's memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def write_whole(path: epath.Path, text: str) -> None:
    """Writes a file whole: a reader sees the old one or the new one.

    Several processes may write the same one.
    """
    if "://" in str(path):  # an object appears when it is complete
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(f"{path.name}.{jax.process_index()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def check_examples(size: int) -> None:
    """Raise ProcessError where some process would have nothing to do."""
    if size < jax.process_count():
        raise ProcessError(
            f"{size} examples do not go round {jax.process_count()} processes; start "
            f"at most {size}"
        )


def _by_hand() -> tuple[str, int, int]:
    missing = [name for name in BY_HAND if not os.environ.get(name)]
    if missing:
        raise ProcessError(
            f"--distributed needs {', '.join(BY_HAND)} in the environment, or SLURM, "
            f"or a TPU pod; not set: {', '.join(missing)}"
        )
    address, count, index = (os.environ[name] for name in BY_HAND)
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ProcessError(
            f"JAX_PROCESS_ID must be a number from 0 to JAX_NUM_PROCESSES - 1, got "
            f"{index!r} of {count!r}"
        )
    return address, int(count), int(index)


def _in_a_cluster() -> bool:
    # A batch script has SLURM_NTASKS without being a task: only a step has this one.
    if _count("SLURM_STEP_NUM_TASKS") > 1:
        return True
    if "tpu" not in (os.environ.get("JAX_PLATFORMS") or "tpu"):
        return False
    return _count("MEGASCALE_NUM_SLICES") > 1 or "," in _tpu_hosts()


def _count(name: str) -> int:
    """The number in an environment variable; 1 where it is not set."""
    said = os.environ.get(name, "1")
    if not said.isdecimal():
        raise ProcessError(f"{name} must be a number, got {said!r}")
    return int(said)


def _tpu_hosts() -> str:
    """The pod's machines, with commas between."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    if hosts is not None or not chips or importlib.util.find_spec("libtpu") is None:
        return hosts or ""
    request = urllib.request.Request(_TPU_HOSTS, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _check_same(settings: Mapping[str, Any]) -> None:
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(settings), default=str)
    first, *others = (json.loads(found) for found in _gather(text))
    for index, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if first.get(name) != other.get(name):
                raise ProcessError(
                    f"process {index} was started with {name} {other.get(name)!r}, "
                    f"process 0 with {first.get(name)!r}; give all the same flags"
                )


def _gather(text: str) -> list[str]:
    """Every process's text, in their order."""
    content = text.encode()
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
