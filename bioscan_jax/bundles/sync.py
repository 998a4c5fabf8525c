"""Keeps a folder of tables and files and a copy of it elsewhere in step, both ways; only changed parts travel."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from bioscan_jax.bundles.bundle import extra_files
from bioscan_jax.bundles.manifest import check_distinct, check_path, sha256_of
from bioscan_jax.bundles.synced import (
    Column,
    FileItem,
    Item,
    Object,
    Part,
    SyncedCopy,
    TableItem,
    foreign_file,
    is_copy,
    is_object,
    manifest_name,
    manifest_numbers,
    object_path,
    read_copy,
    write_copy,
)
from bioscan_jax.bundles.tables import (
    Known,
    describe_table,
    part_keys,
    parts_to_fetch,
    read_column,
    write_column_part,
    write_table,
)
from bioscan_jax.cache import cache_directory
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import (
    Bucket,
    Digest,
    Directory,
    Location,
    Remote,
    check_mounted,
    locate,
)
from bioscan_jax.notebook import Shown, progress_bar
from bioscan_jax.output import whole_file
from bioscan_jax.table.lock import machine_lock, writer_lock
from bioscan_jax.table.storage import open_dataset, storage_errors

if TYPE_CHECKING:
    import lance

STATE = ".sync"
"""Directory in a folder that holds what this machine knows of earlier syncs."""
_TRANSFERS = 4
"""Files that travel at the same time."""
_ATTEMPTS = 3
"""How often a file is sent or fetched that does not arrive intact."""
_Job = TypeVar("_Job")
_Done = TypeVar("_Done")


@dataclass(frozen=True)
class SyncSummary(Shown):
    """What a sync did."""

    target: str
    changed: tuple[str, ...]
    """Tables and files that the target now has as the source does, and had not before."""
    same: int
    """Tables and files that were equal."""
    sent: int
    """Files that travelled."""
    sent_bytes: int
    spared_bytes: int
    """Bytes of the target's version that were there and did not travel."""
    kept: tuple[str, ...]
    """Tables and files that only the target has."""
    skipped: tuple[str, ...]
    """Tables and files that stay as they are at the target, as --prefer target says."""
    deleted: int
    """Tables and files that were deleted at the target."""
    superseded_bytes: int
    """Bytes of earlier versions that the copy still holds."""

    def __str__(self) -> str:
        """The counts, one line each for what travelled and what stayed."""
        lines = [
            f"{self.target}: {len(self.changed):,} tables and files brought up to date, {self.same:,} were equal; "
            f"{self.sent_bytes:,} bytes in {self.sent:,} files travelled, {self.spared_bytes:,} bytes were there"
        ]
        if self.deleted:
            lines.append(f"deleted at the target: {self.deleted:,}")
        if self.kept:
            lines.append(f"only at the target and kept: {_some(self.kept)}; --delete removes what was deleted here")
        if self.skipped:
            lines.append(f"left as they are at the target: {_some(self.skipped)}")
        if self.superseded_bytes:
            lines.append(f"earlier versions take {self.superseded_bytes:,} bytes of the copy; --delete removes them")
        return "\n".join(lines)


def sync(
    source: str,
    target: str,
    *,
    beside: Sequence[str] = (),
    skip: Sequence[str] = (),
    prefer: Literal["source", "target"] | None = None,
    delete: bool = False,
    part_bytes: int = 64 << 20,
    progress: bool = True,
) -> SyncSummary:
    """Brings a copy of a folder up to date, or a folder up to date with its copy; only changed parts travel.

    The folder holds tables (NAME.lance) and any other files: run records, adapters, reports. Its copy is made by the
    first sync, in an empty place. A table travels as parts of columns: new rows are new parts, and a column that was
    joined or changed is sent without the others. Every file is verified where it arrives. A copy always holds a whole
    version, and a folder each table and file whole, whenever a sync is killed; the same command continues it. Hidden
    files and links are left out.

    Args:
        source: The folder, or the copy: a directory, a stick, an fsspec URL or rclone:REMOTE:PATH.
        target: The other of the two; a folder is a directory or an fsspec URL.
        beside: Files and directories outside the folder to copy too; on the command line, --with PATH for each.
        skip: Patterns of paths in the folder that stay as they are on both sides, such as runs/*/checkpoints/*; on the
            command line, --skip PATTERN for each.
        prefer: Which side wins where the target has changed since the last sync; without it that is an error.
        delete: Delete at the target what was deleted at the source since the last sync, also rows and columns of
            tables, and the files of earlier versions.
        part_bytes: Approximate size in memory of a part of a new column.
        progress: Show a progress bar.

    Raises:
        InputError: Neither or both are copies, the target has changed, another process is writing, or the storage
            failed.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> bj.sync(f"{directory}/vectors", f"{directory}/stick", progress=False).changed
        ('sequences.lance', 'sequences.run.json', 'sequences_rejects.lance')
        >>> bj.sync(f"{directory}/stick", f"{directory}/laptop", progress=False).same
        0
        >>> bj.sync(f"{directory}/laptop", f"{directory}/stick", progress=False).sent
        0
    """
    if part_bytes < 1:
        raise InputError(f"--part_bytes {part_bytes} is too small; pass at least 1")
    origin, goal = locate(source, "source"), locate(target, "target")
    if isinstance(origin, Directory) and not origin.root.is_dir():
        raise InputError(f"--source {source}: there is no such directory; is the disk mounted?")
    if isinstance(goal, Directory):
        check_mounted(goal.root, "target")
        if isinstance(origin, Directory):
            _check_apart(origin.root.resolve(), goal.root.resolve())
    sizes, there = origin.sizes(), goal.sizes()
    pulls = is_copy(sizes)
    _check_sides(origin, sizes, goal, there, beside)
    folder, place, held = (goal, origin, sizes) if pulls else (origin, goal, there)
    assert not isinstance(folder, Remote)
    with machine_lock(f"sync {place.name}", f"{place.name}: the copy"):
        copy = read_copy(place, held)
        if pulls and copy is None:
            raise InputError(f"{place.name}: its first sync is unfinished; run that again")
        copy = copy or SyncedCopy(uuid.uuid4().hex, 0, {})
        state = _State.open(folder, copy.id)
        if copy.number < state.number:
            if pulls and prefer is None:
                lost = f"the copy is at version {copy.number}, and version {state.number} was here already"
                raise InputError(f"{place.name}: {lost}; sync the folder to it, or pass --prefer source")
            state.base = {path: _Base.of(item) for path, item in copy.items.items()}
        local = _Folder.read(folder, copy, extra_files(beside), skip, part_bytes, state, progress)
        there = {path: item for path, item in copy.items.items() if not _matches(path, skip)}
        copied = {
            path for path, base in state.base.items() if path in copy.items and base.digest == copy.items[path].digest
        }
        if pulls:
            choice = _choose(there, local.items, (copied, local.unchanged), state.base.keys(), prefer, delete)
        else:
            choice = _choose(local.items, there, (local.unchanged, copied), state.base.keys(), prefer, delete)
        run = _Run(folder, place, held, copy, local, choice, state, part_bytes, progress, delete)
        summary, now = run.pull(goal.name) if pulls else run.push(goal.name)
        state.base |= {path: _Base.of(now.items[path]) for path in (*choice.send, *choice.same)}
        state.base = {path: base for path, base in state.base.items() if path not in choice.delete}
        state.number = now.number
        state.save()
        state.forget_transfers()
    return summary


def _some(paths: Sequence[str], most: int = 3) -> str:
    more = f" and {len(paths) - most:,} more" if len(paths) > most else ""
    return ", ".join(paths[:most]) + more


def _damaged(part: str) -> InputError:
    return InputError(f"{part} is damaged; remove it, then sync the copy from its source again")


def _check_apart(source: Path, target: Path) -> None:
    """Raises InputError if one directory holds the other, whose files would then be copied, too, and again each time."""
    if source == target or source in target.parents or target in source.parents:
        how = "is" if source == target else "lies in" if source in target.parents else "holds"
        raise InputError(f"--target {target} {how} --source {source}; pass a place outside it")


def _check_sides(
    origin: Location,
    sizes: Mapping[str, int | None],
    goal: Location,
    there: Mapping[str, int | None],
    beside: Sequence[str],
) -> None:
    """Raises InputError unless one side is a folder and the other its copy or empty."""
    if is_copy(sizes):
        if is_copy(there):
            raise InputError(f"{origin.name} and {goal.name} are both copies; sync each with the folder itself")
        if isinstance(goal, Remote):
            raise InputError(f"--target {goal.name}: a folder of tables is a directory or a URL; pass one of these")
        if beside:
            raise InputError("--with adds files to a copy, and --source is one; leave it out")
    elif isinstance(origin, Remote):
        raise InputError(f"--source {origin.name}: no synced copy is there; check the path, or swap source and target")
    elif not any(not _is_hidden(path) for path in sizes) and not beside:
        raise InputError(f"--source {origin.name}: nothing is there; pass a folder of tables or a synced copy")
    elif not is_copy(there) and (foreign := foreign_file(there)):
        raise InputError(
            f"--target {goal.name} holds other files ({foreign!r}); pass a new or empty place for the copy"
        )


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _is_hidden(path: str) -> bool:
    return any(name.startswith(".") for name in path.split("/"))


@dataclass(frozen=True)
class _Base:
    """A table or file as it was on both sides after the last sync."""

    digest: str
    cuts: Mapping[str, tuple[int, Sequence[int]]]
    """Of each column of a table: the rows of a new part, and of the parts that the digest is made of."""

    @staticmethod
    def of(item: Item) -> "_Base":
        columns = item.columns if isinstance(item, TableItem) else {}
        cuts = {name: (column.part_rows, [part.rows for part in column.parts]) for name, column in columns.items()}
        return _Base(item.digest, cuts)

    @staticmethod
    def load(digest: str, cuts: dict[str, list]) -> "_Base":
        """Reads what was saved as JSON."""
        return _Base(digest, {name: (new, parts) for name, (new, parts) in cuts.items()})

    @property
    def columns(self) -> dict[str, Column]:
        """The parts, without their contents."""
        return {name: Column(new, tuple(Part(rows, "") for rows in parts)) for name, (new, parts) in self.cuts.items()}


@dataclass
class _State:
    """What this machine knows of earlier syncs of a folder with one copy; it may be lost."""

    directory: Path
    number: int = 0
    """The copy's version at the last sync."""
    base: dict[str, _Base] = field(default_factory=dict)
    known: Known = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    """The identity and SHA-256 of each file that was read."""
    sent: dict[str, Object] = field(default_factory=dict)
    """Objects that arrived intact and are in no manifest yet."""

    @staticmethod
    def open(folder: Directory | Bucket, copy_id: str) -> "_State":
        """Reads what there is."""
        key = hashlib.sha256(copy_id.encode()).hexdigest()[:16]
        if isinstance(folder, Directory):
            directory = folder.root / STATE / key
        else:
            directory = cache_directory() / "sync" / hashlib.sha256(folder.name.encode()).hexdigest()[:16] / key
        state = _State(directory)
        with storage_errors(str(directory), flag="folder"):
            directory.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                found = json.loads(state._file.read_bytes())
                base = {path: _Base.load(**one) for path, one in found["base"].items()}
                state.number, state.known, state.files, state.base = (
                    found["number"],
                    found["known"],
                    found["files"],
                    base,
                )
            for line in state._journal.read_text().splitlines() if state._journal.exists() else ():
                with suppress(ValueError, TypeError):  # cut off by a kill
                    one = Object(**json.loads(line))
                    state.sent[one.path] = one
        return state

    @property
    def _file(self) -> Path:
        return self.directory / "state.json"

    @property
    def _journal(self) -> Path:
        return self.directory / "sent.jsonl"

    @property
    def incoming(self) -> Path:
        """Directory for fetched files that are verified and not in place yet."""
        return self.directory / "incoming"

    def save(self) -> None:
        with whole_file(self._file) as partial:
            base = {path: one.__dict__ for path, one in self.base.items()}
            found = {"number": self.number, "base": base, "known": self.known, "files": self.files}
            partial.write_text(json.dumps(found))

    def note(self, one: Object) -> None:
        """Remembers an object that arrived intact."""
        with self._journal.open("a") as file:
            file.write(json.dumps(one.__dict__) + "\n")

    def forget_transfers(self) -> None:
        """Removes what only an unfinished sync needs."""
        self._journal.unlink(missing_ok=True)
        shutil.rmtree(self.incoming, ignore_errors=True)


@dataclass
class _Folder:
    """The tables and files of a folder."""

    items: dict[str, Item]
    """Tables in the parts that the copy has."""
    datasets: dict[str, "lance.LanceDataset"]
    beside: dict[str, Path]
    """Files from outside the folder."""
    unchanged: set[str] = field(default_factory=set)
    """What is as it was after the last sync."""

    @staticmethod
    def read(
        folder: Directory | Bucket,
        copy: SyncedCopy,
        extra: Mapping[str, Path],
        skip: Sequence[str],
        part_bytes: int,
        state: _State,
        progress: bool,
    ) -> "_Folder":
        sizes = {path: size for path, size in folder.sizes().items() if not _is_hidden(path)}
        tables = sorted({path[: path.index(".lance/") + 6] for path in sizes if ".lance/" in path})
        tables = [path for path in tables if not _matches(path, skip)]
        files = {path: size for path, size in sizes.items() if ".lance/" not in path and not _matches(path, skip)}
        links = sorted(path for path, size in files.items() if size is None)
        if links:
            logger.warning(f"{folder.name}: {len(links):,} links are left out, such as {links[0]}")
        beside = {path.removeprefix("beside/"): file for path, file in extra.items()}
        if clash := beside.keys() & files.keys():
            raise InputError(f"--with: {folder.name} has {min(clash)!r} too; rename one")
        found = _Folder({}, {}, beside)
        identities = folder.versions() if isinstance(folder, Bucket) else {}
        with progress_bar(unit="B", unit_scale=True, desc="compare", disable=not progress) as bar:
            found._read_tables(folder, tables, copy, part_bytes, state, bar.update)
            found._read_files(folder, files, identities, state, bar.update)
        for path, file in beside.items():
            found.items[path] = FileItem(Object("", file.stat().st_size, sha256_of(file)))
        state.save()
        found.unchanged |= {
            p for p, item in found.items.items() if p in state.base and state.base[p].digest == item.digest
        }
        for path in found.items:
            check_path(path, folder.name)
        check_distinct(found.items, folder.name)
        return found

    def _read_tables(
        self,
        folder: Directory | Bucket,
        tables: Sequence[str],
        copy: SyncedCopy,
        part_bytes: int,
        state: _State,
        on_bytes: Callable[[int], object],
    ) -> None:
        """Describes tables in the parts that the copy has; a table before its rejects.

        `embed` commits a block's rejects first, and copes with too many of them.
        """
        known: Known = {}
        for path in tables:
            dataset = open_dataset(f"{folder.name}/{path}")
            if dataset is None:
                continue
            there, base = copy.items.get(path), state.base.get(path)
            columns = there.columns if isinstance(there, TableItem) else {}
            self.datasets[path] = dataset
            self.items[path], keys = describe_table(dataset, columns, part_bytes, state.known, on_bytes)
            known |= keys
            if base is not None and base.digest != self.items[path].digest:  # the copy may be in other parts since
                as_then, keys = describe_table(dataset, base.columns, part_bytes, state.known, on_bytes)
                known |= keys
                self.unchanged |= {path} if as_then.digest == base.digest else set()
        state.known = known

    def _read_files(
        self,
        folder: Directory | Bucket,
        files: Mapping[str, int | None],
        identities: dict[str, str],
        state: _State,
        on_bytes: Callable[[int], object],
    ) -> None:
        """Hashes files; not again those that look as they did at the last sync."""
        seen: dict[str, list[str]] = {}
        with folder.scratch() as scratch:
            for path, size in files.items():
                if size is None:
                    continue
                try:
                    if isinstance(folder, Directory):
                        identities[path] = f"{size} {(folder.root / path).stat().st_mtime_ns}"
                    if state.files.get(path, [""])[0] == identities[path]:
                        seen[path] = state.files[path]
                    else:
                        seen[path] = [identities[path], sha256_of(folder.fetch(path, scratch))]
                        on_bytes(size)
                except FileNotFoundError:
                    continue  # deleted since it was listed, as finetune does with older checkpoints
                self.items[path] = FileItem(Object("", size, seen[path][1]))
        state.files = seen


@dataclass(frozen=True)
class _Choice:
    """What happens to each table and file, by its path."""

    send: tuple[str, ...]
    same: tuple[str, ...]
    keep: tuple[str, ...]
    skip: tuple[str, ...]
    delete: tuple[str, ...]


def _choose(
    wanted: Mapping[str, Item],
    found: Mapping[str, Item],
    unchanged: tuple[Set[str], Set[str]],
    synced: Set[str],
    prefer: Literal["source", "target"] | None,
    delete: bool,
) -> _Choice:
    """Compares both sides with each other and with what they were after the last sync.

    Args:
        wanted: What the source has.
        found: What the target has.
        unchanged: What is as it was after the last sync, at the source and at the target.
        synced: What was equal on both sides then.
        prefer: The side that wins.
        delete: Delete at the target.

    Raises:
        InputError: The target has changed, and nothing says which side wins; or rows or columns would be deleted.
    """
    send, same, keep, skip, gone, both, behind = [], [], [], [], [], [], []
    for path in sorted({*wanted, *found}):
        new, old = wanted.get(path), found.get(path)
        if new is None:
            (gone if delete and path in unchanged[1] else keep).append(path)
        elif old is None:
            send.append(path)
        elif new.digest == old.digest:
            same.append(path)
        elif path in unchanged[1] or prefer == "source":
            send.append(path)
        elif prefer == "target":
            skip.append(path)
        else:
            (behind if path in unchanged[0] else both).append(path)
    if both:
        what = "changed on both sides since the last sync" if both[0] in synced else "differ, and no sync has seen both"
        raise InputError(f"{_some(both)}: {what}; pass --prefer source or --prefer target, the side that wins")
    if behind:
        what = "changed at the target since the last sync, and not at the source"
        raise InputError(f"{_some(behind)}: {what}; swap --source and --target, or pass --prefer source or target")
    for path in () if delete else send:
        new, old = wanted[path], found.get(path)
        if isinstance(new, TableItem) and isinstance(old, TableItem):
            if new.rows < old.rows:
                raise InputError(f"{path}: {old.rows:,} rows at the target, {new.rows:,} at the source; pass --delete")
            if lost := [name for name in old.columns if name not in new.columns]:
                raise InputError(f"{path}: the source has no column {lost[0]!r}; pass --delete to remove it")
    return _Choice(*map(tuple, (send, same, keep, skip, gone)))


@dataclass(frozen=True)
class _Upload:
    """A file of the copy that has to be made and sent."""

    path: str
    """Its place, if what it holds does not change meanwhile."""
    item: str
    """The file of the folder that it is a snapshot of; "" for a part of a table."""
    make: Callable[[Path], object]
    estimate: int
    """Approximate bytes."""


@dataclass
class _Run:
    """One sync, once it is known what has to happen."""

    folder: Directory | Bucket
    place: Location
    held: Mapping[str, int | None]
    """Bytes of the files of the copy."""
    copy: SyncedCopy
    local: _Folder
    choice: _Choice
    state: _State
    part_bytes: int
    progress: bool
    delete: bool

    def push(self, target: str) -> tuple[SyncSummary, SyncedCopy]:
        """Brings the copy up to date; also returns its new version."""
        numbers, earlier = manifest_numbers(self.held), self.copy.objects()
        have = {path: one for path, one in (self.state.sent | earlier).items() if self.held.get(path) == one.bytes}
        # What is damaged or missing in the copy is sent again, though nothing changed here
        broken = [path for path in self.choice.same if any(o.path not in have for o in self.copy.items[path].objects())]
        send = [*self.choice.send, *broken]
        uploads = {one.path: one for path in send for one in self._uploads(path) if one.path not in have}
        _check_room(self.place, sum(one.estimate for one in uploads.values()))
        items = {path: item for path, item in self.copy.items.items() if path not in self.choice.delete}
        with self.place.staging() as staging:
            if not numbers:  # says whose place this is
                write_copy(self.place, self.copy, staging)
            done = self._transfer(
                list(uploads.values()), lambda one: self._send(one, staging), lambda one: one.estimate
            )
            have |= {path: one for path, (one, _) in zip(uploads, done, strict=True)}
            items |= {path: self._placed(path, have) for path in send}
            copy = replace(self.copy, items=items)
            listed = self.place.sizes()
            if send or self.choice.delete:
                copy = replace(self.copy, number=max(numbers, default=0) + 1, items=items)
                if max(manifest_numbers(listed), default=0) >= copy.number:
                    raise InputError(f"{self.place.name}: another sync has written there meanwhile; run this one again")
                write_copy(self.place, copy, staging)
        objects = copy.objects()
        unused = {path: size or 0 for path, size in listed.items() if path not in objects and is_object(path)}
        for path in unused if self.delete else ():
            self.place.remove(path)
        for number in manifest_numbers(listed):
            if number < self.copy.number:
                self.place.remove(manifest_name(number))
        sent = [one for one, travelled in done if travelled]
        return self._summary(target, sent, list(objects.values()), 0 if self.delete else sum(unused.values())), copy

    def _uploads(self, path: str) -> Iterator[_Upload]:
        item = self.local.items[path]
        if isinstance(item, FileItem):
            outside = self.local.beside.get(path)

            def snapshot(file: Path) -> None:
                with self.folder.scratch() as scratch:
                    try:
                        shutil.copyfile(outside or self.folder.fetch(path, scratch), file)
                    except FileNotFoundError as error:
                        raise InputError(f"{path}: deleted while it was copied; run the sync again") from error

            yield _Upload(object_path(path, item.digest), path, snapshot, item.object.bytes)
            return
        dataset = self.local.datasets[path]
        for name, column in item.columns.items():
            first = 0
            for part in column.parts:

                def write(file: Path, name: str = name, first: int = first, rows: int = part.rows) -> None:
                    write_column_part(name, read_column(dataset, name, first, rows), file)

                where = object_path(path, part.content, column=name, first_row=first)
                check_path(where, self.folder.name)
                yield _Upload(where, "", write, part.rows * self.part_bytes // column.part_rows)
                first += part.rows

    def _send(self, upload: _Upload, staging: Path) -> tuple[Object, bool]:
        """Makes a file and sends it, unless it is there; returns whether it travelled."""
        for _ in range(_ATTEMPTS):
            file = staging / uuid.uuid4().hex
            with storage_errors(self.folder.name, flag="--source"):
                upload.make(file)
                digest = Digest.of(file)
            path = object_path(upload.item, digest.sha256) if upload.item else upload.path
            one = Object(path, digest.bytes, digest.sha256)
            if self.held.get(path) == digest.bytes and self.place.holds(path, digest):
                file.unlink()
                self.state.note(one)
                return one, False
            self.place.put(file, path)
            if self.place.holds(path, digest):
                self.state.note(one)
                return one, True
            logger.warning(f"{self.place.name}/{path} did not arrive intact; sending it again")
        raise InputError(f"{self.place.name}/{path} did not arrive intact {_ATTEMPTS} times; check the disk or network")

    def _placed(self, path: str, objects: Mapping[str, Object]) -> Item:
        """Returns a table or file of the folder with its objects in the copy."""
        item = self.local.items[path]
        if isinstance(item, FileItem):
            return FileItem(objects[object_path(path, item.digest)])
        columns = {}
        for name, column in item.columns.items():
            first, parts = 0, []
            for part in column.parts:
                where = object_path(path, part.content, column=name, first_row=first)
                parts.append(replace(part, object=objects[where]))
                first += part.rows
            columns[name] = Column(column.part_rows, tuple(parts))
        return replace(item, columns=columns)

    def pull(self, target: str) -> tuple[SyncSummary, SyncedCopy]:
        """Brings the folder up to date; also returns the copy's version."""
        needed: dict[str, Object] = {}
        for path in self.choice.send:
            item = self.copy.items[path]
            objects = (
                [item.object]
                if isinstance(item, FileItem)
                else [p.object for p in parts_to_fetch(self._table(path), item)]
            )
            needed |= {one.sha256: one for one in objects if one is not None}
        for one in needed.values():
            if self.held.get(one.path) != one.bytes:
                raise InputError(
                    f"{self.place.name}/{one.path} is missing or damaged; sync the copy from its source again"
                )
        _check_room(self.folder, sum(one.bytes for one in needed.values()))
        with storage_errors(str(self.state.incoming), flag="--target"):
            self.state.incoming.mkdir(exist_ok=True)
        done = self._transfer(list(needed.values()), self._fetch, lambda one: one.bytes)
        files = dict(zip(needed, (file for file, _ in done), strict=True))
        for path in self.choice.send:
            item = self.copy.items[path]
            if isinstance(item, TableItem):
                old, (database, name) = self._table(path), self._database(path)
                there = None if old is None else (self.local.datasets[path], old)
                written = write_table(database, name, there, item, files)
                self.state.known |= part_keys(written, item)
        with self.folder.staging() as staging:
            for path in self.choice.send:
                if isinstance(item := self.copy.items[path], FileItem):
                    draft = staging / uuid.uuid4().hex
                    shutil.copyfile(files[item.object.sha256], draft)
                    self.folder.put(draft, path)
        for path in self.choice.delete:
            self._delete(path)
        objects = [one for path in (*self.choice.send, *self.choice.same) for one in self.copy.items[path].objects()]
        fetched = [one for one, (_, travelled) in zip(needed.values(), done, strict=True) if travelled]
        return self._summary(target, fetched, objects, 0), self.copy

    def _table(self, path: str) -> TableItem | None:
        item = self.local.items.get(path)
        return item if isinstance(item, TableItem) else None

    def _database(self, path: str) -> tuple[str, str]:
        directory, _, name = f"{self.folder.name}/{path}".rpartition("/")
        return directory, name.removesuffix(".lance")

    def _fetch(self, one: Object) -> tuple[Path, bool]:
        """Returns a local file with the contents of an object, and whether it travelled."""
        if isinstance(self.place, Directory):
            file = self.place.fetch(one.path, self.state.incoming)
            with storage_errors(str(file), flag="--source"):
                if sha256_of(file) == one.sha256:
                    return file, True
            raise _damaged(str(file))
        goal = self.state.incoming / one.sha256
        if goal.exists() and sha256_of(goal) == one.sha256:
            return goal, False
        for _ in range(_ATTEMPTS):
            with storage_errors(str(goal), flag="--target"):
                scratch = self.state.incoming / uuid.uuid4().hex
                scratch.mkdir()
                file = self.place.fetch(one.path, scratch)
                if sha256_of(file) == one.sha256:
                    os.replace(file, goal)
                    scratch.rmdir()
                    return goal, True
            logger.warning(f"{self.place.name}/{one.path} did not arrive intact; fetching it again")
        raise _damaged(f"{self.place.name}/{one.path}")

    def _delete(self, path: str) -> None:
        """Deletes a table or file of the folder."""
        if path not in self.local.datasets:
            self.folder.remove(path)
            return
        import lance

        database, name = self._database(path)
        with writer_lock(database, name.removesuffix("_rejects")), storage_errors(path):
            lance.LanceDataset.drop(f"{database}/{name}.lance")

    def _transfer(
        self, jobs: Sequence[_Job], do: Callable[[_Job], _Done], size_of: Callable[[_Job], int]
    ) -> list[_Done]:
        """Does all jobs, some at a time; after an error no further one is begun."""
        total = sum(map(size_of, jobs))
        with progress_bar(total=total, unit="B", unit_scale=True, desc="sync", disable=not self.progress) as bar:

            def shown(job: _Job) -> _Done:
                done = do(job)
                bar.update(size_of(job))
                return done

            with ThreadPoolExecutor(_TRANSFERS) as pool:
                try:
                    return list(pool.map(shown, jobs))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

    def _summary(
        self, target: str, travelled: Sequence[Object], objects: Sequence[Object], superseded: int
    ) -> SyncSummary:
        sent = sum(one.bytes for one in travelled)
        return SyncSummary(
            target=target,
            changed=self.choice.send,
            same=len(self.choice.same),
            sent=len(travelled),
            sent_bytes=sent,
            spared_bytes=max(0, sum(one.bytes for one in objects) - sent),
            kept=self.choice.keep,
            skipped=self.choice.skip,
            deleted=len(self.choice.delete),
            superseded_bytes=superseded,
        )


def _check_room(place: Location, needed: int) -> None:
    room = place.free_bytes() if needed else None
    if room is not None and needed > room:
        raise InputError(f"{place.name}: about {needed:,} bytes are needed and {room:,} are free; free space")
