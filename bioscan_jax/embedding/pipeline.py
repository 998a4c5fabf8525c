"""Reads, embeds and commits an input block by block.

Four activities overlap: grain's reader threads clean and tokenise the next blocks, the main thread starts batches on
the devices a bounded amount ahead, a thread of the dispatcher copies finished vectors to the host, and a writer thread
puts them in row order and commits.

The rows of a block are batched together, whatever happens, so that they always give the same bits. Commits need not be
whole blocks: where one takes long, and at a stop, the rows up to the first unfinished one are committed, and a later
run computes only the batches that the others need.

With several processes each embeds every n-th block on its own devices, and process 0 commits one block of each process
per round, and at a stop what precedes the first unfinished row of the round.
"""

import base64
import dataclasses
import json
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grain
import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32
from tqdm import tqdm

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.data.encode import BlockCounts, EncodedBlock, check_finite, encode_block, reject_not_finite
from bioscan_jax.data.parquet import Block
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.embedding.dispatch import Dispatcher
from bioscan_jax.embedding.job import Job
from bioscan_jax.embedding.repeats import PreparedBlock, VectorCache, Window, digests, first_rows, window_blocks
from bioscan_jax.embedding.summary import DeviceActivity, StageClock
from bioscan_jax.table.columns import check_values
from bioscan_jax.table.sink import VectorTable, write_fragments

BLOCKS_AHEAD = 2
"""Most blocks begun while another one is being written."""
BLOCK_BYTES_AHEAD = 1 << 30
"""Bytes of host memory for the vectors of such blocks, beyond the first one."""
SECONDS_BETWEEN_COMMITS = 20.0
"""A block that takes longer is committed in parts."""
SECONDS_TO_STOP = 5.0
"""A block that would take longer is left unfinished at a stop."""
READERS = 2


@dataclass
class Work:
    """Progress and counts of a run, updated by the writer thread."""

    safe_rows: int
    """Rows that are committed."""
    vectors_seen: int = 0
    """Vectors computed for the table by earlier runs, and by this process; those not finite included."""
    not_finite: int = 0
    """How many of them were rejected because they are not finite."""
    counts: BlockCounts = field(default_factory=BlockCounts)
    tokens_real: int = 0
    tokens_computed: int = 0
    model_flops: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)
    stopping: bool = False
    first_commit: float | None = None
    """`time.perf_counter` at the first commit."""
    activity: DeviceActivity = field(default_factory=DeviceActivity)


@dataclass
class _StartedBlock:
    """A block whose batches are being computed, and how much of it was handed over to be committed."""

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
    """Rows of the block that were handed over, or committed by an earlier run."""
    begun: SimpleQueue[Future[None] | None] = field(default_factory=SimpleQueue)
    """The batches that were started; None after the last one."""


def run_rounds(
    job: Job,
    table: VectorTable | None,
    work: Work,
    stop: StopRequest,
    bar: tqdm,
    clock: StageClock,
    profiler: StepProfiler,
) -> None:
    """Reads, embeds and writes the rows from `work.safe_rows` on; every process runs the same number of rounds."""
    processes, block_rows = jax.process_count(), job.source.block_rows
    if work.safe_rows == job.source.rows:
        return
    first, offset = divmod(work.safe_rows, block_rows)
    steps = job.blocks.steps
    cache = VectorCache(window_blocks(job.embed, block_rows), job.sink)
    blocks = _prepared_blocks(job, first, first + jax.process_index(), processes, cache, clock)
    writing: deque[Future] = deque()
    work.activity.resume()
    with (
        job.blocks.memory_errors(),
        Dispatcher(steps, work.activity, profiler) as dispatcher,
        ThreadPoolExecutor(1, "writer") as thread,
        closing(blocks),
        _stop_on_failure(work),
    ):
        writer = _Writer(job, work, table, cache, stop, bar, clock)
        for _ in range(first, len(job.source), processes):
            with clock.stage("wait for input"):
                item = next(blocks, None)
            block = None
            if item is not None:
                block = writer.begin(item, offset if item.encoded.block.index == first else 0)
            writing.append(thread.submit(writer.write, block))
            if block is not None:
                _start_batches(block, dispatcher, work, stop)
                ahead = BLOCK_BYTES_AHEAD // max(block.results.nbytes, 1)
                while len(writing) > max(1, min(BLOCKS_AHEAD, ahead)):
                    writing.popleft().result()
            if work.stopping:
                break
        for future in writing:
            future.result()
    work.activity.pause()
    clock.add("compile", steps.seconds)
    work.shapes = [(shape.rows, shape.tokens) for shape in steps.shapes]


@contextmanager
def _stop_on_failure(work: Work) -> Iterator[None]:
    """Makes the writer skip the blocks still waiting after a failure or a KeyboardInterrupt."""
    try:
        yield
    except BaseException:
        work.stopping = True
        raise


def _start_batches(block: _StartedBlock, dispatcher: Dispatcher, work: Work, stop: StopRequest) -> None:
    """Starts the batches of a block; after a request to stop only if the rest of them ends soon."""
    left = sum(batch.ids.size for batch in block.batches)
    try:
        for batch in block.batches:
            if work.stopping or (stop and dispatcher.seconds(left) > SECONDS_TO_STOP):
                break
            block.begun.put(dispatcher.start(batch, block.results))
            left -= batch.ids.size
    finally:
        block.begun.put(None)


def _prepared_blocks(
    job: Job, first: int, start: int, every: int, cache: VectorCache, clock: StageClock
) -> Generator[PreparedBlock, None, None]:
    """Yields every n-th block from `start` on, read and tokenised ahead of need in reader threads.

    After a restart it also reads, without yielding them, the committed blocks before these from which vectors may be
    copied.
    """

    def tokenise(block: Block) -> tuple[EncodedBlock, list[bytes]]:
        with clock.stage("encode"):
            check_values(block.table, lambda row: job.source.locate(block.first_row + row))
            encoded = encode_block(block, job.blocks.encoding)
            return encoded, digests(encoded.views, encoded.counts.distinct) if cache.blocks else []

    window = Window(cache.blocks)
    begin = start - every * min(cache.blocks, start // every)
    dataset = grain.MapDataset.source(job.source)[begin::every].map(tokenise)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=READERS + 1)))
    try:
        for encoded, names in iterator:
            prepared = window.prepare(encoded, names)
            if encoded.block.index < first:
                cache.add_committed(encoded.block.index, first_rows(encoded))
            else:
                yield prepared
    finally:
        iterator.close()


@dataclass
class _Writer:
    """Puts the vectors of blocks in row order and commits them; all but `begin` runs in the writer thread."""

    job: Job
    work: Work
    table: VectorTable | None
    cache: VectorCache
    stop: StopRequest
    bar: tqdm
    clock: StageClock
    last_commit: float = field(default_factory=time.perf_counter)

    def begin(self, item: PreparedBlock, row: int) -> _StartedBlock:
        """Packs the batches of a block whose first `row` rows are in the table."""
        blocks, fresh = self.job.blocks, self._sequences_before(item, row)[1]
        return _StartedBlock(
            item=item,
            batches=blocks.batches(item.views, item.fresh, fresh),
            results=blocks.buffer(item.views, item.fresh),
            values=np.empty((len(item.repeats.copied), self.job.dimension), self._dtype),
            fresh=blocks.first_computed(fresh, item.fresh),
            row=row,
        )

    @propagate_failure()
    def write(self, block: _StartedBlock | None) -> None:
        """Fetches a block's vectors and commits the round of blocks it belongs to."""
        work = self.work
        with _stop_on_failure(work):
            if work.stopping:
                return
            mine = None
            if block is not None:
                done = self._wait(block)
                if done is None:
                    return
                mine = self._part(block, done)
            every = [json.loads(one) for one in gather_bytes(json.dumps([bool(self.stop), mine]).encode())]
            self._commit([part for _, part in every if part is not None])
            # A process that is alone may stop at once; several must agree.
            stopped = any(one for one, _ in every) or (len(every) == 1 and bool(self.stop))
            work.stopping = stopped or any(part is not None and not part["whole"] for _, part in every)
            if block is not None and mine is not None and mine["whole"]:
                self.cache.keep(block.item, block.values)
                self._count(block)

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(self.job.sink.vector_dtype)

    def _sequences_before(self, item: PreparedBlock, row: int) -> tuple[int, int]:
        """Returns how many of the block's sequences its first rows have, and how many of these are not copied."""
        kept = int(np.searchsorted(item.encoded.kept, row))
        sequences = int(item.encoded.sequence_of[:kept].max(initial=-1)) + 1
        return sequences, int((~item.repeats.copied[:sequences]).sum())

    def _wait(self, block: _StartedBlock) -> int | None:
        """Waits for the batches that were started, and returns their number; None if the run has failed.

        Commits parts of a block that takes long, where this process is the only one.
        """
        done = 0
        with self.clock.stage("write"):
            stored = self._sequences_before(block.item, block.row)[0]
            self.cache.fill(block.values, block.item, stored)
        while (future := block.begun.get()) is not None:
            with self.clock.stage("wait for devices"):
                future.result()
            done += 1
            if self.work.stopping:
                return None
            late = time.perf_counter() - self.last_commit > SECONDS_BETWEEN_COMMITS
            if late and done < len(block.batches) and jax.process_count() == 1:
                self._commit([self._part(block, done)])
        return None if self.work.stopping else done

    def _part(self, block: _StartedBlock, done: int) -> dict[str, Any]:
        """Writes the rows of a block that its first `done` batches have finished and that are not written yet."""
        with self.clock.stage("write"):
            row, encoded = self._assemble(block, done), block.item.encoded
            first, sink = encoded.block.first_row, self.job.sink
            part = _between(encoded, block.row, row)
            rows, rejects = self._rows(part, block.values)
            fragments = write_fragments(
                sink.uri,
                sink.table,
                rows,
                max_bytes_per_file=sink.max_bytes_per_file,
                safe_rows=self.work.safe_rows,
            )
            block.row = row
            return {
                "stop": first + row,
                "whole": row == encoded.block.table.num_rows,
                "rows": rows.num_rows,
                "fragments": fragments,
                "rejects": _pack(rejects),
            }

    def _assemble(self, block: _StartedBlock, done: int) -> int:
        """Averages, projects and stores what is finished, and returns the first row of the block that is not."""
        item, blocks = block.item, self.job.blocks
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

    def _rows(self, part: EncodedBlock, values: Float[np.ndarray, "sequences d"]) -> tuple[pa.Table, pa.Table]:
        """Returns the table rows and the rejects of a part of a block.

        Raises:
            InputError: Too many vectors are not finite.
        """
        vectors, work = values[part.sequence_of], self.work
        bad = np.atleast_1d(~np.isfinite(vectors).all(axis=1))
        work.vectors_seen += len(bad)
        if bad.any():
            work.not_finite += int(bad.sum())
            name = part.block.table["sequence_id"][int(part.kept[bad][0])].as_py()
            check_finite(work.not_finite, work.vectors_seen, repr(name), self._dtype)
            part = reject_not_finite(part, bad, self._dtype, self.job.source.sequence_column)
            vectors = vectors[~bad]
            work.counts += part.counts
        kept = part.block.table.take(pa.array(part.kept))
        columns: dict[str, pa.Array | pa.ChunkedArray] = {name: kept[name] for name in kept.column_names}
        columns["source_row"] = pa.array(part.kept + part.block.first_row, pa.uint64())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        schema = self.job.schema
        rows = pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)
        return rows, part.rejects

    def _commit(self, parts: list[dict[str, Any]]) -> None:
        """Commits the parts of consecutive blocks, up to the first block that is not whole."""
        whole = [part["whole"] for part in parts]
        parts = parts[: whole.index(False) + 1] if False in whole else parts
        self.last_commit = time.perf_counter()
        if not parts or parts[-1]["stop"] == self.work.safe_rows:
            return
        if self.table is not None:
            with self.clock.stage("write"):
                rejects = pa.concat_tables([_unpack(part["rejects"]) for part in parts])
                fragments = [fragment for part in parts for fragment in part["fragments"]]
                self.table.append_fragments(parts[-1]["stop"], fragments, sum(part["rows"] for part in parts), rejects)
                self.work.first_commit = self.work.first_commit or time.perf_counter()
                self.bar.update(parts[-1]["stop"] - self.bar.n)
        self.work.safe_rows = parts[-1]["stop"]

    def _count(self, block: _StartedBlock) -> None:
        item, work, job = block.item, self.work, self.job
        distinct = item.encoded.counts.distinct
        work.counts += dataclasses.replace(item.encoded.counts, distinct=item.fresh, copied=distinct - item.fresh)
        for batch in block.batches:
            lengths, computed = job.blocks.tokens(batch, item.views)
            work.tokens_real += int(lengths.sum())
            work.tokens_computed += computed
            work.model_flops += sum(
                int(count) * job.loaded.config.forward_flops(int(n), int(n), job.depth)
                for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
            )


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


def _pack(rejects: pa.Table) -> str:
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, rejects.schema) as stream:
        stream.write_table(rejects)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpack(packed: str) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(packed)).read_all()
