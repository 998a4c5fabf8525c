"""Places for files: a directory or stick, an fsspec URL such as gs://, or an rclone remote; files appear whole there.

A command that writes a directory works in a local one, which is then uploaded; one that reads a directory downloads it
into the cache, once for each state of its files.
"""

import base64
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from bioscan_jax.cache import cache_bound, downloads_directory, hold, prune
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.output import exclusive, move_synced, whole_file

MOUNT_POINTS = ("/media", "/mnt", "/run/media", "/Volumes")
"""Other disks are mounted below these; a directory there that is on no mounted disk belongs to one that was removed."""
UNFINISHED = ".unfinished"
"""Directory for files while they are written; beside files in a bucket, a file that says that some are missing."""
_SYSTEM_DIRECTORY = re.compile(
    r"System Volume Information|\.Spotlight-V100|\.Trashes|\.fseventsd|\.Trash-\d+|\$RECYCLE\.BIN|lost\+found"
)
"""Directories that Windows, macOS and Linux create on every disk, often unreadable."""
_RCLONE_NOT_FOUND = (3, 4)
_RCLONE_LASTING_CODES = (2, 3, 4, 7)
_RCLONE_LASTING = re.compile(
    r"didn't find section|not support|\b40[0134]\b|denied|forbidden|unauthori[sz]ed|invalid_grant|no space|quota",
    re.IGNORECASE,
)
"""Failures of rclone that another attempt does not change."""
_TRANSIENT = {
    getattr(errno, name, None)  # EREMOTEIO, by which s3fs reports an error 500, is known to Linux alone
    for name in ("EIO", "EBUSY", "EAGAIN", "EREMOTEIO", "ETIMEDOUT", "EPIPE", "ECONNRESET", "ECONNREFUSED")
}
_NETWORK_LIBRARIES = ("aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3")
_NETWORK_ERROR = re.compile(r"Connect|Time|Http|HTTP|Payload|Disconnect|Incomplete|Closed|Response|ClientOS")
_ATTEMPTS = 5
_FIRST_PAUSE_SECONDS = 1.0
_FIX = "; fix it and run the same command again"
_IDENTITY = ("size", "generation", "ETag", "etag", "md5Hash", "content_md5", "mtime", "LastModified", "created")
"""What the drivers of object stores tell of a file that changes with its contents."""


class TransientError(InputError):
    """A failure of a remote store that may pass: a dropped connection, a timeout, an error of the server."""


@contextmanager
def driver_errors(where: str) -> Iterator[None]:
    """Raises failures in its block as a one-line InputError; every fsspec driver has its own exception classes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = TransientError if _may_pass(error) else InputError
        raise kind(f"{where}: the storage failed ({one_line(error)}){_FIX}") from error


def _may_pass(error: Exception) -> bool:
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(code := getattr(error, "code", getattr(error, "status", None)), int):  # of HTTP
        return code in (408, 425, 429) or code >= 500
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT
    library = type(error).__module__.split(".")[0]
    return library in _NETWORK_LIBRARIES and _NETWORK_ERROR.search(type(error).__name__) is not None


_Method = TypeVar("_Method", bound=Callable)


def _retried(method: _Method) -> _Method:
    """Repeats an operation that failed for a reason that may pass, with growing pauses, 5 times at most."""

    @functools.wraps(method)
    def attempts(*arguments: object, **keywords: object) -> object:
        for attempt in range(_ATTEMPTS - 1):
            try:
                return method(*arguments, **keywords)
            except TransientError as error:
                pause = _FIRST_PAUSE_SECONDS * 2**attempt
                logger.warning(f"{str(error).removesuffix(_FIX)}; trying again in {pause:.0f} s")
                time.sleep(pause)
        return method(*arguments, **keywords)

    return cast(_Method, attempts)


@dataclass(frozen=True)
class Digest:
    """What tells whether a copy of a file is intact."""

    bytes: int
    sha256: str
    md5: str
    """The hash that most stores know of their files."""

    @staticmethod
    def of(file: Path) -> "Digest":
        """Reads a file."""
        sha256, md5, size = hashlib.sha256(), hashlib.md5(usedforsecurity=False), 0
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                sha256.update(block)
                md5.update(block)
                size += len(block)
        return Digest(size, sha256.hexdigest(), md5.hexdigest())


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
        with driver_errors(self.name):
            for directory, below, names in os.walk(self.root, onerror=_refuse):
                below[:] = [name for name in below if not _SYSTEM_DIRECTORY.fullmatch(name)]
                links = [name for name in below if (Path(directory) / name).is_symlink()]
                for name in [*names, *links]:
                    path = Path(directory) / name
                    with suppress(FileNotFoundError):  # deleted meanwhile
                        about = path.lstat()
                        size = about.st_size if stat.S_ISREG(about.st_mode) else None
                        found[path.relative_to(self.root).as_posix()] = size
        return found

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Yields an empty directory on the same disk; removes what a killed process left in it."""
        directory = self.root / UNFINISHED
        with driver_errors(self.name):
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
        with driver_errors(str(goal)):
            goal.parent.mkdir(parents=True, exist_ok=True)
            move_synced(file, goal)

    def fetch(self, path: str, scratch: Path) -> Path:
        """Returns the file itself."""
        return self.root / path

    def holds(self, path: str, wanted: Digest) -> bool:
        """Returns whether a file has these contents, read from the disk itself where the system allows it."""
        with driver_errors(f"{self.name}/{path}"):
            with (self.root / path).open("rb") as stream, suppress(AttributeError, OSError):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return Digest.of(self.root / path) == wanted

    def remove(self, path: str) -> None:
        """Removes a file if it exists."""
        with driver_errors(self.name):
            (self.root / path).unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Returns the free bytes on the disk for this user."""
        with driver_errors(self.name):
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
        return {path: info["size"] for path, info in self._files().items()}

    def versions(self) -> dict[str, str]:
        """Returns for every file a text that changes with its contents; a place that is itself a file has the path ""."""
        return {
            path: json.dumps([str(info[key]) for key in _IDENTITY if key in info])
            for path, info in self._files().items()
        }

    @_retried
    def _files(self) -> dict[str, dict]:
        with driver_errors(self.name):
            self.filesystem.invalidate_cache()
            if not self.filesystem.exists(self.root):
                return {}
            found = cast(dict[str, dict], self.filesystem.find(self.root, detail=True))
        start = len(self.root.rstrip("/")) + 1
        return {path[start:]: info for path, info in found.items()}

    def staging(self) -> AbstractContextManager[Path]:
        """Returns a temporary directory."""
        return _temporary()

    scratch = staging

    @_retried
    def put(self, file: Path, path: str, *, keep: bool = False) -> None:
        """Uploads a file, and removes it here unless it is to be kept."""
        goal = f"{self.root.rstrip('/')}/{path}"
        with driver_errors(f"{self.name}/{path}"):
            if not self.filesystem.async_impl:  # the drivers of object stores would make a bucket of that name
                self.filesystem.makedirs(goal.rsplit("/", 1)[0], exist_ok=True)
            self.filesystem.put_file(str(file), goal)
            if not keep:
                file.unlink()

    @_retried
    def fetch(self, path: str, scratch: Path) -> Path:
        """Downloads a file."""
        local = scratch / "fetched"
        with driver_errors(f"{self.name}/{path}"):
            self.filesystem.get_file(f"{self.root.rstrip('/')}/{path}".rstrip("/"), str(local))
        return local

    def holds(self, path: str, wanted: Digest) -> bool:
        """Returns whether a file has these contents, by the MD5 that the store knows or by reading it back."""
        info = self._info(path)
        if info["size"] != wanted.bytes:
            return False
        md5 = bytes.fromhex(wanted.md5)
        known = {str(info.get("ETag", "")).strip('"'), str(info.get("md5Hash", ""))}
        if known & {md5.hex(), base64.b64encode(md5).decode()}:
            return True
        with self.scratch() as scratch:  # an ETag may be something else than the MD5
            return Digest.of(self.fetch(path, scratch)) == wanted

    @_retried
    def _info(self, path: str) -> dict:
        with driver_errors(f"{self.name}/{path}"):
            self.filesystem.invalidate_cache()
            return self.filesystem.info(f"{self.root.rstrip('/')}/{path}")

    @_retried
    def remove(self, path: str) -> None:
        """Removes a file if it exists."""
        with driver_errors(self.name), suppress(FileNotFoundError):
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

    @_retried
    def _run(self, *arguments: str, missing_ok: bool = False) -> str | None:
        if (program := shutil.which("rclone")) is None:
            raise InputError(f"{self.name}: rclone is not installed; get it from your distribution or rclone.org")
        done = subprocess.run([program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return done.stdout
        if missing_ok and done.returncode in _RCLONE_NOT_FOUND:
            return None
        message = " ".join((done.stderr.strip().splitlines() or [""])[-1].split())[:300]
        lasting = done.returncode in _RCLONE_LASTING_CODES or _RCLONE_LASTING.search(done.stderr)
        kind = InputError if lasting else TransientError
        raise kind(f"{self.name}: rclone {arguments[0]} failed ({message}){_FIX}")

    def _at(self, path: str) -> str:
        return f"{self.remote}{path}" if self.remote.endswith((":", "/")) else f"{self.remote}/{path}"

    def sizes(self) -> dict[str, int | None]:
        """Returns the bytes of every file."""
        return {entry["Path"]: entry["Size"] for entry in self._files()}

    def versions(self) -> dict[str, str]:
        """Returns for every file a text that changes with its contents."""
        return {entry["Path"]: json.dumps([entry["Size"], entry.get("ModTime")]) for entry in self._files()}

    def _files(self) -> list[dict]:
        listed = self._run("lsjson", "--recursive", "--files-only", self.remote, missing_ok=True)
        return json.loads(listed or "[]")

    def staging(self) -> AbstractContextManager[Path]:
        """Returns a temporary directory."""
        return _temporary()

    scratch = staging

    def put(self, file: Path, path: str, *, keep: bool = False) -> None:
        """Uploads a file, and removes it here unless it is to be kept; rclone compares the checksums."""
        self._run("copyto" if keep else "moveto", str(file), self._at(path))

    def fetch(self, path: str, scratch: Path) -> Path:
        """Downloads a file."""
        local = scratch / "fetched"
        self._run("copyto", "--ignore-times", self._at(path), str(local))
        return local

    def holds(self, path: str, wanted: Digest) -> bool:
        """Returns whether a file has these contents, by the hash that the remote offers or by reading it back."""
        # Not --stat, which the rclone of Ubuntu 22.04 does not have
        listed = self._run("lsjson", "--files-only", "--hash-type", "md5", "--hash-type", "sha256", self._at(path))
        found = (json.loads(listed or "[]") or [{}])[0]
        if found.get("Size") != wanted.bytes:
            return False
        hashes = found.get("Hashes") or {}
        if hashes.get("sha256") == wanted.sha256 or hashes.get("md5") == wanted.md5:
            return True
        with self.scratch() as scratch:
            return Digest.of(self.fetch(path, scratch)) == wanted

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
whole; `fetch` returns a local copy, in `scratch` unless the file is local already; `holds` compares what arrived. At a
remote place a failure that may pass is tried again, 5 times in all within 15 s of pauses.
"""


def local_directory(place: str, *, flag: str = "sink.uri") -> Path | None:
    """Returns the absolute directory that a path or file:// URL names, or None for any other place.

    It is absolute because Lance reads the start of a relative `a:b` as a URL scheme.

    Args:
        place: The user's text.
        flag: The flag that named it, for messages.

    Raises:
        InputError: The text is empty, or a URL that lost a slash.
    """
    if not place:
        raise InputError(f"--{flag} is empty; pass a directory or an object-store URL")
    if place.startswith("file://"):
        return Path(os.path.expanduser(place.removeprefix("file://"))).absolute()
    if is_remote(place):
        return None
    scheme, colon, path = place.partition(":")
    if colon and scheme in known_implementations and not Path(place).exists():
        raise InputError(f"--{flag} {place}: a URL has two slashes, {scheme}://{path.lstrip('/')}; pass that")
    return Path(os.path.expanduser(place)).absolute()


def is_remote(place: str) -> bool:
    """Returns whether a text names a place that is not a path on this machine: a URL, or rclone:REMOTE:PATH."""
    return place.startswith("rclone:") or ("://" in place and not place.startswith("file://"))


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
    local = local_directory(place, flag=flag)
    if local is not None:
        return Directory(local)
    try:
        filesystem, root = url_to_fs(place)
    except Exception as error:  # each driver has its own for credentials that are missing
        text = " ".join(str(error).split())
        raise InputError(f"--{flag} {place}: {text}; install that driver or pass another") from error
    return Bucket(place.rstrip("/"), filesystem, root)


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


def local_copy(place: str, flag: str) -> Path:
    """Returns the path of a local directory or file; one in a bucket is first downloaded into the cache.

    The cache is keyed by the place and by what its store tells of the files' contents, so that they are downloaded once,
    and again after a change. After a download, those that no process uses are removed down to `cache.cache_bound`. A
    place that is local need not exist.

    Args:
        place: The user's text.
        flag: The flag that named it, for messages.

    Raises:
        InputError: Nothing is there, it is incomplete, the store cannot be read, or the cache cannot be written.
    """
    found = locate(place, flag) if is_remote(place) else None
    if not isinstance(found, Bucket | Remote):
        local_directory(place, flag=flag)  # refuses what is neither a path nor a URL
        return Path(os.path.expanduser(place.removeprefix("file://")))
    versions = found.versions()
    if not versions:
        raise InputError(f"--{flag} {place}: nothing is there; check the URL")
    if UNFINISHED in versions:
        raise InputError(f"--{flag} {place}: incomplete; what wrote it is still running or was stopped, run that again")
    key = hashlib.sha256(json.dumps([found.name, sorted(versions.items())]).encode()).hexdigest()[:32]
    goal, most = downloads_directory() / key, cache_bound()
    name = found.name.rsplit("/", 1)[-1]
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(goal.with_suffix(".lock")):
            hold(goal)
            if not goal.exists():
                with tempfile.TemporaryDirectory(prefix=".", dir=goal.parent) as scratch:
                    for path in versions:
                        file = Path(scratch) / "whole" / (path or name)
                        file.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(found.fetch(path, Path(scratch)), file)
                    if found.versions() != versions:
                        raise InputError(f"--{flag} {place}: changed while it was downloaded; run the command again")
                    os.rename(Path(scratch) / "whole", goal)
                prune(goal.parent, most)
    except OSError as error:
        raise InputError(
            f"--{flag} {place}: cannot be downloaded to {goal} ({error.strerror or error}); free space, or set "
            "XDG_CACHE_HOME to a directory with room"
        ) from error
    return goal / name if "" in versions else goal


@contextmanager
def output_directory(output: str, flag: str = "output") -> Iterator[Path]:
    """Yields the path of a directory to make; one in a bucket is made locally and uploaded on success.

    Until the upload is complete, and after a kill, the bucket holds a file `.unfinished`, which readers refuse and the
    next run replaces with all beside it.

    Raises:
        InputError: It is not empty, or a bucket cannot be written.
    """
    place = locate(output, flag)
    if isinstance(place, Directory):
        if place.root.exists() and (not place.root.is_dir() or any(place.root.iterdir())):
            raise InputError(f"{place.name}: not empty; choose another --{flag} or remove it")
        yield place.root
        return
    there = place.sizes()
    if there and UNFINISHED not in there:
        raise InputError(f"{place.name}: not empty; choose another --{flag} or remove it")
    with place.staging() as staging:
        _clear(place, "")
        yield staging / "output"
        upload(staging / "output", place, "")


def upload(directory: Path, place: Bucket | Remote, path: str, *, keep: bool = False) -> None:
    """Moves the files of a local directory to a directory of a place, instead of the files there.

    Args:
        directory: The local directory.
        place: Where the files go.
        path: The directory there, ending in "/"; "" for the place itself.
        keep: Copy them.

    Raises:
        InputError: The store cannot be written; the directory there has a file `.unfinished` then.
    """
    _clear(place, path)
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        place.put(file, path + file.relative_to(directory).as_posix(), keep=keep)
    place.remove(path + UNFINISHED)


def discard(place: Bucket | Remote, path: str) -> None:
    """Removes a directory of a place; `path` ends in "/". A kill leaves it with a file `.unfinished`."""
    _clear(place, path)
    place.remove(path + UNFINISHED)


def _clear(place: Bucket | Remote, path: str) -> None:
    """Writes `.unfinished` in a directory of a place, then removes all other files there."""
    with _temporary() as staging:
        (staging / UNFINISHED).write_text("the files beside this one are incomplete\n")
        place.put(staging / UNFINISHED, path + UNFINISHED)
    for name in place.sizes():
        if name.startswith(path) and name != path + UNFINISHED:
            place.remove(name)


def check_output(output: str, flag: str = "output", *, inputs: Sequence[str] = ()) -> None:
    """Checks that the file that a flag names can be made.

    Args:
        output: The file.
        flag: The flag, for messages.
        inputs: Paths and URLs of the files that the command reads, which it must not replace.

    Raises:
        InputError: It is a directory, its directory does not exist, its URL has no driver, or it is one of `inputs`.
    """
    local = local_directory(output, flag=flag)
    if any(output == one or (local and os.path.realpath(local) == os.path.realpath(one)) for one in inputs):
        raise InputError(f"--{flag} {output} is a file that the command reads; pass another name")
    if local is None:
        _parent(output, flag)
    elif not local.parent.is_dir():
        raise InputError(f"--{flag} {output}: there is no directory {local.parent}; make it first")
    elif local.is_dir():
        raise InputError(f"--{flag} {output}: that is a directory; pass a file")


@contextmanager
def output_file(output: str, flag: str = "output") -> Iterator[Path]:
    """Yields a temporary path that becomes the file a flag names, as `whole_file` does, or is uploaded on success.

    Raises:
        InputError: As for `check_output`, or it cannot be written.
    """
    check_output(output, flag)
    local = local_directory(output, flag=flag)
    try:
        if local is None:
            place, name = _parent(output, flag)
            with place.staging() as staging:
                yield staging / name
                place.put(staging / name, name)
        else:
            with whole_file(local) as partial:
                yield partial
    except OSError as error:
        raise InputError(
            f"--{flag} {output}: cannot be written ({error.strerror or error}); free space or pass another"
        ) from error


def _parent(output: str, flag: str) -> tuple[Bucket | Remote, str]:
    """Returns the directory of a remote file, and its name."""
    found = re.fullmatch(r"(.*[/:])([^/:]+)", output)
    if found is None:
        raise InputError(f"--{flag} {output}: that is a directory; pass a file")
    place = locate(found[1], flag)
    assert not isinstance(place, Directory)
    return place, found[2]


def read_if_exists(where: str) -> bytes | None:
    """Reads a file at a path or URL; None if there is no such file."""
    with _remote_errors(where):
        filesystem, path = url_to_fs(where)
        try:
            return filesystem.cat_file(path)
        except FileNotFoundError:
            return None


def write_whole(where: str, data: bytes) -> None:
    """Writes a file at a path or URL, whole or not at all; makes its directory."""
    local = local_directory(where)
    if local is not None:
        local.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(local) as partial:
            partial.write_bytes(data)
        return
    with _remote_errors(where):
        filesystem, path = url_to_fs(where)
        filesystem.pipe_file(path, data)


def remove_tree(where: str) -> None:
    """Removes a directory at a path or URL, if there is one; a local one may stay where that fails."""
    local = local_directory(where)
    if local is not None:
        shutil.rmtree(local, ignore_errors=True)
        return
    with _remote_errors(where):
        filesystem, path = url_to_fs(where)
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)


def _remote_errors(where: str) -> AbstractContextManager[None]:
    """Returns `driver_errors` for a place that is not local; the callers describe errors of the local disk."""
    return driver_errors(where) if is_remote(where) else nullcontext()
