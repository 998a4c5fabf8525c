"""A vector table as plain files that fit a FAT32 stick or a bucket: Parquet parts, and a manifest written last.

Vectors are lists of float32 or float16, or codes (bytes) with what decodes them in quantiser.safetensors. A file is in the journal
with its sha256 once it is there, so that an export that was killed, or whose stick was pulled, goes on.
"""

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tqdm import tqdm

from bioscan_jax.bundles.budget import choose, estimates, parse_bytes, row_bytes
from bioscan_jax.bundles.location import Directory, Location, check_mounted, locate
from bioscan_jax.bundles.manifest import (
    JOURNAL,
    MANIFEST,
    MOST_BYTES,
    Entry,
    Kind,
    Manifest,
    OtherFormat,
    check_distinct,
    check_path,
    faults,
    is_left_by_systems,
    read_manifest,
    sha256_of,
)
from bioscan_jax.bundles.parts import BLOCK_ROWS, Rows, coded, open_rows, write_part
from bioscan_jax.bundles.quantise import Precision, Quantiser, fit
from bioscan_jax.errors import InputError
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.reading import schema_metadata, vector_index
from bioscan_jax.table.storage import local_directory, read_if_exists, sidecar_path, storage_errors

QUANTISER = "quantiser.safetensors"
RUN = "run.json"
CALIBRATION = "calibration.json"
_OURS = re.compile(rf"(\.unfinished|vectors|rejects|beside)/.*|{MANIFEST}|{JOURNAL}|{QUANTISER}|{RUN}|{CALIBRATION}")


@dataclass(frozen=True)
class Exported:
    """A whole bundle."""

    name: str
    rows: int
    files: int
    kept: int
    """Files that an earlier export had written."""
    bytes: int
    precision: Precision
    candidates: tuple[str, ...]
    """One line for each precision that was weighed."""
    calibration: str | None
    """What became of the table's; None if it has none."""
    adapter: str | None
    """The same of the adapter that its vectors were made with."""

    def __str__(self) -> str:
        """The choice and the result, as lines."""
        before = f" ({self.kept:,} of them there before)" if self.kept else ""
        done = f"{self.name}: {self.rows:,} rows as {self.precision} in {self.files:,} files{before}"
        parts = {"calibration": self.calibration, "adapter": self.adapter}
        notes = [f"{name} {became}" for name, became in parts.items() if became is not None]
        return "\n".join([*self.candidates, f"{done}, {self.bytes:,} bytes", *notes])


def export(
    source: str,
    target: str,
    table: str = "sequences",
    *,
    filter: str | None = None,
    precision: Precision | None = None,
    budget: str | None = None,
    beside: Sequence[str] = (),
    recall_queries: int = 256,
    recall_rows: int = 100_000,
    seed: int = 0,
    part_bytes: int = 256 << 20,
    progress: bool = True,
) -> Exported:
    """Writes a table with its rejects, its run's record and its calibration to a directory, stick, URL or rclone remote.

    The same call goes on where a killed one stopped: files that are there with the right sha256 are kept.

    Args:
        source: Database directory or URL.
        target: Directory, fsspec URL or rclone:REMOTE:PATH; new, empty or with a bundle of the same.
        table: Name of the vector table.
        filter: Only rows for which this SQL expression holds; rejects are taken all.
        precision: Of the vectors; the table's own if absent.
        budget: Take the most exact precision whose bundle is estimated to be no larger, such as 25GB, and measure
            what each costs.
        beside: Files and directories to take along: adapter, heads, label space; on the command line --with PATH, for
            each of them.
        recall_queries: Vectors of the table to measure recall with.
        recall_rows: Rows to search in; all if the table has fewer.
        seed: Of these draws and of k-means.
        part_bytes: About the size of a part before compression.
        progress: Show a bar on the terminal.

    Raises:
        InputError: There is no such table, the filter is wrong, the target is not mounted, too small or holds
            something else, a name is one that Windows refuses, or the storage failed.
    """
    if precision is not None and budget is not None:
        raise InputError("--precision and --budget both decide the precision; pass one of them")
    for flag, number in (("recall_queries", recall_queries), ("recall_rows", recall_rows), ("part_bytes", part_bytes)):
        if number < 1:
            raise InputError(f"--{flag} {number} is too small; pass at least 1")
    limit = parse_bytes(budget) if budget is not None else None
    taken = open_rows(source, table, filter)
    location = locate(target, "target")
    if isinstance(location, Directory):
        check_mounted(location.root, "target")
    along = _beside(beside)
    local = local_directory(source)
    calibration = _sidecar(source, table, "calibration")
    asked: dict[str, Any] = {
        "source": source if local is None else str(local),
        "table": table,
        "version": taken.dataset.version,
        "filter": filter,
        "rows": taken.rows,
        "precision": precision,
        "budget": limit,
        "beside": {path: sha256_of(file) for path, file in along.items()},
        "calibration_sha256": calibration and hashlib.sha256(calibration.encode()).hexdigest(),
        "seed": seed,
        "part_bytes": part_bytes,
    }
    with writer_lock(f"bundle://{location.name}", table, kind="bundle"):
        before, quantiser = _before(location, asked), None
        if before is None:
            head = asked | _facts(source, table, taken) | {"calibration": calibration}
            head["part_rows"] = max(1, part_bytes // row_bytes(taken))
            sizes = estimates(taken, sum(file.stat().st_size for file in along.values()), head["part_rows"])
            chosen, quantiser, lines = choose(
                taken, sizes, precision, limit, recall_queries=recall_queries, recall_rows=recall_rows, seed=seed
            )
            head |= {"chosen": chosen, "candidates": lines, "estimate": sizes[chosen]}
            before = Manifest(head, ())
        kept = _kept(location, before)
        with location.staging() as staging:
            draft = _Draft(location, staging, before.head, kept)
            _write_vectors(draft, taken, quantiser or _quantiser(draft, taken), progress)
            _write_rest(draft, taken, along)
            total = sum(entry.bytes for entry in draft.files.values())
            if limit is not None and total > limit:
                mend = "remove it and pass a smaller --budget or --precision"
                raise InputError(f"{location.name}: the bundle has {total:,} bytes, over --budget {limit:,}; {mend}")
            draft.note(MANIFEST, draft.files)
            location.remove(JOURNAL)
    head = before.head
    return Exported(
        location.name,
        taken.rows,
        len(draft.files),
        len(kept),
        total,
        head["chosen"],
        tuple(head["candidates"]),
        None if calibration is None else _calibration_left_out(head, taken) or "taken along",
        _adapter(head["metadata"], along),
    )


@dataclass
class _Draft:
    """A bundle that is being written."""

    location: Location
    staging: Path
    head: dict[str, Any]
    kept: dict[str, Entry]
    """What an earlier export has written."""
    files: dict[str, Entry] = field(default_factory=dict)

    def note(self, name: str, files: dict[str, Entry]) -> None:
        """Writes a manifest or journal of these files."""
        file = self.staging / name
        with storage_errors(self.location.name):
            file.write_text(Manifest(self.head, tuple(files[path] for path in sorted(files))).to_json())
        self.location.put(file, name)

    def add(self, path: str, kind: Kind, rows: int, make: Callable[[Path], object]) -> None:
        """Has `make` write a file, unless it is there already."""
        if path in self.kept:
            self.files[path] = self.kept[path]
            return
        file = self.staging / "draft"
        with storage_errors(self.location.name):
            make(file)
            entry = Entry(path, file.stat().st_size, sha256_of(file), kind, rows)
        if entry.bytes > MOST_BYTES:
            raise InputError(f"{self.location.name}: {path} has {entry.bytes:,} bytes; pass a smaller --part_bytes")
        self.location.put(file, path)
        self.files[path] = entry
        self.note(JOURNAL, self.kept | self.files)


def _facts(source: str, table: str, taken: Rows) -> dict[str, Any]:
    """What is needed to make the table again."""
    rejects = taken.rejects
    return {
        "metadata": schema_metadata(taken.dataset),
        "schema": _schema_text(taken.dataset.schema),
        "rejects_metadata": {} if rejects is None else schema_metadata(rejects),
        "rejects_schema": None if rejects is None else _schema_text(rejects.schema),
        "rejects": 0 if rejects is None else rejects.count_rows(),
        "index": vector_index(taken.dataset),
        "run": _sidecar(source, table, "run"),
    }


def _sidecar(source: str, table: str, kind: Literal["run", "calibration"]) -> str | None:
    path = sidecar_path(source, table, kind)
    with storage_errors(path):
        text = read_if_exists(path)
    return None if text is None else text.decode()


def _calibration_left_out(head: dict[str, Any], taken: Rows) -> str:
    """Why it would not hold for what is carried; empty if it does."""
    if head["filter"] is not None:
        return "left out: it was fitted with rows that --filter takes away; run scripts/calibrate.py on the import"
    if head["chosen"] != taken.own_precision:
        return f"left out: it was fitted on {taken.own_precision} vectors; run scripts/calibrate.py on the import"
    return ""


def _adapter(made_by: dict[str, str], along: dict[str, Path]) -> str | None:
    """What became of the adapter; None if the vectors were made without one."""
    if "adapter_sha256" not in made_by:
        return None
    if any(file.name == "adapter_config.json" for file in along.values()):
        return "taken along"
    return "left out: queries can only be embedded with it; pass its directory as --with DIR"


def _schema_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.remove_metadata().serialize().to_pybytes()).decode()


def _beside(paths: Sequence[str]) -> dict[str, Path]:
    """Every file to take along, by its path in the bundle."""
    found: dict[str, Path] = {}
    for given in paths:
        root = Path(given).expanduser().absolute()
        if not root.exists():
            raise InputError(f"--with {given}: there is no such file or directory")
        files = [root]
        if root.is_dir():
            files = sorted(Path(where) / name for where, _, names in os.walk(root) for name in names)
            if linked := [path for path in root.rglob("*") if path.is_symlink() and path.is_dir()]:
                raise InputError(f"--with {given}: {linked[0]} is a link to a directory; pass that directory itself")
        for file in files:
            path = f"beside/{file.relative_to(root.parent).as_posix()}"
            check_path(path, f"--with {given}")
            if path in found:
                raise InputError(f"--with {given}: another --with has {path.removeprefix('beside/')!r} too; rename one")
            if (size := file.stat().st_size) > MOST_BYTES:
                raise InputError(f"--with {given}: {file} has {size:,} bytes; FAT32 takes 4 GiB at most, so split it")
            found[path] = file
    check_distinct(found, "--with")
    return found


def _before(location: Location, asked: dict[str, Any]) -> Manifest | None:
    """The bundle, whole or not, that an earlier export of the same wrote; None where nothing is."""
    found = None
    for name in (MANIFEST, JOURNAL):
        try:
            found = found or read_manifest(location, name)
        except OtherFormat:
            raise
        except InputError:  # a remote that was cut off while it was written, or damage; what it names is written anew
            continue
    if found is None:
        foreign = [path for path in location.sizes() if not is_left_by_systems(path) and not _OURS.fullmatch(path)]
        if foreign:
            raise InputError(f"{location.name} is not empty (it has {foreign[0]!r}); pass a new directory")
        return None
    differing = [key for key, value in asked.items() if found.head.get(key) != value]
    if differing:
        change = f"{differing[0]} {found.head.get(differing[0])!r} there, {asked[differing[0]]!r} now"
        raise InputError(f"{location.name} holds another export ({change}); remove it or pass another --target")
    return found


def _kept(location: Location, before: Manifest) -> dict[str, Entry]:
    """The files that are whole; an InputError if the others have no room."""
    wrong = {line.split(": ")[0] for line in faults(location, before)} if before.files else set()
    kept = {entry.path: entry for entry in before.files if entry.path not in wrong}
    room, needed = location.free_bytes(), before.head["estimate"] - sum(entry.bytes for entry in kept.values())
    if room is not None and needed > room:
        mend = "free space, or pass --budget or --filter"
        raise InputError(f"{location.name}: about {needed:,} bytes are needed and {room:,} are free; {mend}")
    return kept


def _quantiser(draft: _Draft, taken: Rows) -> Quantiser:
    """The quantiser that was chosen when the export began."""
    chosen: Precision = draft.head["chosen"]
    if chosen not in ("int8", "pq"):
        return Quantiser(chosen)
    if QUANTISER not in draft.kept:
        return fit((chosen,), taken.blocks, taken.rows, draft.head["seed"])[chosen]
    with draft.location.scratch() as scratch:
        return Quantiser.load(chosen, draft.location.fetch(QUANTISER, scratch))


def _write_vectors(draft: _Draft, taken: Rows, quantiser: Quantiser, progress: bool) -> None:
    if quantiser.precision in ("int8", "pq"):
        draft.add(QUANTISER, "quantiser", 0, quantiser.save)
    part_rows = draft.head["part_rows"]
    with tqdm(total=taken.rows, unit="row", desc="export", disable=not progress) as bar:
        for start in range(0, taken.rows, part_rows):
            rows = min(part_rows, taken.rows - start)

            def make(file: Path, start: int = start, rows: int = rows) -> None:
                write_part(coded(taken, quantiser, start, rows), file)

            draft.add(f"vectors/part-{start // part_rows:06d}.parquet", "vectors", rows, make)
            bar.update(rows)


def _write_rest(draft: _Draft, taken: Rows, along: dict[str, Path]) -> None:
    """Rejects, the run's record, and what is taken along."""
    part_rows = max(BLOCK_ROWS, draft.head["part_rows"])
    for start in range(0, draft.head["rejects"], part_rows):
        rows = min(part_rows, draft.head["rejects"] - start)

        def make(file: Path, start: int = start, rows: int = rows) -> None:
            assert taken.rejects is not None
            write_part(taken.rejects.to_table(offset=start, limit=rows), file)

        draft.add(f"rejects/part-{start // part_rows:06d}.parquet", "rejects", rows, make)
    if (record := draft.head["run"]) is not None:
        draft.add(RUN, "run", 0, lambda file: file.write_text(record, encoding="utf-8"))
    if (calibration := draft.head["calibration"]) is not None and not _calibration_left_out(draft.head, taken):
        draft.add(CALIBRATION, "calibration", 0, lambda file: file.write_text(calibration, encoding="utf-8"))
    for path, original in along.items():
        draft.add(path, "beside", 0, lambda file, original=original: shutil.copyfile(original, file))
