"""Plans one step of embed or finetune for a slice of TPUs: its memory and its least cost, without a TPU.

Memory, collectives and loops are read from the program that libtpu's compiler makes of the step. Times are lower bounds
from the chip's peak rates; real runs take longer.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bioscan_jax import config
from bioscan_jax.checkpoints.hub import DEFAULT, DEFAULT_DIRECTORY
from bioscan_jax.checkpoints.load import RANDOM
from bioscan_jax.data.batching import BatchShape, batch_shapes, largest_rows
from bioscan_jax.devices.chips import Chip, Slice, find_slice
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_copy, output_file
from bioscan_jax.model.attention import AttentionSetting, choose_attention
from bioscan_jax.model.config import PRESETS, TransformerConfig, read_config
from bioscan_jax.notebook import Shown
from bioscan_jax.planning.aot import INSTALL, Compiled, TooLarge, Traced, has_compiler, trace_and_compile
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram, Program
from bioscan_jax.planning.workload import Workload, embedding_workload, training_workload
from bioscan_jax.training.step import microbatch_shape

Params = Literal["replicated", "fsdp"]
Step = Literal["embed", "finetune"]
SPECIES = 10_000
"""Species that the heads distinguish, if not given."""
_GIB = 2**30
_HUB = "InstaDeepAI/nucleotide-transformer-"
_PUBLISHED = {
    "500m-human-ref": "nt-v1-500m",
    "500m-1000g": "nt-v1-500m",
    "2.5b-multi-species": "nt-v1-2.5b",
    "2.5b-1000g": "nt-v1-2.5b",
    "v2-50m-multi-species": "nt-v2-50m",
    "v2-100m-multi-species": "nt-v2-100m",
    "v2-250m-multi-species": "nt-v2-250m",
    "v2-500m-multi-species": "nt-v2-500m",
}
"""Sizes of the published checkpoints: planning downloads nothing."""


@dataclass(frozen=True, kw_only=True)
class Plan(Shown):
    """Memory and least cost of one step on a slice of TPUs; prints as a table.

    Example:
        >>> found = bj.plan("v3-8", bj.ModelConfig(checkpoint="random:tiny-v1"), batch=64, tokens=128)
        >>> print(found)
              step  embed, random:tiny-v1, bfloat16
             slice  v3-8: 8 x TPU v3, 1 host(s)
             batch  64 x 128 tokens, parameters replicated
        ...
    """

    topology: str
    tpu: Slice
    model: str
    program: Program
    mesh: config.MeshConfig
    shape: BatchShape
    """Rows that the whole slice processes at once, and their tokens."""
    traced: Traced
    """Counts for the devices that share one batch."""
    compiled: Compiled | TooLarge | None
    """None without the compiler."""
    sequences: float
    """Sequences per batch; one sequence may be several rows (strands, phases)."""
    workload: Workload | None
    hours: float | None
    """Least time for the sampled rows of the workload."""
    not_padding: float | None
    """Share of the workload's FLOPs that are not spent on padding."""
    largest: tuple[int, int | None] | None
    """Most rows at once that fit, and the fewest tried that do not; None if not searched for."""
    notes: tuple[str, ...]

    @property
    def ahead_gib(self) -> float:
        """Memory per device for batches started before this one has ended."""
        devices = self.tpu.devices // self.hosts // self.mesh.model
        return self.program.bytes_ahead(self.traced.shape, devices) / _GIB

    @property
    def hbm_gib(self) -> float | None:
        """Memory needed per device; where the compiler gave up, arguments, temporaries and batches ahead only."""
        if isinstance(self.compiled, TooLarge):
            return (self.traced.argument_bytes + self.compiled.temporaries) / _GIB + self.ahead_gib
        return None if self.compiled is None else self.compiled.total / _GIB + self.ahead_gib

    @property
    def fits(self) -> bool | None:
        """Whether the step fits; None (unknown) without the compiler, unless the arguments alone are too large."""
        available = self.tpu.chip.hbm_gib
        if self.compiled is None:
            return False if self.traced.argument_bytes / _GIB > available else None
        assert self.hbm_gib is not None
        return isinstance(self.compiled, Compiled) and self.hbm_gib <= available

    @property
    def hosts(self) -> int:
        """Number of hosts that process batches of their own."""
        return self.tpu.hosts if self.program.by_host else 1

    @property
    def roofline_seconds(self) -> float:
        """Least time per batch."""
        return max(roofline(self.traced, self.tpu.chip, self.tpu.devices // self.hosts))

    @property
    def vectors_per_hour(self) -> float:
        """Most sequences embedded, or trained on once, per hour."""
        return 3600.0 * self.sequences / self.roofline_seconds

    def to_json(self) -> str:
        """Returns the plan as one JSON object; values that need the compiler are null without it."""
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
            "ahead_gib": self.ahead_gib,
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
        """Returns the plan as a table for the terminal."""
        matrix, memory = roofline(self.traced, self.tpu.chip, self.tpu.devices // self.hosts)
        peak = f"{self.tpu.chip.bf16_tflops:g} TFLOP/s"
        lines = {
            "step": f"{self.program.name}, {self.model}, {self.program.dtype}",
            "slice": f"{self.topology}: {self.tpu.devices} x {self.tpu.chip.device_kind}, {self.tpu.hosts} host(s)",
            "batch": f"{self.shape.rows:,} x {self.shape.tokens:,} tokens, parameters {self.mesh.params}",
            "memory": self._memory(),
            "FLOPs": f"{self.traced.matmul_flops * self.hosts / 1e12:,.1f} T in matrix products, counted in the traced program",
        }
        if isinstance(self.compiled, Compiled):
            rounds = ", ".join("unknown" if count is None else f"{count}" for count in self.compiled.trip_counts)
            lines["moved"] = _moved(self.compiled)
            lines["loops"] = f"{len(self.compiled.trip_counts)} (iterations: {rounds or 'none'})"
            lines["compiled"] = f"in {self.compiled.seconds:.1f} s by libtpu {self.compiled.libtpu}"
        lines["bound"] = (
            f"at least {self.roofline_seconds:.4g} s per batch: the longer of {matrix:.4g} s of matrix products at {peak} and "
            f"{memory:.4g} s to read the arguments once at {self.tpu.chip.hbm_gb_per_second:g} GB/s; not a measurement"
        )
        lines["vectors"] = (
            f"at most {self.vectors_per_hour:,.0f} per hour; {self.vectors_per_hour / 2:,.0f} at half that speed"
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
            verdict = "too much" if self.fits is False else "the rest is unknown without the compiler"
            return f"arguments {arguments:.2f} of {available} GiB per device; {verdict}"
        if isinstance(self.compiled, Compiled):
            c = self.compiled
            code, outputs = c.code / _GIB, (c.outputs - c.aliased) / _GIB
            parts = f"arguments {c.arguments / _GIB:.2f}, outputs {outputs:.2f}, temporaries {c.temporaries / _GIB:.2f}"
            parts += f", code {code:.2f}, batches ahead {self.ahead_gib:.2f}"
            free = available - self.hbm_gib
            verdict = f"fits, {free:.2f} GiB free" if self.fits else f"does NOT fit, {-free:.2f} GiB too much"
            return f"{self.hbm_gib:.2f} of {available} GiB per device ({parts}): {verdict}"
        return f"at least {self.hbm_gib:.2f} of {available} GiB per device: does NOT fit, the compiler gave up"

    def _data(self) -> str:
        assert self.workload is not None
        assert self.not_padding is not None
        assert self._data_vectors_per_hour is not None
        work = self.workload
        shapes = ", ".join(f"{s.rows} x {s.tokens} ({n})" for s, n in sorted(work.batches.items(), key=_by_tokens))
        return (
            f"{work.rows:,} rows read: {work.vectors:,} vectors of {len(work.lengths):,} rows of "
            f"{work.lengths.mean():.0f} tokens on average; {100 * (1 - self.not_padding):.1f}% of the FLOPs are padding; at most "
            f"{self._data_vectors_per_hour:,.0f} vectors per hour; batches (rows x tokens) {shapes}"
        )

    def _largest(self) -> str:
        assert self.largest is not None
        fits, over = self.largest
        if not fits:
            return "no batch fits, not even one row per device"
        beyond = f"{over:,} do not" if over is not None else "more were not tried"
        return f"{fits:,} rows of {self.shape.tokens:,} tokens fit at once, {beyond}"


def plan(
    topology: str,
    model: config.ModelConfig,
    step: Step = "embed",
    *,
    data: config.DataConfig | config.ExamplesConfig | None = None,
    embed: config.EmbedConfig | None = None,
    lora: config.LoRAConfig | None = None,
    loss: config.LossConfig | None = None,
    train: config.TrainConfig | None = None,
    mesh: config.MeshConfig | None = None,
    batch: int | None = None,
    tokens: int | None = None,
    params: Params | None = None,
    species: int | None = None,
    largest: bool = False,
) -> Plan:
    """Plan one step of embed or finetune (--step) for TPUs: its memory, its cost, and whether it fits.

    The step is compiled by libtpu's compiler, where that is installed; without it only the arithmetic is done. No
    weights are read and no TPU is needed.

    Args:
        topology: v3-8, v4-8, v5e-8, v6e-8, or a larger slice, up to v5e-256.
        model: Which model; its weights are not read.
        step: embed, or finetune (with the optimizer).
        data: If data.path is given, the lengths of some of its rows are read; labels are not.
        embed: Pooling, layer and batching; for embed.
        lora: The adapters; for finetune, as are the next two.
        loss: Objective and heads.
        train: What is trained, and how a batch is split.
        mesh: How devices are laid out; all of the slice's are used, whatever mesh.data is.
        batch: Rows of the whole slice at once; what embed.batch_tokens allows, or train.batch_size, if absent.
        tokens: Tokens per row; what data.max_tokens and the model allow if absent.
        params: Replaces mesh.params.
        species: Species that the heads distinguish, for finetune; 10,000 if absent.
        largest: Find the largest batch that fits (finetune: without accumulation) even where this one does.

    Raises:
        InputError: The settings do not fit each other, or the compiler failed.

    Example:
        >>> found = bj.plan("v5e-8", bj.ModelConfig(checkpoint="random:tiny-v2"), batch=64, tokens=128)
        >>> found.tpu.devices, found.shape.rows, f"{found.traced.matmul_flops:,}"
        (8, 64, '2,684,354,560')
    """
    given = {"embed": embed, "lora": lora, "loss": loss, "train": train, "species": species}
    if step not in get_args(Step):
        raise InputError(f"--step {step!r} is unknown; pass one of {', '.join(get_args(Step))}")
    for name, value in given.items():
        if value is not None and (name == "embed") != (step == "embed"):
            raise InputError(f"--{name} does not apply to --step {step}; leave it out, or pass the other step")
    kind = config.DataConfig if step == "embed" else config.ExamplesConfig
    if not isinstance(data, kind | None):
        raise InputError(f"--step {step} takes data as a {kind.__name__}, not {type(data).__name__}")
    tpu, transformer = find_slice(topology), model_size(model)
    mesh = mesh or config.MeshConfig()
    mesh = mesh if params is None else dataclasses.replace(mesh, params=params)
    width = _width(transformer, None if data is None else data.max_tokens, tokens)
    dtype = "bfloat16" if model.dtype == "auto" else model.dtype
    views, workload = 1, None
    if step == "embed":
        embed = embed or config.EmbedConfig()
        transformer.resolve_layer(embed.layer)
        devices = _data_devices(tpu.host, mesh)
        views = embed.views
        source = data if isinstance(data, config.DataConfig) else config.DataConfig(path="")
        if batch is None:
            most_rows = source.block_rows * views
            [budget] = batch_shapes([width], devices=devices, tokens_per_device=embed.batch_tokens, most_rows=most_rows)
            batch = budget.rows * tpu.hosts
        program = EmbedProgram(transformer=transformer, dtype=dtype, embed=embed, attention=model.attention)
        if source.path:
            workload = embedding_workload(source, embed, transformer, devices)
    else:
        train = train or config.TrainConfig()
        if batch is not None:
            train = dataclasses.replace(train, batch_size=batch)
        batch = train.batch_size
        species = SPECIES if species is None else species
        if species < 1:
            raise InputError(f"--species {species} is too small; pass at least 1")
        program = FinetuneProgram(
            transformer=transformer,
            dtype=dtype,
            lora=lora or config.LoRAConfig(),
            loss=loss or config.LossConfig(),
            train=train,
            species=species,
            attention=model.attention,
        )
        if isinstance(data, config.ExamplesConfig) and data.path:
            workload = training_workload(data, train, transformer)
    shape = BatchShape(batch, width)
    return _plan(program, topology, model, mesh, shape, workload=workload, views=views, largest=largest)


def write_json(plan: Plan, path: str) -> None:
    """Writes a plan to a JSON file.

    Raises:
        InputError: The file cannot be written.
    """
    with output_file(path, "json") as partial:
        partial.write_text(plan.to_json() + "\n")


def model_size(model: config.ModelConfig) -> TransformerConfig:
    """Returns the sizes of a checkpoint without reading its weights.

    Raises:
        InputError: The sizes are unknown, the model has no layers, or an adapter is given.
    """
    name = model.checkpoint
    preset = name.removeprefix(RANDOM) if name.startswith(RANDOM) else _PUBLISHED.get(name.removeprefix(_HUB))
    if model.adapter is not None:
        raise InputError("--model.adapter cannot be planned; leave it out, it adds little to the cost of the model")
    if preset in PRESETS:
        return PRESETS[preset]
    directory = DEFAULT_DIRECTORY if name == DEFAULT else local_copy(name, "model.checkpoint")
    if directory.is_dir():
        size = read_config(directory)
        if not size.num_hidden_layers:
            raise InputError(
                f"--model.checkpoint {name} has no layers: it fits any device, and there is nothing to plan"
            )
        return size
    known = ", ".join(f"{RANDOM}{preset}" for preset in PRESETS)
    raise InputError(
        f"--model.checkpoint {name!r} is not a directory here and its size is unknown; pass a directory with "
        f"config.json, or one of {known}"
    )


def roofline(traced: Traced, chip: Chip, devices: int) -> tuple[float, float]:
    """Returns the least seconds per batch: for the matrix products at peak rate, and for reading each argument once.

    The longer of the two is the bound. It ignores everything else: activations, vector units, collectives, the host.
    """
    products = traced.matmul_passes / (devices * chip.bf16_tflops * 1e12)
    return products, traced.argument_bytes / (chip.hbm_gb_per_second * 1e9)


def _plan(
    program: Program,
    topology: str,
    model: config.ModelConfig,
    mesh: config.MeshConfig,
    shape: BatchShape,
    *,
    workload: Workload | None,
    views: int,
    largest: bool,
) -> Plan:
    if shape.rows < 1:
        raise InputError(f"--batch {shape.rows} is too small; pass at least 1")
    whole = find_slice(topology)
    tpu = whole.host if program.by_host else whole
    hosts = whole.devices // tpu.devices
    devices = _data_devices(tpu, mesh)
    _check_attention(program, whole.chip, mesh)
    if program.by_host and shape.rows % (devices * hosts):
        up = -(-shape.rows // (devices * hosts)) * devices * hosts
        raise InputError(f"--batch {shape.rows} does not split over {devices * hosts} devices; pass {up}")
    one = BatchShape(shape.rows // hosts, shape.tokens)
    shapes = [one, *(workload.batches if workload is not None else ())]
    traced, compiled = trace_and_compile(program, tpu, mesh, shapes, one if has_compiler() else None)
    found = Plan(
        topology=topology,
        tpu=whole,
        model=model.checkpoint,
        program=program,
        mesh=mesh,
        shape=shape,
        traced=traced[0],
        compiled=compiled,
        sequences=shape.rows / views,
        workload=workload,
        hours=_hours(workload, traced[1:], whole.chip, tpu.devices, hosts),
        not_padding=_not_padding(workload, program, devices),
        largest=None,
        notes=(),
    )
    if compiled is not None and (largest or not found.fits):
        found = dataclasses.replace(found, largest=_largest(found, tpu, devices, hosts))
    return dataclasses.replace(found, notes=tuple(_notes(found, tpu, devices)))


def _largest(plan: Plan, tpu: Slice, devices: int, hosts: int) -> tuple[int, int | None]:
    """Searches the largest batch by compiling for other numbers of rows, without accumulation."""
    tokens = plan.shape.tokens

    def bytes_of(rows: int) -> int:
        program = _unaccumulated(plan.program, rows * tokens)
        shape = BatchShape(rows * devices, tokens)
        traced, compiled = trace_and_compile(program, tpu, plan.mesh, [shape], shape)
        ahead = program.bytes_ahead(shape, devices)
        if isinstance(compiled, TooLarge):
            return traced[0].argument_bytes + compiled.temporaries + ahead
        assert compiled is not None
        return compiled.total + ahead

    rows, used = -(-plan.shape.rows // (devices * hosts)), round((plan.hbm_gib or 0.0) * _GIB)
    if isinstance(plan.program, FinetuneProgram):
        parts, in_part = microbatch_shape(plan.shape.rows, tokens, devices, plan.program.train.batch_tokens)
        if parts > 1:
            rows = in_part // devices
            used = bytes_of(rows)
    available = round(plan.tpu.chip.hbm_gib * _GIB)
    fits, over = largest_rows(bytes_of, rows, used, fixed=plan.traced.argument_bytes, available=available)
    return fits * devices * hosts, None if over is None else over * devices * hosts


def _unaccumulated(program: Program, tokens: int) -> Program:
    if isinstance(program, FinetuneProgram):
        return dataclasses.replace(program, train=dataclasses.replace(program.train, batch_tokens=max(tokens, 2)))
    return program


def _notes(plan: Plan, tpu: Slice, devices: int) -> list[str]:
    """Lists remarks on the plan, and what to change if the step does not fit."""
    notes, mesh = [], plan.mesh
    if mesh.data not in (-1, devices):
        notes.append(f"mesh.data {mesh.data} is for another slice: planned with {devices}; run with --mesh.data -1")
    if plan.program.by_host and plan.tpu.hosts > 1:
        notes.append(f"each host embeds batches of its own: compiled for the {tpu.devices} devices of one host")
    if plan.compiled is None:
        notes.append(f"arithmetic only, nothing was compiled: libtpu is not installed; {INSTALL}")
    if plan.fits is False:
        notes += _fixes(plan, tpu, devices)
    return notes


def _fixes(plan: Plan, tpu: Slice, devices: int) -> list[str]:
    fixes, program = [], plan.program
    if plan.largest is not None and plan.largest[0]:
        rows = plan.largest[0]
        budget = rows // (devices * plan.hosts) * plan.shape.tokens
        group = "train" if isinstance(program, FinetuneProgram) else "embed"
        fixes.append(f"smaller batch: --{group}.batch_tokens {budget} ({rows:,} rows at once)")
    if isinstance(program, FinetuneProgram) and program.train.remat == "none":
        fixes.append("recompute layers in the backward pass: --train.remat layer")
    if plan.mesh.params == "replicated" and devices > 1:
        mesh = dataclasses.replace(plan.mesh, params="fsdp")
        shape = BatchShape(plan.shape.rows // plan.hosts, plan.shape.tokens)
        traced, _ = trace_and_compile(program, tpu, mesh, [shape], None)
        less, now = traced[0].argument_bytes / _GIB, plan.traced.argument_bytes / _GIB
        fixes.append(f"split the parameters: --mesh.params fsdp keeps {less:.2f} GiB per device instead of {now:.2f}")
    if program.dtype == "float32":
        fixes.append("halve the parameters' bytes: --model.dtype bfloat16")
    fixes.append("shorter rows: a smaller --data.max_tokens")
    return fixes


def _hours(workload: Workload | None, traced: list[Traced], chip: Chip, devices: int, hosts: int) -> float | None:
    """Returns the least time for a workload's batches, shared by the hosts."""
    if workload is None:
        return None
    seconds = {one.shape: max(roofline(one, chip, devices)) for one in traced}
    return sum(count * seconds[shape] for shape, count in workload.batches.items()) / hosts / 3600.0


def _not_padding(workload: Workload | None, program: Program, devices: int) -> float | None:
    """Returns the share of the model's matrix products that is not spent on padding."""
    if workload is None:
        return None
    layers, flops_of = None, program.transformer.forward_flops
    if isinstance(program, EmbedProgram):
        layers = program.transformer.resolve_layer(program.embed.layer)
        if layers == 0:
            return 1.0
    computed = 0
    for shape, count in workload.batches.items():
        rows = shape.rows
        if isinstance(program, FinetuneProgram):
            parts, in_part = microbatch_shape(rows, shape.tokens, devices, program.train.batch_tokens)
            rows = parts * in_part
        computed += count * flops_of(rows * shape.tokens, shape.tokens, layers)
    return sum(flops_of(int(n), int(n), layers) for n in workload.lengths) / computed


def _check_attention(program: Program, chip: Chip, mesh: config.MeshConfig) -> None:
    """Raises InputError where the requested attention cannot run on these devices."""
    setting = AttentionSetting(
        platform="tpu",
        device_kind=chip.device_kind,
        capability=None,
        dtype=program.dtype,
        heads=program.transformer.num_attention_heads,
        head_dim=program.transformer.head_dim,
        head_devices=mesh.model,
    )
    choose_attention(program.attention, setting, tokens=0)


def _width(transformer: TransformerConfig, max_tokens: int | None, tokens: int | None) -> int:
    limit = transformer.max_tokens
    for flag, value in (("data.max_tokens", max_tokens), ("tokens", tokens)):
        if value is not None and not 2 <= value <= limit:
            raise InputError(f"--{flag} {value} is outside 2 to the {limit} positions of the model")
    return tokens or max_tokens or limit


def _data_devices(tpu: Slice, mesh: config.MeshConfig) -> int:
    if tpu.devices % mesh.model:
        raise InputError(f"--mesh.model {mesh.model} does not divide the {tpu.devices} devices that share a batch")
    return tpu.devices // mesh.model


def _moved(compiled: Compiled) -> str:
    """Describes the collectives by kind, those inside loops first."""
    groups: dict[tuple[bool, str, str], list[int]] = {}
    for one in compiled.collectives:
        groups.setdefault((not one.in_loop, one.kind, one.dtype), []).append(one.bytes)
    parts = [
        f"{len(sizes)} {kind} of {dtype} ({sum(sizes) / 2**20:.1f} MiB) {'once' if outside else 'per iteration of a loop'}"
        for (outside, kind, dtype), sizes in sorted(groups.items())
    ]
    return "; ".join(parts) or "no data between devices"


def _by_tokens(item: tuple[BatchShape, int]) -> int:
    return item[0].tokens
