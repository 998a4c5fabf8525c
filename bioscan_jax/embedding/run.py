"""Embeds an input into a Lance table, each row exactly once across restarts."""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import jax
import pyarrow as pa

from bioscan_jax import config
from bioscan_jax.barcodes.cleaning import CleaningCounts
from bioscan_jax.barcodes.lineage import LineageSurvey, lineage_columns
from bioscan_jax.checkpoints.load import load_weights
from bioscan_jax.dashboard import NOT_TRACKED, mode_of
from bioscan_jax.data.encode import NOT_FINITE, BlockCounts
from bioscan_jax.data.parquet import ParquetBlocks, check_unique_ids, open_source
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest, stop_on_signals
from bioscan_jax.devices.memory import memory_errors
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.devices.sharding import Layout, make_layout, start_devices
from bioscan_jax.embedding.block import Tally
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.embedding.job import Job, prepare, scratch_directory
from bioscan_jax.embedding.pipeline import Work, run_rounds
from bioscan_jax.embedding.progress import open_progress
from bioscan_jax.embedding.summary import RunSummary, StageClock, peak_device_bytes, peak_host_bytes, versions
from bioscan_jax.errors import InputError, Interrupted, logger
from bioscan_jax.location import write_whole
from bioscan_jax.notebook import progress_bar, same_again
from bioscan_jax.table.columns import CLASH_SUFFIX, SEARCH_COLUMNS, check_values, vector_schema
from bioscan_jax.table.lock import Check, writer_lock
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import VectorTable
from bioscan_jax.table.storage import drop_if_empty, sidecar_path, storage_errors, table_exists, table_path

_SURVEYED_ROWS = 65_536


def embed(
    model: config.ModelConfig,
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig | None = None,
    mesh: config.MeshConfig | None = None,
    tracking: config.TrackingConfig | None = None,
    *,
    progress: bool = True,
    profile: str | None = None,
) -> RunSummary:
    """Does what `bioscan_jax.embed` does, on the devices of this process."""

    def make_encoder(layout: Layout) -> Encoder:
        shown = progress and jax.process_index() == 0
        with progress_bar(unit="B", unit_scale=True, desc="load weights", disable=not shown, leave=False) as bar:
            return Encoder(loaded=load_weights(model, layout, on_bytes=bar.update))

    return embed_with(make_encoder, data, sink, embed, mesh, tracking, progress=progress, profile=profile)


_MEMORY = "lower --data.block_rows or --embed.cache_rows, or take a machine with more memory; bioscan doctor compares"


@propagate_failure()
@memory_errors("embedding", _MEMORY)
def embed_with(
    make_encoder: Callable[[Layout], Encoder],
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig | None = None,
    mesh: config.MeshConfig | None = None,
    tracking: config.TrackingConfig | None = None,
    *,
    progress: bool = True,
    profile: str | None = None,
) -> RunSummary:
    """Does what `embed` does, with an encoder that the caller makes."""
    embed, mesh = embed or config.EmbedConfig(), mesh or config.MeshConfig()
    clock, begun = StageClock(), time.perf_counter()
    start_devices(mesh)
    tracking = tracking or NOT_TRACKED
    mode = mode_of(tracking) if jax.process_index() == 0 else "disabled"
    progress = progress and jax.process_index() == 0
    with ExitStack() as held:
        profiler = held.enter_context(StepProfiler(profile, "embed"))
        lock = held.enter_context(writer_lock(sink.uri, sink.table)) if jax.process_index() == 0 else None
        scratch = held.enter_context(scratch_directory(sink, owned=jax.process_index() == 0))
        with clock.stage("open"):
            source = open_source(data, scratch=scratch)
            vector_schema(source.schema, 1, sink.vector_dtype)  # refuses names and types before the model is loaded
        with clock.stage("load"):
            encoder = make_encoder(make_layout(mesh, local=jax.process_count() > 1))
        with clock.stage("open"):
            job = prepare(source, encoder, data, embed, sink)
            del encoder  # and with it the layers that are not needed
            notes: list[str] = []
            if not table_exists(sink.uri, sink.table):
                check_unique_ids(source)
                notes = input_notes(source) if jax.process_index() == 0 else []
        table = None
        if lock is not None:
            table = held.enter_context(opened_table(source, sink, job.schema, job.plan, job.provenance, lock))
        begun_at = [table.safe_rows, table.vectors, table.count_rejects(NOT_FINITE)] if table is not None else None
        resumed, vectors, not_finite = json.loads(gather_bytes(json.dumps(begun_at).encode())[0])
        work = Work(resumed, vectors + not_finite, not_finite)
        stop = held.enter_context(stop_on_signals())
        opened = open_progress(
            tracking,
            mode,
            sink,
            rows=source.rows,
            resumed=resumed,
            plan=job.plan,
            settings={"provenance": job.provenance, "devices": job.devices, "processes": jax.process_count()},
            shown=progress,
        )
        shown = held.enter_context(opened)
        run_rounds(job, table, work, stop, shown, clock, profiler)
        if table is not None:
            shown.update(work.safe_rows, table, work.tally.counts.distinct, last=True)
        if work.stopping and work.safe_rows < source.rows:
            raise stopped(source, sink, work.safe_rows, stop)
        index = None if table is None else finish_table(table, sink, clock)
        # Also keeps the other processes here while process 0 builds an index: one that exits would stop it.
        work, vectors, rejects = _totals(work, table)
        summary = _summary(job, work, vectors, rejects, resumed, index, clock, begun)
        if (advice := summary.slow_input) is not None:
            notes = [*notes, advice]
            logger.warning(advice)
        summary = dataclasses.replace(summary, notes=notes)
        if table is not None and resumed < source.rows:
            write_record(summary, sink)
    return summary


def stopped(source: ParquetBlocks, sink: config.SinkConfig, safe_rows: int, stop: StopRequest) -> Interrupted:
    """Returns the error that ends a run which was asked to stop."""
    return Interrupted(
        f"stopped with {safe_rows:,} of {source.rows:,} rows safe in {table_path(sink.uri, sink.table)}; "
        f"{same_again()} continues from there",
        stop.signal_number,
    )


def finish_table(table: VectorTable, sink: config.SinkConfig, clock: StageClock) -> str:
    """Checks a table that has all rows and builds its indexes; returns what was built and what was not."""
    with clock.stage("index"):
        finished = table.finish(sink.index)
    return "; ".join([*finished.indexes, *finished.notes])


def write_record(summary: RunSummary, sink: config.SinkConfig) -> None:
    """Writes the record of a run beside its table."""
    with storage_errors(sink.uri, summary.rows):
        write_whole(sidecar_path(sink.uri, sink.table, "run"), summary.to_json().encode())


def input_notes(source: ParquetBlocks) -> list[str]:
    """Returns, and logs as warnings, what of the input's lineages and column names may surprise later."""
    notes = []
    if clashes := [name for name in source.schema.names if name in SEARCH_COLUMNS]:
        notes.append(
            f"the columns {', '.join(clashes)} are kept, but bioscan search has results of these names: there they are "
            f"called {', '.join(name + CLASH_SUFFIX for name in clashes)}"
        )
    if columns := lineage_columns(source.schema.names):
        lineages, survey = source.select(columns, _SURVEYED_ROWS), LineageSurvey()
        try:
            for index in range(len(lineages)):
                block = lineages[index]
                locate = partial(source.locate, first=block.first_row)
                check_values(block.table, locate)
                survey.add(block.table, locate)
            notes += survey.warnings()
        except InputError as error:
            notes.append(f"the lineages cannot be used: {error}")
    for note in notes:
        logger.warning(note)
    return notes


@contextmanager
def opened_table(
    source: ParquetBlocks,
    sink: config.SinkConfig,
    schema: pa.Schema,
    plan: Plan,
    provenance: dict[str, str],
    lock: Check,
) -> Iterator[VectorTable]:
    """Opens the table; removes it again if it is new and fails before its first commit, as its plan may be wrong."""
    with VectorTable.open(
        sink.uri,
        sink.table,
        schema=schema,
        plan=plan,
        provenance=provenance | {"library_version": versions()["bioscan_jax"]},
        rows=source.rows,
        block_rows=source.block_rows,
        max_bytes_per_file=sink.max_bytes_per_file,
        lock=lock,
    ) as table:
        try:
            yield table
        except (InputError, MemoryError):
            with suppress(InputError):
                drop_if_empty(sink.uri, sink.table)
            raise


def _totals(work: Work, table: VectorTable | None) -> tuple[Work, int, int]:
    """Sums the work of all processes; also returns how many vectors and rejects process 0's tables hold."""
    mine = dataclasses.asdict(work.tally)
    mine["table"] = (table.vectors, table.rejects) if table is not None else None
    every = [json.loads(payload) for payload in gather_bytes(json.dumps(mine).encode())]
    tables = [one.pop("table") for one in every]
    total = Tally()
    for one in every:
        counts = one.pop("counts")
        changes = CleaningCounts(**counts.pop("changes"))
        total += Tally(**one, counts=BlockCounts(**counts, changes=changes))
    return dataclasses.replace(work, tally=total), *tables[0]


def _summary(
    job: Job,
    work: Work,
    vectors: int,
    rejects: int,
    resumed: int,
    index: str | None,
    clock: StageClock,
    begun: float,
) -> RunSummary:
    total = time.perf_counter() - begun
    return RunSummary(
        table=table_path(job.sink.uri, job.sink.table),
        rows=job.source.rows,
        vectors=vectors,
        rejects=rejects,
        resumed_at=resumed,
        counts=work.tally.counts,
        tokens_real=work.tally.tokens_real,
        tokens_computed=work.tally.tokens_computed,
        model_flops=work.tally.model_flops,
        shapes=work.shapes,
        seconds={"total": total, "load": 0.0, "compile": 0.0} | clock.seconds,
        device_busy=work.activity.share,
        waiting_for_input=clock.seconds.get("wait for input", 0.0) / (work.activity.wall or 1.0),
        seconds_to_first_commit=None if work.first_commit is None else work.first_commit - begun,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
        devices=job.devices,
        processes=jax.process_count(),
        versions=versions(),
        provenance=job.loaded.facts,
        index=index,
    )
