"""Joins later metadata onto a vector table by sequence_id, all of it in one commit or none."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bioscan_jax.barcodes.aliases import find_column
from bioscan_jax.barcodes.schemas import case_clash_between
from bioscan_jax.config import SideTableConfig
from bioscan_jax.errors import InputError, one_line, shown
from bioscan_jax.notebook import Shown
from bioscan_jax.table.columns import check_values, vector_schema
from bioscan_jax.table.commit import commit
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.reading import check_finished, open_existing, schema_metadata
from bioscan_jax.table.side_tables import ID, SideTable, read_side_table
from bioscan_jax.table.storage import storage_errors, table_path

if TYPE_CHECKING:
    import lance
    from lance.schema import LanceSchema

ANNOTATED = b"annotated"
"""Key in the metadata of a column that was added after embedding."""
_RESERVED = (ID, "source_row", "vector")
_SLAB_ROWS = 1 << 20  # ids looked up together, unless the file has more: its ids are hashed once per lookup
_EXAMPLES = 3
_BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class ColumnSummary:
    """A column of the file, as it was understood."""

    name: str
    type: str
    """Arrow's name of the type; text for strings."""
    nulls: int
    """Rows of the file without a value."""
    examples: tuple[str, ...]
    """The first different values."""
    note: str | None = None
    """Cells that count as null, or decimal commas, if there are any."""

    def __str__(self) -> str:
        """The facts, as one line."""
        examples = f", such as {', '.join(self.examples)}" if self.examples else ""
        return f"{self.name}: {self.type}, {self.nulls:,} null{examples}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True)
class AnnotateSummary(Shown):
    """Counts of one call of `annotate`, and how its file was read."""

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
    columns: tuple[ColumnSummary, ...] = ()
    """The file's columns without the ids."""
    unmatched_ids: tuple[str, ...] = ()
    """The first ids of the table that the file lacks."""
    unused_ids: tuple[str, ...] = ()
    """The first ids of the file that the table lacks."""
    read_as: str = ""
    """Format, delimiter, quoting and encoding of the file, and what was left out of it."""
    dry_run: bool = False
    """Nothing was written."""

    def __str__(self) -> str:
        """The counts as one line, then one line per column and fact."""
        filled = ", ".join(f"{name} ({count:,} values)" for name, count in self.filled.items())
        lines = [
            f"{self.matched:,} rows matched, {self.unmatched:,} of the table and {self.unused:,} of the file did not; "
            f"new columns: {', '.join(self.added) or 'none'}; filled: {filled or 'none'}",
            f"read as {self.read_as}",
            *map(str, self.columns),
        ]
        for where, ids in (("table", self.unmatched_ids), ("file", self.unused_ids)):
            if ids:
                lines.append(f"only in the {where}: {', '.join(map(shown, ids))}")
        if self.dry_run:
            lines.append("dry run: nothing was written")
        return "\n  ".join(lines)


def annotate(
    uri: str,
    path: str | SideTableConfig,
    table: str = "sequences",
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> AnnotateSummary:
    """Joins a file's columns onto a finished vector table by sequence_id.

    A column that the table lacks is added, null where the file has no row; an existing column is filled where it is
    null. Vectors, ids and the order of rows do not change, nor do their files. Readers see either all of the change or
    none. A null in the file changes nothing.

    Args:
        uri: Database directory or URL.
        path: Parquet, CSV or TSV file, or a directory of them, with sequence_id and the columns to join;
            `SideTableConfig` also sets the delimiter, quoting and encoding. See `table.side_tables` for the rules.
        table: Name of the vector table.
        overwrite: Replace values that differ from the file's; otherwise they are an error.
        dry_run: Check and count everything, but write nothing.

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
        ...     print("sequence_id,ship,cast", f"{first},Sonne,007", sep=chr(10), file=file)
        >>> done = bj.annotate(f"{directory}/vectors", f"{directory}/ships.csv")
        >>> (done.matched, done.unmatched, done.added)
        (1, 5, ('ship', 'cast'))
        >>> print(done.columns[1])
        cast: text, 0 null, such as '007'
    """
    from lance import LanceOperation

    source = SideTableConfig(path=path) if isinstance(path, str) else path
    where = table_path(uri, table)
    open_existing(uri, table)
    with writer_lock(uri, table) as check:
        dataset = open_existing(uri, table)
        check_finished(uri, table, dataset)
        types = {field.name: field.type for field in dataset.schema if not pa.types.is_nested(field.type)}
        side = read_side_table(source, "--metadata", types)
        _check_columns(source.path, side, dataset)
        given = _conform(source.path, side, dataset.schema)
        with storage_errors(where):
            matches, unmatched = _matches(given, dataset)
            counts = _check_conflicts(source.path, given, dataset, matches, overwrite)
            if not counts.matched:
                raise InputError(
                    f"{source.path}: none of its {len(given):,} sequence_ids is in {where}; check the ids (the file "
                    f"has {', '.join(map(shown, counts.unused_ids))}, the table {', '.join(map(shown, unmatched))})"
                )
            if not dry_run and (counts.added or any(counts.filled.values())):
                fragments, schema = _write(dataset, given, matches, counts, overwrite)
                what = {"annotated": ",".join([*counts.added, *counts.filled])}
                dataset = commit(dataset, LanceOperation.Merge(fragments, schema), what, check)
                # Removes what a killed process left; keeps the previous version for its current readers
                dataset.cleanup_old_versions(
                    retain_versions=2, delete_unverified=True, error_if_tagged_old_versions=False
                )
    return dataclasses.replace(
        counts,
        columns=_summaries(side, given),
        unmatched_ids=unmatched,
        read_as="; ".join([side.how, "empty cells are null", *side.notes] if side.is_text else [side.how, *side.notes]),
        dry_run=dry_run,
    )


def _summaries(side: SideTable, given: pa.Table) -> tuple[ColumnSummary, ...]:
    found = []
    for name in given.column_names:
        column = given[name]
        first = pc.call_function("drop_null", [column]).slice(0, 1000).to_pylist()
        examples = tuple(dict.fromkeys(shown(value, 40) for value in first))[:_EXAMPLES]
        kind = "text" if pa.types.is_string(column.type) else str(column.type)
        note = side.column_notes.get(name)
        found.append(ColumnSummary(name=name, type=kind, nulls=column.null_count, examples=examples, note=note))
    return tuple(one for one in found if one.name != ID)


def _check_columns(path: str, side: SideTable, dataset: "lance.LanceDataset") -> None:
    given = side.table
    names = given.column_names
    if ID not in names:
        alias = find_column("id", names)
        raise InputError(
            f"{path} has no column {ID!r} (columns: {shown(', '.join(names[:20]), 160)[1:-1]}); pass "
            f"--metadata.id_column {'NAME' if alias is None else shown(alias)[1:-1]} if that is the one with the ids"
        )
    if len(names) != len(set(names)):
        raise InputError(
            f"{path} has a column name twice ({shown(', '.join(names[:20]), 160)[1:-1]}); rename all but one"
        )
    if blank := [name for name in names if name != name.strip() or not name]:
        raise InputError(
            f"{path}: column {shown(blank[0])} has a name that is empty or starts or ends blank; rename it"
        )
    if clash := case_clash_between(dataset.schema.names, names):
        raise InputError(
            f"{path} has a column {shown(clash[1])} and the table one {shown(clash[0])}: they differ only in case, and SQL "
            "cannot tell them apart; rename it in the file"
        )
    if names == [ID]:
        raise InputError(f"{path} has no column but {ID}; there is nothing to join")
    reserved = {
        *_RESERVED,
        json.loads(schema_metadata(dataset).get("plan_facts", "{}")).get("data", {}).get("sequence_column"),
    }
    if taken := [name for name in names if name in reserved and name != ID]:
        raise InputError(f"{path}: column {shown(taken[0])} is an input or a result of embedding; leave it out")
    if given[ID].null_count:
        first = int(np.argmax(given[ID].is_null().to_numpy()))
        raise InputError(
            f"{path}: {given[ID].null_count:,} rows have no sequence_id, the first is {side.locate(first)}; leave them out"
        )
    counts = given[ID].combine_chunks().value_counts()
    again = counts.filter(pa.array(counts.field("counts").to_numpy() > 1))
    if len(again):
        first = again[0].as_py()
        rows = np.flatnonzero(pc.call_function("equal", [given[ID], first["values"]]).to_numpy())[:2].tolist()
        raise InputError(
            f"{path}: {len(again):,} sequence_ids come more than once, such as {shown(first['values'])} "
            f"({first['counts']} times), in {' and '.join(map(side.locate, rows))}; keep one row each"
        )
    for index in dataset.describe_indices():
        if filled := set(index.field_names) & (set(names) - {ID}):
            raise InputError(f"{dataset.uri}: column {filled.pop()!r} has an index ({index.name}); drop it first")


def _conform(path: str, side: SideTable, schema: pa.Schema) -> pa.Table:
    """Casts the file's columns to the table's types, and new ones to types that Lance can store."""
    given = side.table
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
            types = f"{shown(str(given[name].type))[1:-1]}, the table's is {shown(str(kind))[1:-1]}"
            raise InputError(f"{path}: column {shown(name)} is {types} ({one_line(error, 100)})") from error
    return given.cast(pa.schema(fields)).combine_chunks()


def _matches(given: pa.Table, dataset: "lance.LanceDataset") -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Joins the table's rows with the file's.

    Returns:
        The file's row for each row of the table in order, null if there is none; and the first ids without one.
    """
    ids, unmatched = given[ID].combine_chunks(), []
    slab_rows = max(_SLAB_ROWS, len(ids))
    found, waiting, rows = [], [], 0

    def look_up() -> None:
        slab = pa.chunked_array(waiting, pa.string())
        rows = pc.call_function("index_in", [slab], pc.SetLookupOptions(ids)).combine_chunks()
        if rows.null_count and len(unmatched) < _EXAMPLES:
            unmatched.extend(slab.filter(rows.is_null()).slice(0, _EXAMPLES - len(unmatched)).to_pylist())
        found.append(rows)

    for batch in dataset.scanner(columns=[ID]).to_batches():
        waiting.append(batch[ID])
        rows += len(batch)
        if rows >= slab_rows:
            look_up()
            waiting, rows = [], 0
    look_up()
    return pa.chunked_array(found, pa.int32()), tuple(unmatched)


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


def _check_conflicts(
    path: str, given: pa.Table, dataset: "lance.LanceDataset", matches: pa.ChunkedArray, overwrite: bool
) -> AnnotateSummary:
    """Counts the changes in one pass over the table; raises InputError if values differ and may not be replaced."""
    old = [name for name in given.column_names if name in dataset.schema.names and name != ID]
    rows, conflicts, first = 0, 0, ""
    filled = dict.fromkeys(old, 0)
    for batch in dataset.scanner(columns=[ID, *old]).to_batches() if old else ():
        found = matches.slice(rows, len(batch))
        rows += len(batch)
        for name in old:
            before, new = pa.chunked_array([batch[name]]), given[name].take(found)
            differing = _differ(before, new)
            fills = before.is_null().to_numpy() & new.is_valid().to_numpy()
            filled[name] += int(fills.sum()) + (int(differing.sum()) if overwrite else 0)
            conflicts += int(differing.sum())
            if differing.any() and not first:
                row = int(np.argmax(differing))
                first = f"{name} of {shown(batch[ID][row].as_py())} is {shown(before[row].as_py())}, not {shown(new[row].as_py())}"
    if conflicts and not overwrite:
        raise InputError(
            f"{path}: {conflicts:,} values differ from the table's; the first: {first}; pass --overwrite true"
        )
    added = tuple(name for name in given.column_names if name not in dataset.schema.names)
    seen = np.zeros(len(given), bool)
    seen[matches.drop_null().to_numpy()] = True
    unused = np.flatnonzero(~seen)
    return AnnotateSummary(
        matched=len(matches) - matches.null_count,
        unmatched=matches.null_count,
        unused=len(unused),
        added=added,
        filled=filled,
        unused_ids=tuple(given[ID].take(pa.array(unused[:_EXAMPLES])).to_pylist()),
    )


def _write(
    dataset: "lance.LanceDataset", given: pa.Table, matches: pa.ChunkedArray, counts: AnnotateSummary, overwrite: bool
) -> tuple[list["lance.FragmentMetadata"], "LanceSchema"]:
    """Writes new data files for the columns, which no version of the table refers to yet.

    Returns:
        All fragments with their new files, and the schema.
    """
    added = pa.schema([pa.field(n, given.schema.field(n).type, metadata={ANNOTATED: b"1"}) for n in counts.added])
    old = [name for name, count in counts.filled.items() if count]
    fragments, schema, first = [], dataset.lance_schema, 0
    for fragment in dataset.get_fragments():
        result, found = fragment.metadata, matches.slice(first, fragment.count_rows())
        first += len(found)
        if old:
            rows = fragment.to_table(columns=old, with_row_id=True)
            columns = {name: _new_values(rows[name], given[name].take(found), overwrite) for name in old}
            update = pa.table({"_rowid": rows["_rowid"], **columns}).filter(found.is_valid())
            if update.num_rows:
                result, _ = fragment.update_columns(update)
        if added:
            joined = _batches_of(given.select(added.names), found, added)
            merged, schema = fragment.merge_columns(pa.RecordBatchReader.from_batches(added, joined))
            before = {file.path for file in fragment.metadata.files}
            new = [file for file in merged.files if file.path not in before]
            result = dataclasses.replace(result, files=[*result.files, *new])
        fragments.append(result)
    return fragments, schema


def _batches_of(given: pa.Table, found: pa.ChunkedArray, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(found), _BATCH_ROWS):
        rows = given.take(found.slice(start, _BATCH_ROWS)).combine_chunks()
        yield pa.record_batch([column.combine_chunks() for column in rows.columns], schema=schema)
