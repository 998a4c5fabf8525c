"""A plan: what a step needs and costs at least on a slice of TPUs, as JSON and as a table."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.chips import Chip, Slice
from bioscan_jax.planning.aot import Compiled, TooLarge, Traced
from bioscan_jax.planning.programs import Program
from bioscan_jax.planning.workload import Workload

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step on a slice of TPUs."""

    topology: str
    tpu: Slice
    model: str
    program: Program
    mesh: config.MeshConfig
    shape: BatchShape
    """Rows of the whole slice at once."""
    traced: Traced
    """Of the part of the slice that works on one batch."""
    compiled: Compiled | TooLarge | None
    """None where there is no compiler."""
    sequences: float
    """That a batch is worth."""
    workload: Workload | None
    hours: float | None
    """That the workload's sampled rows take at least."""
    not_padding: float | None
    """Share of the FLOPs that the workload would cost without padding."""
    largest: tuple[int, int | None] | None
    """Rows at once of the slice that fit, and the least tried that do not; None where that was not looked for."""
    notes: tuple[str, ...]

    @property
    def hbm_gib(self) -> float | None:
        """Memory needed on a device; where the compiler gave up, without all but arguments and temporaries."""
        if isinstance(self.compiled, TooLarge):
            return (self.traced.argument_bytes + self.compiled.temporaries) / _GIB
        return None if self.compiled is None else self.compiled.hbm_bytes / _GIB

    @property
    def fits(self) -> bool | None:
        """Whether it does; not known without a compiler, unless the arguments alone are too much."""
        available = self.tpu.chip.hbm_gib
        if self.compiled is None:
            return False if self.traced.argument_bytes / _GIB > available else None
        assert self.hbm_gib is not None
        return isinstance(self.compiled, Compiled) and self.hbm_gib <= available

    @property
    def hosts(self) -> int:
        """Hosts that work on batches of their own."""
        return self.tpu.hosts if self.program.by_host else 1

    @property
    def roofline_seconds(self) -> float:
        """Least time of a batch."""
        return max(roofline(self.traced, self.tpu.chip, self.tpu.devices // self.hosts))

    @property
    def vectors_per_hour(self) -> float:
        """At most: sequences embedded, or trained on once."""
        return 3600.0 * self.sequences / self.roofline_seconds

    def to_json(self) -> str:
        """One object; what only the compiler knows is null without one."""
        done = self.compiled if isinstance(self.compiled, Compiled) else None
        found: dict[str, Any] = {
            "topology": self.topology,
            "devices": self.tpu.devices,
            "hosts": self.tpu.hosts,
            "device_kind": self.tpu.chip.device_kind,
            "step": self.program.name,
            "model": self.model,
            "batch": self.shape.rows,
            "tokens": self.shape.tokens,
            "params": self.mesh.params,
            "compiled": self.compiled is not None,
            "libtpu": done and done.libtpu,
            "hbm_gib": self.hbm_gib,
            "hbm_available_gib": self.tpu.chip.hbm_gib,
            "arguments_gib": self.traced.argument_bytes / _GIB,
            "temporaries_gib": None if self.compiled is None else self.compiled.temporaries / _GIB,
            "fits": self.fits,
            "largest_batch": self.largest and self.largest[0],
            "matmul_flops": self.traced.matmul_flops * self.hosts,
            "collectives": done and [dataclasses.asdict(one) for one in done.collectives],
            "while_loops": done and len(done.trip_counts),
            "trip_counts": done and list(done.trip_counts),
            "compile_seconds": done and done.seconds,
            "roofline_seconds": self.roofline_seconds,
            "vectors_per_hour_bound": self.vectors_per_hour,
            "vectors_per_hour_half_of_bound": self.vectors_per_hour / 2,
            "not_padding": self.not_padding,
            "data_vectors_per_hour_bound": self._data_vectors_per_hour,
            "notes": list(self.notes),
        }
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        """The same as a table."""
        matrix, memory = roofline(self.traced, self.tpu.chip, self.tpu.devices // self.hosts)
        peak = f"{self.tpu.chip.bf16_tflops:g} TFLOP/s"
        lines = {
            "step": f"{self.program.name}, {self.model}, {self.program.dtype}",
            "slice": f"{self.topology}: {self.tpu.devices} x {self.tpu.chip.device_kind}, {self.tpu.hosts} host(s)",
            "batch": f"{self.shape.rows:,} x {self.shape.tokens:,} tokens, parameters {self.mesh.params}",
            "memory": self._memory(),
            "FLOPs": f"{self.traced.matmul_flops * self.hosts / 1e12:,.1f} T in matrix products, counted in the jaxpr",
        }
        if isinstance(self.compiled, Compiled):
            rounds = ", ".join("unknown" if count is None else f"{count}" for count in self.compiled.trip_counts)
            lines["moved"] = _moved(self.compiled)
            lines["loops"] = f"{len(self.compiled.trip_counts)} (rounds: {rounds or 'none'})"
            lines["compiled"] = f"in {self.compiled.seconds:.1f} s by libtpu {self.compiled.libtpu}"
        lines["bound"] = (
            f"{self.roofline_seconds:.4g} s a batch: the longer of {matrix:.4g} s of products at {peak} and "
            f"{memory:.4g} s to read the arguments once at {self.tpu.chip.hbm_gb_per_second:g} GB/s; not a measurement"
        )
        lines["vectors"] = (
            f"{self.vectors_per_hour:,.0f} an hour at 100% of that bound, {self.vectors_per_hour / 2:,.0f} at 50%"
        )
        if self.workload is not None:
            lines["data"] = self._data()
        if self.largest is not None:
            lines["largest"] = self._largest()
        for number, note in enumerate(self.notes):
            lines[f"note {number + 1}"] = note
        return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())

    @property
    def _data_vectors_per_hour(self) -> float | None:
        return None if self.workload is None or not self.hours else self.workload.vectors / self.hours

    def _memory(self) -> str:
        available, arguments = self.tpu.chip.hbm_gib, self.traced.argument_bytes / _GIB
        if self.hbm_gib is None:
            verdict = "that is too much" if self.fits is False else "the rest is not known without the compiler"
            return f"arguments {arguments:.2f} of {available} GiB a device; {verdict}"
        if isinstance(self.compiled, Compiled):
            c = self.compiled
            code, outputs = c.code / _GIB, (c.outputs - c.aliased) / _GIB
            parts = f"arguments {c.arguments / _GIB:.2f}, outputs {outputs:.2f}, temporaries {c.temporaries / _GIB:.2f}"
            parts += f", code {code:.2f}"
            free = available - self.hbm_gib
            verdict = f"fits, {free:.2f} GiB free" if self.fits else f"does NOT fit, {-free:.2f} GiB too much"
            return f"{self.hbm_gib:.2f} of {available} GiB a device ({parts}): {verdict}"
        return f"at least {self.hbm_gib:.2f} of {available} GiB a device: does NOT fit, the compiler gave up"

    def _data(self) -> str:
        assert self.workload is not None
        assert self.not_padding is not None
        assert self._data_vectors_per_hour is not None
        work = self.workload
        shapes = ", ".join(f"{s.rows} x {s.tokens} ({n})" for s, n in sorted(work.batches.items(), key=_by_tokens))
        return (
            f"first {work.rows:,} rows: {work.vectors:,} vectors of {len(work.lengths):,} rows of "
            f"{work.lengths.mean():.0f} tokens; {100 * self.not_padding:.1f}% of the FLOPs are not padding; at most "
            f"{self._data_vectors_per_hour:,.0f} vectors an hour (bound); batches {shapes}"
        )

    def _largest(self) -> str:
        assert self.largest is not None
        fits, over = self.largest
        if not fits:
            return "no batch fits, not even one row a device"
        beyond = f"{over:,} do not" if over is not None else "more was not tried"
        return f"{fits:,} rows of {self.shape.tokens:,} tokens at once fit, {beyond}"


def roofline(traced: Traced, chip: Chip, devices: int) -> tuple[float, float]:
    """Least seconds of a batch: by the peak of the matrix units, and by reading every argument once from memory.

    The longer of the two is the bound. It leaves out everything else: activations, vector units, collectives, the host.
    """
    products = traced.matmul_passes / (devices * chip.bf16_tflops * 1e12)
    return products, traced.argument_bytes / (chip.hbm_gb_per_second * 1e9)


def _moved(compiled: Compiled) -> str:
    """Collectives by kind, the loop's first."""
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for one in compiled.collectives:
        groups.setdefault((not one.in_loop, one.kind, one.dtype), []).append(one.bytes)
    parts = [
        f"{len(sizes)} {kind} of {dtype} ({sum(sizes) / 2**20:.1f} MiB) {'once' if outside else 'each round of a loop'}"
        for (outside, kind, dtype), sizes in sorted(groups.items())
    ]
    return "; ".join(parts) or "nothing between devices"


def _by_tokens(item: tuple[BatchShape, int]) -> int:
    return item[0].tokens
