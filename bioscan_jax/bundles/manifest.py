"""The manifest of a bundle: each file with its size and sha256, checks of its paths, and verification."""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from bioscan_jax.errors import InputError, shown
from bioscan_jax.location import Directory, Location, locate
from bioscan_jax.notebook import Shown

FORMAT = "bioscan_jax bundle 1"
MANIFEST = "manifest.json"
JOURNAL = "unfinished.json"
"""Name of the manifest of an unfinished export."""
MAX_FILE_BYTES = (4 << 30) - 2
"""The largest file that FAT32 can hold."""
_MAX_MANIFEST_BYTES = 64 << 20
"""Upper limit; an entry has a few hundred bytes."""
_HEAD = {
    **dict.fromkeys(("table", "chosen", "schema", "index"), str),
    **dict.fromkeys(("rows", "seed", "estimate", "part_rows", "rejects"), int),
    **dict.fromkeys(("filter", "rejects_schema", "run", "calibration"), str | None),
    **dict.fromkeys(("metadata", "rejects_metadata"), dict),
    "candidates": list,
}
"""Required keys of the head, with their types."""
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
_SYSTEM_FILES = re.compile(r"(^|.*/)(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$|\.[^/]+\.lease/[^/]+$")
"""Files that Windows, macOS and desktops add to directories, and the lease of a process that writes to a bucket."""
Kind = Literal["vectors", "rejects", "quantiser", "run", "calibration", "beside"]


class FormatError(InputError):
    """An intact manifest of another format or version."""


@dataclass(frozen=True)
class Entry:
    """One file of a bundle."""

    path: str
    """Relative path, with `/`."""
    bytes: int
    sha256: str
    kind: Kind
    rows: int = 0


@dataclass(frozen=True)
class Manifest:
    """The contents of a bundle."""

    head: dict[str, Any]
    """The options of the export, and what an import needs to read the files."""
    files: tuple[Entry, ...]

    def to_json(self) -> str:
        """Returns the manifest as JSON, with a digest of itself so that damage is detected."""
        return sealed({"format": FORMAT, "head": self.head, "files": [asdict(entry) for entry in self.files]})

    @staticmethod
    def from_json(text: str | bytes, where: str) -> "Manifest":
        """Reads a manifest.

        Raises:
            InputError: It is damaged, of another format, or names a path outside the bundle.
        """
        try:
            body = unsealed(text, where, FORMAT)
            if not isinstance(body["head"], dict) or not all(map(_is_entry, body["files"])):
                raise ValueError("its files are not described as they should be")
            if lacking := _HEAD.keys() - body["head"].keys():
                raise ValueError(f"its head lacks {', '.join(sorted(lacking))}")
            if wrong := [name for name, kind in _HEAD.items() if not isinstance(body["head"][name], kind)]:
                raise ValueError(f"its head has a {wrong[0]} of another type")
            found = Manifest(body["head"], tuple(Entry(**entry) for entry in body["files"]))
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{where} is damaged ({' '.join(str(error).split())[:200]}); copy the bundle again"
            ) from error
        for entry in found.files:
            check_path(entry.path, where)
        return found


def _is_entry(entry: Any) -> bool:
    kinds = {"path": str, "bytes": int, "sha256": str, "kind": str, "rows": int}
    known = isinstance(entry, dict) and entry.keys() == kinds.keys() and entry["kind"] in get_args(Kind)
    return known and all(isinstance(entry[name], kind) for name, kind in kinds.items())


def sealed(body: dict[str, Any]) -> str:
    """Returns a JSON object with a digest of itself, by which `unsealed` detects damage."""
    return json.dumps(body | {"sha256": _digest(body)}, indent=1, sort_keys=True)


def unsealed(text: str | bytes, where: str, expected: str) -> dict[str, Any]:
    """Returns what `sealed` wrote, without the digest.

    Args:
        text: The JSON.
        where: Its place, for messages.
        expected: The value of its key `format`.

    Raises:
        FormatError: It is intact and of another format or version.
        ValueError: It is damaged; also KeyError, TypeError, AttributeError and RecursionError.
    """
    body = json.loads(text)
    digest = body.pop("sha256")
    if digest != _digest(body):
        raise ValueError("its own sha256 is wrong")
    if (given := body["format"]) != expected:
        newer = isinstance(given, str) and given.rsplit(" ", 1)[0] == expected.rsplit(" ", 1)[0]
        fix = "it is of another version of bioscan_jax: import it with that one" if newer else "check the path"
        raise FormatError(f"{where} has the format {given!r:.60}, not {expected!r}; {fix}")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_path(path: str, where: str) -> None:
    """Checks that a path stays inside its directory and is valid on Windows.

    Raises:
        InputError: It is absolute, too long, has `..`, a drive letter, a reserved name or a forbidden character, or
            ends in a dot or space.
    """
    if not isinstance(path, str) or not path:
        raise InputError(f"{where} names {shown(path)}, which is no path; do not trust it")
    if path.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", path) or ".." in re.split(r"[/\\]", path):
        raise InputError(f"{where} names {shown(path)}, which leads out of the directory; do not trust it")
    for name in path.split("/"):
        if not name or name == "." or _RESERVED.fullmatch(name) or _FORBIDDEN.search(name) or name[-1] in ". ":
            raise InputError(f"{where} names {shown(path)}, which Windows refuses ({shown(name)}); rename it")
    if len(path) > 200:
        raise InputError(f"{where} names {shown(path)}, {len(path)} characters; Windows has no room for more than 200")


def check_distinct(paths: Iterable[str], where: str) -> None:
    """Checks that no two paths differ only in case.

    Raises:
        InputError: Two do.
    """
    seen: dict[str, str] = {}
    for path in paths:
        if path.casefold() in seen:
            raise InputError(f"{where}: {seen[path.casefold()]!r} and {path!r} are one file on a stick; rename one")
        seen[path.casefold()] = path


def sha256_of(file: Path) -> str:
    """Returns the sha256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_manifest(location: Location, name: str = MANIFEST) -> Manifest | None:
    """Reads the manifest of a bundle; None if there is none.

    Raises:
        InputError: It is damaged, or names a path outside the bundle.
    """
    sizes = location.sizes()
    if name not in sizes:
        return None
    where = f"{location.name}/{name}"
    if (size := sizes[name]) is None:
        raise InputError(f"{where} is a link; do not trust it")
    if size > _MAX_MANIFEST_BYTES:
        raise InputError(f"{where} has {size:,} bytes, more than a manifest ever has; copy the bundle again")
    with location.scratch() as scratch:
        return Manifest.from_json(location.fetch(name, scratch).read_bytes(), where)


def find_faults(location: Location, manifest: Manifest, *, contents: bool = True) -> list[str]:
    """Compares a bundle with its manifest; returns one line per damaged, missing or extra file.

    Args:
        location: The bundle.
        manifest: Its manifest.
        contents: Also compare the sha256 of each file, which reads all of them.
    """
    sizes = location.sizes()
    lines = []
    with location.scratch() as scratch:
        for entry in manifest.files:
            if fault := _fault(location, entry, sizes, scratch, contents):
                lines.append(f"{entry.path}: {fault}")
    known = {entry.path for entry in manifest.files} | {MANIFEST, JOURNAL}
    extra = [path for path in sizes if path not in known and not _SYSTEM_FILES.fullmatch(path)]
    return [*lines, *(f"{path}: extra, not in the manifest" for path in sorted(extra))]


@dataclass(frozen=True)
class BundleCheck(Shown):
    """Result of comparing a bundle with its manifest."""

    files: int
    """Files that the manifest lists."""
    faults: tuple[str, ...]
    """One line per damaged, missing or extra file."""

    def __str__(self) -> str:
        """The faults and the number of intact files, one per line."""
        intact = self.files - sum(": extra" not in fault for fault in self.faults)
        return "\n".join([*self.faults, f"{intact:,} of {self.files:,} files are whole"])


def verify_bundle(source: str, *, flag: str = "source") -> BundleCheck:
    """Compares every file of a bundle with its manifest.

    Args:
        source: Directory, fsspec URL or rclone:REMOTE:PATH of the bundle.
        flag: The flag that named it, for messages.

    Raises:
        InputError: There is no complete bundle, or its manifest is damaged.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> _ = bj.bundle(f"{directory}/vectors", f"{directory}/stick", progress=False)
        >>> bj.verify_bundle(f"{directory}/stick")
        BundleCheck(files=2, faults=())
    """
    location, manifest = open_bundle(source, flag)
    return BundleCheck(len(manifest.files), tuple(find_faults(location, manifest)))


def open_bundle(source: str, flag: str) -> tuple[Location, Manifest]:
    """Finds a bundle and reads its manifest.

    Raises:
        InputError: There is no complete bundle, or its manifest is damaged.
    """
    location = locate(source, flag)
    if isinstance(location, Directory) and not location.root.is_dir():
        raise InputError(f"--{flag} {source}: there is no such directory; is the disk mounted?")
    manifest = read_manifest(location)
    if manifest is not None:
        return location, manifest
    if JOURNAL in location.sizes():
        raise InputError(f"{location.name} is an unfinished export; run that export again to finish it")
    raise InputError(f"{location.name} has no {MANIFEST}, so it is no bundle; check the path")


def _fault(location: Location, entry: Entry, sizes: dict, scratch: Path, contents: bool) -> str | None:
    parents = [entry.path.rsplit("/", up)[0] for up in range(1, entry.path.count("/") + 1)]
    if any(parent in sizes for parent in parents):
        return "its directory is a link or a file"
    if entry.path not in sizes:
        return "missing"
    if (size := sizes[entry.path]) is None:
        return "a link or no plain file"
    if size != entry.bytes:
        return f"damaged, {size:,} bytes instead of {entry.bytes:,}"
    if contents and sha256_of(location.fetch(entry.path, scratch)) != entry.sha256:
        return "damaged, its sha256 is wrong"
    return None


def is_system_file(path: str) -> bool:
    """Returns whether such a file is no part of a bundle: operating systems or a lease put it there."""
    return _SYSTEM_FILES.fullmatch(path) is not None
