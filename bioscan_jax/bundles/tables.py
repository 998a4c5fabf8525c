"""Tables as parts of columns: hashes of their values, what a Lance table holds, and a Lance table from parts."""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
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
    before: TableItem | None,
    part_bytes: int,
    known: Known,
    advance: Callable[[int], object],
) -> tuple[TableItem, Known]:
    """Finds the parts of a table and their hashes; reads only what `known` lacks.

    Args:
        dataset: The table.
        before: The copy's version of it, whose parts end at the same rows; later rows are in parts of their own.
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
        old = before.columns.get(field.name) if before is not None else None
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


def continues(old: TableItem | None, new: TableItem) -> bool:
    """Returns whether the new table is the old one with rows after it."""
    if old is None or old.fields != new.fields or old.metadata != new.metadata:
        return False
    return all(
        [part.content for part in column.parts]
        == [part.content for part in new.columns[name].parts[: len(column.parts)]]
        for name, column in old.columns.items()
    )


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

    Rows that only the copy has are appended where that is all that changed; otherwise every row is written again, with
    the unchanged columns read from the table.

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
    first = old[1].rows if old is not None and continues(old[1], new) else 0
    with writer_lock(database, table.removesuffix("_rejects")) as check:
        latest = open_dataset(path)
        if (None if latest is None else latest.version) != (None if old is None else old[0].version):
            raise InputError(f"{path} changed while it was compared; run the same command again")
        with storage_errors(path):
            batches = pa.RecordBatchReader.from_batches(schema, _batches(schema, old, new, first, files))
            fragments = write_fragments(
                batches, path if latest is None else latest, schema, max_bytes_per_file=_MAX_BYTES_PER_FILE
            )
            appends = latest is not None and first > 0
            operation = (
                lance.LanceOperation.Append(fragments) if appends else lance.LanceOperation.Overwrite(schema, fragments)
            )
            if latest is None:
                written = lance.LanceDataset.commit(path, operation)
            else:
                written = commit(latest, operation, {"synced": f"{new.rows} rows"}, check)
            if new.index is not None:
                build_indexes(written, new.index)
            # Removes what a killed process left; keeps the previous version for its current readers
            written.cleanup_old_versions(retain_versions=2, delete_unverified=True, error_if_tagged_old_versions=False)
    return written


def _batches(
    schema: pa.Schema,
    old: tuple["lance.LanceDataset", TableItem] | None,
    new: TableItem,
    first: int,
    files: Mapping[str, Path],
) -> Iterator[pa.RecordBatch]:
    """Yields the rows from `first` on; a part of each column is in memory at a time."""
    parts = {
        name: [place for place in _places(None if old is None else old[1], name, column) if place[0] >= first]
        for name, column in new.columns.items()
    }
    ends = sorted({start + part.rows for places in parts.values() for start, part, _ in places})
    held: dict[str, tuple[int, pa.Array]] = {}
    for stop in ends:
        for field in schema:
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
