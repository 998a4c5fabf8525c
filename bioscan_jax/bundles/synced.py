"""The format of a synced copy: files and the columns of tables as objects that never change, and numbered manifests.

An object's name has a hash of its contents, so that what changed gets another name and what did not is sent once. A new
manifest has a new name and comes last: whatever instant a sync is killed at, and whether or not the store writes files
whole, the newest intact manifest lists a complete version.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from bioscan_jax.bundles.manifest import FormatError, check_distinct, check_path, is_system_file, sealed, unsealed
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.location import Digest, Location

FORMAT = "bioscan_jax sync 1"
_MANIFEST = re.compile(r"sync-(\d{6,12})\.json")
_HEX_DIGITS = 16
"""Digits of the hash in an object's name."""
_OBJECT = re.compile(r".*\.[0-9a-f]{16}(\.[^/.]*)?|.*\.columns/[^/]*-\d{12}-[0-9a-f]{16}\.parquet")


@dataclass(frozen=True)
class Object:
    """A file of the copy."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class FileItem:
    """A file of the folder."""

    object: Object

    @property
    def digest(self) -> str:
        """Changes with the contents."""
        return self.object.sha256

    def objects(self) -> Iterator[Object]:
        """Yields the files of the copy that hold it."""
        yield self.object


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one column."""

    rows: int
    content: str
    """SHA-256 of the values, however they are stored."""
    object: Object | None = None
    """The Parquet file that holds them; None for a table whose parts were not sent."""


@dataclass(frozen=True)
class Column:
    """One column of a table, with the part rows that new parts have."""

    part_rows: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class TableItem:
    """A table of the folder."""

    schema: str
    """The Arrow schema in base64, with the metadata of its fields."""
    fields: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...]
    """Name, type, nullability and metadata of each field: what of the schema is compared."""
    metadata: Mapping[str, str]
    rows: int
    index: Literal["none", "ivf_sq", "ivf_pq"] | None
    """Kind of its vector index, or "none"; None if no column is indexed."""
    columns: Mapping[str, Column]

    @property
    def digest(self) -> str:
        """Changes with the values, not with the way they are stored."""
        parts = {name: [[part.rows, part.content] for part in one.parts] for name, one in self.columns.items()}
        body = [self.fields, sorted(self.metadata.items()), self.rows, parts]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def objects(self) -> Iterator[Object]:
        """Yields the files of the copy that hold it."""
        for column in self.columns.values():
            yield from (part.object for part in column.parts if part.object is not None)


Item = FileItem | TableItem


@dataclass(frozen=True)
class SyncedCopy:
    """A version of the copy: everything in it by its path in the folder; a table's path ends in .lance."""

    id: str
    """Of the copy; all its versions have it, wherever it is carried."""
    number: int
    """Of its manifest."""
    items: Mapping[str, Item]

    def objects(self) -> dict[str, Object]:
        """Returns all files of the copy by their path."""
        return {one.path: one for item in self.items.values() for one in item.objects()}


def manifest_name(number: int) -> str:
    """Returns the path of a manifest in the copy."""
    return f"sync-{number:06d}.json"


def manifest_numbers(sizes: Mapping[str, int | None]) -> list[int]:
    """Returns the numbers of the manifests, intact or not, among the files of a place; the newest first."""
    return sorted((int(found[1]) for path in sizes if (found := _MANIFEST.fullmatch(path))), reverse=True)


def is_copy(sizes: Mapping[str, int | None]) -> bool:
    """Returns whether the files of a place are a synced copy, complete or not."""
    return bool(manifest_numbers(sizes))


def is_object(path: str) -> bool:
    """Returns whether a path is one that `object_path` returns."""
    return _OBJECT.fullmatch(path) is not None


def foreign_file(sizes: Mapping[str, int | None]) -> str | None:
    """Returns a file that makes a place unfit for a new copy; None if it is empty."""
    return next((path for path in sorted(sizes) if not is_system_file(path)), None)


def object_path(item: str, content: str, *, column: str | None = None, first_row: int = 0) -> str:
    """Returns the path in the copy of a file, or of rows of a table's column."""
    path = PurePosixPath(item)
    if column is None:
        return str(path.with_name(f"{path.stem[:80]}.{content[:_HEX_DIGITS]}{path.suffix[:20]}"))
    name = re.sub(r"[^A-Za-z0-9_]", "-", column)[:40]
    return str(path.with_suffix(".columns") / f"{name}-{first_row:012d}-{content[:_HEX_DIGITS]}.parquet")


def read_copy(location: Location, sizes: Mapping[str, int | None]) -> SyncedCopy | None:
    """Reads the newest intact manifest; None if there is none.

    Raises:
        InputError: It is of another version, or names a path outside the folder.
    """
    with location.scratch() as scratch:
        for number in manifest_numbers(sizes):
            where = f"{location.name}/{manifest_name(number)}"
            if sizes[manifest_name(number)] is None:
                raise InputError(f"{where} is a link; do not trust it")
            try:
                body = unsealed(location.fetch(manifest_name(number), scratch).read_bytes(), where, FORMAT)
            except FormatError:
                raise
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                if isinstance(error, InputError):
                    raise
                logger.warning(f"{where} is cut off or damaged; taking the version before it")
                continue
            try:
                return _parse(body, where, number)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{where} is none that a sync writes ({one_line(error)}); do not trust it") from error
    return None


def write_copy(location: Location, copy: SyncedCopy, staging: Path) -> None:
    """Writes the manifest of a version; the files that it lists are there.

    Raises:
        InputError: It did not arrive intact.
    """
    tables = {path: item for path, item in copy.items.items() if isinstance(item, TableItem)}
    files = {path: asdict(item.object) for path, item in copy.items.items() if isinstance(item, FileItem)}
    draft = staging / "manifest"
    draft.write_text(
        sealed({"format": FORMAT, "id": copy.id, "files": files, "tables": {p: asdict(t) for p, t in tables.items()}})
    )
    digest, name = Digest.of(draft), manifest_name(copy.number)
    location.put(draft, name)
    if not location.holds(name, digest):
        raise InputError(f"{location.name}/{name} did not arrive intact; run the same command again")


def _parse(body: dict[str, Any], where: str, number: int) -> SyncedCopy:
    items: dict[str, Item] = {path: FileItem(Object(**one)) for path, one in body["files"].items()}
    items |= {path: _table(one) for path, one in body["tables"].items()}
    for path, item in items.items():
        check_path(path, where)
        if isinstance(item, TableItem) != path.endswith(".lance"):
            raise InputError(f"{where} names {path!r} as what it is not; do not trust it")
        if any(name.startswith(".") or (name.endswith(".lance") and name != path) for name in path.split("/")[:-1]):
            raise InputError(
                f"{where} names {path!r}, which would lie where tables or hidden files do; do not trust it"
            )
        for one in item.objects():
            check_path(one.path, where)
    check_distinct(items, where)
    return SyncedCopy(body["id"], number, items)


def _table(body: dict[str, Any]) -> TableItem:
    fields = tuple((name, kind, null, tuple(map(tuple, facts))) for name, kind, null, facts in body.pop("fields"))
    found, columns = body.pop("columns"), {}
    for name, *_ in fields:
        parts = tuple(Part(**part | {"object": Object(**part["object"])}) for part in found[name]["parts"])
        columns[name] = Column(found[name]["part_rows"], parts)
        if sum(part.rows for part in parts) != body["rows"]:
            raise ValueError(f"the parts of column {name!r} do not make it up")
    return TableItem(**body, fields=fields, columns=columns)
