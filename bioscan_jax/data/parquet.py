"""Blocks of rows in a fixed order: what the input is to the rest of the library, and to grain."""

import bisect
import operator
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt64

from bioscan_jax.config import DataConfig
from bioscan_jax.data import fasta, files, footers
from bioscan_jax.data.files import Files
from bioscan_jax.data.footers import Layout, Origin, Part
from bioscan_jax.errors import InputError

# Pieces of 8k, 16k and 32k barcodes decode equally fast; the middle one keeps memory small and seeks short.
_PIECE_ROWS = 16_384
_PIECE_BYTES = 32 << 20
_CACHE_BYTES = 256 << 20
_CACHE_BLOCKS = 4
_OPEN_GROUPS = 2
_READ_BYTES = 1 << 20
_HASHED_ROWS = 65_536


@dataclass(frozen=True)
class Block:
    """Consecutive rows of the input."""

    index: int
    """Number of the block; it starts at row index * block_rows."""
    first_row: int
    """Row of the whole input, over all files, that the table starts with."""
    table: pa.Table
    """sequence_id first, then the input's other columns."""


@dataclass(frozen=True)
class _Group:
    """A row group, decoded in pieces of `piece_rows` rows."""

    part: int
    number: int
    first_row: int
    first_in_file: int
    rows: int
    piece_rows: int


class ParquetBlocks:
    """A grain RandomAccessDataSource whose elements are blocks of rows, in the files' order.

    Only footers are read at the start. A row group, however large, is decoded front to back in pieces of at most
    16,384 rows and about 32 MiB, since Arrow cannot start inside one. Decoded pieces stay in a least-recently-used
    cache of 256 MiB (four blocks, where that is more), so threads that walk forward decode each row once. A seek
    costs the rows of one row group up to the one sought: 0.1 s in groups of 60,000 barcodes, under 2 s in groups of
    a million. Shuffled reading pays that for each block as soon as a row group is larger than the cache.

    Safe to share between threads, and picklable (without the cache).
    """

    def __init__(self, found: Files, parts: Sequence[Part], origins: Sequence[Origin], layout: Layout, block_rows: int):
        self.layout, self.block_rows = layout, block_rows
        self._found, self._parts, self._origins = found, tuple(parts), tuple(origins)
        self._labels = _labels(found.names)
        self._groups = _groups(self._parts)
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
        """Rows of all files."""
        return self._groups[-1].first_row + self._groups[-1].rows

    @property
    def schema(self) -> pa.Schema:
        """Schema of the block tables."""
        return self.layout.schema

    @property
    def sequence_column(self) -> str:
        """The column with the DNA."""
        return self.layout.sequence_column

    @property
    def fingerprint(self) -> list[dict[str, str | int]]:
        """Name, bytes, rows and footer_sha256 of each input file: what is in it, not where or how old it is.

        For FASTA footer_sha256 is that of the headers and sequences, as its Parquet file is the library's own.
        """
        return [
            {"name": origin.name, "bytes": origin.bytes, "rows": origin.rows, "footer_sha256": origin.sha256}
            for origin in self._origins
        ]

    def __len__(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    def __getitem__(self, index: SupportsIndex) -> Block:
        """Reads a block.

        Raises:
            InputError: A damaged file, or a row without an id.
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
        """The same rows with sequence_id and only these columns, in blocks of another size.

        Raises:
            InputError: A column that there is not.
        """
        layout = _projected(self.layout, columns, self._origins[0].url)
        return ParquetBlocks(self._found, self._parts, self._origins, layout, block_rows)

    def locate(self, row: int) -> str:
        """Says which row of which input file a row of the whole input is; both are counted from 0."""
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
                f"({files.one_line(error)}); the file is damaged or was changed, get it again"
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
        """Yields the pieces of a row group as they are in the file."""
        group, local = self._groups[g], self._found.filesystem is None
        part = self._parts[group.part]
        names = [name for name in self.layout.file_columns if name is not None] or part.schema.names[:1]
        source = self._found.arrow_source(part.path, part.origin.bytes)
        # Buffered reads hold 1 MiB a column of the group; over a network one round trip for all of it is better.
        with pq.ParquetFile(
            source, metadata=part.metadata, buffer_size=_READ_BYTES if local else 0, pre_buffer=not local
        ) as file:
            waiting = pa.Table.from_batches([], schema=pa.schema([]))
            batches = file.iter_batches(group.piece_rows, row_groups=[group.number], columns=names, use_threads=False)
            for batch in batches:
                # A batch ends early where the texts of a column pass 2 GiB.
                table = pa.Table.from_batches([batch])
                waiting = pa.concat_tables([waiting, table]) if waiting.num_rows else table
                if waiting.num_rows >= group.piece_rows:
                    yield waiting.slice(0, group.piece_rows)
                    waiting = waiting.slice(group.piece_rows)
            if waiting.num_rows:
                yield waiting

    def _as_block(self, g: int, piece: int, table: pa.Table) -> pa.Table:
        group = self._groups[g]
        offset = piece * group.piece_rows
        expected = min(group.piece_rows, group.rows - offset)
        if table.num_rows != expected:
            raise pa.ArrowInvalid(f"{table.num_rows} rows where the footer says {expected}")
        columns = []
        for field, name in zip(self.schema, self.layout.file_columns, strict=True):
            if name is None:
                first = group.first_in_file + offset
                label = self._labels[group.part]
                columns.append(pa.chunked_array([[f"{label}:{row}" for row in range(first, first + expected)]]))
            else:
                columns.append(_cast(table.column(name), field.type))
        empty = columns[0].fill_null("").index("").as_py()
        if empty >= 0:
            where = self.locate(group.first_row + offset + empty)
            raise InputError(
                f"{where} (counted from 0) has no id in column {self.layout.file_columns[0]!r}; "
                "fill it in, or name another column with --data.id_column"
            )
        return pa.Table.from_arrays(columns, schema=self.schema)


def open_source(
    data: DataConfig,
    *,
    scratch: Path | None,
    columns: Sequence[str] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> ParquetBlocks:
    """Opens the input as blocks of rows and checks all that footers can tell.

    The id column becomes `sequence_id`; where there is none, ids are FILE_STEM:ROW with rows counted from 0, and
    files of the same stem get as much of their path as tells them apart. Dictionary and view columns become plain
    ones; a column without a single value takes the type it has in another file, or text. FASTA and FASTQ are
    first turned into `scratch`/input.parquet.

    Args:
        data: Says where the input is and what its columns are called; for FASTA the names are fixed.
        scratch: Directory for the Parquet form of FASTA; not used for Parquet.
        columns: Columns to read beside sequence_id; all of them if absent.
        on_rows: Called with the number of FASTA records just turned into Parquet, for a progress bar.

    Raises:
        InputError: Nothing to read, a damaged file, files that differ, or a missing, mistyped or reserved column.
    """
    found = files.find(data.path)
    if found.kind == "fasta":
        if scratch is None:
            raise InputError(f"{data.path} is FASTA, which is first turned into Parquet; pass a scratch directory")
        target = fasta.transcode(found, scratch.absolute() / "input.parquet", on_rows=on_rows)
        origins = [
            Origin(found.url(path), **origin) for path, origin in zip(found.paths, fasta.origins(target), strict=True)
        ]
        data = replace(data, sequence_column="dna_sequence", id_column=footers.ID)
        found = Files("parquet", (str(target),))
        parts = footers.read_footers(found)
    else:
        parts = footers.read_footers(found)
        origins = [part.origin for part in parts]
    if not any(part.origin.rows for part in parts):
        raise InputError(f"{data.path} has no rows (files looked at: {len(parts)}); pass files with sequences")
    layout = footers.block_layout(footers.common_schema(parts), data, parts[0].origin.url)
    if columns is not None:
        layout = _projected(layout, columns, parts[0].origin.url)
    for name in footers.RESERVED:
        if name in layout.schema.names:
            raise InputError(
                f"{parts[0].origin.url} has a column {name!r}, which the vector table needs for itself; rename it"
            )
    return ParquetBlocks(found, parts, origins, layout, data.block_rows)


def check_unique_ids(source: ParquetBlocks) -> None:
    """Reads the ids once and makes sure that each is there once; takes 8 bytes of memory a row.

    Raises:
        InputError: A repeated id, or a row without one.
    """
    if source.layout.file_columns[0] is None:
        return
    ids = source.select((), _HASHED_ROWS)
    hashes = np.empty(source.rows, np.uint64)
    for i in range(len(ids)):
        block = ids[i]
        hashes[block.first_row : block.first_row + block.table.num_rows] = _hash_text(block.table.column(footers.ID))
    hashes.sort()
    again = hashes[1:] == hashes[:-1]
    repeats = int(np.count_nonzero(again))
    suspects = np.unique(hashes[1:][again])
    # Two ids may share a hash, so suspects are read again; a slice of them at a time keeps memory bounded.
    for first in range(0, len(suspects), _HASHED_ROWS):
        _confirm_unique(ids, suspects[first : first + _HASHED_ROWS], repeats)


def _confirm_unique(ids: ParquetBlocks, suspects: UInt64[np.ndarray, " suspects"], repeats: int) -> None:
    rows: dict[str, int] = {}
    for i in range(len(ids)):
        block = ids[i]
        column = block.table.column(footers.ID)
        for offset in np.flatnonzero(np.isin(_hash_text(column), suspects)).tolist():
            row, value = block.first_row + offset, column[offset].as_py()
            if value in rows:
                raise InputError(
                    f"sequence_id {value!r} is not unique: {ids.locate(rows[value])} and {ids.locate(row)} (counted "
                    f"from 0) have it, and {repeats} rows in all repeat an earlier id; make ids unique, or name "
                    "another column with --data.id_column"
                )
            rows[value] = row


def _hash_text(column: pa.ChunkedArray) -> UInt64[np.ndarray, " rows"]:
    """64-bit multilinear hashes of texts of at least one byte: sums of random coefficients times bytes."""
    hashes = [np.empty(0, np.uint64)]
    for chunk in column.chunks:
        offset_type = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
        _, offset_buffer, text = chunk.buffers()
        offsets = np.frombuffer(offset_buffer, offset_type)[chunk.offset : chunk.offset + len(chunk) + 1]
        letters = np.frombuffer(text, np.uint8)[offsets[0] : offsets[-1]]
        starts = (offsets - offsets[0]).astype(np.int64)
        lengths = np.diff(starts)
        positions = np.arange(len(letters)) - np.repeat(starts[:-1], lengths)
        coefficients = np.random.default_rng(0).integers(0, 2**64, int(lengths.max()), dtype=np.uint64)
        # One is added so that a trailing zero byte counts.
        products = coefficients[positions] * (letters.astype(np.uint64) + np.uint64(1))
        hashes.append(np.add.reduceat(products, starts[:-1]))
    return np.concatenate(hashes)


def _groups(parts: Sequence[Part]) -> tuple[_Group, ...]:
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
    return column.cast(footers.plain_type(column.type)).cast(kind)


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """Shortest endings of the paths, without suffix, that tell the files apart."""
    parts = [(*PurePosixPath(name).parent.parts, PurePosixPath(name).stem) for name in names]
    depths = [1] * len(parts)
    while True:
        labels = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        count = Counter(labels)
        short = [i for i, label in enumerate(labels) if count[label] > 1 and depths[i] < len(parts[i])]
        if not short:
            # Only the suffix may still differ, as in x.parquet and x.PARQUET.
            return tuple(label if count[label] == 1 else name for label, name in zip(labels, names, strict=True))
        for i in short:
            depths[i] += 1


def _projected(layout: Layout, columns: Sequence[str], url: str) -> Layout:
    """The layout with sequence_id and only these columns."""
    for name in columns:
        if name not in layout.schema.names:
            raise InputError(f"{url} has no column {name!r}; choose from: {', '.join(layout.schema.names)}")
    kept = [i for i, name in enumerate(layout.schema.names) if i == 0 or name in columns]
    return replace(
        layout,
        schema=pa.schema([layout.schema.field(i) for i in kept]),
        file_columns=tuple(layout.file_columns[i] for i in kept),
    )
