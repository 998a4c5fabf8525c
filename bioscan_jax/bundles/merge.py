"""Imports a bundle into a LanceDB table: the rows whose sequence_id the table lacks, in the bundle's order."""

import base64
import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Int64, UInt64

from bioscan_jax.barcodes.schemas import case_clash_between
from bioscan_jax.bundles.manifest import Entry, Manifest, find_faults, open_bundle, sha256_of
from bioscan_jax.bundles.parts import read_codes
from bioscan_jax.bundles.quantise import PRECISIONS, Quantiser
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.location import Directory, Location, locate
from bioscan_jax.notebook import Shown
from bioscan_jax.table.commit import append_files, write_files
from bioscan_jax.table.index import build_indexes
from bioscan_jax.table.lock import Check, writer_lock
from bioscan_jax.table.reading import check_finished, check_name, schema_metadata, take_rows, vector_index
from bioscan_jax.table.storage import create_dataset, open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance

ID = "sequence_id"
MADE_BY = ("weights_sha256", "adapter_sha256", "dtype", "pooling", "layer", "strand", "phases", "max_tokens")
"""Metadata in which two tables must agree for their vectors to be comparable."""
_HASHED_ROWS = 1 << 17
_MAX_BYTES_PER_FILE = 3 << 30


@dataclass(frozen=True)
class ImportSummary(Shown):
    """Counts of an import."""

    path: str
    inserted: int
    existing: int
    """Rows of the bundle that the table already had; they are unchanged."""
    rejects: int
    """Rejects inserted."""
    indexes: tuple[str, ...]

    def __str__(self) -> str:
        """The counts, as one line."""
        rows = f"{self.inserted:,} rows and {self.rejects:,} rejects inserted, {self.existing:,} rows were there"
        return f"{self.path}: {rows}; index {'; '.join(self.indexes) or 'none'}"


def import_bundle(source: str, target: str, table: str | None = None) -> ImportSummary:
    """Merges a bundle into a table, which is created if absent.

    Each part is one commit, and rows that the table already has are skipped: an interrupted or repeated import gives
    the same table. A new table made from an unfiltered float32 bundle equals the exported one.

    Args:
        source: Directory, fsspec URL or rclone:REMOTE:PATH of the bundle.
        target: Database directory or URL.
        table: Name of the table; that of the exported table if absent.

    Raises:
        InputError: The bundle is damaged or unfinished, its vectors were not made as the table's were, an id has
            another sequence in the table, another process is writing the table, or the storage failed.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> _ = bj.bundle(f"{directory}/vectors", f"{directory}/stick", progress=False)
        >>> bj.import_bundle(f"{directory}/stick", f"{directory}/ashore").inserted
        6
    """
    location, manifest = open_bundle(source, "source")
    name: str = manifest.head["table"] if table is None else table
    check_name(name)
    # The files of a remote are verified when they are fetched
    if wrong := find_faults(location, manifest, contents=isinstance(location, Directory)):
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{location.name}: {wrong[0]}{more}; run verify and copy the bundle again")
    _check_head(location.name, manifest)
    path = table_path(target, name)
    with ExitStack() as held:
        check = held.enter_context(writer_lock(target, name))
        scratch = held.enter_context(location.scratch())
        read = _Reader(location, manifest, scratch)
        found = open_dataset(path)
        if found is not None:
            _check_origin(path, found, manifest)
            if schema_metadata(found).get("plan") != manifest.head["metadata"].get("plan"):
                check_finished(target, name, found)
        _place_extra_files(read, target, name)
        with storage_errors(path):
            dataset = found if found is not None else create_dataset(path, read.schema(found))
            dataset = _add_missing_columns(dataset, read.schema(found))
            kind = vector_index(dataset)
            kind = manifest.head["index"] if kind == "none" else kind
            inserted = existing = 0
            there = _RowsByKey((ID,), dataset, check)
            for entry in read.entries("vectors"):
                new, known = _new_rows(path, there, read.vectors(entry, dataset.schema), manifest)
                there.append(new)
                inserted, existing = inserted + new.num_rows, existing + known
            dataset = there.dataset
            rejects = _merge_rejects(read, table_path(target, f"{name}_rejects"), check)
            indexes, _ = build_indexes(dataset, kind)
        if dataset.count_rows() == manifest.head["rows"]:  # a calibration holds only for exactly these rows
            _place(read, target, {entry: f"{name}.calibration.json" for entry in read.entries("calibration")})
    return ImportSummary(path, inserted, existing, rejects, indexes)


@dataclass(frozen=True)
class _Reader:
    """Reads the files of a bundle, each verified before it is used."""

    location: Location
    manifest: Manifest
    scratch: Path

    def entries(self, kind: str) -> list[Entry]:
        return sorted((entry for entry in self.manifest.files if entry.kind == kind), key=lambda entry: entry.path)

    def file(self, entry: Entry) -> Path:
        file = self.location.fetch(entry.path, self.scratch)
        if not isinstance(self.location, Directory) and sha256_of(file) != entry.sha256:
            raise InputError(f"{self.location.name}: {entry.path}: damaged, its sha256 is wrong; copy the bundle again")
        return file

    def table(self, entry: Entry) -> pa.Table:
        try:
            return pq.ParquetFile(self.file(entry)).read()
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{self.location.name}: {entry.path} cannot be read ({one_line(error, 200)}); export it again"
            ) from error

    def schema(self, found: "lance.LanceDataset | None") -> pa.Schema:
        """Returns the bundle's columns; the metadata records a reduced precision or a filter."""
        head = self.manifest.head
        schema = _schema(head["schema"])
        place = schema.get_field_index("vector")
        item = pa.float16() if head["chosen"] == "float16" else pa.float32()
        if found is not None:
            item = found.schema.field("vector").type.value_type
        old = schema.field("vector")
        schema = schema.set(place, old.with_type(pa.list_(pa.field("item", item), old.type.list_size)))
        exact = schema.field("vector").type.value_type == old.type.value_type and head["chosen"] not in ("int8", "pq")
        if exact and head["filter"] is None:
            return schema.with_metadata(head["metadata"])
        taken = json.dumps({"precision": head["chosen"], "filter": head["filter"]})
        return schema.with_metadata(head["metadata"] | {"bundle": taken})

    @cached_property
    def quantiser(self) -> Quantiser:
        chosen = self.manifest.head["chosen"]
        files = self.entries("quantiser")
        return Quantiser.load(chosen, self.file(files[0])) if files else Quantiser(chosen)

    def vectors(self, entry: Entry, schema: pa.Schema) -> pa.Table:
        """Reads a part's rows in the columns and types of the table."""
        part = self.table(entry)
        wanted = schema.field("vector").type
        if part.schema.field("vector").type != wanted:
            values = [self.quantiser.decode(read_codes(chunk)) for chunk in part["vector"].chunks]
            flat = pa.array(np.concatenate(values).ravel().astype(wanted.value_type.to_pandas_dtype()))
            column = pa.FixedSizeListArray.from_arrays(flat, type=wanted)
            part = part.set_column(part.schema.get_field_index("vector"), "vector", column)
        columns = [
            part[f.name].cast(f.type) if f.name in part.column_names else pa.nulls(part.num_rows, f.type)
            for f in schema
        ]
        return pa.table(columns, schema=schema)


def _check_head(name: str, manifest: Manifest) -> None:
    """Checks the head of the manifest before anything is written.

    Raises:
        InputError: No table can be made from it.
    """
    head = manifest.head
    rows = {kind: sum(e.rows for e in manifest.files if e.kind == kind) for kind in ("vectors", "rejects")}
    try:
        schema = _schema(head["schema"])
        facts = [*head["metadata"].values(), *head["rejects_metadata"].values()]
        sound = {
            "schema": ID in schema.names and pa.types.is_fixed_size_list(schema.field("vector").type),
            "rejects_schema": head["rejects_schema"] is None or ID in _schema(head["rejects_schema"]).names,
            "chosen": head["chosen"] in PRECISIONS,
            "index": head["index"] in ("none", "ivf_sq", "ivf_pq"),
            "rows": head["rows"] == rows["vectors"] > 0,
            "rejects": head["rejects"] == rows["rejects"],
            "metadata": all(isinstance(fact, str) for fact in facts),
        }
    except (ValueError, OSError, KeyError, pa.ArrowException):
        sound = {"schema": False}
    if wrong := [key for key, fine in sound.items() if not fine]:
        raise InputError(f"{name}: the manifest's {wrong[0]} is none that an export writes; export the table again")


def _schema(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


def _check_origin(path: str, found: "lance.LanceDataset", manifest: Manifest) -> None:
    """Raises InputError unless the table's vectors and columns are comparable with the bundle's."""
    there, given = schema_metadata(found), manifest.head["metadata"]
    if "weights_sha256" not in there:
        raise InputError(f"{path} does not say what made its vectors; pass another --table")
    if differing := [key for key in MADE_BY if there.get(key) != given.get(key)]:
        key = differing[0]
        change = f"{key} {given.get(key)!r} in the bundle, {there.get(key)!r} in the table"
        raise InputError(f"{path} was made by something else ({change}); pass another --table")
    schema = _schema(manifest.head["schema"])
    for f in schema:
        if f.name in found.schema.names and f.name != "vector" and found.schema.field(f.name).type != f.type:
            types = f"{f.type} in the bundle, {found.schema.field(f.name).type} in the table"
            raise InputError(f"{path}: column {f.name!r} is {types}; pass another --table")
    if clash := case_clash_between(found.schema.names, schema.names):
        names = f"{clash[1]!r} in the bundle, {clash[0]!r} in the table"
        raise InputError(f"{path}: the columns {names} differ only in case; pass another --table")
    if needed := [f.name for f in found.schema if not f.nullable and f.name not in schema.names]:
        raise InputError(
            f"{path}: column {needed[0]!r} must not be null, and the bundle has none; pass another --table"
        )
    if schema.field("vector").type.list_size != found.schema.field("vector").type.list_size:
        raise InputError(f"{path} has vectors of another length; pass another --table")


def _add_missing_columns(dataset: "lance.LanceDataset", schema: pa.Schema) -> "lance.LanceDataset":
    """Adds the columns that only the bundle has, null in the existing rows."""
    new = [f.with_nullable(True) for f in schema if f.name not in dataset.schema.names]
    if new:
        dataset.add_columns(pa.schema(new))
        dataset.checkout_latest()
    return dataset


class _RowsByKey:
    """Finds the rows of a table by the values of some columns, after one pass over these columns; 16 bytes a row.

    It keeps the 64-bit hash and the position of each row, in sorted runs that are merged once they are of similar
    length: n rows are added in n log n steps, in whatever portions.
    """

    def __init__(self, key: tuple[str, ...], dataset: "lance.LanceDataset", check: Check) -> None:
        import duckdb

        self.dataset, self._check = dataset, check
        self._key, self._rows, self._database = key, 0, duckdb.connect(":memory:")
        self._runs: list[tuple[UInt64[np.ndarray, " run"], Int64[np.ndarray, " run"]]] = []
        for batch in dataset.scanner(columns=list(key), batch_size=_HASHED_ROWS, scan_in_order=True).to_batches():
            self._add(pa.Table.from_batches([batch]))

    def find(self, rows: pa.Table) -> pa.Array:
        """Returns the position in the table of the row with the same key, null where there is none."""
        hashes, found = self._hashes(rows), np.full(len(rows), -1, np.int64)
        for known, positions in self._runs:
            first, stop = np.searchsorted(known, hashes), np.searchsorted(known, hashes, "right")
            for step in range((stop - first).max(initial=0)):  # once, unless different keys have the same hash
                asked = np.flatnonzero(first + step < stop)
                places = positions[first[asked] + step]
                same = self._equal(rows.take(pa.array(asked)), places)
                found[asked[same]] = places[same]
        return pa.array(found, mask=found < 0)

    def append(self, rows: pa.Table) -> None:
        """Commits rows to the table."""
        files = write_files(self.dataset, rows, _MAX_BYTES_PER_FILE)
        self.dataset = append_files(self.dataset, files, {"imported": f"{len(rows)} rows"}, self._check)
        self._add(rows)

    def _equal(self, rows: pa.Table, places: Int64[np.ndarray, " rows"]) -> Bool[np.ndarray, " rows"]:
        own, same = take_rows(self.dataset, places, list(self._key)), np.ones(len(places), bool)
        for name in self._key:
            same &= pc.call_function("equal", [rows[name], own[name]]).to_numpy()
        return same

    def _add(self, rows: pa.Table) -> None:
        hashes, positions = self._hashes(rows), np.arange(self._rows, self._rows + len(rows))
        self._rows += len(rows)
        while self._runs and len(self._runs[-1][0]) <= 2 * len(hashes):
            longer = self._runs.pop()
            hashes, positions = np.concatenate([longer[0], hashes]), np.concatenate([longer[1], positions])
        order = np.argsort(hashes, kind="stable")
        self._runs.append((hashes[order], positions[order]))

    def _hashes(self, rows: pa.Table) -> UInt64[np.ndarray, " rows"]:
        keys = self._database.from_arrow(rows.select(self._key))
        return keys.project(f"hash({', '.join(self._key)}) AS hash").fetchnumpy()["hash"]


def _new_rows(path: str, there: _RowsByKey, part: pa.Table, manifest: Manifest) -> tuple[pa.Table, int]:
    """Returns the rows whose sequence_id is not in the table, and the number of others, whose sequences must agree.

    Not Lance's merge_insert, which inserts rows in another order.
    """
    ids = part[ID].combine_chunks()
    if len(ids.unique()) != len(ids):
        raise InputError(f"the bundle has a sequence_id twice, so it cannot be merged into {path}; export it again")
    column = json.loads(manifest.head["metadata"].get("plan_facts", "{}")).get("data", {}).get("sequence_column")
    place = there.find(part)
    known = part.filter(place.is_valid())
    if column in part.column_names and column in there.dataset.schema.names:
        own = take_rows(there.dataset, place.drop_null().to_numpy(), [column])[column]
        same = pc.call_function("equal", [known[column], own]).fill_null(True).to_numpy()
        if not same.all():
            first = known[ID][int(np.argmin(same))].as_py()
            counted = f"{int((~same).sum()):,} rows, the first {first!r}, have another {column} in the table"
            raise InputError(f"{path}: {counted}; ids must name the same thing in both: pass another --table")
    return part.filter(place.is_null()), known.num_rows


def _merge_rejects(read: _Reader, path: str, check: Check) -> int:
    """Inserts the rejects whose id and row the table lacks."""
    if read.manifest.head["rejects_schema"] is None:
        return 0
    schema = _schema(read.manifest.head["rejects_schema"]).with_metadata(read.manifest.head["rejects_metadata"])
    found = open_dataset(path)
    dataset = found if found is not None else create_dataset(path, schema)
    there = _RowsByKey((ID, "source_row"), dataset, check)
    inserted = 0
    for entry in read.entries("rejects"):
        part = read.table(entry).cast(schema)
        new = part.filter(there.find(part).is_null())
        there.append(new)
        inserted += new.num_rows
    return inserted


def _place_extra_files(read: _Reader, target: str, table: str) -> None:
    """Copies the run record and the additional files beside the table."""
    sizes = {entry: f"{table}.run.json" for entry in read.entries("run")}
    for entry in read.entries("beside"):
        name = entry.path.removeprefix("beside/")
        if name.split("/")[0].endswith(".lance") or name.startswith("."):
            raise InputError(f"{read.location.name}: {entry.path} would lie where tables do; do not trust it")
        sizes[entry] = name
    _place(read, target, sizes)


def _place(read: _Reader, target: str, names: dict[Entry, str]) -> None:
    """Copies files beside the table; existing files are not replaced."""
    goal, sizes = locate(target, "target"), dict(names)
    there = goal.sizes() if sizes else {}
    with goal.scratch() as scratch:
        for entry, name in list(sizes.items()):
            if name in there:
                same = there[name] == entry.bytes and sha256_of(goal.fetch(name, scratch)) == entry.sha256
                if not same and entry.kind == "beside":
                    raise InputError(f"{goal.name}/{name} is there and differs from the bundle's; move it away first")
                del sizes[entry]
    if not sizes:
        return
    with goal.staging() as staging:
        for entry, name in sizes.items():
            draft = staging / "draft"
            shutil.copyfile(read.file(entry), draft)
            goal.put(draft, name)
