"""The arrays and tables that cross modules, with their shapes in their types."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids of different lengths, one after another."""

    ids: Int[np.ndarray, " tokens"]
    """int32 ids of all rows, no padding."""
    offsets: Int[np.ndarray, " rows_plus_1"]
    """int64; row i is ids[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Tokens of each row."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenBatch:
    """One compiled shape's worth of token rows, padded on the right."""

    ids: Int[np.ndarray, "batch tokens"]
    """int32; filler rows hold CLS alone."""
    rows: Int[np.ndarray, " used"]
    """Index of each used row among the rows that were batched; rows past len(rows) are filler."""


REJECTS = pa.schema(
    [
        pa.field("sequence_id", pa.string(), nullable=False),
        pa.field("source_row", pa.uint64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("sequence", pa.string()),
    ]
)
"""Columns of a `_rejects` table; `sequence` is the text as it was given."""
