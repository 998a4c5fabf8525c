"""One block of rows: its batches, its vectors, and the rows and files that it becomes.

The loop of a process that works alone, and the workers of a fleet, embed each block through these functions, so that a
table has the same bits whoever computed it.
"""

import base64
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.data.encode import NOT_FINITE, BlockCounts, EncodedBlock, Encoding, encode_block, reject_not_finite
from bioscan_jax.data.parquet import Block, ParquetBlocks
from bioscan_jax.embedding.job import Job
from bioscan_jax.embedding.repeats import PreparedBlock, digests
from bioscan_jax.table.columns import check_values
from bioscan_jax.table.sink import write_fragments


@dataclass
class StartedBlock:
    """A block whose batches are being computed, and how much of it was written."""

    item: PreparedBlock
    batches: list[TokenBatch]
    """In the order in which they are started."""
    results: Float32[np.ndarray, "rows d"]
    """Where the batches' vectors go."""
    values: Float[np.ndarray, "sequences d"]
    """The vectors as they are stored: copied ones, and computed ones up to `fresh`."""
    fresh: int
    """How many of the sequences to compute are done, counted from the first."""
    row: int
    """Rows of the block that were written, or committed by an earlier run."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive rows of one block, written to the table's storage and not committed yet."""

    stop: int
    """The input row after the last one."""
    whole: bool
    """Whether the block ends there."""
    rows: int
    """Vectors in the fragments."""
    fragments: list[str]
    rejects: str
    """Arrow stream, base64."""
    not_finite: int
    """How many of the rejects were rejected since their vectors are not finite."""
    example: str | None
    """The `sequence_id` of one of them."""

    @cached_property
    def rejected(self) -> pa.Table:
        """The rejects as a table."""
        return pa.ipc.open_stream(base64.b64decode(self.rejects)).read_all()

    @property
    def counts(self) -> BlockCounts:
        """What the rows that are not finite change in the counts of the block."""
        lost = self.not_finite
        return BlockCounts(vectors=-lost, rejects={NOT_FINITE: lost} if lost else {})


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What was read and computed, for one block or summed over those of a run."""

    counts: BlockCounts = field(default_factory=BlockCounts)
    tokens_real: int = 0
    tokens_computed: int = 0
    model_flops: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        """Adds number by number."""
        return Tally(
            counts=self.counts + other.counts,
            tokens_real=self.tokens_real + other.tokens_real,
            tokens_computed=self.tokens_computed + other.tokens_computed,
            model_flops=self.model_flops + other.model_flops,
        )


def tokenise(
    source: ParquetBlocks, encoding: Encoding, block: Block, *, named: bool
) -> tuple[EncodedBlock, Sequence[bytes]]:
    """Checks, cleans and tokenises a block; also returns the digests of its sequences, if they are `named`.

    Raises:
        InputError: A value cannot be stored.
    """
    check_values(block.table, partial(source.locate, first=block.first_row))
    encoded = encode_block(block, encoding)
    return encoded, digests(encoded.views, encoded.counts.distinct) if named else []


def begin(job: Job, item: PreparedBlock, row: int) -> StartedBlock:
    """Packs the batches of a block whose first `row` rows are in the table."""
    blocks, fresh = job.blocks, sequences_before(item, row)[1]
    return StartedBlock(
        item=item,
        batches=blocks.batches(item.views, item.fresh, fresh),
        results=blocks.buffer(item.views, item.fresh),
        values=np.empty((len(item.repeats.copied), job.dimension), _dtype(job)),
        fresh=blocks.first_computed(fresh, item.fresh),
        row=row,
    )


def sequences_before(item: PreparedBlock, row: int) -> tuple[int, int]:
    """Returns how many of the block's sequences its first rows have, and how many of these are not copied."""
    kept = int(np.searchsorted(item.encoded.kept, row))
    sequences = int(item.encoded.sequence_of[:kept].max(initial=-1)) + 1
    return sequences, int((~item.repeats.copied[:sequences]).sum())


def write_part(job: Job, block: StartedBlock, done: int, safe_rows: int | None = None) -> Part:
    """Writes the rows of a block that its first `done` batches have finished and that are not written yet.

    The vectors of copied sequences must be in `block.values`.

    Args:
        job: The job.
        block: The block; remembers what was written.
        done: Batches that are finished, counted from the first.
        safe_rows: Input rows already committed, for the error message.

    Raises:
        InputError: The storage failed.
    """
    row, encoded, sink = _assemble(job, block, done), block.item.encoded, job.sink
    part = _between(encoded, block.row, row)
    rows, rejects, bad = _rows(job, part, block.values)
    fragments = write_fragments(
        sink.uri, sink.table, rows, max_bytes_per_file=sink.max_bytes_per_file, safe_rows=safe_rows
    )
    block.row = row
    return Part(
        stop=encoded.block.first_row + row,
        whole=row == encoded.block.table.num_rows,
        rows=rows.num_rows,
        fragments=fragments,
        rejects=packed(rejects),
        not_finite=len(bad),
        example=encoded.block.table["sequence_id"][bad[0]].as_py() if bad else None,
    )


def tally(job: Job, block: StartedBlock) -> Tally:
    """Counts what a whole block took; what was not finite is in its parts."""
    item = block.item
    distinct = item.encoded.counts.distinct
    real = computed = flops = 0
    for batch in block.batches:
        lengths, tokens = job.blocks.tokens(batch, item.views)
        real += int(lengths.sum())
        computed += tokens
        flops += sum(
            int(count) * job.loaded.config.forward_flops(int(n), int(n), job.depth)
            for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
        )
    counts = dataclasses.replace(item.encoded.counts, distinct=item.fresh, copied=distinct - item.fresh)
    return Tally(counts=counts, tokens_real=real, tokens_computed=computed, model_flops=flops)


def _dtype(job: Job) -> np.dtype:
    return np.dtype(job.sink.vector_dtype)


def _assemble(job: Job, block: StartedBlock, done: int) -> int:
    """Averages, projects and stores what is finished, and returns the first row of the block that is not."""
    item, blocks = block.item, job.blocks
    waiting = block.batches[done] if done < len(block.batches) else None
    stop = blocks.finished(waiting, item.views, item.fresh)
    computed = np.flatnonzero(~item.repeats.copied)
    if stop > block.fresh:
        vectors = blocks.vectors(block.results, item.views, range(block.fresh, stop), item.fresh)
        with np.errstate(over="ignore"):
            block.values[computed[block.fresh : stop]] = vectors
        block.fresh = stop
    if stop == item.fresh:
        return item.encoded.block.table.num_rows
    # Sequences are numbered in the order of their first rows.
    return int(item.encoded.kept[np.argmax(item.encoded.sequence_of >= computed[stop])])


def _rows(
    job: Job, part: EncodedBlock, values: Float[np.ndarray, "sequences d"]
) -> tuple[pa.Table, pa.Table, list[int]]:
    """Returns the table rows and the rejects of a part of a block, and which rows of the block are not finite."""
    vectors = values[part.sequence_of]
    bad = np.atleast_1d(~np.isfinite(vectors).all(axis=1))
    lost = part.kept[bad].tolist()
    if lost:
        part = reject_not_finite(part, bad, _dtype(job), job.source.sequence_column)
        vectors = vectors[~bad]
    kept = part.block.table.take(pa.array(part.kept))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: kept[name] for name in kept.column_names}
    columns["source_row"] = pa.array(part.kept + part.block.first_row, pa.uint64())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    schema = job.schema
    rows = pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
    return rows, part.rejects, lost


def _between(encoded: EncodedBlock, start: int, stop: int) -> EncodedBlock:
    """Returns a block with some of its rows alone: those kept and those rejected; without counts."""
    kept = slice(*np.searchsorted(encoded.kept, [start, stop]).tolist())
    numbers = encoded.rejects["source_row"].to_numpy().astype(np.int64) - encoded.block.first_row
    first, last = np.searchsorted(numbers, [start, stop]).tolist()
    return dataclasses.replace(
        encoded,
        kept=encoded.kept[kept],
        sequence_of=encoded.sequence_of[kept],
        rejects=encoded.rejects.slice(first, last - first),
        counts=BlockCounts(),
    )


def packed(rejects: pa.Table) -> str:
    """Returns a table as an Arrow stream in base64."""
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, rejects.schema) as stream:
        stream.write_table(rejects)
    return base64.b64encode(buffer.getvalue()).decode()
