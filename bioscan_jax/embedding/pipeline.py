"""Reads, embeds and commits an input block by block.

Three activities overlap: grain's reader threads clean and tokenise the next blocks, the main thread starts batches on
the devices without waiting for them, and a writer thread fetches finished vectors, puts them in row order and commits.

With several processes each embeds every n-th block on its own devices, and process 0 commits one block of each process
per round.
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

import grain
import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.data.encode import BlockCounts, EncodedBlock, encode_block
from bioscan_jax.data.parquet import Block
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.embedding.job import Job
from bioscan_jax.embedding.repeats import PreparedBlock, VectorCache, Window, digests, first_rows, window_blocks
from bioscan_jax.embedding.step import CompiledSteps, CountingSteps
from bioscan_jax.embedding.summary import DeviceActivity, StageClock
from bioscan_jax.errors import InputError
from bioscan_jax.table.columns import check_values
from bioscan_jax.table.sink import VectorTable, write_fragments

BLOCKS_AHEAD = 2
"""Blocks started on the devices while another one is being written."""
READERS = 2


@dataclass
class Work:
    """Progress and counts of a run, updated by the writer thread."""

    counts: BlockCounts = field(default_factory=BlockCounts)
    tokens_real: int = 0
    tokens_computed: int = 0
    model_flops: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)
    next_block: int = 0
    stopping: bool = False
    first_commit: float | None = None
    """`time.perf_counter` at the first commit."""
    activity: DeviceActivity = field(default_factory=DeviceActivity)


def run_rounds(
    job: Job,
    table: VectorTable | None,
    first: int,
    stop: StopRequest,
    bar: tqdm,
    clock: StageClock,
    profiler: StepProfiler,
) -> Work:
    """Reads, embeds and writes the blocks from `first` on; every process runs the same number of rounds."""
    work, processes = Work(next_block=first), jax.process_count()
    rounds = -(-(len(job.source) - first) // processes)
    if rounds <= 0:
        return work
    steps = job.blocks.steps
    cache = VectorCache(window_blocks(job.embed, job.source.block_rows), job.sink)
    blocks = _prepared_blocks(job, first, first + jax.process_index(), processes, cache, clock)
    writing: deque[Future] = deque()
    write = _stop_on_failure(work)(_write)
    work.activity.resume()
    with (
        ThreadPoolExecutor(1, "writer") as writer,
        ThreadPoolExecutor(1, "watcher") as watcher,
        closing(blocks),
        _stop_on_failure(work),
    ):
        for number in range(rounds):
            with clock.stage("wait for input"):
                item = next(blocks, None)
            results = []
            for batch in job.blocks.batches(item.views, item.fresh) if item is not None else []:
                results.append((batch, profiler.run(batch.ids.shape, _start, steps, batch.ids, work.activity)))
                watcher.submit(_watch, results[-1][1], work.activity)
            indices = range(first + number * processes, min(first + (number + 1) * processes, len(job.source)))
            writing.append(writer.submit(write, job, work, table, cache, indices, item, results, stop, bar, clock))
            if len(writing) > BLOCKS_AHEAD:
                writing.popleft().result()
            if work.stopping:
                break
        for future in writing:
            future.result()
    work.activity.pause()
    clock.add("compile", steps.seconds)
    work.shapes = [(shape.rows, shape.tokens) for shape in steps.shapes]
    return work


@contextmanager
def _stop_on_failure(work: Work) -> Iterator[None]:
    """Makes the writer skip the blocks still waiting after a failure or a KeyboardInterrupt."""
    try:
        yield
    except BaseException:
        work.stopping = True
        raise


def _start(steps: CompiledSteps | CountingSteps, ids: Int[np.ndarray, "b s"], activity: DeviceActivity) -> Array:
    """Starts a batch on the devices; the first of its shape, which compiles, is not timed."""
    if BatchShape(*ids.shape) in steps.shapes:
        activity.batch_started()
        return steps(ids)
    activity.pause()
    result = steps(ids)
    activity.batch_started()
    activity.resume()
    return result


def _watch(result: Array, activity: DeviceActivity) -> None:
    """Records when a batch has finished; if it failed, the writer raises its error."""
    try:
        result.block_until_ready()
    finally:
        activity.batch_finished()


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


@propagate_failure()
def _write(
    job: Job,
    work: Work,
    table: VectorTable | None,
    cache: VectorCache,
    indices: range,
    item: PreparedBlock | None,
    results: list[tuple[TokenBatch, Array]],
    stop: StopRequest,
    bar: tqdm,
    clock: StageClock,
) -> None:
    """Fetches a block's vectors and commits the round of blocks it belongs to."""
    if work.stopping:
        return
    mine = {"stop": bool(stop), "rows": 0, "fragments": [], "rejects": None}
    if item is not None:
        with clock.stage("wait for devices"):
            vectors = job.blocks.collect(results, item.views, item.fresh)
        with clock.stage("write"):
            values = cache.complete(item, _stored(item, vectors, job))
            rows = _rows(item.encoded, values, job)
            mine |= {"rows": rows.num_rows, "rejects": _pack(item.encoded.rejects)}
            sink, safe = job.sink, indices.start * job.source.block_rows
            mine["fragments"] = write_fragments(
                sink.uri, sink.table, rows, max_bytes_per_file=sink.max_bytes_per_file, safe_rows=safe
            )
    every = [json.loads(payload) for payload in gather_bytes(json.dumps(mine).encode())]
    if table is not None:
        with clock.stage("write"):
            rejects = pa.concat_tables([_unpack(one["rejects"]) for one in every if one["rejects"] is not None])
            fragments = [fragment for one in every for fragment in one["fragments"]]
            table.append_fragments(list(indices), fragments, sum(one["rows"] for one in every), rejects)
            work.first_commit = work.first_commit or time.perf_counter()
            bar.update(min(indices.stop * job.source.block_rows, job.source.rows) - bar.n)
    work.stopping = any(one["stop"] for one in every)
    work.next_block = indices.stop
    if item is not None:
        lengths, distinct = item.views.tokens.lengths, item.encoded.counts.distinct
        work.counts += dataclasses.replace(item.encoded.counts, distinct=item.fresh, copied=distinct - item.fresh)
        work.tokens_real += int(lengths.sum())
        work.tokens_computed += job.blocks.computed_tokens(results)
        work.model_flops += sum(
            int(count) * job.loaded.config.forward_flops(int(n), int(n), job.depth)
            for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
        )


def _stored(item: PreparedBlock, vectors: Float[np.ndarray, "fresh d"], job: Job) -> Float[np.ndarray, "fresh d"]:
    """Casts the computed vectors of a block to the type they are stored in.

    Raises:
        InputError: A vector is not finite in that type.
    """
    dtype = np.dtype(job.sink.vector_dtype)
    with np.errstate(over="ignore"):
        stored = vectors.astype(dtype, copy=False)
    bad = ~np.isfinite(stored).all(axis=1)
    if bad.any():
        encoded, computed = item.encoded, np.flatnonzero(~item.repeats.copied)
        row = int(np.flatnonzero(np.isin(encoded.sequence_of, computed[bad]))[0])
        name = encoded.block.table["sequence_id"][int(encoded.kept[row])].as_py()
        finite = np.isfinite(vectors[np.searchsorted(computed, encoded.sequence_of[row])]).all()
        fix = "pass --sink.vector_dtype float32" if finite else "try --model.dtype float32, or check the weights"
        raise InputError(f"the vector of {name!r} is not finite in {dtype}; {fix}")
    return stored


def _rows(encoded: EncodedBlock, values: Float[np.ndarray, "sequences d"], job: Job) -> pa.Table:
    """Returns the table rows of a block."""
    kept = encoded.block.table.take(pa.array(encoded.kept))
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: kept[name] for name in kept.column_names}
    columns["source_row"] = pa.array(encoded.kept + encoded.block.first_row, pa.uint64())
    flat = pa.array(values[encoded.sequence_of].reshape(-1))
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    schema = job.schema
    return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _pack(rejects: pa.Table) -> str:
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, rejects.schema) as stream:
        stream.write_table(rejects)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpack(packed: str) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(packed)).read_all()
