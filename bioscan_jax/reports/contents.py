"""Contents of a vector table that a report shows: rows, taxa, the record of the run, and the table's metadata."""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Float64, Int32, Int64

from bioscan_jax.barcodes.aliases import find_column
from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.lineage import LINEAGE_COLUMN, RANKS, lineage_columns, read_lineages
from bioscan_jax.barcodes.metadata import METADATA_COLUMNS, find_metadata, split_coordinates
from bioscan_jax.errors import InputError
from bioscan_jax.location import read_if_exists
from bioscan_jax.table.reading import open_existing, schema_metadata
from bioscan_jax.table.storage import open_dataset, sidecar_path, storage_errors, table_path

if TYPE_CHECKING:
    import lance


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows shown on the maps, in the table's order."""

    ids: tuple[str, ...]
    vectors: Float32[np.ndarray, "rows hidden"]
    names: Int32[np.ndarray, "rows ranks"]
    """Index of each rank's name in `Taxa`, -1 where unknown."""
    depth: Float64[np.ndarray, " rows"]
    """Metres below the surface; NaN where unknown."""
    latitude: Float64[np.ndarray, " rows"]
    """Degrees; NaN for a row without a valid latitude and longitude."""
    longitude: Float64[np.ndarray, " rows"]
    """Degrees; NaN where `latitude` is."""
    markers: tuple[str | None, ...]
    sequences: tuple[str, ...]
    """Cleaned DNA; empty where the table has none."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)


@dataclass(frozen=True)
class Taxa:
    """Names of one rank, counted over the whole table, the most frequent first."""

    names: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def known(self) -> int:
        """Rows with a name."""
        return sum(self.counts)


@dataclass(frozen=True, kw_only=True)
class TableContents:
    """What a report shows of the table itself."""

    uri: str
    table: str
    total: int
    """Rows of the table; `rows` may be a sample of them."""
    sampled: int
    """Rows of that sample; the others in `rows` were asked for by their ids."""
    rejects: int
    rows: Rows
    taxa: tuple[Taxa, ...]
    """One for each of RANKS."""
    made_by: dict[str, str]
    """Metadata of the table: model, weights, settings."""
    run: dict[str, Any] | None
    """Record of the run that wrote the table, if there is one."""
    notes: dict[str, str]
    """For each part of the report that cannot be shown, the reason."""

    @property
    def main_rank(self) -> int:
        """Index of the rank to colour by at first: the coarsest with three names or more, no single one above 80%."""
        for index, taxa in enumerate(self.taxa):
            if len(taxa.counts) >= 3 and sum(taxa.counts[1:]) >= 0.2 * taxa.known:
                return index
        return next((index for index, taxa in enumerate(self.taxa) if taxa.names), 0)


def read_contents(uri: str, table: str, max_rows: int, seed: int, wanted: Collection[str] = ()) -> TableContents:
    """Reads a vector table.

    Args:
        uri: Database directory or URL.
        table: Name of the table.
        max_rows: Rows to show; from a larger table this many are sampled without replacement.
        seed: Random seed of the sample.
        wanted: sequence_ids of rows to show beside the sample.

    Raises:
        InputError: There is no such table, it has no rows or no vectors, or a vector is not finite.
    """
    dataset = open_existing(uri, table)
    kind = dataset.schema.field("vector").type if "vector" in dataset.schema.names else None
    if not isinstance(kind, pa.FixedSizeListType) or "sequence_id" not in dataset.schema.names:
        raise InputError(f"{dataset.uri} is no vector table (no column of vectors, or no sequence_id); pass another")
    total = dataset.count_rows()
    if not total:
        raise InputError(f"{dataset.uri} has no rows, so there is nothing to report; embed some first")
    notes: dict[str, str] = {}
    taxa = _count_taxa(dataset, notes)
    chosen = None
    if total > max_rows:
        chosen = np.sort(np.random.default_rng(seed).choice(total, max_rows, replace=False))
    rejects = open_dataset(table_path(uri, f"{table}_rejects"))
    rows = _read_rows(dataset, chosen, wanted, taxa, notes)
    return TableContents(
        uri=uri,
        table=table,
        total=total,
        sampled=min(total, max_rows),
        rejects=0 if rejects is None else rejects.count_rows(),
        rows=rows,
        taxa=taxa,
        made_by=schema_metadata(dataset),
        run=_run_record(uri, table, notes),
        notes=notes,
    )


def contains_all(uri: str, table: str, ids: Sequence[str]) -> bool:
    """Returns whether a table contains all of the given sequence_ids; False if none are given."""
    if not ids:
        return False
    dataset = open_existing(uri, table)
    with storage_errors(dataset.uri):
        found = dataset.to_table(columns=["sequence_id"], filter=_one_of(ids))
    return set(ids) <= set(found["sequence_id"].to_pylist())


def _one_of(ids: Collection[str]) -> str:
    """Returns the SQL condition for rows with one of the given sequence_ids."""
    quoted = ", ".join("'" + key.replace("'", "''") + "'" for key in sorted(set(ids)))
    return f"sequence_id IN ({quoted})"


def _count_taxa(dataset: "lance.LanceDataset", notes: dict[str, str]) -> tuple[Taxa, ...]:
    columns = lineage_columns(dataset.schema.names)
    if not columns:
        notes["taxa"] = f"the table has neither a column {LINEAGE_COLUMN} nor one of genus or species"
        return tuple(Taxa((), ()) for _ in RANKS)
    counters: list[Counter[str]] = [Counter() for _ in RANKS]
    with storage_errors(dataset.uri):
        for batch in dataset.to_batches(columns=columns):
            for counter, names in zip(counters, read_lineages(batch), strict=True):
                for pair in names.drop_null().value_counts().to_pylist():
                    counter[pair["values"]] += pair["counts"]
    ordered = [sorted(counter.items(), key=lambda pair: (-pair[1], pair[0])) for counter in counters]
    return tuple(Taxa(tuple(n for n, _ in pairs), tuple(c for _, c in pairs)) for pairs in ordered)


def _read_rows(
    dataset: "lance.LanceDataset",
    chosen: Int64[np.ndarray, " rows"] | None,
    wanted: Collection[str],
    taxa: Sequence[Taxa],
    notes: dict[str, str],
) -> Rows:
    available = dataset.schema.names
    lineages = lineage_columns(available)
    called = find_metadata(available)
    marker = find_column("marker", available)
    dna = _sequence_column(dataset)
    others = [*called.values(), *(name for name in (marker, dna) if name is not None)]
    columns = list(dict.fromkeys(["sequence_id", "vector", *lineages, *others]))
    with storage_errors(dataset.uri):
        read = dataset.to_table(columns=columns) if chosen is None else dataset.take(chosen, columns=columns)
        if chosen is not None and (more := set(wanted).difference(read["sequence_id"].to_pylist())):
            read = pa.concat_tables([read, dataset.to_table(columns=columns, filter=_one_of(more))])
    names = np.full((len(read), len(RANKS)), -1, np.int32)
    if lineages:
        for rank, (found, column) in enumerate(zip(taxa, read_lineages(read), strict=True)):
            index = {name: i for i, name in enumerate(found.names)}
            names[:, rank] = [-1 if name is None else index[name] for name in column.to_pylist()]
    depth, latitude, longitude = (_numbers(read, name, called, notes) for name in METADATA_COLUMNS)
    placed = (np.abs(latitude) <= 90) & (np.abs(longitude) <= 180)
    if not placed.any():
        notes.setdefault("places", "no row has both a latitude and a longitude")
    markers = [None] * len(read) if marker is None else read[marker].to_pylist()
    return Rows(
        ids=tuple(str(name) for name in read["sequence_id"].to_pylist()),
        vectors=_vectors(read, dataset.uri),
        names=names,
        depth=depth,
        latitude=np.where(placed, latitude, np.nan),
        longitude=np.where(placed, longitude, np.nan),
        markers=tuple(None if marker is None else str(marker) for marker in markers),
        sequences=("",) * len(read)
        if dna is None
        else tuple(text or "" for text in clean(read[dna]).sequences.to_pylist()),
    )


def _sequence_column(dataset: "lance.LanceDataset") -> str | None:
    """Returns the column with the DNA that was embedded, if the table holds it."""
    try:
        recorded = json.loads(schema_metadata(dataset).get("plan_facts", "{}"))["data"]["sequence_column"]
    except (ValueError, KeyError, TypeError):
        recorded = find_column("sequence", dataset.schema.names)
    if recorded not in dataset.schema.names:
        return None
    kind = dataset.schema.field(recorded).type
    return recorded if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _vectors(read: pa.Table, where: str) -> Float32[np.ndarray, "rows hidden"]:
    column = read["vector"].combine_chunks()
    if column.null_count:
        raise InputError(f"{where}: {column.null_count:,} rows have no vector; embed them again, or delete them")
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(read), -1).astype(np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = read["sequence_id"][int(np.argmin(finite))].as_py()
        raise InputError(f"{where}: the vector of {row!r} is not finite, embed the table again")
    return vectors


def _numbers(
    read: pa.Table, name: str, places: Mapping[str, str], notes: dict[str, str]
) -> Float64[np.ndarray, " rows"]:
    """Reads a column of numbers, NaN where one is missing; adds a note if there is no such column or it holds text."""
    part = "depth" if name == "depth" else "places"
    unknown = np.full(len(read), np.nan)
    called = places.get(name)
    if called is None:
        notes.setdefault(part, f"the table has no column {name}")
        return unknown
    if part == "places" and places.get("latitude") == places.get("longitude"):
        return split_coordinates(read[called])[name == "longitude"]
    kind = read[called].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        notes.setdefault(part, f"the column {called} has the type {kind}, not numbers")
        return unknown
    values = read[called].cast(pa.float64()).to_numpy()
    return np.where(np.isfinite(values), values, np.nan)


def _run_record(uri: str, table: str, notes: dict[str, str]) -> dict[str, Any] | None:
    path = sidecar_path(uri, table, "run")
    with storage_errors(path):
        text = read_if_exists(path)
    if text is None:
        notes["run"] = f"there is no {table}.run.json beside the table"
        return None
    try:
        record = json.loads(text)
    except ValueError as error:
        record = error
    if not isinstance(record, dict):
        notes["run"] = f"{table}.run.json beside the table is no JSON object ({record})"[:300]
        return None
    return record
