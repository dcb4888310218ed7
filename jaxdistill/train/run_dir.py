# SPDX-License-Identifier: Apache-2.0
"""A run directory: all that report, benchmark and export need, and nothing else.

    config.json     the command's settings
    env.json        versions, devices, commit
    metrics.jsonl   one record a line, in order
    summary.json    the result, written last
    checkpoints/    one folder a training

The directory may lie in object storage (`gs://...`): files are small and written whole.
What else a command needs is here: its flags, compiled programs kept on disk, and errors
in one sentence.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from etils import epath

from jaxdistill.parallel import processes
from jaxdistill.parallel.lock import Lock, folder_at
from jaxdistill.parallel.sealed import read_sealed, seal, unseal

FREE = (
    "run_dir",
    "data_dir",
    "parallel",
    "distributed",
    "stored",
    "remat",
    "save",
    "compilation_cache",
    "progress",
)
"""Flags that are no settings of a run: it may be resumed with others.

Of `parallel` seeds alone has checkpoints of its own, and says so.
"""

PACKAGES = ("jaxdistill", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
"""On which numbers depend."""


class RunError(RuntimeError):
    """A run directory that cannot be used; one sentence says why."""


class RunDir:
    """A run directory, opened for one configuration.

    Of several processes the first writes; the others' calls do nothing.
    """

    def __init__(self, directory: str | os.PathLike, config: Mapping[str, Any]):
        """Opens or creates a directory.

        It is this process's until it ends, or until nothing refers to this object.

        Raises:
          RunError: it holds a run with another configuration, or is damaged, or cannot
            be written.
          InUse: another process has it.
        """
        self.path = folder_at(directory)
        # As it is read again from config.json: JSON turns tuples into lists.
        self.settings = json.loads(json.dumps(config))
        self._opened = time.monotonic()
        self._environment = environment()
        self._records: list[dict[str, Any]] = []
        try:
            processes.on_first(lambda: self._open(self.settings))
        except OSError as error:
            raise RunError(
                f"cannot write to run directory {directory}: {error}"
            ) from error

    def _open(self, config: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = Lock(self.path, "run directory")
        weakref.finalize(self, lock.release)
        self._records = read_records(self.path / "metrics.jsonl")
        known = self.path / "config.json"
        # Without a record nothing was trained, as when a setting was refused: the
        # corrected command must not be taken for another run.
        if self._records and known.exists():
            remedy = (
                "delete it and give the first command again, whose settings each "
                "checkpoint knows, or another --run-dir"
            )
            self._compare(read_sealed(known, remedy), config)
        else:
            self.write("config.json", config)
        if not self._records:  # else it is of what trained them, see `dispatched`
            self.write("env.json", self._environment)

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file whole: a reader sees the old one or the new one.

        An object gets a checksum (`parallel.sealed`).
        """
        value = seal(value) if isinstance(value, Mapping) else value
        self._replace(name, json.dumps(value, indent=1) + "\n")

    def write_bytes(self, name: str, content: bytes) -> None:
        """Writes a file below the directory."""
        if not processes.is_first():
            return
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(content)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends a record to metrics.jsonl."""
        self._records.append(dict(record))
        if not processes.is_first():
            return
        if "://" in str(self.path):  # an object cannot be appended to
            self._replace("metrics.jsonl", _lines(self._records))
            return
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_lines([record]))

    def dispatched(self, steps: int) -> None:
        """Notes in env.json how long this process took to train its first `steps`.

        The time runs from the opening of the directory: reading the data, drawing the
        weights, compilation, and the steps themselves.
        """
        if "first_dispatch" not in self._environment:
            seconds = round(time.monotonic() - self._opened, 3)
            first = {"steps": steps, "seconds": seconds}
            self._environment["first_dispatch"] = first
            self.write("env.json", self._environment)

    def rewind(self, fit: str, step: int) -> None:
        """Drops what training `fit` logged after `step`: it resumes from there."""
        kept = [r for r in self._records if r["fit"] != fit or r["step"] <= step]
        self._keep_damaged()
        # Also where nothing is dropped: a kill may have left half a line in the file.
        self._records = kept
        self._replace("metrics.jsonl", _lines(kept))

    def _keep_damaged(self) -> None:
        """Copies metrics.jsonl where it has lines that are about to be lost."""
        path = self.path / "metrics.jsonl"
        if not (processes.is_first() and path.exists() and _lines_of(path)[1]):
            return
        number = len(list(self.path.glob("metrics.damaged*.jsonl")))
        path.copy(self.path / f"metrics.damaged-{number}.jsonl", overwrite=True)

    def __str__(self) -> str:
        """What a script says last: where all is, and how soon the training began."""
        first = self._environment.get("first_dispatch")
        where = f"run directory: {self.path}"
        if first is None:
            return where
        return f"{where} (first {first['steps']} steps after {first['seconds']:.1f} s)"

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records, in order."""
        return list(self._records)

    def _replace(self, name: str, text: str) -> None:
        if processes.is_first():
            processes.write_whole(self.path / name, text)

    def _compare(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        changed = [
            f"{key} was {old.get(key)!r}, is now {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise RunError(
                f"run directory {self.path} holds another run: {'; '.join(changed)}; "
                "give another --run-dir, or the first command again to resume it"
            )


def parse(presets: Mapping[str, Any], argv: Sequence[str] | None, description: Any):
    """A script's command line as its configuration; `--preset` chooses the defaults.

    Compiled programs are kept on disk where its flag `compilation_cache` says so. Where
    the script has a flag `distributed`, its processes join (`processes.start`); one
    without it ends where there are several.

    Args:
      presets: `{name: configuration}`, dataclasses; the first is the default.
      argv: the arguments, None for the process's own.
      description: the script's docstring.
    """
    import tyro

    first = next(iter(presets))
    # tyro wants the defaults before it reads the flags that choose them.
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", default=first)
    preset = early.parse_known_args(argv)[0].preset
    # tyro refuses an unknown preset below, and lists those that there are.
    default = presets.get(preset, presets[first])
    config = tyro.cli(
        type(default), args=argv, default=default, description=description
    )
    for name, value in vars(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                flag = name.replace("_", "-")
                sys.exit(f"error: --{flag} must be a finite number, got {number}")
    if getattr(config, "compilation_cache", False):
        enable_compilation_cache()
    try:
        if hasattr(config, "distributed"):
            processes.start(config.distributed, asdict(config))
        else:
            processes.check_alone()
    except processes.ProcessError as error:
        sys.exit(f"error: {error}")
    return config


def settings(config: Any) -> dict[str, Any]:
    """A script's configuration, but for the flags that its results do not depend on."""
    return {k: v for k, v in asdict(config).items() if k not in FREE}


def read_records(path: epath.Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line cut short by a kill is dropped.

    Warns:
      UserWarning: another line is damaged; it is named, and the others are read.
    """
    if not path.exists():
        return []
    records, damaged = _lines_of(path)
    if damaged:
        numbers = ", ".join(map(str, damaged))
        warnings.warn(
            f"{path} is damaged in line {numbers}, which is left out; the other "
            f"{len(records)} records are read",
            stacklevel=2,
        )
    return records


def _lines_of(path: epath.Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a metrics.jsonl, and the numbers of its damaged lines."""
    records, damaged = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = unseal(line)
            if not {"fit", "step"} <= set(record):
                raise ValueError("it is no record")
            records.append(record)
        except ValueError:
            # What a kill has cut has no end of line; behind the last there is nothing.
            if number < len(lines):
                damaged.append(number)
    return records, damaged


def read_summary(run_dir: Any) -> dict[str, Any]:
    """A run's summary.json, with what jaxdistill 0.1 called rows under `arms`.

    Raises:
      RunError: there is none.
      Damaged: it is not what was written.
    """
    path = folder_at(run_dir) / "summary.json"
    if not path.exists():
        raise RunError(
            f"there is no {path}: the run is not finished (give its command again), or "
            f"{run_dir} is no run directory"
        )
    summary = read_sealed(path, "give the command of the run again, which writes it")
    if "rows" in summary:
        summary["arms"] = {
            name: {"arm": arm.get("row"), **arm}
            for name, arm in summary.pop("rows").items()
        }
    return summary


def environment() -> dict[str, Any]:
    """What the numbers depend on: versions, devices, precision, commit."""
    device = jax.devices()[0]
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "cpu_count": os.cpu_count(),
        "matmul_precision": precision or "default",
        "commit": _commit(),
    }


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _lines(records) -> str:
    return "".join(json.dumps(seal(record)) + "\n" for record in records)


def enable_compilation_cache() -> None:
    """Keeps all programs compiled from now on, however small.

    They lie in `jaxdistill/` in the user's cache folder, in one part for each kind of
    processor, as a program made for another may not run. The user's own settings come
    first: nothing is changed where JAX has a folder already (JAX_COMPILATION_CACHE_DIR)
    or is told to keep none (JAX_ENABLE_COMPILATION_CACHE=0).
    """
    setting = jax.config.values.get
    enabled = setting("jax_enable_compilation_cache")
    if not enabled or setting("jax_compilation_cache_dir"):
        return
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # there is no home: nothing is kept
        return
    folder = caches / "jaxdistill" / _features()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # By default only what took a second: small students compile in less, many times.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Not 0: JAX may then choose a least size by the file system.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _features() -> str:
    """A name for what XLA compiles for on a CPU: the architecture and its features."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next(
            line for line in lines if line.startswith(("flags", "Features"))
        )
    except (OSError, StopIteration):
        features = platform.processor()
    features = " ".join(sorted(features.split()))
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


SOURCES = Path(__file__).parents[1]


@contextmanager
def exit_with_message(script: Callable | None = None) -> Iterator[None]:
    """Ends the process with an error's message alone, where that says what to do.

    Such are the types that this package defines, `OSError`, and a `ValueError` that a
    `raise` made in this package, in the folder of the script or in its own package.
    Where JAX finds no device, the message says what it was asked for. All else is a
    mistake in a program, as when JAX refuses two shapes: it passes, with its traceback.

    Args:
      script: a function of the script; None is what has this `with`.
    """
    for stream in (sys.stdout, sys.stderr):  # in an ASCII locale there is no "±"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        yield
    except Exception as error:
        if _of_backend(error):
            asked = os.environ.get("JAX_PLATFORMS") or "any that it knows"
            reason = str(error) or "the platform is not known to this jaxlib"
            sys.exit(
                f"error: JAX finds no device of JAX_PLATFORMS={asked}: {reason}; "
                "JAX_PLATFORMS=cpu always works"
            )
        if not _explains_itself(error, script):
            raise
        sys.exit(f"error: {error}")


def _of_backend(error: Exception) -> bool:
    """Whether JAX could not start a device."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__") == "jax._src.xla_bridge"


def _explains_itself(error: Exception, script: Callable | None) -> bool:
    if isinstance(error, OSError) or type(error).__module__.startswith("jaxdistill."):
        return True
    if not isinstance(error, ValueError):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    last = frames[-1]  # and the first is of `yield`
    names = frames[1].f_globals if script is None else script.__globals__
    file = Path(last.f_code.co_filename)
    package = (names.get("__package__") or "").split(".")[0]
    ours = (
        file.is_relative_to(SOURCES)
        or file.parent == Path(names.get("__file__", "")).parent
        or (package and (last.f_globals.get("__package__") or "").startswith(package))
    )
    # JAX takes its own frames out of a traceback: then the last is the call of it.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return bool(ours) and line.startswith("raise ")
