"""The directory of a training run: a local one, or one in a bucket with a working copy on this machine's disk.

orbax writes to local disks and to gs:// by itself. For other stores each finished checkpoint is uploaded from the
working copy, and the newest one is downloaded when a run continues. Either way the bucket alone decides how a run
continues: the working copy may be lost at any moment.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bioscan_jax.errors import InputError
from bioscan_jax.location import UNFINISHED, Bucket, Directory, Remote, discard, locate, upload

RUN_FILE = "run.json"
LABEL_SPACE_FILE = "label_space.json"
METRICS = "metrics.jsonl"
CURVES = "curves.png"
LAST, BEST = "checkpoints", "best"
"""Subdirectories with orbax checkpoints, one directory a step."""


@dataclass(kw_only=True)
class RunDirectory:
    """Where one process reads and writes the files of a run; created by `open_run_directory`."""

    name: str
    """As the user wrote it."""
    local: Path
    """Holds the files: the directory itself, or the working copy."""
    _place: Bucket | None = None
    """The bucket; None if `local` is the directory itself."""
    _check: Callable[[], None] | None = None
    """Raises InputError once another process writes there; None where this process only reads."""
    _uploaded: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file as it is in the bucket."""

    def check(self) -> None:
        """Raises InputError if another process writes there by now; called before each checkpoint and upload."""
        if self._check is not None:
            self._check()

    def checkpoints(self, name: str) -> str:
        """Returns the directory or URL in which orbax keeps the checkpoints of a subdirectory."""
        if self._is_native:
            return f"{self.name.rstrip('/')}/{name}"
        return str(self.local.absolute() / name)

    @property
    def _is_native(self) -> bool:
        return self.name.startswith("gs://")

    def fetch_files(self) -> None:
        """Replaces the files of the working copy by those in the bucket."""
        if self._place is None:
            return
        present = self._place.sizes()
        for name in (RUN_FILE, LABEL_SPACE_FILE, METRICS, CURVES):
            (self.local / name).unlink(missing_ok=True)
            if name in present:
                self._place.fetch(name, self.local).rename(self.local / name)
                self._uploaded[name] = _digest(self.local / name)

    def put_files(self) -> None:
        """Uploads the files that have changed."""
        if self._place is None or self._check is None:
            return
        self.check()
        for name in (LABEL_SPACE_FILE, RUN_FILE, METRICS, CURVES):
            file = self.local / name
            if file.exists() and self._uploaded.get(name) != (digest := _digest(file)):
                self._place.put(file, name, keep=True)
                self._uploaded[name] = digest

    def has(self, name: str) -> bool:
        """Returns whether there is a subdirectory of checkpoints."""
        return (self.local / name).is_dir() if self._place is None else bool(self._steps(name))

    def fetch_newest(self, name: str) -> None:
        """Replaces the checkpoints of a subdirectory of the working copy by the newest complete one in the bucket."""
        if self._place is None or self._is_native:
            return
        shutil.rmtree(self.local / name, ignore_errors=True)
        steps = self._steps(name)
        if complete := [step for step in sorted(steps) if f"{name}/{step}/{UNFINISHED}" not in steps[step]]:
            for path in steps[complete[-1]]:
                file = self.local / path
                file.parent.mkdir(parents=True, exist_ok=True)
                self._place.fetch(path, self.local).rename(file)

    def put_checkpoint(self, name: str, step: int, *, keep: int) -> None:
        """Uploads a finished checkpoint, then removes all but the newest `keep`."""
        if self._place is None or self._is_native:
            return
        self.check()
        upload(self.local / name / str(step), self._place, f"{name}/{step}/", keep=True)
        for old in sorted(self._steps(name))[:-keep]:
            discard(self._place, f"{name}/{old}/")

    def _steps(self, name: str) -> dict[int, list[str]]:
        """Returns the paths in the bucket of each step of a subdirectory."""
        assert self._place is not None
        found: dict[int, list[str]] = {}
        for path in self._place.sizes():
            first, _, rest = path.partition("/")
            step = rest.partition("/")[0]
            if first == name and step.isdecimal():
                found.setdefault(int(step), []).append(path)
        return found


def locate_run(output_dir: str, *, flag: str, processes: int = 1) -> Directory | Bucket:
    """Returns the place of a run's directory.

    Args:
        output_dir: A directory or URL.
        flag: The flag that named it, for messages.
        processes: Processes of the run.

    Raises:
        InputError: There is no driver for the URL, or several processes cannot write checkpoints to this store.
    """
    place = locate(output_dir, flag)
    if isinstance(place, Remote):
        raise InputError(f"--{flag} {output_dir}: a run is kept in a directory or a bucket; pass one, such as gs://...")
    if isinstance(place, Bucket) and processes > 1 and not output_dir.startswith("gs://"):
        raise InputError(
            f"--{flag} {output_dir}: {processes} processes write checkpoints to gs:// or to a directory that all of them "
            "see; pass one of these"
        )
    return place


@contextmanager
def open_run_directory(
    place: Directory | Bucket, scratch: Path, *, check: Callable[[], None] | None = None
) -> Iterator[RunDirectory]:
    """Opens a run's directory, with the files of a bucket in a working copy; its checkpoints are removed at the end.

    Args:
        place: From `locate_run`.
        scratch: Directory on this machine for working copies.
        check: Raises InputError once another process writes there; None where this one only reads.

    Raises:
        InputError: The bucket cannot be read.
    """
    if isinstance(place, Directory):
        yield RunDirectory(name=place.name, local=place.root, _check=check)
        return
    local = scratch / hashlib.sha256(place.name.encode()).hexdigest()[:16] / place.name.rpartition("/")[2]
    try:
        local.mkdir(parents=True, exist_ok=True)
        opened = RunDirectory(name=place.name, local=local, _check=check, _place=place)
        opened.fetch_files()
        yield opened
    except OSError as error:
        raise InputError(f"{local}: {error.strerror or error}; free space or pass another --data.scratch") from error
    finally:
        for name in (LAST, BEST):
            shutil.rmtree(local / name, ignore_errors=True)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
