# SPDX-License-Identifier: Apache-2.0
"""Orbax checkpoints that know when they are damaged.

Orbax restores a flipped bit silently, and counts an empty folder as a step. So the
SHA-256 of every array is stored beside the arrays, inside the same atomic commit, and a
checkpoint is used only when every array still has its own.
"""

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxdistill import __version__
from jaxdistill.parallel import processes
from jaxdistill.parallel.lock import folder_at
from jaxdistill.teachers import fingerprints
from jaxdistill.teachers.programs import versions
from jaxdistill.train.identity import differences
from jaxdistill.types import TrainState

# Orbax reports each save and restore through absl, and a failure with the traceback of
# each of its threads; what failed is raised here, in a sentence.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or used; one sentence says which and why."""


class Checkpoints:
    """The checkpoints of one training: asynchronous, the last two and the best kept."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        identity: Mapping[str, Any] | None = None,
        best: str | None = None,
    ):
        """Opens or creates a folder of checkpoints.

        Args:
          directory: a local path or an object store's.
          identity: JSON stored beside each state and compared on restore, beside
            what `train.fit` says of the training (`train.identity`).
          best: the metric whose highest value marks the best checkpoint.

        Raises:
          CheckpointError: the folder cannot be made.
          ValueError: it is neither on a disk nor in gs://.
        """
        self.path = folder_at(directory)
        if "://" not in str(self.path):
            # By os: epath's own method needs etils 1.13.
            self.path = epath.Path(os.path.abspath(self.path))
        # As it is read again: JSON turns tuples into lists, which equal no tuple.
        self._identity = json.loads(json.dumps(identity or {}))
        # Here and below, not above: opening Orbax takes half a second.
        import orbax.checkpoint as ocp

        self._best, self._scores = best, dict[int, float]()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(self._scores), create=True
        )
        try:
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except OSError as error:
            raise CheckpointError(
                f"cannot open checkpoint folder {self.path}: {error}"
            ) from error
        if best is not None:
            for step in self.steps():
                self._scores[step] = self._score(step)

    def identify(self, training: Mapping[str, Any]) -> None:
        """Adds what a training is to the identity, unless it is there.

        Args:
          training: see `train.identity.of_training`.
        """
        self._identity.setdefault("training", training)

    @property
    def identified(self) -> bool:
        """Whether the identity says what the training is."""
        return "training" in self._identity

    def save(
        self,
        state: TrainState,
        position: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a state; returns once its arrays have left the device.

        Args:
          state: the parts where they are (`Partitioner.storable`), all of them a copy
            of one device, or arrays of the host. Each process writes its own parts.
          position: where the data stands, as JSON.
          metrics: for the choice of the best; without its metric a state is the worst.

        Raises:
          CheckpointError: this save, or the one before it, could not be written.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        arrays = _of_all_processes(_plain(state))
        meta = {
            "version": __version__,
            "identity": self._identity,
            "position": dict(position),
            "metrics": dict(metrics or {}),
            "leaves": _leaves(arrays),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays),
            meta=ocp.args.JsonSave({"meta": meta, "sha256": _hash(meta)}),
        )
        if self._best is not None:
            self._scores[step] = (metrics or {}).get(self._best, -math.inf)
        try:
            # The loop decides when to save. Without force Orbax's own policy may skip a
            # step.
            self._manager.save(step, args=args, force=True)
        except Exception as error:  # Orbax raises whatever its storage raised
            raise self._unwritten(step, error) from error

    def wait(self) -> None:
        """Blocks until the last save is on disk, or raises CheckpointError."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unwritten(None, error) from error

    def close(self) -> None:
        """Waits, then lets the folder go."""
        self.wait()
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a checkpoint, intact or not, oldest first."""
        return sorted(self._manager.all_steps(read=True))

    def best_step(self) -> int | None:
        """The step whose `best` metric is highest, the first of equals."""
        scores = {step: self._scores.get(step, -math.inf) for step in self.steps()}
        return max(scores, key=lambda step: scores[step], default=None)

    def restore(
        self, like: TrainState, step: int | None = None, *, shardings: Any = None
    ):
        """The newest intact checkpoint, or the given one.

        A damaged checkpoint is named in a warning, moved to `damaged/`, and the one
        before it is tried.

        Args:
          like: a state of the expected structure and shapes, on any devices.
          step: a step, or None for the newest.
          shardings: `Parallel.shardings(like)`, or None for the default device.

        Returns:
          `(state, position)`, or None where there is none.

        Raises:
          CheckpointError: the checkpoint is of another model, configuration or teacher.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            found, reason = None, ""
            try:
                found = self._read(candidate, like, shardings)
            except CheckpointError:
                raise
            except Exception as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
            # One process may have read a damaged part that the others have not.
            if not processes.any_process(found is None):
                return found
            warnings.warn(
                f"checkpoint {self.path / str(candidate)} is damaged ({reason}); "
                "moved to damaged/, using the one before it",
                stacklevel=2,
            )
            processes.on_first(partial(self._set_aside, candidate))
            # The manager keeps a list of steps, and does not know that one was moved
            # away.
            self._manager.reload()
        return None

    def _meta(self, step: int) -> Mapping[str, Any]:
        """What is stored beside a state.

        Raises:
          ValueError, or whatever Orbax does: it is damaged.
        """
        import orbax.checkpoint as ocp

        read = self._manager.restore(
            step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
        )["meta"]
        if _hash(read["meta"]) != read["sha256"]:
            raise ValueError("its description does not match its checksum")
        return read["meta"]

    def _score(self, step: int) -> float:
        """A step's `best` metric; of a damaged one, which `restore` names, none."""
        try:
            return self._meta(step)["metrics"].get(self._best, -math.inf)
        except Exception:
            return -math.inf

    def _read(self, step: int, like: TrainState, shardings: Any):
        import orbax.checkpoint as ocp

        meta = self._meta(step)
        self._check_identity(step, meta)
        self._check_shapes(step, meta["leaves"], _plain(like))
        abstract = _abstract(like, shardings)
        arrays = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )["state"]
        for name, leaf in _leaves(arrays).items():
            if leaf != meta["leaves"][name]:
                raise ValueError(f"array {name} does not match its checksum")
        return _state(arrays, like), meta["position"]

    def _check_identity(self, step: int, meta: Mapping[str, Any]) -> None:
        stored, version = dict(meta["identity"]), meta.get("version", "0.1")
        at = self.path / str(step)
        if not self.identified:  # opened to look at it, not to go on
            stored.pop("training", None)
        if self.identified and "training" not in stored:
            raise CheckpointError(
                f"checkpoint {at} does not say what made it (jaxdistill {version} "
                "wrote it): finish the run with that version, or begin it anew in "
                "another folder"
            )
        found = differences(stored, self._identity)
        old, new = versions(stored), versions(self._identity)
        if old and new and old != new:
            warnings.warn(
                f"checkpoint {at} was written with jax {', '.join(sorted(old))}: its "
                "module, objective and optimizer are compared by their numbers alone",
                stacklevel=2,
            )
        if found:
            raise CheckpointError(
                f"checkpoint {at} belongs to another run: {'; '.join(found)} "
                f"(jaxdistill {version} wrote it); give the first settings again to "
                "resume it, or another folder to begin anew"
            )

    def _check_shapes(self, step: int, stored: Mapping[str, Any], like: Any) -> None:
        expected = {
            jax.tree_util.keystr(path): [str(leaf.dtype), list(leaf.shape)]
            for path, leaf in jax.tree_util.tree_leaves_with_path(like)
        }
        found = {name: leaf[:2] for name, leaf in stored.items()}
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"checkpoint {self.path / str(step)} is of another model: {name} "
                    f"is {found.get(name)} there, {expected.get(name)} here"
                )

    def _set_aside(self, step: int) -> None:
        target = self.path / "damaged"
        target.mkdir(exist_ok=True)
        # A step that is trained again may be damaged again: each keeps a name of its
        # own.
        number = len(list(target.iterdir()))
        (self.path / str(step)).rename(target / f"{step}-{number}")

    def _unwritten(self, step: int | None, error: Exception) -> CheckpointError:
        which = "last checkpoint" if step is None else f"checkpoint of step {step}"
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if "No space left" in reason:
            reason = (
                "no space is left on the device; make some and give the command again"
            )
        kept = ", ".join(str(s) for s in self.steps() if s != step)
        last = f"steps kept: {kept}" if kept else "none was written before it"
        return CheckpointError(
            f"could not write the {which} to {self.path} (disk full or no permission?):"
            f" {reason}; {last}"
        )


class _Kept:
    """Which checkpoints stay: the newest two, as one may be damaged, and the best."""

    def __init__(self, scores: Mapping[int, float]):
        self.scores = scores

    def should_preserve(self, checkpoints: Any, *, context: Any = None) -> list[bool]:
        """One truth value for each of Orbax's checkpoints, which come oldest first."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set(steps[-2:])
        if known := [step for step in steps if step in self.scores]:
            kept.add(max(known, key=lambda step: self.scores[step]))
        return [step in kept for step in steps]


def _plain(state: TrainState) -> dict[str, Any]:
    """A state as a dict of numeric arrays; the typed key as its data."""
    return {**vars(state), "rng": jax.random.key_data(state.rng)}


def _of_all_processes(arrays: Any) -> Any:
    """Orbax takes no array of one process's devices where there are others."""
    if jax.process_count() == 1:
        return arrays
    return jax.tree.map(
        lambda x: x if not x.is_fully_addressable else np.asarray(x), arrays
    )


def _abstract(like: TrainState, shardings: Any) -> Any:
    """The shapes of a state's arrays, and where they are to be read to."""
    if shardings is None and jax.process_count() > 1:
        return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), _plain(like))
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, like)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        _plain(like),
        vars(shardings),
    )


def _state(arrays: Mapping[str, Any], like: TrainState) -> TrainState:
    rng = jax.random.wrap_key_data(arrays["rng"], impl=jax.random.key_impl(like.rng))
    return TrainState(**{**arrays, "rng": rng})


def _leaves(arrays: Any) -> dict[str, list]:
    """`{path: [dtype, shape, sha256]}`."""
    hashes = fingerprints.by_leaf(arrays).items()
    return {
        name: [str(jnp.asarray(leaf).dtype), list(leaf.shape), digest]
        for (name, digest), leaf in zip(hashes, jax.tree.leaves(arrays), strict=True)
    }


def _hash(meta: Any) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
