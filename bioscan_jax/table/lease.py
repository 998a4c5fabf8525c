"""A lease in an object store, by which one process at a time writes a table, on whatever machine it runs.

A lease is a numbered object that is created only if absent; the highest number is in force. Its owner rewrites it every
`BEAT_SECONDS`. Once that has not happened for `STALE_SECONDS`, the next process takes over by creating the next number,
which one process alone can do, and the former owner, should it wake up, finds that number before it commits.
"""

import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.location import driver_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BEAT_SECONDS = 15.0
"""How often a lease is renewed."""
STALE_SECONDS = 90.0
"""Age from which on a lease may be taken over."""
_held: "set[_Lease]" = set()
"""The leases of this process."""


def this_process() -> dict[str, Any]:
    """Returns what names this process to others: number, host, command and the time."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.orig_argv), "started": started}


def describe(holder: dict[str, Any]) -> str:
    """Names the process that `this_process` described."""
    return f"process {holder['pid']} on {holder['host']} since {holder['started']} ({holder['command'][:200]})"


@contextmanager
def held_lease(where: str, what: str) -> Iterator[Callable[[], None]]:
    """Holds a lease, and yields a function that raises InputError once it is lost.

    Args:
        where: URL of the directory for the lease's objects.
        what: What messages call that which is leased.

    Raises:
        InputError: Another process, which the message names, holds it; no driver is installed for the URL; or the
            storage failed.
    """
    from fsspec.core import url_to_fs

    try:
        filesystem, root = url_to_fs(where)
    except (ImportError, ValueError) as error:
        raise InputError(f"{where}: {one_line(error)}; install that driver or pass another URL") from error
    lease = _Lease(filesystem, root, where, what)
    _held.add(lease)
    try:
        with driver_errors(where):
            lease.acquire()
        stop = threading.Event()
        keeper = threading.Thread(target=lease.keep, args=(stop,), name="lease", daemon=True)
        keeper.start()
        try:
            yield lease.check
        finally:
            stop.set()
            keeper.join()
            with suppress(Exception):  # it then lapses by itself
                lease.release()
    finally:
        _held.discard(lease)


def release_all(seconds: float) -> None:
    """Gives back the leases of a process that ends at once, within a time; what is left lapses by itself."""

    def release() -> None:
        for lease in list(_held):
            with suppress(Exception):
                lease.release()

    if _held:
        thread = threading.Thread(target=release, daemon=True)  # the main thread may be anywhere, with any lock
        thread.start()
        thread.join(seconds)


class _Lease:
    def __init__(self, filesystem: "AbstractFileSystem", root: str, where: str, what: str) -> None:
        self._filesystem, self._root, self._where, self._what = filesystem, root.rstrip("/"), where, what
        self._mine = this_process() | {"token": uuid.uuid4().hex}
        self._path = ""
        self._seen = 0.0
        """When this process last knew that it owns the lease."""
        self._lost = ""
        self._renewing = threading.Lock()

    def acquire(self) -> None:
        """Creates the next lease; raises InputError if the last one is another process's and not stale."""
        found = self._all()
        if found:
            if _age(found) < STALE_SECONDS:
                self._refuse(found)
            owner, watched = describe(max(found.items())[1]), 2 * BEAT_SECONDS
            logger.warning(f"{self._what} was being written by {owner}; watching {watched:.0f} s whether it is gone")
            time.sleep(watched)  # the clocks may differ
            if (now := self._all()) not in (found, {}):
                self._refuse(now)
        number = int(max(found, default="0").rpartition("/")[2].removesuffix(".json")) + 1
        self._path = f"{self._root}/{number:08d}.json"
        self._seen = time.time()
        try:
            with suppress(FileExistsError):  # perhaps by this process, if the answer to a first try was lost
                self._filesystem.pipe_file(self._path, self._content(), mode="create")
            now = self._all()
            others = {
                path: one for path, one in now.items() if path not in found and one["token"] != self._mine["token"]
            }
            if others or self._path not in now:  # a third process may have created another number at the same time
                self._refuse(others or found or {self._path: self._mine | {"beat": self._seen}})
            for path in found:
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(path)
        except BaseException:
            with suppress(Exception):
                self.release()
            raise

    def keep(self, stop: threading.Event) -> None:
        """Renews the lease until it is lost or `stop` is set."""
        while not self._lost and not stop.wait(BEAT_SECONDS):
            with suppress(Exception):  # the storage may recover in time; if not, `check` says so
                self._renew()

    def check(self) -> None:
        """Raises InputError unless this process owns the lease."""
        if time.time() - self._seen > 2 * BEAT_SECONDS:
            with driver_errors(self._where):
                self._renew()
        if self._lost:
            raise InputError(f"{self._what}: {self._lost}; what was committed is safe; run the same command again")

    def release(self) -> None:
        """Deletes the lease if it is this process's."""
        if json.loads(self._filesystem.cat_file(self._path))["token"] == self._mine["token"]:
            self._filesystem.rm_file(self._path)

    def _renew(self) -> None:
        with self._renewing:
            now, found = time.time(), self._all()
            last = max(found.items(), default=("", {}))
            if last[1].get("token") != self._mine["token"]:
                self._lost = f"this process was not seen for {now - self._seen:.0f} s, and " + (
                    f"{describe(last[1])} took over" if last[1] else "its lease was removed"
                )
            elif now - self._seen > STALE_SECONDS:
                self._lost = f"this process could not renew its lease for {now - self._seen:.0f} s"
            else:
                self._filesystem.pipe_file(self._path, self._content())
                self._seen = now

    def _content(self) -> bytes:
        return json.dumps(self._mine | {"beat": time.time()}).encode()

    def _all(self) -> dict[str, dict[str, Any]]:
        """Returns the owner of each lease there is, by path."""
        self._filesystem.invalidate_cache()
        found = {}
        for path in self._filesystem.find(self._root):
            with suppress(FileNotFoundError):  # released since
                found[path] = json.loads(self._filesystem.cat_file(path))
        return found

    def _refuse(self, found: dict[str, dict[str, Any]]) -> None:
        holder, age = max(found.items())[1], _age(found)
        raise InputError(
            f"{self._what} is being written by {describe(holder)}, last seen {age:.0f} s ago; wait for it or stop it; "
            f"if it is dead, run the same command again in {max(0.0, STALE_SECONDS - age):.0f} s, which then takes over"
        )


def _age(found: dict[str, dict[str, Any]]) -> float:
    """Returns the seconds since the newest lease was renewed, by the clocks of its owner and of this machine."""
    return max(0.0, time.time() - max(found.items())[1]["beat"])
