"""Views of a sequence: windows, strands and start phases, each one row of tokens.

Non-overlapping 6-mers change completely when a read starts one base later or runs on the other strand, and a long
sequence does not fit the model at once. All three are answered alike: a sequence has one or more views, and its vector
is their mean weighted by tokens.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from bioscan_jax.barcodes.cleaning import drop_prefix, reverse_complement
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode


@dataclass(frozen=True)
class Views:
    """The token rows of some sequences."""

    tokens: TokenRows
    owner: Int[np.ndarray, " views"]
    """Index of the sequence each view belongs to, ascending."""
    overlong: Bool[np.ndarray, " sequences"]
    """Sequences with a view of more than max_tokens tokens before it was cut."""


def cut_views(
    sequences: pa.LargeStringArray,
    vocabulary: Vocabulary,
    *,
    max_tokens: int,
    overlong: Literal["truncate", "window", "error"],
    strand: Literal["forward", "both"],
    phases: int,
) -> Views:
    """Tokenises every view of cleaned sequences.

    Args:
        sequences: Cleaned (ACGTN), none empty.
        vocabulary: Of the model.
        max_tokens: Longest row, CLS included.
        overlong: `truncate` keeps the first max_tokens tokens; `window` cuts a view into the fewest windows of nearly
            equal size; `error` leaves every view of such a sequence out (the caller rejects it).
        strand: `both` adds the views of the reverse complement.
        phases: Views start at bases 0 to phases - 1; a start past the end gives no view.
    """
    strands = [sequences] + [reverse_complement(sequences)] * (strand == "both")
    rows, owners = [], []
    for oriented in strands:
        for phase in range(phases):
            tokens = encode(drop_prefix(oriented, phase) if phase else oriented, vocabulary)
            rows.append(tokens)
            owners.append(np.arange(len(tokens)))
    tokens, owner = _concatenate(rows), np.concatenate(owners)
    lengths = tokens.lengths
    too_long = np.zeros(len(sequences), bool)
    too_long[owner[lengths > max_tokens]] = True
    keep = lengths > 1
    if overlong == "error":
        keep &= ~too_long[owner]
    pieces = np.ones(len(lengths), np.int64)
    if overlong == "window":
        pieces = -(-(lengths - 1) // (max_tokens - 1))
    chosen = np.flatnonzero(keep)
    chosen = chosen[np.argsort(owner[chosen], kind="stable")]
    return Views(_cut(tokens, chosen, pieces[chosen], max_tokens), np.repeat(owner[chosen], pieces[chosen]), too_long)


def _concatenate(rows: list[TokenRows]) -> TokenRows:
    if len(rows) == 1:
        return rows[0]
    starts = np.cumsum([0] + [len(r.ids) for r in rows])
    offsets = [r.offsets[:-1] + start for r, start in zip(rows, starts[:-1], strict=True)]
    return TokenRows(np.concatenate([r.ids for r in rows]), np.concatenate([*offsets, starts[-1:]]))


def _cut(
    tokens: TokenRows, rows: Int[np.ndarray, " rows"], pieces: Int[np.ndarray, " rows"], max_tokens: int
) -> TokenRows:
    """Picks rows and cuts each into `pieces`, every piece with the row's CLS in front, none over max_tokens."""
    lengths = tokens.lengths[rows]
    whole = len(rows) == len(tokens) and (rows == np.arange(len(rows))).all()
    if whole and (pieces == 1).all() and lengths.max(initial=0) <= max_tokens:
        return tokens
    source = np.repeat(rows, pieces)
    number = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    count, content = np.repeat(pieces, pieces), np.repeat(lengths - 1, pieces)
    first = number * content // count
    size = np.minimum((number + 1) * content // count - first, max_tokens - 1)
    offsets = np.concatenate([[0], np.cumsum(size + 1)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], size + 1)
    skip = np.where(within > 0, np.repeat(first, size + 1), 0)
    return TokenRows(tokens.ids[np.repeat(tokens.offsets[source], size + 1) + within + skip], offsets)
