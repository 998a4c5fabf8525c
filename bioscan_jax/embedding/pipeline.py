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

import dataclasses
import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import grain
import jax
import numpy as np
import pyarrow as pa

from bioscan_jax.data.encode import EncodedBlock, check_finite
from bioscan_jax.data.parquet import Block
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.embedding.block import (
    Part,
    StartedBlock,
    Tally,
    begin,
    sequences_before,
    tally,
    tokenise,
    write_part,
)
from bioscan_jax.embedding.dispatch import Dispatcher
from bioscan_jax.embedding.job import Job
from bioscan_jax.embedding.progress import RunProgress
from bioscan_jax.embedding.repeats import PreparedBlock, VectorCache, Window, first_rows, window_blocks
from bioscan_jax.embedding.summary import DeviceActivity, StageClock
from bioscan_jax.table.sink import VectorTable

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
    """Vectors computed for the table by earlier runs and by this one; those not finite included."""
    not_finite: int = 0
    """How many of them were rejected because they are not finite."""
    tally: Tally = field(default_factory=Tally)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    stopping: bool = False
    first_commit: float | None = None
    """`time.perf_counter` at the first commit."""
    activity: DeviceActivity = field(default_factory=DeviceActivity)

    def check_finite(self, part: Part, dtype: str) -> None:
        """Counts the vectors of a part that is to be committed next; raises InputError if too many are not finite."""
        self.vectors_seen += part.rows + part.not_finite
        self.not_finite += part.not_finite
        if part.not_finite:
            check_finite(self.not_finite, self.vectors_seen, repr(part.example), np.dtype(dtype))


@dataclass
class _InWork(StartedBlock):
    """A block whose batches this process starts and waits for."""

    begun: SimpleQueue[Future[None] | None] = field(default_factory=SimpleQueue)
    """The batches that were started; None after the last one."""


def run_rounds(
    job: Job,
    table: VectorTable | None,
    work: Work,
    stop: StopRequest,
    progress: RunProgress,
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
        writer = _Writer(job, work, table, cache, stop, progress, clock)
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


def _start_batches(block: _InWork, dispatcher: Dispatcher, work: Work, stop: StopRequest) -> None:
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

    def read(block: Block) -> tuple[EncodedBlock, Sequence[bytes]]:
        with clock.stage("encode"):
            return tokenise(job.source, job.blocks.encoding, block, named=bool(cache.blocks))

    window = Window(cache.blocks)
    begin = start - every * min(cache.blocks, start // every)
    dataset = grain.MapDataset.source(job.source)[begin::every].map(read)
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
    progress: RunProgress
    clock: StageClock
    last_commit: float = field(default_factory=time.perf_counter)

    def begin(self, item: PreparedBlock, row: int) -> _InWork:
        """Packs the batches of a block whose first `row` rows are in the table."""
        return _InWork(**vars(begin(self.job, item, row)))

    @propagate_failure()
    def write(self, block: _InWork | None) -> None:
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
            told = [bool(self.stop), None if mine is None else dataclasses.asdict(mine)]
            every = [json.loads(one) for one in gather_bytes(json.dumps(told).encode())]
            self._commit([Part(**part) for _, part in every if part is not None])
            # A process that is alone may stop at once; several must agree.
            stopped = any(one for one, _ in every) or (len(every) == 1 and bool(self.stop))
            work.stopping = stopped or any(part is not None and not part["whole"] for _, part in every)
            if block is not None and mine is not None and mine.whole:
                self.cache.keep(block.item, block.values)
                work.tally += tally(self.job, block)

    def _wait(self, block: _InWork) -> int | None:
        """Waits for the batches that were started, and returns their number; None if the run has failed.

        Commits parts of a block that takes long, where this process is the only one.
        """
        done = 0
        with self.clock.stage("write"):
            stored = sequences_before(block.item, block.row)[0]
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

    def _part(self, block: _InWork, done: int) -> Part:
        """Writes the rows of a block that its first `done` batches have finished and that are not written yet."""
        with self.clock.stage("write"):
            part = write_part(self.job, block, done, self.work.safe_rows)
        self.work.tally += Tally(counts=part.counts)
        return part

    def _commit(self, parts: list[Part]) -> None:
        """Commits the parts of consecutive blocks, up to the first block that is not whole.

        Raises:
            InputError: Too many vectors are not finite, or the storage failed.
        """
        whole, work = [part.whole for part in parts], self.work
        parts = parts[: whole.index(False) + 1] if False in whole else parts
        self.last_commit = time.perf_counter()
        if not parts or parts[-1].stop == work.safe_rows:
            return
        for part in parts:
            work.check_finite(part, self.job.sink.vector_dtype)
        if self.table is not None:
            with self.clock.stage("write"):
                rejects = pa.concat_tables([part.rejected for part in parts])
                fragments = [fragment for part in parts for fragment in part.fragments]
                self.table.append_fragments(parts[-1].stop, fragments, sum(part.rows for part in parts), rejects)
                work.first_commit = work.first_commit or time.perf_counter()
                self.progress.update(parts[-1].stop, self.table, work.tally.counts.distinct)
        work.safe_rows = parts[-1].stop
