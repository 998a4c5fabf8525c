"""The columns of all Parquet files, as their footers give them, and how they become those of a block."""

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.config import DataConfig
from bioscan_jax.data.files import Files, one_line
from bioscan_jax.errors import InputError

_FOOTER_GUESS = 64 << 10
_FOOTER_THREADS = 32

ID = "sequence_id"
RESERVED = ("source_row", "vector")
"""Columns of the vector table, which the input must not have."""

_SEQUENCE_NAMES = ("dna_sequence", "sequence", "seq", "dna", "nucleotides", "nucraw", "barcode")


@dataclass(frozen=True)
class Origin:
    """One input file as the user gave it: Parquet, or the FASTA that was turned into Parquet."""

    url: str
    name: str
    """Path below the closest directory that holds all input files."""
    bytes: int
    rows: int
    sha256: str
    """Of the raw Parquet footer, or of the FASTA headers and sequences."""


@dataclass(frozen=True)
class Part:
    """One Parquet file, as its footer describes it."""

    path: str
    metadata: pq.FileMetaData
    schema: pa.Schema
    origin: Origin


@dataclass(frozen=True)
class Layout:
    """How the columns of the files become those of a block."""

    schema: pa.Schema
    """Of the block tables."""
    file_columns: tuple[str | None, ...]
    """The files' name of each block column; None for ids that are made of file and row."""
    sequence_column: str


def read_footers(found: Files) -> list[Part]:
    """Reads the footer of each Parquet file, many at a time.

    Raises:
        InputError: A file that is damaged, cut short or not Parquet.
    """
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(found.paths))) as pool:
        return list(pool.map(lambda path, name: _read_footer(found, path, name), found.paths, found.names))


def _read_footer(found: Files, path: str, name: str) -> Part:
    url, size = found.url(path), 0
    try:
        with found.open(path) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _FOOTER_GUESS))
            tail = stream.read()
            length = int.from_bytes(tail[-8:-4], "little") + 8
            if tail[-4:] == b"PAR1" and len(tail) < length <= size:
                stream.seek(size - length)
                tail = stream.read()
        metadata = pq.read_metadata(pa.BufferReader(tail))
        schema = metadata.schema.to_arrow_schema()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{url} ({size} bytes) is not a whole Parquet file ({one_line(error)}); get it again or leave it out"
        ) from error
    origin = Origin(url, name, size, metadata.num_rows, hashlib.sha256(tail[-length:-8]).hexdigest())
    return Part(path, metadata, schema, origin)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type a column has in a block; null is settled elsewhere."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def common_schema(parts: Sequence[Part]) -> pa.Schema:
    """Names and plain types of the columns of all files.

    Raises:
        InputError: Files that differ in more than the order of columns, or a column name used twice.
    """
    first = parts[0]
    types: dict[str, pa.DataType] = dict.fromkeys(first.schema.names, pa.null())
    settled_by: dict[str, str] = {}
    for part in parts:
        names, url = part.schema.names, part.origin.url
        for name, count in Counter(names).items():
            if count > 1:
                raise InputError(f"{url} has {count} columns named {name!r}; rename them")
        for name in (*types, *names):
            if (name in types) != (name in names):
                has, lacks = (url, first.origin.url) if name in names else (first.origin.url, url)
                raise InputError(
                    f"{lacks} has no column {name!r}, but {has} has; give all files the same columns or pass only one"
                )
        for field in part.schema:
            kind, before = plain_type(field.type), types[field.name]
            if pa.types.is_null(before):
                types[field.name] = kind
                settled_by[field.name] = url
            elif not pa.types.is_null(kind) and kind != before:
                raise InputError(
                    f"{url}: column {field.name!r} is {kind}, but {before} in {settled_by[field.name]}; "
                    "write all files with one type"
                )
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])


def block_layout(schema: pa.Schema, data: DataConfig, url: str) -> Layout:
    """Finds the sequence and the id column and puts sequence_id first.

    Raises:
        InputError: No such sequence column, a wrong type, or two columns that would be sequence_id.
    """
    sequence, column = data.sequence_column, data.id_column
    if sequence == column:
        raise InputError(f"--data.sequence_column and --data.id_column are both {column!r}; pass two columns")
    if sequence not in schema.names:
        raise InputError(f"{url} has no column {sequence!r}; {_suggestion(schema, data)}")
    if not _is_text(schema.field(sequence).type):
        raise InputError(
            f"{url}: column {sequence!r} is {schema.field(sequence).type}, not text; "
            "write it as a string column, or name another with --data.sequence_column"
        )
    if column != ID and ID in schema.names:
        if column in schema.names:
            raise InputError(
                f"{url}: column {column!r} is to become {ID!r}, but there is another column of that name; "
                f"rename it, or pass --data.id_column {ID}"
            )
        raise InputError(f"{url} has no column {column!r}, but one named {ID!r}; pass --data.id_column {ID}")
    if column != ID and column not in schema.names:
        raise InputError(
            f"{url} has no column {column!r}; name one of {', '.join(schema.names)} with --data.id_column, "
            "or leave it out to number the rows"
        )
    present = column in schema.names
    kind = schema.field(column).type if present else pa.string()
    if not _is_text(kind) and not pa.types.is_integer(kind):
        raise InputError(
            f"{url}: id column {column!r} is {kind}, neither text nor integer; "
            "write it as a string column, or name another with --data.id_column"
        )
    rest = [field for field in schema if field.name != column]
    ids = pa.field(ID, kind if _is_text(kind) else pa.string())
    file_columns = (column if present else None, *(field.name for field in rest))
    return Layout(pa.schema([ids, *rest]), file_columns, sequence)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _suggestion(schema: pa.Schema, data: DataConfig) -> str:
    text = {field.name.lower(): field.name for field in schema if _is_text(field.type) and field.name != data.id_column}
    likely = [name for name in _SEQUENCE_NAMES if name in text]
    for wanted in (data.sequence_column.lower(), "sequence"):
        likely += difflib.get_close_matches(wanted, [name for name in text if not name.endswith("id")], 1)
    column = text[likely[0]] if likely else "COLUMN"
    return f"pass --data.sequence_column {column} (columns: {', '.join(schema.names)})"
