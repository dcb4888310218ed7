# SPDX-License-Identifier: Apache-2.0
"""One owner of a folder that is being written: a run directory, a store.

On a disk the owner holds an operating system's lock on a file in the folder, which ends
with its process, however that ends. Where there are no such locks, as in object
storage, the file has a heartbeat, and an owner whose heart has stopped is dead.
"""

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from typing import Any

from etils import epath

NAME = "lock.json"
BEAT, DEAD = 10.0, 60.0
"""Seconds between heartbeats, and after how many without one an owner is dead."""


class InUse(RuntimeError):
    """A folder that another process writes; one sentence says which process."""


class Lock:
    """The lock of a folder, held from its making until `release`.

    A process may hold one several times, and lets go with the last.
    """

    def __init__(self, folder: Any, what: str):
        """Takes the lock.

        Args:
          folder: an existing one.
          what: it is, for messages.

        Raises:
          InUse: another process holds it.
        """
        local = "://" not in str(folder)
        # One folder has one lock, by whichever path a process comes to it.
        self._key = os.path.realpath(folder) if local else str(folder)
        held = _HELD.get(self._key)
        if held is None:
            path = epath.Path(folder) / NAME
            held = _HELD[self._key] = _File(path, what)
        held.count += 1
        self._held: _File | None = held

    def release(self) -> None:
        """Lets go; a second time does nothing."""
        held, self._held = self._held, None
        if held is None:
            return
        held.count -= 1
        if not held.count:
            _HELD.pop(self._key, None)
            held.release()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_) -> None:
        self.release()


def folder_at(path: str | os.PathLike) -> epath.Path:
    """A folder on a disk, or in object storage (`gs://...`).

    Raises:
      ValueError: it is neither.
    """
    scheme, found, _ = os.fspath(path).rpartition("://")
    if (found and scheme != "gs") or not os.fspath(path):
        raise ValueError(f"a folder, or gs://..., is wanted, got {os.fspath(path)!r}")
    return epath.Path(path)


class _File:
    """The file of a lock, the system's where it can be, else with a heartbeat."""

    def __init__(self, path: epath.Path, what: str):
        self.count, self._path, self._what = 0, path, what
        self._file: Any = None
        self._stop = threading.Event()
        self._owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "id": uuid.uuid4().hex,
        }
        if not self._take_file():
            self._take_beat()

    def release(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):  # the folder may be gone
            if self._file is not None or self._read() == self._owner:
                self._path.unlink()
        if self._file is not None:
            self._file.close()

    def _take_file(self) -> bool:
        """Whether the system could be asked; raises InUse where another has it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return False
        if "://" in str(self._path):
            return False
        while True:
            file = open(self._path, "a+", encoding="utf-8")  # noqa: SIM115  # until released
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise self._in_use(self._read()) from None
            except OSError:  # a file system without locks
                file.close()
                return False
            # Its last owner may have removed it between the two calls.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(file.fileno()).st_ino == os.stat(self._path).st_ino:
                    break
            file.close()
        self._say_taken_over(self._read())
        file.truncate(0)
        file.write(json.dumps(self._owner))
        file.flush()
        self._file = file
        return True

    def _take_beat(self) -> None:
        before = self._read()
        if before and time.time() - before.get("beat", 0) < DEAD:
            raise self._in_use(before)
        self._say_taken_over(before)
        self._beat()
        time.sleep(0.2)  # of two that wrote at once the later one is the owner
        if (found := self._read()) is None or found["id"] != self._owner["id"]:
            raise self._in_use(found)
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):
                self._beat()

    def _beat(self) -> None:
        self._owner["beat"] = time.time()
        self._path.write_text(json.dumps(self._owner), encoding="utf-8")

    def _read(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _say_taken_over(self, before: dict[str, Any] | None) -> None:
        if before is not None:
            print(
                f"{self._what} {self._path.parent}: taken over from {_who(before)}, "
                "which has ended",
                file=sys.stderr,
            )

    def _in_use(self, owner: dict[str, Any] | None) -> InUse:
        return InUse(
            f"{self._what} {self._path.parent} is in use by {_who(owner or {})}; wait "
            "for it or end it, or give another folder"
        )


def _who(owner: dict[str, Any]) -> str:
    if "process" not in owner:
        return "another process"
    return f"process {owner['process']} on {owner['host']} since {owner['since']}"


_HELD: dict[str, _File] = {}
"""This process's locks, by folder."""
