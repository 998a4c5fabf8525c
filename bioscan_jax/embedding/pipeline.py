"""Blocks through the pipeline: read, embedded and committed a round at a time.

Three threads of work overlap: grain's readers clean and tokenise blocks ahead, the main thread hands batches to the
devices without waiting for them, and one writer fetches finished vectors, puts them in row order and commits.

Of several processes each embeds every n-th block on its own devices; process 0 commits their blocks, a round at a time.
"""

import base64
import dataclasses
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import grain
import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from bioscan_jax.barcodes.schemas import TokenBatch
from bioscan_jax.barcodes.views import Views
from bioscan_jax.data.batching import BatchShape, make_batches
from bioscan_jax.data.encode import BlockCounts, EncodedBlock, encode_block
from bioscan_jax.data.parquet import Block
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.embedding.encoder import CompiledSteps, collect, sequence_vectors
from bioscan_jax.embedding.job import Job
from bioscan_jax.embedding.repeats import Known, Repeats, Window, digests, first_rows, fresh_views, window_blocks
from bioscan_jax.embedding.summary import Clock, InFlight
from bioscan_jax.errors import InputError
from bioscan_jax.table.columns import check_values
from bioscan_jax.table.sink import VectorTable, write_fragments

BLOCKS_AHEAD = 2
"""Blocks on the devices while one is being written."""
READERS = 2


@dataclass
class Work:
    """What the writer has done so far."""

    counts: BlockCounts = field(default_factory=BlockCounts)
    tokens_real: int = 0
    tokens_computed: int = 0
    model_flops: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)
    next_block: int = 0
    stopping: bool = False
    first_commit: float | None = None
    """`time.perf_counter` of it."""
    flight: InFlight = field(default_factory=InFlight)


def run_rounds(
    job: Job, table: VectorTable | None, first: int, make_steps: Callable, stop: StopRequest, bar: tqdm, clock: Clock
) -> Work:
    """Reads, embeds and writes the blocks from `first` on; every process runs the same number of rounds."""
    work, processes = Work(next_block=first), jax.process_count()
    rounds = -(-(len(job.source) - first) // processes)
    if rounds <= 0:
        return work
    steps = make_steps(job.loaded.model, job.loaded.layout, job.embed)
    known = Known(job.sink, window_blocks(job.embed, job.source.block_rows))
    blocks = _blocks(job, first, first + jax.process_index(), processes, known, clock)
    writing: deque[Future] = deque()
    write = _stopping_at_failure(work)(_write)
    work.flight.begin()
    with (
        ThreadPoolExecutor(1, "writer") as writer,
        ThreadPoolExecutor(1, "watcher") as watcher,
        closing(blocks),
        _stopping_at_failure(work),
    ):
        for number in range(rounds):
            with clock.stage("wait for input"):
                item = next(blocks, None)
            results = []
            for batch in _batches(job, item):
                results.append((batch, _start(steps, batch.ids, work.flight)))
                watcher.submit(_watch, results[-1][1], work.flight)
            indices = range(first + number * processes, min(first + (number + 1) * processes, len(job.source)))
            writing.append(writer.submit(write, job, work, table, known, indices, item, results, stop, bar, clock))
            if len(writing) > BLOCKS_AHEAD:
                writing.popleft().result()
            if work.stopping:
                break
        for future in writing:
            future.result()
    work.flight.end()
    clock.add("compile", steps.seconds)
    work.shapes = [(shape.rows, shape.tokens) for shape in steps.shapes]
    return work


@contextmanager
def _stopping_at_failure(work: Work) -> Iterator[None]:
    """Lets the writer pass over the blocks that wait behind a failure or a KeyboardInterrupt."""
    try:
        yield
    except BaseException:
        work.stopping = True
        raise


def _start(steps: CompiledSteps, ids: Int[np.ndarray, "b s"], flight: InFlight) -> Array:
    """Hands a batch to the devices; the first of its shape, which compiles, is not timed."""
    if BatchShape(*ids.shape) in steps.shapes:
        flight.given()
        return steps(ids)
    flight.end()
    result = steps(ids)
    flight.given()
    flight.begin()
    return result


def _watch(result: Array, flight: InFlight) -> None:
    """Notes when a batch is done; if it failed, the writer tells why."""
    try:
        result.block_until_ready()
    finally:
        flight.done()


class _Ready(NamedTuple):
    """A block and what of it must be computed."""

    encoded: EncodedBlock
    repeats: Repeats
    views: Views


def _blocks(job: Job, first: int, start: int, every: int, known: Known, clock: Clock) -> Generator[_Ready, None, None]:
    """Every n-th block from `start` on, encoded ahead of need in reader threads.

    Those before them whose vectors may be copied, which are in the table, are read too, but not given.
    """

    def ready(block: Block) -> tuple[EncodedBlock, list[bytes]]:
        with clock.stage("encode"):
            check_values(block.table, lambda row: job.source.locate(block.first_row + row))
            encoded = encode_block(block, job.encoding)
            return encoded, digests(encoded.views, encoded.counts.distinct) if known.blocks else []

    window = Window(known.blocks)
    begin = start - every * min(known.blocks, start // every)
    dataset = grain.MapDataset.source(job.source)[begin::every].map(ready)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=READERS + 1)))
    try:
        for encoded, names in iterator:
            index = encoded.block.index
            repeats = window.see(index, names) if known.blocks else Repeats.none(encoded.counts.distinct)
            if index < first:
                known.committed(index, first_rows(encoded))
            else:
                yield _Ready(encoded, repeats, fresh_views(encoded.views, repeats.copied))
    finally:
        iterator.close()


def _batches(job: Job, item: _Ready | None) -> list[TokenBatch]:
    vocabulary = job.encoding.vocabulary
    if item is None:
        return []
    return make_batches(item.views.tokens, job.shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id)


@propagate_failure()
def _write(
    job: Job,
    work: Work,
    table: VectorTable | None,
    known: Known,
    indices: range,
    item: _Ready | None,
    results: list[tuple[TokenBatch, Array]],
    stop: StopRequest,
    bar: tqdm,
    clock: Clock,
) -> None:
    """Fetches a block's vectors and commits the round of blocks it belongs to."""
    if work.stopping:
        return
    mine = {"stop": bool(stop), "rows": 0, "fragments": [], "rejects": None}
    if item is not None:
        with clock.stage("wait for devices"):
            by_view = collect(results, len(item.views.owner), job.loaded.config.hidden_size)
        with clock.stage("write"):
            fresh = len(item.repeats.copied) - int(item.repeats.copied.sum())
            vectors = sequence_vectors(by_view, item.views, fresh, job.embed.pooling)
            values = _values(item, vectors, known, job)
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
        lengths, copied = item.views.tokens.lengths, int(item.repeats.copied.sum())
        distinct = item.encoded.counts.distinct - copied
        work.counts += dataclasses.replace(item.encoded.counts, distinct=distinct, copied=copied)
        work.tokens_real += int(lengths.sum())
        work.tokens_computed += sum(batch.ids.size for batch, _ in results)
        work.model_flops += sum(
            int(count) * job.loaded.config.forward_flops(int(n), int(n), job.depth)
            for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
        )


def _values(
    item: _Ready, vectors: Float[np.ndarray, "fresh d"], known: Known, job: Job
) -> Float[np.ndarray, "sequences d"]:
    """The vectors of a block's sequences as they are stored, those computed now and those copied."""
    dtype, copied = np.dtype(job.sink.vector_dtype), item.repeats.copied
    with np.errstate(over="ignore"):
        fresh = vectors.astype(dtype, copy=False)
    bad = ~np.isfinite(fresh).all(axis=1)
    if bad.any():
        encoded, computed = item.encoded, np.flatnonzero(~copied)
        row = int(np.flatnonzero(np.isin(encoded.sequence_of, computed[bad]))[0])
        name = encoded.block.table["sequence_id"][int(encoded.kept[row])].as_py()
        finite = np.isfinite(vectors[np.searchsorted(computed, encoded.sequence_of[row])]).all()
        mend = "pass --sink.vector_dtype float32" if finite else "try --model.dtype float32, or check the weights"
        raise InputError(f"the vector of {name!r} is not finite in {dtype}; {mend}")
    values = fresh
    if copied.any():
        values = np.empty((len(copied), fresh.shape[1]), dtype)
        values[~copied] = fresh
        known.copy_into(values, item.repeats)
    known.keep(item.encoded.block.index, values)
    return values


def _rows(encoded: EncodedBlock, values: Float[np.ndarray, "sequences d"], job: Job) -> pa.Table:
    """The table rows of a block."""
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
