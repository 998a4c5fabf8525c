"""Sequences that a caller holds in memory, as blocks of rows like those of a file."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from bioscan_jax.data.parquet import Block
from bioscan_jax.errors import InputError

COLUMN = "dna_sequence"
"""The name of a column of sequences that has none."""
Sequences = Sequence[str | None] | np.ndarray | pa.Array | pa.ChunkedArray | Any
"""DNA as a list or tuple of str, a numpy array of them, an Arrow column or a pandas Series."""


def as_column(sequences: Sequences) -> pa.Array | pa.ChunkedArray:
    """Converts what a user holds to an Arrow column of strings.

    Raises:
        InputError: It is not one-dimensional or has no order, or an element is neither a string nor missing.
    """
    if isinstance(sequences, pa.Array | pa.ChunkedArray):
        column: Any = sequences
        return column.cast(pa.large_string()) if pa.types.is_string_view(column.type) else column
    if isinstance(sequences, Mapping | Set) or getattr(sequences, "ndim", 1) != 1:
        raise InputError(f"sequences are a {type(sequences).__name__}; pass a list, or one column of strings")
    values = [None if _is_missing(value) else value for value in sequences]
    for i, value in enumerate(values):
        if not isinstance(value, str | None):
            raise InputError(f"sequence {i} is of type {type(value).__name__}; pass strings of DNA")
    return pa.array(values, pa.large_string())


def _is_missing(value: object) -> bool:
    """Whether a value is None, NaN or pandas.NA."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"


@dataclass(frozen=True)
class SequencesInMemory:
    """Sequences in memory, as blocks of rows."""

    column: pa.Array | pa.ChunkedArray
    block_rows: int
    name: str = COLUMN
    """Of the column."""

    @property
    def rows(self) -> int:
        """Number of sequences."""
        return len(self.column)

    def __len__(self) -> int:
        return -(-self.rows // self.block_rows)

    def __getitem__(self, index: int, /) -> Block:
        first = index * self.block_rows
        if index >= len(self):
            raise IndexError(index)
        column = self.column.slice(first, self.block_rows)
        ids = pa.array(range(first, first + len(column)), pa.int64()).cast(pa.string())
        return Block(index, first, pa.table({"sequence_id": ids, self.name: column}))

    def locate(self, row: int, first: int = 0) -> str:
        """Names a sequence, counted from `first`, by its number."""
        return f"sequence {first + row}"
