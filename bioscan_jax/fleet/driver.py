"""The driver of a fleet: holds the table's lock, hands out blocks, and commits them in order as they are finished."""

import dataclasses
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bioscan_jax import config
from bioscan_jax.dashboard import mode_of
from bioscan_jax.data.encode import NOT_FINITE
from bioscan_jax.data.files import DEMO
from bioscan_jax.data.parquet import ParquetBlocks, check_unique_ids, open_source
from bioscan_jax.devices.interrupt import StopRequest, stop_on_signals
from bioscan_jax.embedding.block import Part, Tally
from bioscan_jax.embedding.job import scratch_directory
from bioscan_jax.embedding.pipeline import SECONDS_TO_STOP, Work
from bioscan_jax.embedding.progress import RunProgress, open_progress
from bioscan_jax.embedding.repeats import window_blocks
from bioscan_jax.embedding.run import finish_table, input_notes, opened_table, stopped, write_record
from bioscan_jax.embedding.summary import FleetFigures, RunSummary, StageClock, peak_host_bytes, versions
from bioscan_jax.errors import InputError, Interrupted, logger
from bioscan_jax.fleet.cluster import Cluster, Member, connected, summed
from bioscan_jax.fleet.naming import Naming
from bioscan_jax.fleet.orders import Earlier, Facts, Order, Settings, Written
from bioscan_jax.fleet.schedule import BLOCKS_AHEAD, Schedule
from bioscan_jax.location import is_remote, local_directory, locate, write_whole
from bioscan_jax.notebook import same_again
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import VectorTable
from bioscan_jax.table.storage import storage_errors, table_exists, table_path

IN_WORK = 3
"""Blocks that a worker has at a time: one on the devices, one ready for them, and one being read."""
WAITING_BYTES = 2 << 30
"""Host memory of a worker for the vectors of blocks that wait for earlier ones; at least two blocks wait."""
_POLL_SECONDS = 0.2


def embed_by_fleet(
    model: config.ModelConfig,
    data: config.DataConfig,
    sink: config.SinkConfig,
    embed: config.EmbedConfig,
    mesh: config.MeshConfig,
    tracking: config.TrackingConfig,
    fleet: config.FleetConfig,
    *,
    progress: bool = True,
) -> RunSummary:
    """Does what `embedding.run.embed` does, on the workers of a Ray cluster; uses no device of this process.

    Raises:
        InputError: An input, setting, table or the cluster is wrong, or a block failed three times.
        Interrupted: Ctrl-C or SIGTERM; the same call continues.
    """
    if mesh.distributed:
        raise InputError("--mesh.distributed joins processes to one job, --fleet needs none; leave one out")
    mode = mode_of(tracking)
    clock, begun = StageClock(), time.perf_counter()
    model, data, sink = absolute(model, data, sink)
    with ExitStack() as held:
        lock = held.enter_context(writer_lock(sink.uri, sink.table))
        scratch = held.enter_context(scratch_directory(sink, owned=True))
        with clock.stage("open"):
            source = open_source(data, scratch=scratch)
            vector_schema(source.schema, 1, sink.vector_dtype)  # refuses names and types before a model is loaded
        ray = held.enter_context(connected(fleet))
        stop = held.enter_context(stop_on_signals())
        marker, token = held.enter_context(_marker(sink))
        settings = Settings(model=model, data=data, sink=sink, embed=embed, mesh=mesh, marker=marker, token=token)
        cluster = Cluster(ray, fleet, settings)
        held.callback(cluster.end)
        with clock.stage("start workers"):
            facts = _first_facts(cluster, stop)
        with clock.stage("open"):
            notes: list[str] = []
            if not table_exists(sink.uri, sink.table):
                check_unique_ids(source)
                notes = input_notes(source)
        opened = opened_table(source, sink, facts.schema, Plan(facts.plan), facts.provenance, lock)
        table = held.enter_context(opened)
        resumed, not_finite = table.safe_rows, table.count_rejects(NOT_FINITE)
        work = Work(resumed, table.vectors + not_finite, not_finite)
        opened = open_progress(
            tracking,
            mode,
            sink,
            rows=source.rows,
            resumed=resumed,
            plan=Plan(facts.plan),
            settings={"provenance": facts.provenance, "devices": facts.devices, "fleet": dataclasses.asdict(fleet)},
            shown=progress,
        )
        shown = held.enter_context(opened)
        run = Run(cluster, source, embed, sink, fleet, facts, table, work, shown, clock)
        if resumed < source.rows:
            run.until_finished(stop)
        run.show(last=True)
        cluster.end()
        if work.safe_rows < source.rows:
            raise stopped(source, sink, work.safe_rows, stop)
        index = finish_table(table, sink, clock)
        summary = dataclasses.replace(run.summary(resumed, index, begun), notes=notes)
        if resumed < source.rows:
            write_record(summary, sink)
    return summary


def absolute(
    model: config.ModelConfig, data: config.DataConfig, sink: config.SinkConfig
) -> tuple[config.ModelConfig, config.DataConfig, config.SinkConfig]:
    """Makes local paths absolute, since workers start in other directories."""

    def whole(path: str) -> str:
        return path if is_remote(path) or path == DEMO else os.path.abspath(os.path.expanduser(path))

    names = {name: value for name in ("checkpoint", "adapter", "projection") if (value := getattr(model, name))}
    there = {name: whole(value) for name, value in names.items() if Path(value).expanduser().exists()}
    directory = local_directory(sink.uri)
    return (
        dataclasses.replace(model, **there),
        dataclasses.replace(data, path=whole(data.path)),
        sink if directory is None else dataclasses.replace(sink, uri=str(directory)),
    )


@contextmanager
def _marker(sink: config.SinkConfig) -> Iterator[tuple[str, bytes]]:
    """Writes a file beside the table, by which workers recognise the directory; yields its name and content."""
    name, token = f".{sink.table}.fleet", secrets.token_hex(16).encode()
    with storage_errors(sink.uri):
        write_whole(f"{sink.uri.rstrip('/')}/{name}", token)
    try:
        yield name, token
    finally:
        locate(sink.uri, "sink.uri").remove(name)


def _first_facts(cluster: Cluster, stop: StopRequest) -> Facts:
    """Waits for the first worker that has loaded; the others join later."""
    while cluster.facts is None:
        cluster.grow(1 << 30)
        cluster.poll(_POLL_SECONDS, lambda member: None)
        if stop:
            raise Interrupted(f"stopped before a worker was ready; {same_again()} continues", stop.signal_number)
    return cluster.facts


@dataclass
class _State:
    """What one worker has been given."""

    asked: list[int] = field(default_factory=list)
    """Blocks that are its own, but whose order cannot be made yet."""
    computing: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    """Computed; to be written once the blocks that it needs are."""


class Run:
    """The blocks of one run: handed out, written in the order that copies require, committed in order."""

    def __init__(
        self,
        cluster: Cluster,
        source: ParquetBlocks,
        embed: config.EmbedConfig,
        sink: config.SinkConfig,
        fleet: config.FleetConfig,
        facts: Facts,
        table: VectorTable,
        work: Work,
        progress: RunProgress,
        clock: StageClock,
    ) -> None:
        self._cluster, self._source, self._sink, self._facts = cluster, source, sink, facts
        self._table, self._work, self._progress, self._clock = table, work, progress, clock
        self._fleet = fleet
        self._window = window_blocks(embed, source.block_rows)
        self._schedule = Schedule(range(table.next_block, len(source)), blocks_ahead=self._bound)
        self._naming = Naming(source, facts.encoding, self._window, table.safe_rows, self._bound)
        self._states: dict[str, _State] = {}
        self._orders: dict[int, Order] = {}
        self._written: dict[int, Written] = {}
        self._earlier: dict[int, Earlier] = {}
        self._begun: Earlier | None = None
        """What an earlier run committed of the first block, and perhaps of those before it."""
        self._first = table.next_block
        self._returned: set[int] = set()
        block_bytes = source.block_rows * max(1, facts.schema.field("vector").type.list_size) * 4
        self._most_waiting = max(2, WAITING_BYTES // block_bytes)
        self._last: dict[str, Written] = {}
        self._failures = self._again = 0
        self._straggling = 0.0

    @property
    def _bound(self) -> int:
        """How many blocks may be handed out beyond the committed ones, with the workers there are."""
        return self._fleet.blocks_ahead or BLOCKS_AHEAD * max(1, len(self._cluster.ready))

    def until_finished(self, stop: StopRequest) -> None:
        """Hands out and commits blocks until all are in the table, or what is finished soon after a request to stop.

        Raises:
            InputError: A block failed three times, the storage failed, or too many vectors are not finite.
        """
        self._remember_committed()
        deadline, seen = None, time.perf_counter()
        with self._naming:
            while not self._schedule.finished and (deadline is None or time.monotonic() < deadline):
                if stop and deadline is None:
                    deadline = time.monotonic() + SECONDS_TO_STOP
                try:
                    self._step(handing_out=deadline is None)
                except InputError:
                    self._commit()
                    raise
                now = time.perf_counter()
                waits = bool(self._written) or any(one.waiting for one in self._states.values())
                self._straggling += (now - seen) * (waits and not self._schedule.commit_ready())
                seen = now
                self._commit()
                if deadline is not None and not any(one.computing or one.waiting for one in self._states.values()):
                    break

    def _step(self, *, handing_out: bool) -> None:
        """Gives the workers something to do, and takes what they have finished."""
        if handing_out:
            self._cluster.grow(len(self._source) - self._schedule.frontier)
            self._hand_out()
        self._write_ready()
        for answer in self._cluster.poll(_POLL_SECONDS, self._lose):
            self._take(answer.member, answer.call, answer.block, answer.written, answer.failure)

    def _remember_committed(self) -> None:
        """Finds the vectors of the last blocks that an earlier run committed."""
        size, next_block = self._source.block_rows, self._schedule.frontier
        first = max(0, next_block - self._window) * size
        if self._window and self._table.safe_rows:
            fragments = self._table.fragments_of(first, self._table.safe_rows)
            lost = self._table.rejected_rows(NOT_FINITE, first)
            for block in range(first // size, next_block + 1):
                here = lost[(lost >= block * size) & (lost < (block + 1) * size)]
                self._earlier[block] = Earlier(fragments=fragments, not_finite=here)
            self._begun = self._earlier.pop(next_block)

    def _hand_out(self) -> None:
        self._schedule.blocks_ahead = max(self._schedule.blocks_ahead, self._bound)
        self._naming.advance(self._schedule.frontier, self._schedule.blocks_ahead)
        for member in self._cluster.ready:
            state = self._states.setdefault(member.name, _State())
            while self._has_room(state) and (block := self._next(member, state)) is not None:
                state.asked.append(block)
            for block in list(state.asked):
                if self._drop_if_committed(member, block, state.asked):
                    continue
                if (order := self._naming.order(block)) is not None:
                    state.asked.remove(block)
                    state.computing.add(block)
                    self._orders[block] = order
                    self._cluster.compute(member, order)

    def _has_room(self, state: _State) -> bool:
        """Whether a worker takes another block; one that others lost also where many wait, as they may wait for it."""
        if len(state.asked) + len(state.computing) >= IN_WORK:
            return False
        return len(state.waiting) < self._most_waiting or bool(self._returned)

    def _next(self, member: Member, state: _State) -> int | None:
        held = self._schedule.holding(member.name)
        if held and self._nothing_new():  # what it would get is a copy of a block that another one works on
            return None
        block = self._schedule.next_for(member.name)
        if block is not None:
            self._returned.discard(block)
        return block

    def _nothing_new(self) -> bool:
        last = min(len(self._source), self._schedule.frontier + self._schedule.blocks_ahead)
        return not self._returned and self._schedule.frontier + self._schedule.ahead >= last

    def _write_ready(self) -> None:
        """Lets workers write the blocks whose copied vectors are all in files."""
        for member in self._cluster.ready:
            state = self._states.setdefault(member.name, _State())
            for block in sorted(state.waiting):
                if self._drop_if_committed(member, block, state.waiting):
                    continue
                needs = self._orders[block].needs
                if all(need in self._earlier for need in needs):
                    state.waiting.remove(block)
                    self._cluster.write(member, block, {need: self._earlier[need] for need in needs})

    def _drop_if_committed(self, member: Member, block: int, held: list[int] | set[int]) -> bool:
        """Takes a block from a worker if another one was faster."""
        if block >= self._schedule.frontier:
            return False
        held.remove(block)
        self._schedule.done(member.name, block)
        self._cluster.forget(member, block)
        return True

    def _take(self, member: Member, call: str, block: int, written: Written | None, failure: str | None) -> None:
        state = self._states.get(member.name)
        if state is None:  # lost meanwhile
            return
        if call == "compute":
            state.computing.discard(block)
        if failure is None and written is not None:
            failure = self._check(block, written.part)
        if failure is not None:
            self._failures += 1
            logger.warning(f"block {block} failed on {member.name}: {failure}")
            self._returned.add(block)
            self._schedule.failed(member.name, block, failure)
        elif call == "compute":
            state.waiting.add(block)
        elif written is not None and self._schedule.done(member.name, block):
            self._accept(member, block, written)

    def _check(self, block: int, part: Part) -> str | None:
        """Returns what is wrong with the rows of a finished block."""
        first = max(block * self._source.block_rows, self._work.safe_rows)
        stop = min((block + 1) * self._source.block_rows, self._source.rows)
        rejects = part.rejected.num_rows
        if part.whole and part.stop == stop and part.rows + rejects == stop - first:
            return None
        return f"{part.rows} vectors and {rejects} rejects came back for rows {first} to {stop - 1}"

    def _accept(self, member: Member, block: int, written: Written) -> None:
        self._returned.discard(block)
        self._written[block] = self._last[member.name] = written
        record = member.record
        record.blocks, record.rows = record.blocks + 1, record.rows + written.part.rows + written.part.rejected.num_rows
        record.seconds = time.perf_counter() - member.began
        if self._window:
            lost = written.part.rejected.filter(pc.field("reason") == NOT_FINITE)["source_row"].to_numpy()
            before = self._begun if block == self._first else None
            self._earlier[block] = Earlier(
                fragments=[*(before.fragments if before else []), *written.part.fragments],
                not_finite=np.concatenate([before.not_finite, lost]) if before else lost,
            )

    def _lose(self, member: Member) -> None:
        again = self._schedule.lost(member.name)
        self._again += len(again)
        self._returned.update(again)
        self._states.pop(member.name, None)
        if not self._cluster.ready:
            logger.warning("no worker is left; waiting for machines")

    def _commit(self) -> None:
        """Commits the consecutive finished blocks."""
        blocks, work = self._schedule.commit_ready(), self._work
        if not blocks:
            return
        done = [self._written.pop(block) for block in blocks]
        for one in done:
            work.check_finite(one.part, self._sink.vector_dtype)
            work.tally += one.tally + Tally(counts=one.part.counts)
        parts = [one.part for one in done]
        with self._clock.stage("commit"):
            rejects = pa.concat_tables([part.rejected for part in parts])
            fragments = [fragment for part in parts for fragment in part.fragments]
            self._table.append_fragments(parts[-1].stop, fragments, sum(part.rows for part in parts), rejects)
        work.first_commit = work.first_commit or time.perf_counter()
        work.safe_rows = parts[-1].stop
        for block in blocks:
            self._schedule.committed(block)
            self._orders.pop(block, None)
        for block in [block for block in self._earlier if block < self._schedule.frontier - self._window]:
            del self._earlier[block]
        self.show()

    def show(self, *, last: bool = False) -> None:
        """Shows how far the run is."""
        work, workers = self._work, len(self._cluster.ready)
        self._progress.update(work.safe_rows, self._table, work.tally.counts.distinct, workers=workers, last=last)

    def summary(self, resumed: int, index: str, begun: float) -> RunSummary:
        """Describes the run."""
        work, last = self._work, list(self._last.values())
        peaks = [one.peak_device_bytes for one in last if one.peak_device_bytes is not None]
        seconds = {
            "total": time.perf_counter() - begun,
            "load": self._cluster.load_seconds,
            "compile": max((one.compile_seconds for one in last), default=0.0),
        }
        return RunSummary(
            table=table_path(self._sink.uri, self._sink.table),
            rows=self._source.rows,
            vectors=self._table.vectors,
            rejects=self._table.rejects,
            resumed_at=resumed,
            counts=work.tally.counts,
            tokens_real=work.tally.tokens_real,
            tokens_computed=work.tally.tokens_computed,
            model_flops=work.tally.model_flops,
            shapes=sorted({shape for one in last for shape in one.shapes}),
            seconds=seconds | self._clock.seconds,
            device_busy=float(np.mean([one.device_busy for one in last])) if last else 0.0,
            waiting_for_input=None,
            seconds_to_first_commit=None if work.first_commit is None else work.first_commit - begun,
            peak_host_bytes=peak_host_bytes(),
            peak_device_bytes=max(peaks, default=None),
            devices=self._facts.devices,
            processes=len(self._cluster.records),
            versions=versions(),
            provenance=self._facts.model,
            index=index,
            fleet=FleetFigures(
                workers=summed(self._cluster.records),
                lost=self._cluster.lost,
                refused=self._cluster.refused,
                blocks_again=self._again,
                failures=self._failures,
                straggling=self._straggling,
            ),
        )
