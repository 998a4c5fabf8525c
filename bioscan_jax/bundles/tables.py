"""Tables as parts of columns: hashes of their values, what a Lance table holds, and a Lance table from parts."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bioscan_jax.bundles.parts import write_part
from bioscan_jax.bundles.synced import Column, Part, TableItem
from bioscan_jax.errors import InputError
from bioscan_jax.table.commit import commit
from bioscan_jax.table.index import build_indexes
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.reading import schema_metadata, vector_index
from bioscan_jax.table.storage import open_dataset, storage_errors

if TYPE_CHECKING:
    import lance

_SAMPLED_ROWS = 1024
_STEP_ROWS = 1024
"""Parts have a multiple of these rows, so that they end at the same rows in more columns."""
_BATCH_ROWS = 8192
_MAX_BYTES_PER_FILE = 3 << 30
Known = dict[str, str]
"""The hashes of parts that were read before, by `part_key`."""


def content_digest(column: str, values: pa.Array) -> str:
    """Returns the SHA-256 of a column's values, bit for bit; the same in every version of Arrow."""
    digest = hashlib.sha256(json.dumps([column, str(values.type), len(values)]).encode())
    _feed(digest, values)
    return digest.hexdigest()


def _feed(digest: "hashlib._Hash", values: pa.Array) -> None:
    kind = values.type
    if pa.types.is_dictionary(kind):
        return _feed(digest, values.dictionary_decode())
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    digest.update(np.packbits(valid).tobytes())
    if pa.types.is_null(kind):
        return None
    if pa.types.is_struct(kind):
        for child in values.flatten():
            _feed(digest, child)
    elif pa.types.is_nested(kind):
        lengths = pc.call_function("list_value_length", [values]).fill_null(0)
        digest.update(np.ascontiguousarray(lengths.to_numpy(zero_copy_only=False), np.int64).tobytes())
        _feed(digest, values.flatten())
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(values.drop_null().to_numpy(zero_copy_only=False)).tobytes())
    elif text := _large_type(kind):
        present = values.drop_null().cast(text)
        _, offsets, data = present.buffers()
        if len(present) and offsets is not None:
            ends = np.frombuffer(offsets, np.int64, len(present) + 1, present.offset * 8)
            digest.update((ends - ends[0]).tobytes())
            digest.update(b"" if data is None else data[int(ends[0]) : int(ends[-1])])
    else:
        present, width = values.drop_null(), kind.byte_width
        if len(present):
            digest.update(present.buffers()[1][present.offset * width : (present.offset + len(present)) * width])
    return None


def _large_type(kind: pa.DataType) -> pa.DataType | None:
    """Returns the type with 64-bit offsets of a type of texts or bytes of any length; None for others."""
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.large_binary()
    return None


def read_column(dataset: "lance.LanceDataset", name: str, first: int, rows: int) -> pa.Array:
    """Returns consecutive rows of one column.

    Raises:
        InputError: The table changed meanwhile, or the storage failed.
    """
    with storage_errors(dataset.uri):
        scanner = dataset.scanner(columns=[name], offset=first, limit=rows, scan_in_order=True)
        found = scanner.to_table().column(0).combine_chunks()
    if len(found) != rows:
        raise InputError(f"{dataset.uri} changed while it was read; run the same command again")
    return found


class _Sources:
    """Names the files that hold rows of a column; what they hold never changes."""

    def __init__(self, dataset: "lance.LanceDataset") -> None:
        self._fields = {field.name(): list(_ids(field)) for field in dataset.lance_schema.fields()}
        self._types = {field.name: str(field.type) for field in dataset.schema}
        self._fragments, self._starts = [], [0]
        for fragment in dataset.get_fragments():
            self._fragments.append(fragment.metadata)
            self._starts.append(self._starts[-1] + fragment.count_rows())

    def key(self, column: str, first: int, rows: int) -> str:
        begin = int(np.searchsorted(self._starts, first, "right")) - 1
        stop = int(np.searchsorted(self._starts, first + rows, "left"))
        wanted = set(self._fields[column])
        files = [
            [
                [[one.path, sorted(wanted.intersection(one.fields))] for one in fragment.files],
                str(fragment.deletion_file),
                str(getattr(fragment, "overlays", [])),
                first - start,
                fragment.physical_rows,
            ]
            for fragment, start in zip(self._fragments[begin:stop], self._starts[begin:stop], strict=True)
        ]
        files = [[[one for one in held if one[1]], *rest] for held, *rest in files]
        body = json.dumps([column, self._types[column], rows, files])
        return hashlib.sha256(body.encode()).hexdigest()


def _ids(field) -> Iterator[int]:
    yield field.id()
    for child in field.children():
        yield from _ids(child)


def part_keys(dataset: "lance.LanceDataset", item: TableItem) -> Known:
    """Returns the hashes of the parts of a table that holds this."""
    sources, keys = _Sources(dataset), {}
    for name, column in item.columns.items():
        for first, part, _ in _places(None, name, column):
            keys[sources.key(name, first, part.rows)] = part.content
    return keys


def describe_table(
    dataset: "lance.LanceDataset",
    before: Mapping[str, Column],
    part_bytes: int,
    known: Known,
    advance: Callable[[int], object],
) -> tuple[TableItem, Known]:
    """Finds the parts of a table and their hashes; reads only what `known` lacks.

    Args:
        dataset: The table.
        before: Columns whose parts shall end at the same rows; later rows are in parts of their own.
        part_bytes: Approximate size in memory of a part.
        known: Hashes found earlier.
        advance: Called with the bytes that were read.

    Returns:
        The table, without objects, and the hashes of its parts.
    """
    schema, total = dataset.schema, dataset.count_rows()
    sources, columns, keys = _Sources(dataset), {}, {}
    with storage_errors(dataset.uri):
        sample = dataset.to_table(limit=_SAMPLED_ROWS) if total else schema.empty_table()
    for field in schema:
        old = before.get(field.name)
        if old is None:
            row_bytes = max(1, sample[field.name].nbytes // max(1, len(sample)))
            old = Column(max(1, part_bytes // row_bytes // _STEP_ROWS) * _STEP_ROWS, ())
        parts, first = [], 0
        for rows in _cut(total, [part.rows for part in old.parts], old.part_rows):
            key = sources.key(field.name, first, rows)
            if key not in known:
                values = read_column(dataset, field.name, first, rows)
                advance(values.nbytes)
                known[key] = content_digest(field.name, values)
            keys[key] = known[key]
            parts.append(Part(rows, keys[key]))
            first += rows
        columns[field.name] = Column(old.part_rows, tuple(parts))
    indexed = {name for index in dataset.describe_indices() for name in index.field_names}
    item = TableItem(
        schema=base64.b64encode(schema.remove_metadata().serialize().to_pybytes()).decode(),
        fields=tuple(_facts(field) for field in schema),
        metadata=schema_metadata(dataset),
        rows=total,
        index=vector_index(dataset) if {"vector", "sequence_id"} & indexed else None,
        columns=columns,
    )
    return item, keys


def _facts(field: pa.Field) -> tuple[str, str, bool, tuple[tuple[str, str], ...]]:
    facts = sorted((key.decode(), value.decode()) for key, value in (field.metadata or {}).items())
    return field.name, str(field.type), field.nullable, tuple(facts)


def _cut(total: int, before: list[int], part_rows: int) -> Iterator[int]:
    """Yields the rows of each part: as they were cut before, then in new parts."""
    left = total
    for rows in before:
        if left:
            yield min(rows, left)
            left -= min(rows, left)
    while left:
        yield min(part_rows, left)
        left -= min(part_rows, left)


def write_column_part(column: str, values: pa.Array, file: Path) -> None:
    """Writes rows of one column as Parquet."""
    write_part(pa.table({column: values}), file)


def parts_to_fetch(old: TableItem | None, new: TableItem) -> list[Part]:
    """Returns the parts of the new table that the old one does not hold at the same rows."""
    return [part for name, column in new.columns.items() for _, part, here in _places(old, name, column) if not here]


def _places(old: TableItem | None, name: str, column: Column) -> Iterator[tuple[int, Part, bool]]:
    """Yields each part of a column with its first row, and whether the old table holds it there."""
    held, first = {}, 0
    for part in old.columns[name].parts if old is not None and name in old.columns else ():
        held[first, part.rows] = part.content
        first += part.rows
    first = 0
    for part in column.parts:
        yield first, part, held.get((first, part.rows)) == part.content
        first += part.rows


def write_table(
    database: str,
    table: str,
    old: tuple["lance.LanceDataset", TableItem] | None,
    new: TableItem,
    files: Mapping[str, Path],
) -> "lance.LanceDataset":
    """Brings a Lance table to the state of a copy, in one commit, and then its indexes.

    If there are new rows and no other change, these are appended; if there are new columns and no other change, these are
    joined. Otherwise all rows are written again, with the unchanged parts read from the table.

    Args:
        database: Directory or URL of the table.
        table: Its name.
        old: The table as it is there, and what it holds; None if there is none.
        new: The state to reach.
        files: Local files of the objects from `parts_to_fetch`, by SHA-256.

    Raises:
        InputError: Another process writes or has changed the table, or the storage failed.
    """
    import lance
    from lance.fragment import write_fragments

    path = f"{database.rstrip('/')}/{table}.lance"
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(new.schema))).with_metadata(dict(new.metadata))
    with writer_lock(database, table.removesuffix("_rejects")) as check:
        latest = open_dataset(path)
        if (None if latest is None else latest.version) != (None if old is None else old[0].version):
            raise InputError(f"{path} changed while it was compared; run the same command again")
        with storage_errors(path):
            if latest is None or old is None:
                rows = _reader(schema, _batches(schema, None, new, 0, files))
                fragments = write_fragments(rows, path, schema, mode="create", max_bytes_per_file=_MAX_BYTES_PER_FILE)
                written = lance.LanceDataset.commit(path, lance.LanceOperation.Overwrite(schema, fragments))
            else:
                operation = _change(schema, latest, old[1], new, files)
                written = commit(latest, operation, {"synced": f"{new.rows} rows"}, check)
            if new.index is not None:
                build_indexes(written, new.index)
            # Removes what a killed process left; keeps the previous version for its current readers
            written.cleanup_old_versions(retain_versions=2, delete_unverified=True, error_if_tagged_old_versions=False)
    return written


def _change(
    schema: pa.Schema, dataset: "lance.LanceDataset", old: TableItem, new: TableItem, files: Mapping[str, Path]
) -> "lance.LanceOperation.BaseOperation":
    """Writes the files of a change, and returns it: new rows, new columns, or everything."""
    from lance import LanceOperation
    from lance.fragment import write_fragments

    same_facts = old.metadata == new.metadata and old.fields == new.fields[: len(old.fields)]
    starts_as_old = same_facts and all(
        [part.content for part in column.parts]
        == [part.content for part in new.columns[name].parts[: len(column.parts)]]
        for name, column in old.columns.items()
    )
    if starts_as_old and old.fields == new.fields:
        rows = _reader(schema, _batches(schema, None, new, old.rows, files))
        return LanceOperation.Append(
            write_fragments(rows, dataset, schema, mode="append", max_bytes_per_file=_MAX_BYTES_PER_FILE)
        )
    if starts_as_old and old.rows == new.rows:
        added = pa.schema([schema.field(name) for name in new.columns if name not in old.columns])
        counts = [fragment.count_rows() for fragment in dataset.get_fragments()]
        batches = _batches(added, None, new, 0, files, np.cumsum(counts).tolist())
        fragments, merged_schema = [], dataset.lance_schema
        for fragment, count in zip(dataset.get_fragments(), counts, strict=True):
            merged, merged_schema = fragment.merge_columns(_reader(added, _next_rows(batches, count)))
            fragments.append(merged)
        return LanceOperation.Merge(fragments, merged_schema)
    rows = _reader(schema, _batches(schema, (dataset, old), new, 0, files))
    return LanceOperation.Overwrite(
        schema, write_fragments(rows, dataset, schema, mode="overwrite", max_bytes_per_file=_MAX_BYTES_PER_FILE)
    )


def _reader(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatchReader:
    return pa.RecordBatchReader.from_batches(schema, batches)


def _next_rows(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yields the next batches, which together have these rows."""
    while rows:
        batch = next(batches)
        rows -= len(batch)
        yield batch


def _batches(
    schema: pa.Schema,
    old: tuple["lance.LanceDataset", TableItem] | None,
    new: TableItem,
    first: int,
    files: Mapping[str, Path],
    stops: Sequence[int] = (),
) -> Iterator[pa.RecordBatch]:
    """Yields the rows from `first` on, of a part of each column at a time.

    Args:
        schema: The columns to read.
        old: The table to read unchanged parts from; None where all are in `files`.
        new: The state that the rows have.
        first: A row at which a part of each column begins.
        files: Local files of the other parts, by SHA-256.
        stops: Rows at which a batch ends too.
    """
    parts = {
        name: [
            place for place in _places(None if old is None else old[1], name, new.columns[name]) if place[0] >= first
        ]
        for name in schema.names
    }
    ends = sorted({*stops, *(start + part.rows for places in parts.values() for start, part, _ in places)})
    held: dict[str, tuple[int, pa.Array]] = {}
    for stop in ends:
        for field in schema if first < stop else ():
            if field.name not in held or held[field.name][0] + len(held[field.name][1]) <= first:
                start, part, here = parts[field.name].pop(0)
                values = (
                    read_column(old[0], field.name, start, part.rows)
                    if here and old is not None
                    else _read_part(files, part)
                )
                held[field.name] = start, values.cast(field.type)
        while first < stop:
            rows = min(_BATCH_ROWS, stop - first)
            yield pa.record_batch([values.slice(first - start, rows) for start, values in held.values()], schema=schema)
            first += rows


def _read_part(files: Mapping[str, Path], part: Part) -> pa.Array:
    assert part.object is not None
    try:
        values = pq.ParquetFile(files[part.object.sha256]).read().column(0).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{part.object.path} cannot be read ({error}); sync it again from its source") from error
    if len(values) != part.rows:
        raise InputError(f"{part.object.path} has {len(values)} rows instead of {part.rows}; do not trust it")
    return values
