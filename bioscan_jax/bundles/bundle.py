"""Exports a vector table as plain files for a FAT32 stick or a bucket: Parquet parts, and a manifest written last.

Vectors are lists of float32 or float16, or byte codes whose decoding tables are in quantiser.safetensors. Each finished
file is recorded in a journal with its sha256, so that an export that was killed, or whose stick was pulled, resumes.
"""

import base64
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from bioscan_jax.bundles.manifest import (
    JOURNAL,
    MANIFEST,
    MAX_FILE_BYTES,
    Entry,
    FormatError,
    Kind,
    Manifest,
    check_distinct,
    check_path,
    find_faults,
    is_system_file,
    read_manifest,
    sha256_of,
)
from bioscan_jax.bundles.parts import BLOCK_ROWS, SelectedRows, encode_part, parquet_bytes, select_rows, write_part
from bioscan_jax.bundles.quantise import PRECISIONS, Precision, Quantiser, bytes_per_vector, fit, recall
from bioscan_jax.errors import InputError
from bioscan_jax.location import Directory, Location, check_mounted, local_directory, locate, read_if_exists
from bioscan_jax.notebook import Shown, progress_bar
from bioscan_jax.table.lock import Check, place_lock
from bioscan_jax.table.reading import schema_metadata, vector_index
from bioscan_jax.table.storage import sidecar_path, storage_errors

if TYPE_CHECKING:
    import lance

QUANTISER = "quantiser.safetensors"
RUN = "run.json"
CALIBRATION = "calibration.json"
_SAMPLED_ROWS = 1024
_OVERHEAD_BYTES = 65536
"""Upper estimate of a Parquet footer and an entry of the manifest."""
_UNITS = {
    "": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}
_OURS = re.compile(rf"(\.unfinished|vectors|rejects|beside)/.*|{MANIFEST}|{JOURNAL}|{QUANTISER}|{RUN}|{CALIBRATION}")


@dataclass(frozen=True)
class BundleSummary(Shown):
    """A complete bundle, as `bundle` reports it."""

    name: str
    rows: int
    files: int
    kept: int
    """Files that an earlier, interrupted export had written."""
    bytes: int
    precision: Precision
    candidates: tuple[str, ...]
    """One line per precision that was considered."""
    calibration: str | None
    """Whether the table's calibration is included, or why not; None if there is none."""
    adapter: str | None
    """The same for the adapter that made the vectors."""

    def __str__(self) -> str:
        """The precisions considered and the result, one per line."""
        earlier = f" ({self.kept:,} of them written earlier)" if self.kept else ""
        done = f"{self.name}: {self.rows:,} rows as {self.precision} in {self.files:,} files{earlier}"
        parts = {"calibration": self.calibration, "adapter": self.adapter}
        notes = [f"{name} {note}" for name, note in parts.items() if note is not None]
        return "\n".join([*self.candidates, f"{done}, {self.bytes:,} bytes", *notes])


def bundle(
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
) -> BundleSummary:
    """Exports a table with its rejects, run record and calibration to a directory, stick, URL or rclone remote.

    Repeating the call resumes an interrupted export: files with the right sha256 are kept.

    Args:
        source: Database directory or URL.
        target: Directory, fsspec URL or rclone:REMOTE:PATH; new, empty, or holding an earlier attempt of this export.
        table: Name of the vector table.
        filter: SQL condition on the rows to export; rejects are always all exported.
        precision: Precision of the vectors; the table's own if absent.
        budget: Largest size, such as 25GB: the most exact precision whose estimate fits is chosen, and the recall of
            each is measured.
        beside: Files and directories to include: adapter, heads, label space; on the command line, --with PATH for each.
        recall_queries: Number of vectors of the table used as queries to measure recall.
        recall_rows: Number of rows they are searched in; all if the table has fewer.
        seed: Random seed of both samples and of k-means.
        part_bytes: Approximate size of a part before compression.
        progress: Show a progress bar.

    Raises:
        InputError: There is no such table, the filter is wrong, the target is not mounted, too small or holds
            something else, Windows would refuse a file name, or the storage failed.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> done = bj.bundle(f"{directory}/vectors", f"{directory}/stick", progress=False)
        >>> done.rows, done.precision, done.adapter
        (6, 'float32', None)
    """
    if precision is not None and budget is not None:
        raise InputError("--precision and --budget both decide the precision; pass one of them")
    for flag, number in (("recall_queries", recall_queries), ("recall_rows", recall_rows), ("part_bytes", part_bytes)):
        if number < 1:
            raise InputError(f"--{flag} {number} is too small; pass at least 1")
    limit = parse_bytes(budget) if budget is not None else None
    selected = select_rows(source, table, filter)
    location = locate(target, "target")
    if isinstance(location, Directory):
        check_mounted(location.root, "target")
    extra = extra_files(beside)
    local = local_directory(source)
    calibration = _sidecar(source, table, "calibration")
    asked: dict[str, Any] = {
        "source": source if local is None else str(local),
        "table": table,
        "version": selected.dataset.version,
        "filter": filter,
        "rows": selected.rows,
        "precision": precision,
        "budget": limit,
        "beside": {path: sha256_of(file) for path, file in extra.items()},
        "calibration_sha256": calibration and hashlib.sha256(calibration.encode()).hexdigest(),
        "seed": seed,
        "part_bytes": part_bytes,
    }
    with place_lock(location, table, f"{location.name}: bundle {table}") as check:
        previous, quantiser = _previous_export(location, asked), None
        if previous is None:
            head = asked | _table_facts(source, table, selected) | {"calibration": calibration}
            head["part_rows"] = max(1, part_bytes // _row_bytes(selected))
            sizes = _estimate_sizes(selected, sum(file.stat().st_size for file in extra.values()), head["part_rows"])
            chosen, quantiser, lines = _choose_precision(
                selected, sizes, precision, limit, recall_queries=recall_queries, recall_rows=recall_rows, seed=seed
            )
            head |= {"chosen": chosen, "candidates": lines, "estimate": sizes[chosen]}
            previous = Manifest(head, ())
        kept = _intact_files(location, previous)
        with location.staging() as staging:
            draft = _Draft(location, staging, previous.head, kept, check)
            _write_vectors(draft, selected, quantiser or _quantiser(draft, selected), progress)
            _write_rest(draft, selected, extra)
            total = sum(entry.bytes for entry in draft.files.values())
            if limit is not None and total > limit:
                fix = "remove it and pass a smaller --budget or --precision"
                raise InputError(f"{location.name}: the bundle has {total:,} bytes, over --budget {limit:,}; {fix}")
            draft.note(MANIFEST, draft.files)
            location.remove(JOURNAL)
    head = previous.head
    return BundleSummary(
        location.name,
        selected.rows,
        len(draft.files),
        len(kept),
        total,
        head["chosen"],
        tuple(head["candidates"]),
        None if calibration is None else _calibration_obstacle(head, selected) or "included",
        _adapter_note(head["metadata"], extra),
    )


def parse_bytes(text: str) -> int:
    """Returns the bytes of a size such as 25GB, 500 MiB or 1000.

    Raises:
        InputError: The text is not a size, or the size is 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise InputError(f"--budget {text!r} is no size; pass one such as 25GB, 500MB or 2GiB")
    return size


def _row_bytes(selected: SelectedRows) -> int:
    """Returns the average bytes of a row before compression."""
    batch = next(selected.batches(None, 0, min(selected.rows, _SAMPLED_ROWS)))
    return -(-batch.nbytes // len(batch))


def _estimate_sizes(selected: SelectedRows, beside_bytes: int, part_rows: int) -> dict[Precision, int]:
    """Estimates the bundle's bytes in each precision: codes in full, other columns as a sample of rows compresses."""
    sample = _sample(selected.dataset, selected.filter, selected.rows)
    rest = parquet_bytes(sample) / sample.num_rows * selected.rows
    if selected.rejects is not None and (rejects := selected.rejects.count_rows()):
        sample = _sample(selected.rejects, None, rejects)
        rest += parquet_bytes(sample) / sample.num_rows * rejects
    fixed = beside_bytes + _OVERHEAD_BYTES * (3 + selected.rows // part_rows)
    hidden, own = selected.hidden_size, PRECISIONS.index(selected.own_precision)
    codebook: dict[Precision, int] = {"int8": 8 * hidden, "pq": 4 * 256 * hidden}
    return {
        precision: int(
            1.1 * rest + selected.rows * bytes_per_vector(precision, hidden) + codebook.get(precision, 0) + fixed
        )
        for precision in PRECISIONS[own:]
    }


def _sample(dataset: "lance.LanceDataset", filter_sql: str | None, rows: int) -> pa.Table:
    """Reads rows from the start, the middle and the end, without vectors."""
    columns = [name for name in dataset.schema.names if name != "vector"]
    each = -(-_SAMPLED_ROWS // 4)
    starts = sorted({max(0, (rows - each) * part // 3) for part in range(4)})
    return pa.concat_tables(
        dataset.to_table(columns=columns, filter=filter_sql, offset=start, limit=each) for start in starts
    )


def _choose_precision(
    selected: SelectedRows,
    sizes: dict[Precision, int],
    precision: Precision | None,
    limit: int | None,
    *,
    recall_queries: int,
    recall_rows: int,
    seed: int,
) -> tuple[Precision, Quantiser, list[str]]:
    """Chooses the precision to write; also returns its quantiser and a line per precision considered."""
    if limit is None and precision in (None, selected.own_precision):
        return selected.own_precision, Quantiser(selected.own_precision), []
    if precision is not None and precision not in sizes:
        raise InputError(f"--precision {precision}: the table's vectors are {selected.own_precision}; leave it out")
    considered = tuple(sizes) if precision is None else (precision,)
    quantisers = fit(considered, selected.blocks, selected.rows, seed)
    if precision is not None and precision not in quantisers:
        raise InputError(f"--precision {precision} cannot hold these {selected.rows:,} vectors; pass another")
    costs = recall(quantisers, selected.blocks, selected.rows, queries=recall_queries, most_rows=recall_rows, seed=seed)
    fitting: list[Precision] = [name for name in quantisers if limit is None or sizes[name] <= limit]
    if not fitting:
        least = min(quantisers, key=lambda name: sizes[name])
        raise InputError(
            f"--budget {limit:,} bytes is too small: {least}, the smallest, needs about {sizes[least]:,}; "
            "pass more, or take fewer rows with --filter"
        )
    searched = min(recall_rows, selected.rows)
    lines = [
        f"recall@10 of {min(recall_queries, searched):,} rows among {searched:,}, against {selected.own_precision}:"
    ]
    for name in quantisers:
        note = "  <- chosen" if name == fitting[0] else "" if name in fitting else "  over the budget"
        lines.append(f"  {name:8} about {sizes[name]:>15,} bytes  recall@10 {costs[name]:.4f}{note}")
    return fitting[0], quantisers[fitting[0]], lines


@dataclass
class _Draft:
    """A bundle while it is being written."""

    location: Location
    staging: Path
    head: dict[str, Any]
    kept: dict[str, Entry]
    """Intact files of an earlier attempt."""
    check: Check
    """Raises InputError if another process has taken over."""
    files: dict[str, Entry] = field(default_factory=dict)

    def note(self, name: str, files: dict[str, Entry]) -> None:
        """Writes a manifest or journal that lists these files."""
        self.check()
        file = self.staging / name
        with storage_errors(self.location.name):
            file.write_text(Manifest(self.head, tuple(files[path] for path in sorted(files))).to_json())
        self.location.put(file, name)

    def keep(self, path: str) -> bool:
        """Takes over a file that an earlier attempt wrote; returns whether there is one."""
        if path in self.kept:
            self.files[path] = self.kept[path]
        return path in self.kept

    def add(self, path: str, kind: Kind, rows: int, make: Callable[[Path], object]) -> None:
        """Writes a file by calling `make`, unless an earlier attempt wrote it."""
        if self.keep(path):
            return
        file = self.staging / "draft"
        with storage_errors(self.location.name):
            make(file)
            entry = Entry(path, file.stat().st_size, sha256_of(file), kind, rows)
        if entry.bytes > MAX_FILE_BYTES:
            raise InputError(f"{self.location.name}: {path} has {entry.bytes:,} bytes; pass a smaller --part_bytes")
        self.location.put(file, path)
        self.files[path] = entry
        self.note(JOURNAL, self.kept | self.files)


def _table_facts(source: str, table: str, selected: SelectedRows) -> dict[str, Any]:
    """Collects what an import needs to recreate the table."""
    rejects = selected.rejects
    return {
        "metadata": schema_metadata(selected.dataset),
        "schema": _schema_text(selected.dataset.schema),
        "rejects_metadata": {} if rejects is None else schema_metadata(rejects),
        "rejects_schema": None if rejects is None else _schema_text(rejects.schema),
        "rejects": 0 if rejects is None else rejects.count_rows(),
        "index": vector_index(selected.dataset),
        "run": _sidecar(source, table, "run"),
    }


def _sidecar(source: str, table: str, kind: Literal["run", "calibration"]) -> str | None:
    path = sidecar_path(source, table, kind)
    with storage_errors(path):
        text = read_if_exists(path)
    return None if text is None else text.decode()


def _calibration_obstacle(head: dict[str, Any], selected: SelectedRows) -> str:
    """Explains why the calibration does not hold for the exported rows; empty if it does."""
    if head["filter"] is not None:
        return "left out: it was fitted with rows that --filter leaves out; run bioscan calibrate on the import"
    if head["chosen"] != selected.own_precision:
        return f"left out: it was fitted on {selected.own_precision} vectors; run bioscan calibrate on the import"
    return ""


def _adapter_note(made_by: dict[str, str], extra: dict[str, Path]) -> str | None:
    """Reports whether the adapter is included; None if the vectors were made without one."""
    if "adapter_sha256" not in made_by:
        return None
    if any(file.name == "adapter_config.json" for file in extra.values()):
        return "included"
    return "left out: queries can only be embedded with it; pass its directory as --with DIR"


def _schema_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.remove_metadata().serialize().to_pybytes()).decode()


def extra_files(paths: Sequence[str]) -> dict[str, Path]:
    """Lists the additional files to include, by their path in the bundle."""
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
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise InputError(f"--with {given}: {file} has {size:,} bytes; FAT32 takes 4 GiB at most, so split it")
            found[path] = file
    check_distinct(found, "--with")
    return found


def _previous_export(location: Location, asked: dict[str, Any]) -> Manifest | None:
    """Reads the manifest or journal of an earlier attempt of the same export; None if the target is empty."""
    found = None
    for name in (MANIFEST, JOURNAL):
        try:
            found = found or read_manifest(location, name)
        except FormatError:
            raise
        except InputError:  # damaged, or cut off while it was uploaded; its files are written again
            continue
    if found is None:
        foreign = [path for path in location.sizes() if not is_system_file(path) and not _OURS.fullmatch(path)]
        if foreign:
            raise InputError(f"{location.name} is not empty (it has {foreign[0]!r}); pass a new directory")
        return None
    differing = [key for key, value in asked.items() if found.head.get(key) != value]
    if differing:
        change = f"{differing[0]} {found.head.get(differing[0])!r} there, {asked[differing[0]]!r} now"
        raise InputError(f"{location.name} holds another export ({change}); remove it or pass another --target")
    return found


def _intact_files(location: Location, previous: Manifest) -> dict[str, Entry]:
    """Returns the intact files of an earlier attempt; raises InputError if there is no room for the others."""
    wrong = {line.split(": ")[0] for line in find_faults(location, previous)} if previous.files else set()
    kept = {entry.path: entry for entry in previous.files if entry.path not in wrong}
    room, needed = location.free_bytes(), previous.head["estimate"] - sum(entry.bytes for entry in kept.values())
    if room is not None and needed > room:
        fix = "free space, or pass --budget or --filter"
        raise InputError(f"{location.name}: about {needed:,} bytes are needed and {room:,} are free; {fix}")
    return kept


def _quantiser(draft: _Draft, selected: SelectedRows) -> Quantiser:
    """Returns the quantiser that was chosen when the export began."""
    chosen: Precision = draft.head["chosen"]
    if chosen not in ("int8", "pq"):
        return Quantiser(chosen)
    if QUANTISER not in draft.kept:
        return fit((chosen,), selected.blocks, selected.rows, draft.head["seed"])[chosen]
    with draft.location.scratch() as scratch:
        return Quantiser.load(chosen, draft.location.fetch(QUANTISER, scratch))


def _write_vectors(draft: _Draft, selected: SelectedRows, quantiser: Quantiser, progress: bool) -> None:
    if quantiser.precision in ("int8", "pq"):
        draft.add(QUANTISER, "quantiser", 0, quantiser.save)
    part_rows = draft.head["part_rows"]
    paths = [f"vectors/part-{number:06d}.parquet" for number in range(-(-selected.rows // part_rows))]
    begin = next((number for number, path in enumerate(paths) if path not in draft.kept), len(paths))
    with progress_bar(total=selected.rows, unit="row", desc="export", disable=not progress) as bar:
        for path in paths[:begin]:
            draft.keep(path)
            bar.update(part_rows)
        for path, part in zip(paths[begin:], selected.parts(begin * part_rows, part_rows), strict=True):

            def make(file: Path, part: pa.Table = part) -> None:
                write_part(encode_part(part, quantiser, selected.own_precision), file)

            draft.add(path, "vectors", len(part), make)
            bar.update(len(part))


def _write_rest(draft: _Draft, selected: SelectedRows, extra: dict[str, Path]) -> None:
    """Writes rejects, run record, calibration and additional files."""
    part_rows = max(BLOCK_ROWS, draft.head["part_rows"])
    for start in range(0, draft.head["rejects"], part_rows):
        rows = min(part_rows, draft.head["rejects"] - start)

        def make(file: Path, start: int = start, rows: int = rows) -> None:
            assert selected.rejects is not None
            write_part(selected.rejects.to_table(offset=start, limit=rows), file)

        draft.add(f"rejects/part-{start // part_rows:06d}.parquet", "rejects", rows, make)
    if (record := draft.head["run"]) is not None:
        draft.add(RUN, "run", 0, lambda file: file.write_text(record, encoding="utf-8"))
    if (calibration := draft.head["calibration"]) is not None and not _calibration_obstacle(draft.head, selected):
        draft.add(CALIBRATION, "calibration", 0, lambda file: file.write_text(calibration, encoding="utf-8"))
    for path, original in extra.items():
        draft.add(path, "beside", 0, lambda file, original=original: shutil.copyfile(original, file))
