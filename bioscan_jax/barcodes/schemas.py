"""Arrays and table schemas that several folders share."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Int


def case_clash(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns the first two names that differ only in case, which SQL cannot tell apart.

    Example:
        >>> case_clash(["genus", "depth", "Genus"])
        ('genus', 'Genus')
    """
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            return other, name
    return None


def case_clash_between(there: Iterable[str], new: Iterable[str]) -> tuple[str, str] | None:
    """Returns the first of some new names that differs only in case from one that is there, after that one.

    Example:
        >>> case_clash_between(["genus", "depth"], ["depth", "Genus"])
        ('genus', 'Genus')
    """
    known = {name.casefold(): name for name in there}
    return next(((known[key], name) for name in new if known.get(key := name.casefold(), name) != name), None)


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids of different lengths, stored one after another."""

    ids: Int[np.ndarray, " tokens"]
    """int32 ids of all rows, without padding."""
    offsets: Int[np.ndarray, " rows_plus_1"]
    """int64; row i is ids[offsets[i]:offsets[i + 1]]."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """Number of tokens of each row."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenBatch:
    """Token rows padded on the right to one compiled shape."""

    ids: Int[np.ndarray, "batch tokens"]
    """int32; filler rows hold only CLS."""
    rows: Int[np.ndarray, " used"]
    """Index, among the rows that were batched, of each used row; later rows of `ids` are filler."""


REJECTS = pa.schema(
    [
        pa.field("sequence_id", pa.string(), nullable=False),
        pa.field("source_row", pa.uint64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("sequence", pa.string()),
    ]
)
"""Columns of a `_rejects` table; `sequence` is the input text."""
