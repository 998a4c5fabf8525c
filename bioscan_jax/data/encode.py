"""Cleans, deduplicates and tokenises a block of rows, and keeps how to return to row order."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from bioscan_jax.barcodes.cleaning import CleaningCounts, clean, describe_foreign
from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.barcodes.views import Views, cut_views
from bioscan_jax.data.parquet import Block
from bioscan_jax.errors import InputError

TOO_LONG = "too_long"
"""Reject reason under `overlong: error`; most others are those of `barcodes.cleaning.REASONS`."""
NOT_FINITE = "not_finite"
"""Reject reason of a row whose vector has a number that is NaN or infinite."""
MOST_NOT_FINITE = 0.01
"""Share of the vectors, beyond the first one, that may be rejected as not finite; more end the run."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """The settings that decide the tokens of a sequence."""

    sequence_column: str
    vocabulary: Vocabulary
    max_tokens: int
    overlong: Literal["truncate", "window", "error"]
    strand: Literal["forward", "both"]
    phases: int
    deduplicate: bool


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """Counts of one block, or summed over the blocks of a run."""

    rows: int = 0
    vectors: int = 0
    distinct: int = 0
    """Sequences embedded."""
    copied: int = 0
    """Sequences of a block whose vectors were copied from an earlier block."""
    truncated: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    changes: CleaningCounts = field(default_factory=lambda: CleaningCounts(0, 0, 0, 0))

    def __add__(self, other: "BlockCounts") -> "BlockCounts":
        """Adds count by count."""
        reasons = self.rejects.keys() | other.rejects.keys()
        return BlockCounts(
            rows=self.rows + other.rows,
            vectors=self.vectors + other.vectors,
            distinct=self.distinct + other.distinct,
            copied=self.copied + other.copied,
            truncated=self.truncated + other.truncated,
            rejects={r: self.rejects.get(r, 0) + other.rejects.get(r, 0) for r in sorted(reasons)},
            changes=self.changes + other.changes,
        )


@dataclass(frozen=True, kw_only=True)
class EncodedBlock:
    """A block whose sequences are tokenised."""

    block: Block
    kept: Int[np.ndarray, " vectors"]
    """Rows of the block that get a vector, ascending."""
    sequence_of: Int[np.ndarray, " vectors"]
    """Which of the block's distinct sequences each kept row has."""
    views: Views
    """The views of the distinct sequences; `owner` counts these from 0."""
    rejects: pa.Table
    counts: BlockCounts


def encode_block(block: Block, encoding: Encoding) -> EncodedBlock:
    """Cleans, deduplicates and tokenises the sequences of a block."""
    given = block.table[encoding.sequence_column]
    cleaned = clean(given)
    usable = np.flatnonzero(cleaned.reasons.is_null().to_numpy(zero_copy_only=False))
    sequences = cleaned.sequences.take(pa.array(usable))
    sequence_of = np.arange(len(usable))
    if encoding.deduplicate:
        coded = sequences.dictionary_encode()
        sequences, sequence_of = coded.dictionary, coded.indices.to_numpy().astype(np.int64)
    views = cut_views(
        sequences,
        encoding.vocabulary,
        max_tokens=encoding.max_tokens,
        overlong=encoding.overlong,
        strand=encoding.strand,
        phases=encoding.phases,
    )
    refused = views.overlong if encoding.overlong == "error" else np.zeros(len(sequences), bool)
    reasons = np.array(cleaned.reasons.to_numpy(zero_copy_only=False), dtype=object)
    reasons[usable[refused[sequence_of]]] = TOO_LONG
    kept = ~refused[sequence_of]
    renumbered = np.cumsum(~refused) - 1
    views = Views(views.tokens, renumbered[views.owner], views.overlong[~refused])
    rejected = np.flatnonzero(reasons != None)  # noqa: E711 - elementwise
    names, numbers = np.unique(reasons[rejected].astype(str), return_counts=True)
    counts = BlockCounts(
        rows=block.table.num_rows,
        vectors=int(kept.sum()),
        distinct=int((~refused).sum()),
        truncated=int(views.overlong[renumbered[sequence_of[kept]]].sum()) if encoding.overlong == "truncate" else 0,
        rejects=dict(zip(names.tolist(), numbers.tolist(), strict=True)),
        changes=cleaned.changes,
    )
    return EncodedBlock(
        block=block,
        kept=usable[kept],
        sequence_of=renumbered[sequence_of[kept]],
        views=views,
        rejects=_rejects(block, given, rejected, reasons, encoding.max_tokens),
        counts=counts,
    )


def reject_not_finite(
    encoded: EncodedBlock, bad: Bool[np.ndarray, " vectors"], dtype: np.dtype, sequence_column: str
) -> EncodedBlock:
    """Moves kept rows to the rejects, because their vectors are not finite.

    Args:
        encoded: The block.
        bad: Which of its kept rows.
        dtype: Type in which their vectors are not finite.
        sequence_column: Column of the block with the sequences.
    """
    rows, rejects, count = encoded.kept[bad], encoded.rejects, int(bad.sum())
    picked = pa.array(rows)
    added = pa.table(
        [
            encoded.block.table["sequence_id"].take(picked).cast(pa.string()),
            pa.array(rows + encoded.block.first_row, pa.uint64()),
            pa.array([NOT_FINITE] * count, pa.string()),
            pa.array([f"not finite in {dtype}"] * count, pa.string()),
            encoded.block.table[sequence_column].take(picked).cast(pa.string()),
        ],
        schema=REJECTS,
    )
    counts = dataclasses.replace(encoded.counts, vectors=encoded.counts.vectors - count)
    return dataclasses.replace(
        encoded,
        kept=encoded.kept[~bad],
        sequence_of=encoded.sequence_of[~bad],
        rejects=pa.concat_tables([rejects, added]).sort_by("source_row"),
        counts=counts + BlockCounts(rejects={NOT_FINITE: count}),
    )


def check_finite(bad: int, vectors: int, name: str, dtype: np.dtype) -> None:
    """Checks that few enough vectors are not finite.

    Args:
        bad: How many of them.
        vectors: How many there are so far, these included.
        name: One of the rows, for the message.
        dtype: Type of the vectors.

    Raises:
        InputError: More than one and `MOST_NOT_FINITE` of the vectors are not finite, or all of them.
    """
    if bad > 1 + MOST_NOT_FINITE * vectors or bad == vectors > 0:
        fix = "--sink.vector_dtype float32" if dtype == np.float16 else "--model.dtype float32"
        raise InputError(
            f"the vector of {name} is not finite in {dtype}, and {bad:,} of {vectors:,} so far are not; "
            f"pass {fix}, or check the weights"
        )


def _rejects(
    block: Block, given: pa.ChunkedArray, rows: Int[np.ndarray, " rejects"], reasons: np.ndarray, max_tokens: int
) -> pa.Table:
    picked = pa.array(rows)
    chosen = [str(r) for r in reasons[rows]]
    texts = given.take(picked).cast(pa.string())
    raw = texts.cast(pa.binary()).to_pylist()  # text that is not UTF-8 is refused elsewhere, with its row
    detail = [_detail(r, text, max_tokens) for r, text in zip(chosen, raw, strict=True)]
    columns = [
        block.table["sequence_id"].take(picked).cast(pa.string()),
        pa.array(rows + block.first_row, pa.uint64()),
        pa.array(chosen, pa.string()),
        pa.array(detail, pa.string()),
        texts,
    ]
    return pa.table(columns, schema=REJECTS)


def _detail(reason: str, text: bytes | None, max_tokens: int) -> str | None:
    if reason == TOO_LONG:
        return f"more than {max_tokens} tokens"
    return describe_foreign(text.decode(errors="replace")) if reason == "not_dna" and text is not None else None
