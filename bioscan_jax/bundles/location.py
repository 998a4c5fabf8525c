"""Places that hold a bundle: a directory or stick, an fsspec URL, or an rclone remote; files appear whole or not at all."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import fsspec
from fsspec.core import url_to_fs

from bioscan_jax.errors import InputError
from bioscan_jax.output import move_synced

MOUNT_POINTS = ("/media", "/mnt", "/run/media", "/Volumes")
"""Other disks are mounted below these; a directory there that is on no mounted disk belongs to one that was removed."""
UNFINISHED = ".unfinished"
"""Directory for files while they are written."""
_SYSTEM_DIRECTORY = re.compile(
    r"System Volume Information|\.Spotlight-V100|\.Trashes|\.fseventsd|\.Trash-\d+|\$RECYCLE\.BIN|lost\+found"
)
"""Directories that Windows, macOS and Linux create on every disk, often unreadable."""
_RCLONE_NOT_FOUND = (3, 4)


@contextmanager
def _storage_errors(where: str) -> Iterator[None]:
    """Raises failures in its block as a one-line InputError; every fsspec driver has its own exception classes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__} {error}".split())[:300]
        raise InputError(f"{where}: the storage failed ({text}); fix it and run the same command again") from error


@dataclass(frozen=True)
class Directory:
    """A directory on this machine or a stick; needs neither hard links nor file modes."""

    root: Path

    @property
    def name(self) -> str:
        """The place as messages name it."""
        return str(self.root)

    def sizes(self) -> dict[str, int | None]:
        """Returns the bytes of every file outside system directories; None for a link, which is not followed."""
        found: dict[str, int | None] = {}
        if not self.root.exists():
            return found
        with _storage_errors(self.name):
            for directory, below, names in os.walk(self.root, onerror=_refuse):
                below[:] = [name for name in below if not _SYSTEM_DIRECTORY.fullmatch(name)]
                links = [name for name in below if (Path(directory) / name).is_symlink()]
                for name in [*names, *links]:
                    path = Path(directory) / name
                    plain = path.is_file() and not path.is_symlink()
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size if plain else None
        return found

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory on the same disk; removes what a killed process left in it."""
        directory = self.root / UNFINISHED
        with _storage_errors(self.name):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yields the directory itself, since nothing has to be copied."""
        yield self.root

    def put(self, file: Path, path: str) -> None:
        """Moves a file to its path once its bytes are on the disk."""
        goal = self.root / path
        with _storage_errors(str(goal)):
            goal.parent.mkdir(parents=True, exist_ok=True)
            move_synced(file, goal)

    def fetch(self, path: str, scratch: Path) -> Path:
        """Returns the file itself."""
        return self.root / path

    def remove(self, path: str) -> None:
        """Removes a file if it exists."""
        with _storage_errors(self.name):
            (self.root / path).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Returns the free bytes on the disk for this user."""
        with _storage_errors(self.name):
            return shutil.disk_usage(self.root if self.root.is_dir() else self.root.parent).free


def _refuse(error: OSError) -> None:
    raise error


@contextmanager
def _temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bioscan_jax-") as directory:
        yield Path(directory)


@dataclass(frozen=True)
class Bucket:
    """A directory of an object store, named by an fsspec URL."""

    url: str
    filesystem: fsspec.AbstractFileSystem
    root: str

    @property
    def name(self) -> str:
        """The place as messages name it."""
        return self.url

    def sizes(self) -> dict[str, int | None]:
        """Returns the bytes of every file."""
        with _storage_errors(self.name):
            self.filesystem.invalidate_cache()
            if not self.filesystem.exists(self.root):
                return {}
            found = cast(dict[str, dict], self.filesystem.find(self.root, detail=True))
        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: info["size"] for path, info in found.items()}

    def staging(self) -> AbstractContextManager[Path]:
        """Returns a temporary directory."""
        return _temporary()

    scratch = staging

    def put(self, file: Path, path: str) -> None:
        """Uploads a file and removes it here."""
        goal = f"{self.root.rstrip('/')}/{path}"
        with _storage_errors(f"{self.name}/{path}"):
            self.filesystem.makedirs(goal.rsplit("/", 1)[0], exist_ok=True)
            self.filesystem.put_file(str(file), goal)
            file.unlink()

    def fetch(self, path: str, scratch: Path) -> Path:
        """Downloads a file."""
        local = scratch / "fetched"
        with _storage_errors(f"{self.name}/{path}"):
            self.filesystem.get_file(f"{self.root.rstrip('/')}/{path}", str(local))
        return local

    def remove(self, path: str) -> None:
        """Removes a file if it exists."""
        with _storage_errors(self.name), suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.root.rstrip('/')}/{path}")

    def free_bytes(self) -> int | None:
        """Returns None: buckets do not report it."""
        return None


@dataclass(frozen=True)
class Remote:
    """REMOTE:PATH of an rclone configuration, through the rclone program."""

    remote: str

    @property
    def name(self) -> str:
        """The place as messages name it."""
        return f"rclone:{self.remote}"

    def _run(self, *arguments: str, missing_ok: bool = False) -> str | None:
        if (program := shutil.which("rclone")) is None:
            raise InputError(f"{self.name}: rclone is not installed; get it from your distribution or rclone.org")
        done = subprocess.run([program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return done.stdout
        if missing_ok and done.returncode in _RCLONE_NOT_FOUND:
            return None
        message = " ".join((done.stderr.strip().splitlines() or [""])[-1].split())[:300]
        raise InputError(
            f"{self.name}: rclone {arguments[0]} failed ({message}); fix it and run the same command again"
        )

    def _at(self, path: str) -> str:
        return f"{self.remote}{path}" if self.remote.endswith((":", "/")) else f"{self.remote}/{path}"

    def sizes(self) -> dict[str, int | None]:
        """Returns the bytes of every file."""
        listed = self._run("lsjson", "--recursive", "--files-only", self.remote, missing_ok=True)
        return {entry["Path"]: entry["Size"] for entry in json.loads(listed or "[]")}

    def staging(self) -> AbstractContextManager[Path]:
        """Returns a temporary directory."""
        return _temporary()

    scratch = staging

    def put(self, file: Path, path: str) -> None:
        """Uploads a file and removes it here; rclone compares the checksums."""
        self._run("moveto", str(file), self._at(path))

    def fetch(self, path: str, scratch: Path) -> Path:
        """Downloads a file."""
        local = scratch / "fetched"
        self._run("copyto", "--ignore-times", self._at(path), str(local))
        return local

    def remove(self, path: str) -> None:
        """Removes a file if it exists."""
        self._run("deletefile", self._at(path), missing_ok=True)

    def free_bytes(self) -> int | None:
        """Returns the free bytes that the remote reports, or None."""
        try:
            return json.loads(self._run("about", "--json", f"{self.remote.split(':')[0]}:") or "{}").get("free")
        except InputError:  # many remotes do not report it
            return None


Location = Directory | Bucket | Remote
"""A place that holds files under relative paths with `/`.

`staging` yields a local directory in which to write a file, and `put` moves it from there to its path, where it appears
whole; `fetch` returns a local copy, in `scratch` unless the file is local already.
"""


def locate(place: str, flag: str) -> Location:
    """Returns the Location that a directory, URL or rclone:REMOTE:PATH names.

    Args:
        place: The user's text.
        flag: The flag that named it, for messages.

    Raises:
        InputError: It is empty, no driver is installed for it, or rclone is not.
    """
    if not place:
        raise InputError(f"--{flag} is empty; pass a directory, an fsspec URL or rclone:REMOTE:PATH")
    if place.startswith("rclone:"):
        remote = place.removeprefix("rclone:")
        if ":" not in remote or remote.startswith("-"):
            raise InputError(f"--{flag} {place}: pass rclone:REMOTE:PATH with a REMOTE of `rclone listremotes`")
        found = Remote(remote)
        found._run("version")
        return found
    if "://" in place and not place.startswith("file://"):
        try:
            filesystem, root = url_to_fs(place)
        except (ImportError, ValueError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"--{flag} {place}: {text}; install that driver or pass another") from error
        return Bucket(place.rstrip("/"), filesystem, root)
    return Directory(Path(place.removeprefix("file://")).expanduser().absolute())


def check_mounted(directory: Path, flag: str) -> None:
    """Checks that the disk of a directory is mounted, so that nothing is written to the disk beneath it.

    Raises:
        InputError: The parent directory is missing, or the directory is below a mount point with nothing mounted.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--{flag} {directory}: a file stands there; pass a directory")
    if not directory.parent.is_dir():
        raise InputError(f"--{flag} {directory}: there is no {directory.parent}; is the disk mounted?")
    resolved = directory.resolve()
    for point in map(Path, MOUNT_POINTS):
        if resolved.is_relative_to(point):
            between = [path for path in (resolved, *resolved.parents) if path.is_relative_to(point)]
            if not any(os.path.ismount(path) for path in between):
                raise InputError(f"--{flag} {directory}: nothing is mounted at or above it below {point}; mount it")
