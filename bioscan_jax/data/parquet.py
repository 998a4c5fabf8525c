"""Parquet input as blocks of rows in a fixed order, which grain can read at random.

The columns come from the footers of all files, which must agree.
"""

import bisect
import dataclasses
import difflib
import hashlib
import json
import operator
import os
import re
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt64

from bioscan_jax.barcodes.aliases import describe_roles, find_column, find_roles
from bioscan_jax.config import DataConfig
from bioscan_jax.data import fasta
from bioscan_jax.data.files import Files, find_files
from bioscan_jax.errors import InputError, logger, one_line, printable
from bioscan_jax.location import local_directory

# Pieces of 8k, 16k and 32k barcodes decode equally fast; 16k keeps memory small and seeks short.
_PIECE_ROWS = 16_384
_PIECE_BYTES = 32 << 20
_CACHE_BYTES = 256 << 20
_CACHE_BLOCKS = 4
_OPEN_GROUPS = 2
_READ_BYTES = 1 << 20
_HASHED_ROWS = 65_536
_FOOTER_GUESS = 64 << 10
_FOOTER_THREADS = 32
_LISTED = 25

_ID = "sequence_id"
_RESERVED = ("source_row", "vector")
"""Columns that the vector table adds, so the input must not have them."""

_OLD_ID = "input_id"
"""Name of the input's own sequence_id where --data.id file_row replaces it."""


@dataclass(frozen=True)
class Block:
    """Consecutive rows of the input."""

    index: int
    """Number of the block, which starts at row index * block_rows."""
    first_row: int
    """First row of the table, counted from 0 over all files."""
    table: pa.Table
    """sequence_id first, then the input's other columns."""


@dataclass(frozen=True)
class _Origin:
    """One input file as the user passed it: Parquet, or FASTA before its conversion."""

    url: str
    name: str
    """Path relative to the closest directory that holds all input files."""
    bytes: int
    rows: int
    sha256: str
    """Hash of the raw Parquet footer, or of the FASTA headers and sequences."""
    folders: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Names and values of its `key=value` folders."""


@dataclass(frozen=True)
class _Part:
    """One Parquet file and its footer."""

    path: str
    metadata: pq.FileMetaData
    schema: pa.Schema
    origin: _Origin


class _Made(Enum):
    """A column of a block that is not one of the files'."""

    FILE_ROW = "file and row"
    HEADER = "id and description of FASTA"
    SIZE = "abundance in the id of FASTA"
    FOLDER = "a key=value folder"


@dataclass(frozen=True)
class _Columns:
    """How the columns of the files become those of a block."""

    schema: pa.Schema
    """Schema of the block tables."""
    file_columns: tuple[str | _Made, ...]
    """Name in the files of each block column, or what it is made from."""
    sequence_column: str
    id_column: str
    """As the user would ask for it."""
    fasta: bool = False


@dataclass(frozen=True)
class _Group:
    """A row group, which is decoded in pieces of `piece_rows` rows."""

    part: int
    number: int
    first_row: int
    first_in_file: int
    rows: int
    piece_rows: int


class ParquetBlocks:
    """A grain RandomAccessDataSource whose elements are blocks of rows, in the order of the files.

    Opening reads footers only. Each row group is decoded front to back in pieces of at most 16,384 rows and about
    32 MiB, since Arrow cannot start inside one. Decoded pieces stay in a least-recently-used cache of 256 MiB (or four
    blocks, if that is more), so that threads reading forward decode each row once. A seek decodes its row group up to
    the row sought: 0.1 s in groups of 60,000 barcodes, under 2 s in groups of a million. Shuffled reading pays that
    for every block if a row group is larger than the cache.

    Threads may share it. It can be pickled, without the cache.
    """

    def __init__(
        self, found: Files, parts: Sequence[_Part], origins: Sequence[_Origin], columns: _Columns, block_rows: int
    ):
        self.block_rows = block_rows
        self._columns = columns
        self._found, self._parts, self._origins = found, tuple(parts), tuple(origins)
        self._labels = _short_labels([origin.name for origin in origins])
        self._origin_starts = np.cumsum([0, *(origin.rows for origin in origins)]).tolist()
        self._groups = _row_groups(self._parts)
        self._starts = [group.first_row for group in self._groups]
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()
        self._cached_bytes = self._cached_rows = 0
        self._readers: OrderedDict[int, tuple[int, Generator[pa.Table, None, None]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_cache", "_readers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __repr__(self) -> str:
        return f"ParquetBlocks(files={len(self._parts)}, rows={self.rows}, block_rows={self.block_rows})"

    @property
    def rows(self) -> int:
        """Number of rows in all files."""
        return self._groups[-1].first_row + self._groups[-1].rows

    @property
    def schema(self) -> pa.Schema:
        """Schema of the block tables."""
        return self._columns.schema

    @property
    def sequence_column(self) -> str:
        """Name of the column that holds the DNA."""
        return self._columns.sequence_column

    @property
    def id_column(self) -> str:
        """Name in the input of the column that became sequence_id."""
        return self._columns.id_column

    @property
    def numbers_rows(self) -> bool:
        """Whether sequence_id is made of file and row."""
        return self._columns.file_columns[0] is _Made.FILE_ROW

    @property
    def urls(self) -> list[str]:
        """Each input file as the user would write it: a path, or a URL."""
        return [origin.url for origin in self._origins]

    @property
    def fingerprint(self) -> list[dict[str, str | int]]:
        """Name, bytes, rows and footer_sha256 of each input file: its content, not its location or age.

        For FASTA, footer_sha256 is the hash of the headers and sequences, not of the converted file.
        """
        return [
            {"name": origin.name, "bytes": origin.bytes, "rows": origin.rows, "footer_sha256": origin.sha256}
            | ({"folders": json.dumps(dict(origin.folders))} if origin.folders else {})
            for origin in self._origins
        ]

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    def __getitem__(self, index: SupportsIndex) -> Block:
        """Reads a block.

        Raises:
            InputError: A file is damaged, or a row has no id.
        """
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"block {number} is outside 0 to {len(self) - 1}")
        first = row = number * self.block_rows
        last = min(first + self.block_rows, self.rows)
        tables = []
        with self._lock:
            while row < last:
                g = bisect.bisect_right(self._starts, row) - 1
                piece, offset = divmod(row - self._starts[g], self._groups[g].piece_rows)
                tables.append(self._piece(g, piece).slice(offset, last - row))
                row += tables[-1].num_rows
        return Block(number, first, pa.concat_tables(tables).combine_chunks())

    def select(self, columns: Sequence[str], block_rows: int) -> "ParquetBlocks":
        """Returns the same rows with sequence_id and only these columns, in blocks of another size.

        Raises:
            InputError: There is no such column.
        """
        projected = _project(self._columns, columns, self._origins[0].url)
        return ParquetBlocks(self._found, self._parts, self._origins, projected, block_rows)

    def locate(self, row: int, first: int = 0) -> str:
        """Returns the input file and the row in it, counted from 0, of a row of the input counted from row `first`."""
        row += first
        for origin in self._origins:
            if row < origin.rows:
                return f"{origin.url} row {row}"
            row -= origin.rows
        raise IndexError(row)

    def _piece(self, g: int, piece: int) -> pa.Table:
        if (g, piece) not in self._cache:
            self._decode_up_to(g, piece)
        self._cache.move_to_end((g, piece))
        return self._cache[g, piece]

    def _decode_up_to(self, g: int, piece: int) -> None:
        at, reader = self._readers.pop(g, (0, None))
        if reader is None or at > piece:
            at, reader = 0, self._read(g)
        part = self._parts[self._groups[g].part]
        try:
            for number in range(at, piece + 1):
                self._keep((g, number), self._as_block(g, number, next(reader)))
        except (OSError, pa.ArrowException, StopIteration) as error:
            raise InputError(
                f"{part.origin.url}: row group {self._groups[g].number} cannot be decoded "
                f"({one_line(error)}); the file is damaged or was changed, get it again"
            ) from error
        if (piece + 1) * self._groups[g].piece_rows < self._groups[g].rows:
            self._readers[g] = (piece + 1, reader)
        while len(self._readers) > _OPEN_GROUPS:
            self._readers.popitem(last=False)

    def _keep(self, key: tuple[int, int], table: pa.Table) -> None:
        if key in self._cache:
            return
        self._cache[key] = table
        self._cached_bytes += table.nbytes
        self._cached_rows += table.num_rows
        while self._cached_bytes > _CACHE_BYTES:
            oldest = next(iter(self._cache.values()))
            if self._cached_rows - oldest.num_rows < _CACHE_BLOCKS * self.block_rows or oldest is table:
                break
            self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
            self._cached_rows -= oldest.num_rows

    def _read(self, g: int) -> Generator[pa.Table, None, None]:
        """Yields the pieces of a row group, with the columns as they are in the file."""
        group, local = self._groups[g], self._found.filesystem is None
        part = self._parts[group.part]
        names = self._file_names() or part.metadata.schema.to_arrow_schema().names[:1]
        source = self._found.arrow_source(part.path, part.origin.bytes)
        # Buffered reads hold 1 MiB per column; over a network, one request for the whole group is faster.
        with pq.ParquetFile(
            source, metadata=part.metadata, buffer_size=_READ_BYTES if local else 0, pre_buffer=not local
        ) as file:
            waiting = pa.Table.from_batches([], schema=pa.schema([]))
            batches = file.iter_batches(group.piece_rows, row_groups=[group.number], columns=names, use_threads=False)
            for batch in batches:
                # A batch ends early if the texts of a column exceed 2 GiB.
                table = pa.Table.from_batches([batch])
                waiting = pa.concat_tables([waiting, table]) if waiting.num_rows else table
                if waiting.num_rows >= group.piece_rows:
                    yield waiting.slice(0, group.piece_rows)
                    waiting = waiting.slice(group.piece_rows)
            if waiting.num_rows:
                yield waiting

    def _file_names(self) -> list[str]:
        """Returns the columns of the files that blocks are made from."""
        wanted = self._columns.file_columns
        names = [name for name in wanted if not isinstance(name, _Made)]
        if _Made.HEADER in wanted or _Made.SIZE in wanted:
            names += [name for name in (_ID, "description") if name not in names]
        return names

    def _by_origin(self, first: int, rows: int, make: Callable[[int, range], pa.Array]) -> pa.ChunkedArray:
        """Makes a column for some rows of the input, each from its origin and rows in that."""
        chunks, row = [], first
        while row < first + rows:
            o = bisect.bisect_right(self._origin_starts, row) - 1
            last = min(self._origin_starts[o + 1], first + rows)
            chunks.append(make(o, range(row - self._origin_starts[o], last - self._origin_starts[o])))
            row = last
        return pa.chunked_array(chunks)

    def _make(self, made: _Made, field: pa.Field, first: int, table: pa.Table) -> pa.ChunkedArray:
        """Makes a column that is not in the files."""
        if made is _Made.FILE_ROW:
            labels = self._labels
            return self._by_origin(
                first, table.num_rows, lambda o, rows: pa.array([f"{labels[o]}:{row}" for row in rows], pa.string())
            )
        if made is _Made.FOLDER:
            values = [pa.scalar(origin.folders[field.name]).cast(field.type) for origin in self._origins]
            return self._by_origin(first, table.num_rows, lambda o, rows: pa.repeat(values[o], len(rows)))
        if made is _Made.HEADER:
            rest = table.column("description").fill_null("")
            joined = pc.call_function("binary_join_element_wise", [table.column(_ID), rest, pa.scalar(" ")])
            return pc.call_function("utf8_trim", [joined], pc.TrimOptions(characters=" "))
        found = pc.call_function("extract_regex", [table.column(_ID)], pc.ExtractRegexOptions(fasta.SIZE_ANNOTATION))
        return pc.call_function("struct_field", [found], pc.StructFieldOptions([0])).cast(pa.int64())

    def _as_block(self, g: int, piece: int, table: pa.Table) -> pa.Table:
        group = self._groups[g]
        offset = piece * group.piece_rows
        expected = min(group.piece_rows, group.rows - offset)
        if table.num_rows != expected:
            raise pa.ArrowInvalid(f"{table.num_rows} rows, but the footer states {expected}")
        columns = []
        for field, name in zip(self.schema, self._columns.file_columns, strict=True):
            if isinstance(name, _Made):
                columns.append(_cast(self._make(name, field, group.first_row + offset, table), field.type))
            else:
                columns.append(_cast(table.column(name), field.type))
        empty = columns[0].fill_null("").index("").as_py()
        if empty >= 0:
            where = self.locate(group.first_row + offset + empty)
            raise InputError(
                f"{where} (counted from 0) has no id in column {self._columns.file_columns[0]!r}; "
                "fill it in, or name another column with --data.id_column"
            )
        return pa.Table.from_arrays(columns, schema=self.schema)


def open_source(
    data: DataConfig,
    *,
    scratch: Path | None,
    columns: Sequence[str] | None = None,
    for_table: bool = True,
    on_rows: Callable[[int], None] | None = None,
) -> ParquetBlocks:
    """Opens the input as blocks of rows and checks the footers of all files.

    The id column becomes `sequence_id`; if there is none, ids are FILE_STEM:ROW with rows counted from 0, and files of
    the same stem keep as much of their path as makes them differ. Where a column is not there under its default name,
    the names of public databases are tried (`bioscan_jax.barcodes.aliases`). `key=value` folders are columns. Dictionary and view columns are decoded; a column
    that is all null takes its type from another file, or is text. FASTA and FASTQ are first converted to
    `scratch`/input.parquet, or into `data.scratch` under a name of their own; abundances in their ids (`;size=12;`) are a column `size`, too.

    Args:
        data: The path and the column names; for FASTA the column names are fixed.
        scratch: Directory for the converted FASTA; not used for Parquet.
        columns: Columns to read beside sequence_id; all if absent.
        for_table: Whether the rows become a vector table: columns that it adds itself are refused then, else left out.
        on_rows: Called with the number of FASTA records just converted, for a progress bar.

    Raises:
        InputError: There is nothing to read, a file is damaged, files differ, or a column is missing, of a wrong type
            or reserved.

    Example:
        >>> import tempfile
        >>> directory = tempfile.TemporaryDirectory()
        >>> path = f"{directory.name}/coi.parquet"
        >>> pq.write_table(pa.table({"dna_sequence": ["ACGT", "TTGA", "CCAT"]}), path)
        >>> source = open_source(DataConfig(path=path, block_rows=2), scratch=None)
        >>> source[1].table.to_pylist()
        [{'sequence_id': 'coi:2', 'dna_sequence': 'CCAT'}]
        >>> directory.cleanup()
    """
    if data.scratch is not None:
        scratch_place(data.scratch)  # refused for Parquet too
    found = find_files(data.path)
    is_fasta, extra = found.kind == "fasta", {}
    if is_fasta:
        target = _converted(found, data, scratch)
        fasta.transcode(found, target, on_rows=on_rows)
        converted = zip(found.paths, fasta.read_origins(target), strict=True)
        origins = [_Origin(found.url(path), **origin, folders=found.folders(path)) for path, origin in converted]
        data = replace(data, sequence_column="dna_sequence", id_column=_ID)
        if fasta.has_sizes(target):
            extra[fasta.SIZE_COLUMN] = _Made.SIZE
        found = Files("parquet", (str(target),))
        parts = _read_footers(found)
    else:
        if data.id == "header":
            raise InputError(f"--data.id header is for FASTA, {data.path} is Parquet; pass --data.id_column COLUMN")
        parts = _read_footers(found)
        origins = [part.origin for part in parts]
    if not any(part.origin.rows for part in parts):
        raise InputError(f"{data.path} has no rows (files looked at: {len(parts)}); pass files with sequences")
    if empty := [origin.name for origin in origins if not origin.rows]:
        more = f" and {len(empty) - 3:,} more" if len(empty) > 3 else ""
        logger.warning(
            printable(f"{len(empty):,} of {len(origins):,} files have no sequences: {', '.join(empty[:3])}{more}")
        )
    schema, folders = _with_folders(_common_schema(parts), origins)
    chosen = _find_columns(schema, data, parts[0].origin.url, extra | folders)
    chosen = replace(chosen, fasta=is_fasta)
    if columns is not None:
        chosen = _project(chosen, columns, parts[0].origin.url)
    elif not is_fasta and (told := describe_roles(find_roles(schema.names))):
        logger.info(printable(f"{origins[0].url}: columns understood as {told}"))
    reserved = [name for name in chosen.schema.names if name in _RESERVED]
    if reserved and for_table:
        raise InputError(
            f"{parts[0].origin.url} has a column {reserved[0]!r}, which the vector table adds itself; rename it"
        )
    if reserved:
        logger.info(f"{parts[0].origin.url}: the columns {', '.join(reserved)} of a vector table are not read")
        chosen = _project(chosen, [name for name in chosen.schema.names if name not in reserved], parts[0].origin.url)
    return ParquetBlocks(found, parts, origins, chosen, data.block_rows)


def _with_folders(schema: pa.Schema, origins: Sequence[_Origin]) -> tuple[pa.Schema, dict[str, _Made]]:
    """Adds a column for each `key=value` folder: int64 where every value is a plain whole number, else text.

    Raises:
        InputError: Some files are in folders of a name and others are not.
    """
    names = list(dict.fromkeys(name for origin in origins for name in origin.folders))
    made = {}
    for name in names:
        if name in schema.names:
            logger.warning(
                printable(f"the files have a column {name!r} of their own; the folders {name}=... are ignored")
            )
            continue
        lacking = next((origin for origin in origins if name not in origin.folders), None)
        if lacking is not None:
            other = next(origin for origin in origins if name in origin.folders)
            raise InputError(
                f"{other.url} is in a folder {name}=..., a column, but {lacking.url} is not; put all files into such "
                "folders, or pass only one"
            )
        values = [origin.folders[name] for origin in origins]
        whole = [value is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", value) is not None for value in values]
        kind = pa.int64() if all(whole) and any(value is not None for value in values) else pa.string()
        schema = schema.append(pa.field(name, kind))
        made[name] = _Made.FOLDER
    return schema, made


def check_unique_ids(source: ParquetBlocks) -> None:
    """Checks that no id occurs twice. By hand, as it needs 8 bytes of memory per row where a library holds all ids.

    Raises:
        InputError: An id is repeated, or a row has none.
    """
    if source._columns.file_columns[0] is _Made.FILE_ROW:
        return
    ids = source.select((), _HASHED_ROWS)
    hashes = np.empty(source.rows, np.uint64)
    for i in range(len(ids)):
        block = ids[i]
        hashes[block.first_row : block.first_row + block.table.num_rows] = hash_text(block.table.column(_ID))
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    repeats = int(np.count_nonzero(again))
    suspects = np.unique(hashes[1:][again])
    # Two ids may share a hash, so suspects are read again, some at a time to bound memory.
    for first in range(0, len(suspects), _HASHED_ROWS):
        _confirm_unique(ids, suspects[first : first + _HASHED_ROWS], repeats)


def _confirm_unique(ids: ParquetBlocks, suspects: UInt64[np.ndarray, " suspects"], repeats: int) -> None:
    rows: dict[str, int] = {}
    for i in range(len(ids)):
        block = ids[i]
        column = block.table.column(_ID)
        for offset in np.flatnonzero(np.isin(hash_text(column), suspects)).tolist():
            row, value = block.first_row + offset, column[offset].as_py()
            if value in rows:
                raise InputError(
                    f"sequence_id {value!r} is not unique: {ids.locate(rows[value])} and {ids.locate(row)} (counted "
                    f"from 0) have it, and {repeats} rows in all repeat an earlier id; make ids unique, "
                    + (
                        "or pass --data.id header (the whole header) or --data.id file_row (file and row)"
                        if ids._columns.fasta
                        else "or name another column with --data.id_column, or pass --data.id file_row"
                    )
                )
            rows[value] = row


def hash_text(column: pa.ChunkedArray) -> UInt64[np.ndarray, " rows"]:
    """64-bit multilinear hashes of non-empty texts: sums of random coefficients times bytes."""
    hashes = [np.empty(0, np.uint64)]
    for chunk in column.chunks:
        if not len(chunk):
            continue
        offset_type = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
        _, offset_buffer, text = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, offset_type)[chunk.offset : chunk.offset + len(chunk) + 1]
        letters = np.frombuffer(text, np.uint8)[offsets[0] : offsets[-1]]
        starts = (offsets - offsets[0]).astype(np.int64)
        lengths = np.diff(starts)
        positions = np.arange(len(letters)) - np.repeat(starts[:-1], lengths)
        coefficients = np.random.default_rng(0).integers(0, 2**64, int(lengths.max()), dtype=np.uint64)
        # One is added so that a trailing zero byte changes the hash.
        products = coefficients[positions] * (letters.astype(np.uint64) + np.uint64(1))
        hashes.append(np.add.reduceat(products, starts[:-1]))
    return np.concatenate(hashes)


def _read_footers(found: Files) -> list[_Part]:
    """Reads the footers of all files in parallel.

    Raises:
        InputError: A file is damaged, cut short or not Parquet.
    """
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(found.paths))) as pool:
        return list(pool.map(lambda path, name: _read_footer(found, path, name), found.paths, found.names))


def _read_footer(found: Files, path: str, name: str) -> _Part:
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
        _ = schema.names, [str(field.type) for field in schema]
    except UnicodeDecodeError as error:
        raise InputError(
            f"{url}: the name of a column is not UTF-8 ({error.object!r:.60}); write the file again with names in UTF-8"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{url} ({size} bytes) is not a whole Parquet file ({one_line(error)}); get it again or leave it out"
        ) from error
    digest = hashlib.sha256(tail[-length:-8]).hexdigest()
    origin = _Origin(url, name, size, metadata.num_rows, digest, found.folders(path))
    return _Part(path, metadata, schema, origin)


def _converted(found: Files, data: DataConfig, scratch: Path | None) -> Path:
    """Returns the path of the Parquet form of FASTA files."""
    if data.scratch is not None:
        return scratch_place(data.scratch) / f"{fasta.fingerprint(found)}.parquet"
    if scratch is None:
        raise InputError(f"{data.path} is FASTA, which is first converted to Parquet; pass --data.scratch DIRECTORY")
    return scratch.absolute() / "input.parquet"


def scratch_place(scratch: str) -> Path:
    """Returns the directory that `data.scratch` names.

    Raises:
        InputError: It is not on this machine.
    """
    local = local_directory(scratch, flag="data.scratch")
    if local is None:
        raise InputError(f"--data.scratch {scratch}: working files need a disk; pass a directory on this machine")
    return local


def _plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column in a block: dictionaries and views decoded."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else kind


def _common_schema(parts: Sequence[_Part]) -> pa.Schema:
    """Names and plain types of the columns of all files.

    Raises:
        InputError: Files differ in more than the order of columns, or a column name is used twice.
    """
    first = parts[0]
    types: dict[str, pa.DataType] = dict.fromkeys(first.schema.names, pa.null())
    typed_by: dict[str, str] = {}
    for part in parts:
        names, url = Counter(part.schema.names), part.origin.url
        for name, count in names.items():
            if count > 1:
                raise InputError(f"{url} has {count} columns named {name!r}; rename them")
        for name in (*types, *names):
            if (name in types) != (name in names):
                has, lacks = (url, first.origin.url) if name in names else (first.origin.url, url)
                raise InputError(
                    f"{lacks} has no column {name!r}, but {has} has; give all files the same columns or pass only one"
                )
        for field in part.schema:
            kind, before = _plain_type(field.type), types[field.name]
            if pa.types.is_null(before):
                types[field.name] = kind
                typed_by[field.name] = url
            elif not pa.types.is_null(kind) and kind != before:
                raise InputError(
                    f"{url}: column {field.name!r} is {kind}, but {before} in {typed_by[field.name]}; "
                    "write all files with one type"
                )
    return pa.schema([(name, pa.string() if pa.types.is_null(kind) else kind) for name, kind in types.items()])


def _find_columns(schema: pa.Schema, data: DataConfig, url: str, made: Mapping[str, _Made]) -> _Columns:
    """Finds the sequence and the id column and puts sequence_id first.

    Where the columns are not there under their default names, they are found by `aliases.find_column`. A column of
    another name that becomes sequence_id because of a flag is moved; one found as an alias stays, too.

    Args:
        schema: Columns of the files, and those made from folders.
        data: The flags.
        url: The first file, for messages.
        made: Columns that are not in the files; those that `schema` lacks are added.

    Raises:
        InputError: There is no such sequence column, a type is wrong, or two columns would become sequence_id.
    """
    sequence, column = _find_sequence(schema, data, url), data.id_column
    alias = None
    if data.id == "column" and column == _ID and _ID not in schema.names:
        usable = [name for name in schema.names if name != sequence and _is_id(schema.field(name).type)]
        alias = find_column("id", usable)
    if data.id == "column" and column != _ID and _ID in schema.names:
        if column in schema.names:
            raise InputError(
                f"{url}: column {column!r} is to become {_ID!r}, but there is another column of that name; "
                f"rename it, or pass --data.id_column {_ID}"
            )
        raise InputError(f"{url} has no column {column!r}, but one named {_ID!r}; pass --data.id_column {_ID}")
    if column != _ID and column not in schema.names:
        raise InputError(
            f"{url} has no column {column!r}; name one of {_listed(schema.names)} with --data.id_column, "
            "or leave it out to number the rows"
        )
    taken = alias or column
    present = taken in schema.names
    kind = schema.field(taken).type if present else pa.string()
    if data.id == "column" and not _is_id(kind):
        raise InputError(
            f"{url}: id column {column!r} is {kind}, neither text nor integer; "
            "write it as a string column, or name another with --data.id_column"
        )
    source: str | _Made = taken if present else _Made.FILE_ROW
    if data.id != "column":
        source, kind = (_Made.HEADER if data.id == "header" else _Made.FILE_ROW), pa.string()
        if _OLD_ID in schema.names and _ID in schema.names:
            raise InputError(f"{url}: --data.id {data.id} keeps {_ID!r} as {_OLD_ID!r}, but there is one; rename it")
    elif isinstance(made.get(taken), _Made):
        source = made[taken]
    fields = [pa.field(_ID, kind if _is_text(kind) else pa.string())]
    columns: list[str | _Made] = [source]
    for field in schema:
        if data.id == "column" and field.name == taken and alias is None:
            continue
        if data.id == "header" and field.name in (_ID, "description"):
            continue
        fields.append(field.with_name(_OLD_ID) if field.name == _ID else field)
        columns.append(made.get(field.name, field.name))
    for name in [name for name in made if name not in schema.names]:
        fields.append(pa.field(name, pa.int64()))
        columns.append(made[name])
    return _Columns(pa.schema(fields), tuple(columns), sequence, taken)


def _find_sequence(schema: pa.Schema, data: DataConfig, url: str) -> str:
    """Returns the name of the sequence column; see `_find_columns`."""
    sequence, column = data.sequence_column, data.id_column
    if sequence == column:
        raise InputError(f"--data.sequence_column and --data.id_column are both {column!r}; pass two columns")
    if sequence == DataConfig.sequence_column and sequence not in schema.names:
        sequence = find_column("sequence", [name for name in _text_columns(schema) if name != column]) or sequence
    if sequence not in schema.names:
        raise InputError(f"{url} has no column {sequence!r}; {_suggestion(schema, data)}")
    if not _is_text(schema.field(sequence).type):
        raise InputError(
            f"{url}: column {sequence!r} is {schema.field(sequence).type}, not text; "
            "write it as a string column, or name another with --data.sequence_column"
        )
    return sequence


def _text_columns(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if _is_text(field.type)]


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > _LISTED else shown


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _suggestion(schema: pa.Schema, data: DataConfig) -> str:
    text = {name.lower(): name for name in _text_columns(schema) if name != data.id_column}
    alias = find_column("sequence", text.values())
    likely = [] if alias is None else [alias.lower()]
    for wanted in (data.sequence_column.lower(), "sequence"):
        likely += difflib.get_close_matches(wanted, [name for name in text if not name.endswith("id")], 1)
    column = text[likely[0]] if likely else "COLUMN"
    return f"pass --data.sequence_column {column} (columns: {_listed(schema.names) or 'none'})"


def _row_groups(parts: Sequence[_Part]) -> tuple[_Group, ...]:
    groups = []
    first_row = 0
    for p, part in enumerate(parts):
        first_in_file = 0
        for number in range(part.metadata.num_row_groups):
            group = part.metadata.row_group(number)
            if group.num_rows:
                row_bytes = max(group.total_byte_size // group.num_rows, 1)
                piece_rows = min(_PIECE_ROWS, max(_PIECE_BYTES // row_bytes, 1))
                groups.append(_Group(p, number, first_row, first_in_file, group.num_rows, piece_rows))
            first_row += group.num_rows
            first_in_file += group.num_rows
    return tuple(groups)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if column.type == kind:
        return column
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    return column.cast(_plain_type(column.type)).cast(kind)


def _short_labels(names: Sequence[str]) -> tuple[str, ...]:
    """Shortest endings of the paths, without suffix, that differ between the files."""
    parts = [(*PurePosixPath(name).parent.parts, PurePosixPath(name).stem) for name in names]
    depths = [1] * len(parts)
    while True:
        labels = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        count = Counter(labels)
        short = [i for i, label in enumerate(labels) if count[label] > 1 and depths[i] < len(parts[i])]
        if not short:
            # Only the suffix can still differ, as in x.parquet and x.PARQUET.
            return tuple(label if count[label] == 1 else name for label, name in zip(labels, names, strict=True))
        for i in short:
            depths[i] += 1


def _project(chosen: _Columns, columns: Sequence[str], url: str) -> _Columns:
    """Keeps sequence_id and only these columns."""
    for name in columns:
        if name not in chosen.schema.names:
            raise InputError(f"{url} has no column {name!r}; choose from: {_listed(chosen.schema.names)}")
    kept = [i for i, name in enumerate(chosen.schema.names) if i == 0 or name in columns]
    return replace(
        chosen,
        schema=pa.schema([chosen.schema.field(i) for i in kept]),
        file_columns=tuple(chosen.file_columns[i] for i in kept),
    )
