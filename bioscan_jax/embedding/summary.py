"""Measures an embedding run, and reports it as text and as JSON."""

import dataclasses
import json
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bioscan_jax.data.encode import BlockCounts
from bioscan_jax.notebook import Shown, facts_html

VERSIONED = ("bioscan_jax", "jax", "jaxlib", "flax", "grain", "pyarrow", "pylance", "lancedb")
SLOW_INPUT = 0.25
"""Share of the time without input from which a run warns of it."""
_SHORT_RUN_SECONDS = 30.0
"""Runs that take less do not warn."""


@dataclass
class StageClock:
    """Wall seconds per stage; stages may run in several threads."""

    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the context to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to a stage."""
        with self.lock:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass
class DeviceActivity:
    """Measures how long the devices had work, as the host sees it; safe to call from several threads.

    A batch counts from its start until its vectors are ready. Time while paused, as while compiling, does not count.
    """

    busy: float = 0.0
    """Seconds with at least one batch started and not finished."""
    wall: float = 0.0
    """Seconds between `resume` and `pause`."""
    _batches: int = 0
    _counting: bool = False
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def share(self) -> float:
        """Share of the measured time in which the devices were busy."""
        return self.busy / self.wall if self.wall else 0.0

    def resume(self) -> None:
        """Starts measuring, or continues after `pause`."""
        self._update(0, True)

    def pause(self) -> None:
        """Stops measuring."""
        self._update(0, False)

    def batch_started(self) -> None:
        """Records that a batch is being started."""
        self._update(1)

    def batch_finished(self) -> None:
        """Records that the vectors of a batch are ready."""
        self._update(-1)

    def _update(self, batches: int, counting: bool | None = None) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._counting:
                self.wall += now - self._since
                self.busy += (now - self._since) * (self._batches > 0)
            self._counting = self._counting if counting is None else counting
            self._batches, self._since = self._batches + batches, now


@dataclass(frozen=True, kw_only=True)
class FleetFigures:
    """What the workers of a fleet did in one run."""

    workers: list[dict[str, Any]]
    """Name, devices, blocks, rows, seconds and rows_per_second of each worker, the lost ones included."""
    lost: int
    """Workers that ended before the run did."""
    refused: list[str]
    """Workers that did not fit the others, and why."""
    blocks_again: int
    """Blocks that were given out again, since their worker was lost."""
    failures: int
    """Times that a block failed on a worker which went on."""
    straggling: float
    """Seconds in which finished blocks waited for an earlier one."""

    def __str__(self) -> str:
        """Formats the figures as one line."""
        rates = sorted(one["rows_per_second"] for one in self.workers if one["rows"])
        speed = f", {rates[0]:,.0f} to {rates[-1]:,.0f} rows/s each" if rates else ""
        again = f", {self.blocks_again:,} blocks given out again, {self.failures:,} failed attempts"
        return (
            f"{len(self.workers)} workers{speed}; {self.lost} lost{again}; {len(self.refused)} refused; "
            f"finished blocks waited {self.straggling:.1f} s for slower ones"
        )


@dataclass(frozen=True, kw_only=True)
class RunSummary(Shown):
    r"""Figures of one `embed` run; those about work cover this run alone, not an earlier part that it resumed.

    Counts are summed over all processes; seconds and memory are those of this process.

    Example:
        >>> import bioscan_jax as bj
        >>> from pathlib import Path
        >>> _ = Path("barcodes.fasta").write_text(">a\nACGTTGCAACGT\n>b\n\n")
        >>> model, data = bj.ModelConfig(checkpoint="random:tiny-v2"), bj.DataConfig(path="barcodes.fasta")
        >>> summary = bj.embed(model, data, bj.SinkConfig(uri="vectors"), progress=False)
        >>> summary.rows, summary.vectors, summary.counts.rejects
        (2, 1, {'empty': 1})
    """

    table: str
    """Path of the vector table."""
    rows: int
    """Rows of the input."""
    vectors: int
    """Rows of the vector table."""
    rejects: int
    """Rows of the rejects table."""
    resumed_at: int
    """Rows that were finished when this run began."""
    counts: BlockCounts
    """Counts over the rows that this run read."""
    tokens_real: int
    """Tokens of the embedded views, CLS included."""
    tokens_computed: int
    """The same with padding and filler rows included."""
    model_flops: int
    """Matrix-product FLOPs of the real tokens."""
    shapes: list[tuple[int, int]]
    """Compiled batch shapes, rows x tokens."""
    seconds: dict[str, float]
    """Wall time in total and per stage; stages overlap, so they do not add up."""
    device_busy: float
    """Share of the time, compiling left out, in which a batch was on the devices, as the host sees it."""
    waiting_for_input: float | None
    """Share of that time in which no block was ready for the devices; None for a fleet."""
    seconds_to_first_commit: float | None
    """From the call to the first commit; None where this process did not commit."""
    peak_host_bytes: int
    peak_device_bytes: int | None
    """Largest over the local devices; None where the platform does not report it."""
    devices: str
    processes: int
    versions: dict[str, str]
    provenance: dict[str, str | None]
    index: str | None
    """The indexes built at the end."""
    notes: list[str] = field(default_factory=list)
    """Warnings about the lineages and columns of the input, in a run that does not resume, and about its speed."""
    fleet: FleetFigures | None = None
    """Where the workers of a fleet embedded."""

    @property
    def rows_per_second(self) -> float:
        """Rows that this run read, divided by its time without loading and compiling."""
        busy = self.seconds["total"] - self.seconds["load"] - self.seconds["compile"]
        return self.counts.rows / max(busy, 1e-9)

    @property
    def slow_input(self) -> str | None:
        """What to do if a run of some length was held up by its input; None where it was not."""
        busy = self.seconds["total"] - self.seconds["load"] - self.seconds["compile"]
        if (self.waiting_for_input or 0.0) < SLOW_INPUT or busy < _SHORT_RUN_SECONDS:
            return None
        return (
            f"the devices waited for input {self.waiting_for_input:.0%} of the time: copy the input to a local disk, write "
            "it as Parquet in several row groups, or take a machine with more or faster cores"
        )

    def to_json(self) -> str:
        """Returns every field and the rate as JSON."""
        record = dataclasses.asdict(self) | {"rows_per_second": self.rows_per_second}
        return json.dumps(record, indent=2) + "\n"

    def __str__(self) -> str:
        """Formats the summary as the lines printed at the end of a run."""
        return "\n".join(f"{name:>10}  {text}" for name, text in self._lines().items())

    def _repr_html_(self) -> str:
        lines = self._lines()
        notes = [name for name in lines if name.startswith("note")]
        return facts_html(lines, ["table", "model", "rows", "vectors", "rejects", "speed", "devices", *notes])

    def _lines(self) -> dict[str, str]:
        counts, changes = self.counts, self.counts.changes
        rejects = ", ".join(f"{n:,} {reason}" for reason, n in counts.rejects.items()) or "none"
        resumed = f" ({self.resumed_at:,} of them before this run)" if self.resumed_at else ""
        waste = self.tokens_computed / self.tokens_real if self.tokens_real else 1.0
        shapes = ", ".join(f"{rows}x{tokens}" for rows, tokens in self.shapes) or "none"
        flops = self.model_flops / max(self.seconds["total"] - self.seconds["load"] - self.seconds["compile"], 1e-9)
        device = f", device {_gib(self.peak_device_bytes)}" if self.peak_device_bytes is not None else ""
        adapter = f" with the adapter {self.provenance['adapter']}" if self.provenance["adapter"] else ""
        stages = ", ".join(f"{name} {s:.1f}" for name, s in self.seconds.items())
        lines = {
            "table": self.table,
            "model": f"{self.provenance['model']}{adapter}, {self.provenance['dtype']}",
            "rows": f"{self.rows:,}{resumed}",
            "vectors": f"{self.vectors:,} in the table; this run embedded {counts.distinct:,} sequences and copied the "
            f"vectors of {counts.vectors - counts.distinct:,} repeats",
            "rejects": f"{self.rejects:,} in the rejects table; this run: {rejects}",
            "truncated": f"{counts.truncated:,} sequences",
            "cleaned": f"{changes.lower_case:,} lower-case, {changes.u_to_t:,} U to T, "
            f"{changes.ambiguous_to_n:,} ambiguous to N, {changes.gaps_removed:,} gaps "
            + (f"and {changes.stops_removed:,} final '*' " if changes.stops_removed else "")
            + "removed (characters)",
            "tokens": f"{self.tokens_real:,} real, {self.tokens_computed:,} computed (x {waste:.3f})",
            "shapes": f"{shapes}; compiled in {self.seconds['compile']:.1f} s",
            "seconds": stages,
            "speed": f"{self.rows_per_second:,.0f} rows/s, {flops / 1e9:,.1f} model GFLOP/s",
            "overlap": f"devices busy {self.device_busy:.1%} of the time"
            + ("" if self.waiting_for_input is None else f", no input ready {self.waiting_for_input:.1%}"),
            "memory": f"host {_gib(self.peak_host_bytes)}{device}",
            "devices": f"{self.devices}, {self.processes} process(es)",
        }
        if self.fleet is not None:
            lines["fleet"] = str(self.fleet)
        if self.index is not None:
            lines["index"] = self.index
        for number, note in enumerate(self.notes, 1):
            lines["note" if number == 1 else f"note {number}"] = note
        if self.resumed_at == self.rows:
            work = ("truncated", "cleaned", "tokens", "shapes", "seconds", "speed", "overlap")
            lines = {name: text for name, text in lines.items() if name not in (*work, "fleet")}
            lines["vectors"], lines["rejects"] = f"{self.vectors:,}", f"{self.rejects:,}"
            lines["rows"] = f"{self.rows:,}, complete before this run: nothing was left to do"
        return lines


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def peak_host_bytes() -> int:
    """Returns the largest resident set of this process so far."""
    try:
        # Linux's ru_maxrss begins with the peak of the process that started this one.
        peak = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    if peak is not None:
        return int(peak[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def peak_device_bytes() -> int | None:
    """Returns the largest memory in use on a local device so far, where the platform reports it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None


def resident_bytes() -> int:
    """Returns the memory of this process now; its peak where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_host_bytes()


def bytes_in_use() -> int:
    """Returns the memory now in use on the fullest local device; that of this process where the platform has no figure."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["bytes_in_use"] for s in stats if "bytes_in_use" in s), default=resident_bytes())


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make the vectors."""
    return {name: metadata.version(name) for name in VERSIONED}
