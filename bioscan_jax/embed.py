"""The main job: blocks of barcodes in, an exactly-once table of vectors out.

Three threads of work overlap: grain's readers clean and tokenise blocks ahead, the main thread hands batches to the
devices without waiting for them, and one writer fetches finished vectors, puts them in row order and commits.

Of several processes each embeds every n-th block on its own devices; process 0 commits their blocks, a round at a time.
"""

import base64
import dataclasses
import json
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field

import grain
import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.columns import check_values
from bioscan_jax.data.batching import make_batches
from bioscan_jax.data.encode import BlockCounts, EncodedBlock, encode_block
from bioscan_jax.data.source import Block, check_unique_ids, open_source
from bioscan_jax.errors import InputError
from bioscan_jax.hosts import failing_together, gather_bytes
from bioscan_jax.interrupt import Interrupted, StopRequest, stop_on_signals
from bioscan_jax.job import Job, prepare, scratch_directory
from bioscan_jax.lock import drop_empty, storage_errors, writer_lock
from bioscan_jax.model.load import LoadedModel, load
from bioscan_jax.schemas import TokenBatch
from bioscan_jax.sequences import CleaningCounts
from bioscan_jax.sharding import Layout, make_layout, start_devices
from bioscan_jax.sink import VectorTable, table_exists, table_path, write_fragments
from bioscan_jax.summary import Clock, RunSummary, peak_device_bytes, peak_host_bytes, versions
from bioscan_jax.vectors import CompiledSteps, collect, sequence_vectors

BLOCKS_AHEAD = 2
"""Blocks on the devices while one is being written."""
READERS = 2


@failing_together()
def embed(
    model: config.Model,
    data: config.Data,
    sink: config.Sink,
    embed: config.Embed | None = None,
    mesh: config.Mesh | None = None,
    *,
    progress: bool = True,
) -> RunSummary:
    """Embeds every sequence of the input into a Lance table, once, going on where an earlier run stopped.

    Args:
        model: Which weights.
        data: Which sequences.
        sink: Which table.
        embed: Pooling and batching.
        mesh: Devices.
        progress: Show bars on the terminal.

    Raises:
        InputError: Something the user can mend; nothing is half-written.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    embed, mesh = embed or config.Embed(), mesh or config.Mesh()
    clock, begun = Clock(), time.perf_counter()
    start_devices(mesh)
    progress = progress and jax.process_index() == 0
    with ExitStack() as held:
        if jax.process_index() == 0:
            held.enter_context(writer_lock(sink.uri, sink.table))
        scratch = held.enter_context(scratch_directory(sink, owned=jax.process_index() == 0))
        with clock.stage("open"):
            source = open_source(data, scratch=scratch)
        with clock.stage("load"):
            loaded = _load(model, make_layout(mesh, local=jax.process_count() > 1), progress)
        with clock.stage("open"):
            job = prepare(source, loaded, data, embed, sink)
            if not table_exists(sink.uri, sink.table):
                check_unique_ids(source)
        table = held.enter_context(_opened_table(job)) if jax.process_index() == 0 else None
        first = json.loads(gather_bytes(json.dumps(table.next_block if table else None).encode())[0])
        resumed = min(first * source.block_rows, source.rows)
        stop = held.enter_context(stop_on_signals())
        bar = held.enter_context(
            tqdm(total=source.rows, initial=resumed, unit="row", desc="embed", disable=not progress)
        )
        work = _run(job, table, first, stop, bar, clock)
        bar.close()
        if work.stopping and work.next_block < len(source):
            raise Interrupted(
                f"stopped with {work.next_block * source.block_rows:,} of {source.rows:,} rows safe in "
                f"{table_path(sink.uri, sink.table)}; the same command goes on from there",
                stop.signal_number,
            )
        index = None
        if table is not None:
            with clock.stage("index"):
                finished = table.finish(sink.index)
            index = "; ".join([*finished.indexes, *finished.notes])
        # Also keeps the others here while process 0 builds an index: one that left would take it down.
        work, vectors, rejects = _totals(work, table)
        summary = _summary(job, work, vectors, rejects, resumed, index, clock, time.perf_counter() - begun)
        if table is not None and resumed < source.rows:
            with storage_errors(sink.uri, source.rows):
                _write_text(sink.uri, f"{sink.table}.run.json", summary.to_json())
    return summary


@dataclass
class _Work:
    """What the writer has done so far."""

    counts: BlockCounts = field(default_factory=BlockCounts)
    tokens_real: int = 0
    tokens_computed: int = 0
    model_flops: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)
    next_block: int = 0
    stopping: bool = False


def _run(job: Job, table: VectorTable | None, first: int, stop: StopRequest, bar: tqdm, clock: Clock) -> _Work:
    """Reads, embeds and writes the blocks from `first` on; every process runs the same number of rounds."""
    work, processes = _Work(next_block=first), jax.process_count()
    rounds = -(-(len(job.source) - first) // processes)
    if rounds <= 0:
        return work
    steps = CompiledSteps(job.loaded.model, job.loaded.layout, job.embed)
    blocks = _blocks(job, first + jax.process_index(), processes, clock)
    writing: deque[Future] = deque()
    write = _stopping_at_failure(work)(_write)
    with ThreadPoolExecutor(1, "writer") as writer, closing(blocks), _stopping_at_failure(work):
        for number in range(rounds):
            with clock.stage("wait for input"):
                item = next(blocks, None)
            results = []
            if item is not None:
                results = [(batch, steps(batch.ids)) for batch in item[1]]
            indices = range(first + number * processes, min(first + (number + 1) * processes, len(job.source)))
            encoded = item[0] if item is not None else None
            writing.append(writer.submit(write, job, work, table, indices, encoded, results, stop, bar, clock))
            if len(writing) > BLOCKS_AHEAD:
                writing.popleft().result()
            if work.stopping:
                break
        for future in writing:
            future.result()
    clock.add("compile", steps.seconds)
    work.shapes = [(shape.rows, shape.tokens) for shape in steps.shapes]
    return work


@contextmanager
def _stopping_at_failure(work: _Work) -> Iterator[None]:
    """Lets the writer pass over the blocks that wait behind a failure or a KeyboardInterrupt."""
    try:
        yield
    except BaseException:
        work.stopping = True
        raise


def _blocks(
    job: Job, first: int, every: int, clock: Clock
) -> Generator[tuple[EncodedBlock, list[TokenBatch]], None, None]:
    """Every n-th block from `first` on, encoded ahead of need in reader threads."""
    vocabulary = job.encoding.vocabulary

    def ready(block: Block) -> tuple[EncodedBlock, list[TokenBatch]]:
        with clock.stage("encode"):
            check_values(block.table, lambda row: job.source.locate(block.first_row + row))
            encoded = encode_block(block, job.encoding)
            tokens = encoded.views.tokens
            return encoded, make_batches(tokens, job.shapes, cls=vocabulary.cls_id, pad=vocabulary.pad_id)

    dataset = grain.MapDataset.source(job.source)[first::every].map(ready)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=READERS + 1)))
    try:
        yield from iterator
    finally:
        iterator.close()


@failing_together()
def _write(
    job: Job,
    work: _Work,
    table: VectorTable | None,
    indices: range,
    encoded: EncodedBlock | None,
    results: list[tuple[TokenBatch, Array]],
    stop: StopRequest,
    bar: tqdm,
    clock: Clock,
) -> None:
    """Fetches a block's vectors and commits the round of blocks it belongs to."""
    if work.stopping:
        return
    mine = {"stop": bool(stop), "rows": 0, "fragments": [], "rejects": None}
    if encoded is not None:
        with clock.stage("wait for devices"):
            width = job.loaded.config.hidden_size
            by_view = collect(results, len(encoded.views.owner), width)
        with clock.stage("write"):
            vectors = sequence_vectors(by_view, encoded.views, encoded.counts.distinct, job.embed.pooling)
            rows = _rows(encoded, vectors, job)
            mine |= {"rows": rows.num_rows, "rejects": _pack(encoded.rejects)}
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
            bar.update(min(indices.stop * job.source.block_rows, job.source.rows) - bar.n)
    work.stopping = any(one["stop"] for one in every)
    work.next_block = indices.stop
    if encoded is not None:
        lengths = encoded.views.tokens.lengths
        work.counts += encoded.counts
        work.tokens_real += int(lengths.sum())
        work.tokens_computed += sum(batch.ids.size for batch, _ in results)
        work.model_flops += sum(
            int(count) * job.loaded.config.forward_flops(int(n), int(n), job.depth)
            for n, count in zip(*np.unique(lengths, return_counts=True), strict=True)
        )


def _rows(encoded: EncodedBlock, vectors: Float[np.ndarray, "sequences d"], job: Job) -> pa.Table:
    """The table rows of a block."""
    dtype = np.dtype(job.sink.vector_dtype)
    with np.errstate(over="ignore"):
        values = vectors.astype(dtype)[encoded.sequence_of]
    kept = encoded.block.table.take(pa.array(encoded.kept))
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        name = kept["sequence_id"][int(bad[0])].as_py()
        finite = np.isfinite(vectors[encoded.sequence_of[bad[0]]]).all()
        mend = "pass --sink.vector_dtype float32" if finite else "try --model.dtype float32, or check the weights"
        raise InputError(f"the vector of {name!r} is not finite in {dtype}; {mend}")
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: kept[name] for name in kept.column_names}
    columns["source_row"] = pa.array(encoded.kept + encoded.block.first_row, pa.uint64())
    columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    schema = job.schema
    return pa.table([columns[name] for name in schema.names], names=schema.names).cast(schema)


def _load(model: config.Model, layout: Layout, progress: bool) -> LoadedModel:
    with tqdm(unit="B", unit_scale=True, desc="load weights", disable=not progress, leave=False) as bar:
        return load(model, layout, on_bytes=bar.update)


@contextmanager
def _opened_table(job: Job) -> Iterator[VectorTable]:
    """The table; if it is new and fails before its first commit it is not left behind, as its plan may be at fault."""
    with VectorTable.open(
        job.sink.uri,
        job.sink.table,
        schema=job.schema,
        plan=job.plan,
        provenance=job.provenance | {"library_version": versions()["bioscan_jax"]},
        rows=job.source.rows,
        block_rows=job.source.block_rows,
        max_bytes_per_file=job.sink.max_bytes_per_file,
        locked=True,
    ) as table:
        try:
            yield table
        except InputError:
            with suppress(InputError):
                drop_empty(job.sink.uri, job.sink.table)
            raise


def _totals(work: _Work, table: VectorTable | None) -> tuple[_Work, int, int]:
    """What all processes did, and how many vectors and rejects process 0's tables hold."""
    mine = dataclasses.asdict(work) | {"table": (table.vectors, table.rejects) if table is not None else None}
    every = [json.loads(payload) for payload in gather_bytes(json.dumps(mine).encode())]
    counts = BlockCounts()
    for one in every:
        changes = CleaningCounts(**one["counts"].pop("changes"))
        counts += BlockCounts(**one["counts"], changes=changes)
    sums = {name: sum(one[name] for one in every) for name in ("tokens_real", "tokens_computed", "model_flops")}
    return dataclasses.replace(work, counts=counts, **sums), *every[0]["table"]


def _summary(
    job: Job,
    work: _Work,
    vectors: int,
    rejects: int,
    resumed: int,
    index: str | None,
    clock: Clock,
    total: float,
) -> RunSummary:
    devices = job.loaded.layout.mesh.devices
    return RunSummary(
        table=table_path(job.sink.uri, job.sink.table),
        rows=job.source.rows,
        vectors=vectors,
        rejects=rejects,
        resumed_at=resumed,
        counts=work.counts,
        tokens_real=work.tokens_real,
        tokens_computed=work.tokens_computed,
        model_flops=work.model_flops,
        shapes=work.shapes,
        seconds={"total": total, "load": 0.0, "compile": 0.0} | clock.seconds,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
        devices=f"{devices.size} x {devices.flat[0].device_kind}",
        processes=jax.process_count(),
        versions=versions(),
        provenance=dataclasses.asdict(job.loaded.provenance),
        index=index,
    )


def _pack(rejects: pa.Table) -> str:
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, rejects.schema) as stream:
        stream.write_table(rejects)
    return base64.b64encode(buffer.getvalue()).decode()


def _unpack(packed: str) -> pa.Table:
    return pa.ipc.open_stream(base64.b64decode(packed)).read_all()


def _write_text(uri: str, name: str, text: str) -> None:
    import fsspec

    filesystem, directory = fsspec.core.url_to_fs(uri)
    filesystem.pipe_file(f"{directory.rstrip('/')}/{name}", text.encode())
