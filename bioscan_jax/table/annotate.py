"""Joins later metadata onto a vector table by sequence_id, all of it in one commit or none."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from bioscan_jax.errors import InputError
from bioscan_jax.table.columns import check_values, vector_schema
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.reading import check_finished, open_existing, schema_metadata
from bioscan_jax.table.storage import storage_errors, table_path

if TYPE_CHECKING:
    import lance
    from lance.schema import LanceSchema

ID = "sequence_id"
ANNOTATED = b"annotated"
"""Key in the metadata of a column that was added after embedding."""
_RESERVED = (ID, "source_row", "vector")
_TEXT_FORMATS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class AnnotateSummary:
    """Counts of one call of `annotate`."""

    matched: int
    """Rows of the table whose sequence_id is in the file."""
    unmatched: int
    """Rows of the table whose sequence_id is not."""
    unused: int
    """Rows of the file whose sequence_id is not in the table."""
    added: tuple[str, ...]
    """New columns."""
    filled: dict[str, int]
    """Number of values written into each existing column."""

    def __str__(self) -> str:
        """The counts, as one line."""
        filled = ", ".join(f"{name} ({count:,} values)" for name, count in self.filled.items())
        return (
            f"{self.matched:,} rows matched, {self.unmatched:,} of the table and {self.unused:,} of the file did not; "
            f"new columns: {', '.join(self.added) or 'none'}; filled: {filled or 'none'}"
        )


def annotate(uri: str, path: str, table: str = "sequences", *, overwrite: bool = False) -> AnnotateSummary:
    """Joins a file's columns onto a finished vector table by sequence_id.

    A column that the table lacks is added, null where the file has no row; an existing column is filled where it is
    null. Vectors, ids and the order of rows do not change, nor do their files. Readers see either all of the change or
    none. A null in the file changes nothing.

    Args:
        uri: Database directory or URL.
        path: Parquet, CSV or TSV file (CSV and TSV also as .gz) with sequence_id and the columns to join.
        table: Name of the vector table.
        overwrite: Replace values that differ from the file's; otherwise they are an error.

    Raises:
        InputError: The file cannot be read or does not fit the table, an id occurs twice, a column is reserved, values
            differ, the table is unfinished, another process is writing it, or the storage failed.

    Example:
        >>> import tempfile
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> directory = tempfile.mkdtemp()
        >>> path = write_simulated(f"{directory}/in.parquet", species=2, per_species=3, length=60, seed=0)
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path=str(path))
        >>> _ = bj.embed(model, data, bj.SinkConfig(uri=f"{directory}/vectors"), progress=False)
        >>> first = bj.query("SELECT sequence_id FROM sequences LIMIT 1", f"{directory}/vectors")[0][0]
        >>> with open(f"{directory}/ships.csv", "w") as file:
        ...     print("sequence_id,ship", f"{first},Sonne", sep=chr(10), file=file)
        >>> print(bj.annotate(f"{directory}/vectors", f"{directory}/ships.csv"))
        1 rows matched, 5 of the table and 0 of the file did not; new columns: ship; filled: none
    """
    from lance import LanceDataset, LanceOperation

    where = table_path(uri, table)
    open_existing(uri, table)
    with writer_lock(uri, table):
        dataset = open_existing(uri, table)
        check_finished(uri, table, dataset)
        given = _read(path, dataset.schema)
        _check_columns(path, given, dataset)
        given = _conform(path, given, dataset.schema)
        ids = given[ID].combine_chunks()
        with storage_errors(where):
            counts = _check_conflicts(path, given, dataset, overwrite)
            if not counts.matched:
                raise InputError(f"{path}: none of its {len(ids):,} sequence_ids is in {where}; check the ids")
            if counts.added or any(counts.filled.values()):
                fragments, schema = _write(dataset, given, counts, overwrite)
                operation = LanceOperation.Merge(fragments, schema)
                dataset = LanceDataset.commit(dataset, operation, read_version=dataset.version)
                # Removes what a killed process left; keeps the previous version for its current readers
                dataset.cleanup_old_versions(
                    retain_versions=2, delete_unverified=True, error_if_tagged_old_versions=False
                )
    return counts


def _read(path: str, schema: pa.Schema) -> pa.Table:
    file = Path(path).expanduser()
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if not file.is_file():
        raise InputError(f"--metadata {path}: there is no such file; pass a Parquet, CSV or TSV file")
    try:
        if suffix in _TEXT_FORMATS:
            known = {f.name: f.type for f in schema if not pa.types.is_nested(f.type)} | {ID: pa.string()}
            options = csv.ConvertOptions(column_types=known, strings_can_be_null=True)
            read = csv.read_csv(file, None, csv.ParseOptions(delimiter=_TEXT_FORMATS[suffix]), options)
            if strange := [f.name for f in read.schema if pa.types.is_binary(f.type)]:
                raise InputError(f"--metadata {path}: column {strange[0]!r} is not UTF-8; save the file as UTF-8")
            return read
        if suffix == ".parquet":
            return pq.ParquetFile(file).read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"--metadata {path} cannot be read: {' '.join(str(error).split())[:300]}; fix it") from error
    raise InputError(f"--metadata {path}: unknown kind {suffix or 'without extension'}; pass .parquet, .csv or .tsv")


def _check_columns(path: str, given: pa.Table, dataset: "lance.LanceDataset") -> None:
    names = given.column_names
    if ID not in names:
        raise InputError(f"{path} has no column {ID!r} (columns: {', '.join(names[:20])}); rename the one with the ids")
    if len(names) != len(set(names)):
        raise InputError(f"{path} has a column name twice ({', '.join(names[:20])}); rename all but one")
    if blank := [name for name in names if name != name.strip() or not name]:
        raise InputError(f"{path}: column {blank[0]!r} has a name that is empty or starts or ends blank; rename it")
    if names == [ID]:
        raise InputError(f"{path} has no column but {ID}; there is nothing to join")
    reserved = {
        *_RESERVED,
        json.loads(schema_metadata(dataset).get("plan_facts", "{}")).get("data", {}).get("sequence_column"),
    }
    if taken := [name for name in names if name in reserved and name != ID]:
        raise InputError(f"{path}: column {taken[0]!r} is an input or a result of embedding; leave it out")
    if given[ID].null_count:
        raise InputError(f"{path}: {given[ID].null_count:,} rows have no sequence_id; leave them out")
    counts = given[ID].combine_chunks().value_counts()
    again = counts.filter(pa.array(counts.field("counts").to_numpy() > 1))
    if len(again):
        first = again[0].as_py()
        raise InputError(
            f"{path}: {len(again):,} sequence_ids come more than once, such as {first['values']!r} "
            f"({first['counts']} times); keep one row each"
        )
    for index in dataset.describe_indices():
        if filled := set(index.field_names) & (set(names) - {ID}):
            raise InputError(f"{dataset.uri}: column {filled.pop()!r} has an index ({index.name}); drop it first")


def _conform(path: str, given: pa.Table, schema: pa.Schema) -> pa.Table:
    """Casts the file's columns to the table's types, and new ones to types that Lance can store."""
    check_values(given, lambda row: f"{path} row {row}")
    added = pa.schema([f for f in given.schema if f.name not in schema.names])
    nulls = [pa.field(f.name, pa.string()) if pa.types.is_null(f.type) else f for f in added]
    stored = vector_schema(pa.schema(nulls), 1, "float32")
    fields = []
    for name in given.column_names:
        kind = pa.string() if name == ID else (schema if name in schema.names else stored).field(name).type
        fields.append(pa.field(name, kind))
        try:
            given[name].cast(kind)
        except pa.ArrowException as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path}: column {name!r} is {given[name].type}, the table's is {kind} ({cause})"
            ) from error
    return given.cast(pa.schema(fields))


def _matches(given: pa.Table, ids: pa.ChunkedArray | pa.Array) -> pa.Array | pa.ChunkedArray:
    """Returns the file's row for each row of the table, null if there is none."""
    return pc.call_function("index_in", [ids], pc.SetLookupOptions(given[ID].combine_chunks()))


def _new_values(old: pa.ChunkedArray, new: pa.ChunkedArray, overwrite: bool) -> pa.ChunkedArray:
    return pc.call_function("coalesce", [new, old] if overwrite else [old, new])


def _differ(old: pa.ChunkedArray, new: pa.ChunkedArray) -> np.ndarray:
    """Returns where both have a value and the values differ."""
    both = old.is_valid().to_numpy() & new.is_valid().to_numpy()
    if not both.any():
        return both
    if pa.types.is_nested(old.type):
        return both & np.array([a != b for a, b in zip(old.to_pylist(), new.to_pylist(), strict=True)])
    same = pc.call_function("equal", [old, new]).fill_null(True).to_numpy()
    if pa.types.is_floating(old.type):
        same = same | (_is_nan(old) & _is_nan(new))
    return both & ~same


def _is_nan(column: pa.ChunkedArray) -> np.ndarray:
    return pc.call_function("is_nan", [column]).fill_null(False).to_numpy()


def _check_conflicts(path: str, given: pa.Table, dataset: "lance.LanceDataset", overwrite: bool) -> AnnotateSummary:
    """Counts the changes in one pass over the table; raises InputError if values differ and may not be replaced."""
    old = [name for name in given.column_names if name in dataset.schema.names and name != ID]
    seen, matched, rows, conflicts, first = np.zeros(len(given), bool), 0, 0, 0, ""
    filled = dict.fromkeys(old, 0)
    for batch in dataset.scanner(columns=[ID, *old]).to_batches():
        found = _matches(given, batch[ID])
        seen[found.drop_null().to_numpy()] = True
        matched, rows = matched + len(found) - found.null_count, rows + len(batch)
        for name in old:
            before, new = pa.chunked_array([batch[name]]), given[name].take(found)
            differing = _differ(before, new)
            fills = before.is_null().to_numpy() & new.is_valid().to_numpy()
            filled[name] += int(fills.sum()) + (int(differing.sum()) if overwrite else 0)
            conflicts += int(differing.sum())
            if differing.any() and not first:
                row = int(np.argmax(differing))
                first = f"{name} of {batch[ID][row].as_py()!r} is {before[row].as_py()!r}, not {new[row].as_py()!r}"
    if conflicts and not overwrite:
        raise InputError(
            f"{path}: {conflicts:,} values differ from the table's; the first: {first}; pass --overwrite true"
        )
    added = tuple(name for name in given.column_names if name not in dataset.schema.names)
    return AnnotateSummary(matched, rows - matched, len(given) - int(seen.sum()), added, filled)


def _write(
    dataset: "lance.LanceDataset", given: pa.Table, counts: AnnotateSummary, overwrite: bool
) -> tuple[list["lance.FragmentMetadata"], "LanceSchema"]:
    """Writes new data files for the columns, which no version of the table refers to yet.

    Returns:
        All fragments with their new files, and the schema.
    """
    added = pa.schema([pa.field(n, given.schema.field(n).type, metadata={ANNOTATED: b"1"}) for n in counts.added])
    old = [name for name, count in counts.filled.items() if count]
    fragments, schema = [], dataset.lance_schema

    def join(batch: pa.RecordBatch) -> pa.RecordBatch:
        found = _matches(given, batch[ID])
        columns = [given[name].combine_chunks().take(found) for name in added.names]
        return pa.record_batch(columns, schema=added)

    for fragment in dataset.get_fragments():
        result = fragment.metadata
        if old:
            rows = fragment.to_table(columns=[ID, *old], with_row_id=True)
            found = _matches(given, rows[ID])
            columns = {name: _new_values(rows[name], given[name].take(found), overwrite) for name in old}
            update = pa.table({"_rowid": rows["_rowid"], **columns}).filter(found.is_valid())
            if update.num_rows:
                result, _ = fragment.update_columns(update)
        if added:
            merged, schema = fragment.merge_columns(join, columns=[ID])
            before = {file.path for file in fragment.metadata.files}
            new = [file for file in merged.files if file.path not in before]
            result = dataclasses.replace(result, files=[*result.files, *new])
        fragments.append(result)
    return fragments, schema
