"""Views of a sequence: its windows, strands and start phases, each tokenised as one row.

Non-overlapping 6-mers change completely if a read starts one base later or comes from the other strand, and a long
sequence does not fit the model. In all three cases a sequence has several views, and its vector is their mean, weighted
by tokens. With a vocabulary that has tokens for the columns of an alignment, one more view reads the sequence in these.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from bioscan_jax.barcodes.cleaning import reverse_complement, start_at_phase
from bioscan_jax.barcodes.schemas import TokenRows
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode, encode_columns


@dataclass(frozen=True)
class Views:
    """The views of some sequences."""

    tokens: TokenRows
    owner: Int[np.ndarray, " views"]
    """Index of the sequence each view belongs to, ascending."""
    overlong: Bool[np.ndarray, " sequences"]
    """Whether each sequence has a view that was longer than max_tokens before cutting."""


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
        sequences: Cleaned sequences, none empty.
        vocabulary: The model's vocabulary.
        max_tokens: Most tokens per view, with CLS.
        overlong: `truncate` keeps the first max_tokens tokens; `window` splits a view into the fewest windows of nearly
            equal size; `error` returns no view of such a sequence (the caller rejects it).
        strand: `both` adds the views of the reverse complement; there is one view of columns all the same.
        phases: Views start at bases 0 to phases - 1 of each stretch between Ns; there is none for a start past the end.
    """
    strands = [sequences] + [reverse_complement(sequences)] * (strand == "both")
    rows, owners = [], []
    for oriented in strands:
        for phase in range(phases):
            tokens = encode(start_at_phase(oriented, phase), vocabulary)
            rows.append(tokens)
            owners.append(np.arange(len(tokens)))
    by_column = vocabulary.columns is not None
    if by_column:  # in windows where it must, whatever `overlong` says: it has a token per base, not per six
        rows.append(encode_columns(sequences, vocabulary))
        owners.append(np.arange(len(sequences)))
    tokens, owner = _concatenate(rows), np.concatenate(owners)
    lengths = tokens.lengths
    sixmers = np.arange(len(owner)) < len(owner) - by_column * len(sequences)
    too_long = np.zeros(len(sequences), bool)
    too_long[owner[(lengths > max_tokens) & sixmers]] = True
    keep = lengths > 1
    if overlong == "error":
        keep &= ~too_long[owner]
    pieces = np.ones(len(lengths), np.int64)
    windowed = ~sixmers | (overlong == "window")
    pieces[windowed] = np.maximum(-(-(lengths[windowed] - 1) // (max_tokens - 1)), 1)
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
    """Selects rows and splits each into `pieces`, each with CLS in front and at most max_tokens long."""
    lengths = tokens.lengths[rows]
    if (pieces == 1).all() and lengths.max(initial=0) <= max_tokens:
        if len(rows) == len(tokens) and (rows == np.arange(len(rows))).all():
            return tokens
        offsets = pa.py_buffer(tokens.offsets * tokens.ids.itemsize)
        texts = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(tokens), [None, offsets, pa.py_buffer(tokens.ids)]
        )
        _, taken, data = texts.take(pa.array(rows)).buffers()  # Arrow copies a row at once
        offsets = np.frombuffer(taken, np.int64, len(rows) + 1) // tokens.ids.itemsize
        return TokenRows(np.frombuffer(data, tokens.ids.dtype, offsets[-1]), offsets)
    source = np.repeat(rows, pieces)
    number = np.arange(len(source)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    count, content = np.repeat(pieces, pieces), np.repeat(lengths - 1, pieces)
    first = number * content // count
    size = np.minimum((number + 1) * content // count - first, max_tokens - 1)
    offsets = np.concatenate([[0], np.cumsum(size + 1)])
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], size + 1)
    skip = np.where(within > 0, np.repeat(first, size + 1), 0)
    return TokenRows(tokens.ids[np.repeat(tokens.offsets[source], size + 1) + within + skip], offsets)
