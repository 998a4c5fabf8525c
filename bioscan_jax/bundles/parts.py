"""The rows of a table, and the Parquet parts of a bundle that hold them."""

import io
import re
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
from bioscan_jax.table.storage import open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance

BLOCK_ROWS = 4096
"""Rows read at once."""


@dataclass(frozen=True)
class Rows:
    """The rows to take, as one version of the table holds them."""

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
        """As the table holds its vectors."""
        return "float16" if pa.types.is_float16(self.dataset.schema.field("vector").type.value_type) else "float32"

    def blocks(self) -> Iterator[Float32[np.ndarray, "rows hidden"]]:
        """All vectors, some rows at a time."""
        for batch in self.batches(["vector"], 0, self.rows):
            yield vectors_of(batch["vector"])

    def batches(self, columns: list[str] | None, offset: int, rows: int) -> Iterator[pa.RecordBatch]:
        """Rows in the order of the table."""
        scanner = self.dataset.scanner(
            columns=columns, filter=self.filter, offset=offset, limit=rows, batch_size=BLOCK_ROWS, scan_in_order=True
        )
        with storage_errors(self.dataset.uri):
            yield from scanner.to_batches()


def vectors_of(column: pa.Array) -> Float32[np.ndarray, "rows hidden"]:
    """The vectors of a column, as float32."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32, copy=False).reshape(len(column), -1)


def open_rows(source: str, table: str, filter_sql: str | None) -> Rows:
    """Opens a vector table and its rejects.

    Args:
        source: Database directory or URL.
        table: Name of the vector table.
        filter_sql: Condition on the rows to take, None for all.

    Raises:
        InputError: There is no such table, the condition is wrong, or no row is left.
    """
    dataset = open_existing(source, table)
    if "vector" not in dataset.schema.names or not pa.types.is_fixed_size_list(dataset.schema.field("vector").type):
        raise InputError(f"{dataset.uri} has no column of vectors; pass a table that embed made")
    condition = None if filter_sql is None else check_condition(filter_sql)
    try:
        rows = dataset.count_rows(condition)
    except (ValueError, OSError) as error:
        text = " ".join(re.sub(r",? ?/\S+\.rs:\d+:\d+", "", str(error)).split())[:300]
        raise InputError(f"--filter {filter_sql!r} is no condition on the table's columns: {text}") from error
    if not rows:
        raise InputError(
            f"{dataset.uri} has no row{' for which --filter holds' if filter_sql else ''}; nothing to take"
        )
    return Rows(dataset, open_dataset(table_path(source, f"{table}_rejects")), condition, rows)


def parquet_bytes(table: pa.Table) -> int:
    """Size of a table as a part."""
    write_part(table, sink := io.BytesIO())
    return len(sink.getvalue())


def write_part(table: pa.Table, file: Path | io.BytesIO) -> None:
    """Writes rows as Parquet, which gives every bit of them back."""
    floats = "vector" in table.column_names and pa.types.is_fixed_size_list(table.schema.field("vector").type)
    # Bytes of like weight together: floats of any precision then compress a little
    encoding = {"vector.list.element": "BYTE_STREAM_SPLIT"} if floats else None
    table = table.replace_schema_metadata()  # Lance gives it in another order each time; the manifest has it
    pq.write_table(table, file, compression="zstd", use_dictionary=False, column_encoding=encoding, version="2.6")


def coded(taken: Rows, coder: Quantiser, start: int, rows: int) -> pa.Table:
    """A part's rows, with the vectors as codes; as they are where the precision is the table's own."""
    batches = list(taken.batches(None, start, rows))
    table = pa.Table.from_batches(batches)
    if coder.precision == taken.own_precision:
        return table
    codes = np.concatenate([coder.encode(vectors_of(batch["vector"])) for batch in batches])
    if codes.dtype == np.uint8:  # Parquet would make four bytes of each
        kind = pa.binary(codes.shape[1])
        column = pa.Array.from_buffers(kind, len(codes), [None, pa.py_buffer(np.ascontiguousarray(codes))])
    else:
        column = pa.FixedSizeListArray.from_arrays(pa.array(codes.ravel()), codes.shape[1])
    place = table.schema.get_field_index("vector")
    return table.set_column(place, pa.field("vector", column.type, nullable=False), column)


def codes_of(column: pa.Array) -> Shaped[np.ndarray, "rows codes"]:
    """The codes in a column of a part."""
    if not pa.types.is_fixed_size_binary(column.type):
        return vectors_of(column)
    width = column.type.byte_width
    flat = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return flat.reshape(len(column), width)
