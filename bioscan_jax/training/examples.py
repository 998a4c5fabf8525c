"""The rows to train on, with random access: cleaned bases in a memory-mapped file, labels and splits in memory.

Shuffled training reads single rows in random order, which Parquet cannot do; so one pass over the input writes the
cleaned bases to a scratch file. About 60 bytes per row stay in memory.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, Int8, Int32, Int64, UInt8

from bioscan_jax import config
from bioscan_jax.barcodes.aliases import find_column
from bioscan_jax.barcodes.cleaning import clean, string_bytes
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import (
    RANKS,
    LineageSurvey,
    lineage_columns,
    missing_lineages,
    rank_columns,
    read_lineages,
)
from bioscan_jax.barcodes.metadata import check_metadata, find_metadata
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.errors import InputError, logger
from bioscan_jax.table.columns import check_values
from bioscan_jax.training import splits

_BLOCK_ROWS = 16_384
BASES = "bases"
"""Name of the scratch file."""


@dataclass(frozen=True, eq=False)
class Examples:
    """All rows of the input, in input order."""

    bases: UInt8[np.ndarray, " bases"]
    """Cleaned sequences one after another, mapped from a file; those of rejected rows are empty."""
    offsets: Int64[np.ndarray, " rows_plus_1"]
    """Row i is bases[offsets[i]:offsets[i + 1]]."""
    tokens: Int32[np.ndarray, " rows"]
    """Number of tokens of each whole sequence, including CLS."""
    splits: Int8[np.ndarray, " rows"]
    """Indices into `splits.SPLITS`, or LEFT_OUT."""
    labels: Int32[np.ndarray, "rows 7"] | None
    """Indices of taxa, -1 where unknown; None for an objective without labels."""
    space: LabelSpace | None
    """Taxa of the training rows; None like `labels`."""
    metadata: Float32[np.ndarray, "rows 3"] | None
    """Depth, latitude and longitude; NaN where missing."""
    locate: Callable[[int], str]
    """Returns the file and row number of a row, for messages."""

    def rows(self, split: str) -> Int64[np.ndarray, " rows"]:
        """Returns the usable rows of a split: with a sequence and, if labels are used, at least one known label."""
        chosen = self.splits == splits.SPLITS.index(split)
        if self.labels is not None:
            chosen &= (self.labels >= 0).any(axis=1)
        return np.flatnonzero(chosen)

    def left_out(self) -> dict[str, int]:
        """Counts the rows that are in no split or not usable there, by reason."""
        empty, unused = np.diff(self.offsets) == 0, self.splits == splits.LEFT_OUT
        reasons = {"without usable DNA": empty, "in no split": unused & ~empty}
        if self.labels is not None:
            unknown = (self.labels < 0).all(axis=1)
            reasons["without a name that a training row has"] = unknown & ~empty & ~unused
        return {reason: int(rows.sum()) for reason, rows in reasons.items() if rows.any()}

    def sequences(self, rows: Int[np.ndarray, " rows"]) -> list[bytes]:
        """Returns the bases of some rows."""
        starts, ends = self.offsets[rows].tolist(), self.offsets[rows + 1].tolist()
        return [self.bases[start:end].tobytes() for start, end in zip(starts, ends, strict=True)]


def prepare_examples(
    source: ParquetBlocks,
    wanted: config.ExamplesConfig,
    vocabulary: Vocabulary,
    scratch: Path,
    *,
    labelled: bool,
    with_metadata: bool = False,
    on_rows: Callable[[int], object] = lambda n: None,
) -> Examples:
    """Prepares the rows of an input: reads it once for the sequences, and its labels twice more.

    Args:
        source: The input, with all of its columns.
        wanted: How rows are split.
        vocabulary: The model's vocabulary, which determines token counts.
        scratch: Existing directory with room for the sequences.
        labelled: Whether labels are needed.
        with_metadata: Whether depth, latitude and longitude are needed.
        on_rows: Called with the number of rows just read, for a progress bar.

    Raises:
        InputError: A column is missing, labels or metadata are wrong, sequences leak between splits, or there is
            no row to train on.
    """
    present = source.schema.names
    held_out = None if wanted.split_column else splits.HELD_OUT_RANK[wanted.split]
    lineages = lineage_columns(present) if labelled or held_out else []
    if (labelled or held_out) and not lineages:
        raise missing_lineages(present)
    if lineages and (ranks := rank_columns(present)) and (unknown := [rank for rank in RANKS if rank not in ranks]):
        filled = "; the kingdom is that of the phylum where that is known" if "kingdom" in unknown else ""
        logger.info(
            f"the ranks are read from {', '.join(lineages)}; there is no column for {', '.join(unknown)}{filled}"
        )
    if wanted.split_column is None and (column := find_column("split", present)) is not None:
        logger.info(f"the column {column!r} is not used; pass --data.split_column {column} if it assigns the splits")
    places = find_metadata(present)
    extra = [wanted.split_column] if wanted.split_column else []
    extra += lineages if held_out else []
    extra += places.values() if with_metadata else []
    path = scratch / BASES
    sequences, lengths, tokens, taxa, from_column, metadata = [], [], [], [], [], []
    with path.open("wb") as file:
        for first, table in _tables(source, [source.sequence_column, *extra]):
            locate = partial(source.locate, first=first)
            cleaned = clean(table[source.sequence_column])
            text, offsets = string_bytes(cleaned.sequences)
            file.write(text.data)
            lengths.append(np.diff(offsets))
            tokens.append(encode(cleaned.sequences, vocabulary).lengths.astype(np.int32))
            sequences.append(splits.fingerprints(cleaned.sequences, seed=wanted.split_seed))
            if held_out:
                names = read_lineages(table, locate=locate)[RANKS.index(held_out)]
                taxa.append(splits.fingerprints(names, seed=wanted.split_seed))
            if wanted.split_column:
                from_column.append(splits.read_given_splits(table[wanted.split_column], locate=locate))
            if with_metadata:
                metadata.append(check_metadata(table, locate=locate, columns=places))
            on_rows(table.num_rows)
    fingerprints = np.concatenate(sequences)
    if wanted.split_column:
        assigned = np.where(fingerprints == 0, splits.LEFT_OUT, np.concatenate(from_column)).astype(np.int8)
    else:
        shares = {"validation": wanted.validation, "test": wanted.test}
        assigned = splits.assign_splits(fingerprints, np.concatenate(taxa) if held_out else None, **shares)
    splits.check_leakage(fingerprints, assigned, locate=source.locate)
    space, labels = _labels(source, lineages, assigned) if labelled else (None, None)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    examples = Examples(
        bases=np.memmap(path, np.uint8, "r") if offsets[-1] else np.empty(0, np.uint8),
        offsets=offsets,
        tokens=np.concatenate(tokens),
        splits=assigned,
        labels=labels,
        space=space,
        metadata=np.concatenate(metadata) if with_metadata else None,
        locate=source.locate,
    )
    if not len(examples.rows("train")):
        raise InputError(f"{wanted.path} has no row to train on: {source.rows} rows, none usable and in 'train'")
    if left := examples.left_out():
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left.items())
        logger.warning(f"{sum(left.values()):,} of {source.rows:,} rows are left out: {reasons}")
    return examples


def _tables(source: ParquetBlocks, columns: Sequence[str]) -> Generator[tuple[int, pa.Table], None, None]:
    """Yields the first row and the table of each block."""
    blocks = source.select(list(dict.fromkeys(columns)), _BLOCK_ROWS)
    for index in range(len(blocks)):
        block = blocks[index]
        check_values(block.table, partial(source.locate, first=block.first_row))
        yield block.first_row, block.table


def _labels(
    source: ParquetBlocks, columns: Sequence[str], assigned: Int8[np.ndarray, " rows"]
) -> tuple[LabelSpace, Int32[np.ndarray, "rows 7"]]:
    """Returns the taxa of the training rows, and the labels of all rows."""
    train = assigned == splits.SPLITS.index("train")

    def training() -> Generator[pa.Table, None, None]:
        for first, table in _tables(source, columns):
            yield table.filter(pa.array(train[first : first + table.num_rows]))

    try:
        space = LabelSpace.build(training())
    except InputError:
        for first, table in _tables(source, columns):  # the same error with file and row, if it is about one
            read_lineages(table, locate=partial(source.locate, first=first))
        raise
    labels, survey = np.empty((source.rows, len(RANKS)), np.int32), LineageSurvey()
    for first, table in _tables(source, columns):
        locate = partial(source.locate, first=first)
        labels[first : first + table.num_rows] = space.encode(read_lineages(table, locate=locate))
        survey.add(table, locate)
    for line in survey.warnings():
        logger.warning(line)
    return space, labels
