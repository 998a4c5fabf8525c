"""Reads the rows to export, and writes and reads the Parquet parts of a bundle."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Shaped

from bioscan_jax.bundles.quantise import Precision, Quantiser
from bioscan_jax.errors import InputError
from bioscan_jax.table.reading import check_condition, open_existing
from bioscan_jax.table.storage import lance_text, open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance

BLOCK_ROWS = 4096
"""Rows per read."""


@dataclass(frozen=True)
class SelectedRows:
    """The rows to export, from one version of a table."""

    dataset: "lance.LanceDataset"
    rejects: "lance.LanceDataset | None"
    filter: str | None
    rows: int

    @property
    def hidden_size(self) -> int:
        """Length of a vector."""
        return self.dataset.schema.field("vector").type.list_size

    @property
    def own_precision(self) -> Precision:
        """Precision of the vectors in the table."""
        return "float16" if pa.types.is_float16(self.dataset.schema.field("vector").type.value_type) else "float32"

    def blocks(self) -> Iterator[Float32[np.ndarray, "rows hidden"]]:
        """Yields all vectors, in blocks of rows."""
        for batch in self.batches(["vector"], 0, self.rows):
            yield float_vectors(batch["vector"])

    def parts(self, first: int, part_rows: int) -> Iterator[pa.Table]:
        """Yields the rows from `first` on in tables of `part_rows`, the last maybe shorter, in one pass."""
        waiting: list[pa.RecordBatch] = []
        missing = part_rows
        for batch in self.batches(None, first, self.rows - first) if first < self.rows else ():
            while len(batch) >= missing:
                yield pa.Table.from_batches([*waiting, batch.slice(0, missing)]).combine_chunks()
                batch, waiting, missing = batch.slice(missing), [], part_rows
            waiting.append(batch)
            missing -= len(batch)
        if missing < part_rows:
            yield pa.Table.from_batches(waiting).combine_chunks()

    def batches(self, columns: list[str] | None, offset: int, rows: int) -> Iterator[pa.RecordBatch]:
        """Yields rows in the order of the table."""
        scanner = self.dataset.scanner(
            columns=columns, filter=self.filter, offset=offset, limit=rows, batch_size=BLOCK_ROWS, scan_in_order=True
        )
        with storage_errors(self.dataset.uri):
            yield from scanner.to_batches()


def float_vectors(column: pa.Array) -> Float32[np.ndarray, "rows hidden"]:
    """Returns the vectors of a column as a float32 matrix."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)


def select_rows(source: str, table: str, filter_sql: str | None) -> SelectedRows:
    """Opens a vector table and its rejects.

    Args:
        source: Database directory or URL.
        table: Name of the vector table.
        filter_sql: Condition on the rows to export, None for all.

    Raises:
        InputError: There is no such table, the condition is wrong, or no row matches.
    """
    dataset = open_existing(source, table)
    if "vector" not in dataset.schema.names or not pa.types.is_fixed_size_list(dataset.schema.field("vector").type):
        raise InputError(f"{dataset.uri} has no column of vectors; pass a table that embed made")
    condition = None if filter_sql is None else check_condition(filter_sql)
    try:
        rows = dataset.count_rows(condition)
    except (ValueError, OSError) as error:
        raise InputError(
            f"--filter {filter_sql!r} is no condition on the table's columns: {lance_text(error)}"
        ) from error
    if not rows:
        raise InputError(
            f"{dataset.uri} has no row{' for which --filter holds' if filter_sql else ''}; nothing to export"
        )
    return SelectedRows(dataset, open_dataset(table_path(source, f"{table}_rejects")), condition, rows)


def parquet_bytes(table: pa.Table) -> int:
    """Returns the size that a table has as a Parquet part."""
    write_part(table, sink := io.BytesIO())
    return len(sink.getvalue())


def write_part(table: pa.Table, file: Path | io.BytesIO) -> None:
    """Writes rows as Parquet, from which they are read back bit for bit."""
    floats = "vector" in table.column_names and pa.types.is_fixed_size_list(table.schema.field("vector").type)
    # Stores the bytes of equal significance together, so that floats compress
    encoding = {"vector.list.element": "BYTE_STREAM_SPLIT"} if floats else None
    table = table.replace_schema_metadata()  # its order varies between reads; the manifest has it
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encoding, version="2.6")


def encode_part(table: pa.Table, coder: Quantiser, own: Precision) -> pa.Table:
    """Replaces the vectors of a part by codes, unless the coder's precision is the table's own."""
    if coder.precision == own:
        return table
    vectors = table["vector"].combine_chunks()
    starts = range(0, len(vectors), BLOCK_ROWS)
    codes = np.concatenate([coder.encode(float_vectors(vectors.slice(start, BLOCK_ROWS))) for start in starts])
    if codes.dtype == np.uint8:  # Parquet would store four bytes for each
        kind = pa.binary(codes.shape[1])
        column = pa.Array.from_buffers(kind, len(codes), [None, pa.py_buffer(np.ascontiguousarray(codes))])
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1])
    place = table.schema.get_field_index("vector")
    return table.set_column(place, pa.field("vector", column.type, nullable=False), column)


def read_codes(column: pa.Array) -> Shaped[np.ndarray, "rows codes"]:
    """Returns the codes in the vector column of a part."""
    if not pa.types.is_fixed_size_binary(column.type):
        return float_vectors(column)
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return flat.reshape(len(column), width)
