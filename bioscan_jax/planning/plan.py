"""What a step needs and costs at least on a slice of TPUs, before anybody pays for it.

Memory, collectives and loops are the compiler's word on the very program that would run. Times are bounds from the
chip's peaks: nothing is ever as fast.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from bioscan_jax import config
from bioscan_jax.checkpoints.load import RANDOM
from bioscan_jax.data.batching import BatchShape, batch_shapes
from bioscan_jax.devices.chips import Chip, Slice, find_slice
from bioscan_jax.errors import InputError
from bioscan_jax.model.attention import Site, choose
from bioscan_jax.model.config import PRESETS, TransformerConfig, read_config
from bioscan_jax.output import whole_file
from bioscan_jax.planning.aot import INSTALL, TooLarge, Traced, has_compiler, trace_and_compile
from bioscan_jax.planning.fit import largest_rows
from bioscan_jax.planning.planned import Plan, roofline
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram, Program
from bioscan_jax.planning.workload import Workload, embedding_workload, training_workload
from bioscan_jax.training.step import microbatch_shape

Params = Literal["replicated", "fsdp"]
_GIB = 2**30
_NO_DATA, _NO_EXAMPLES = config.DataConfig(path=""), config.ExamplesConfig(path="")
_EMBED, _MESH, _LORA, _LOSS, _TRAIN = (
    config.EmbedConfig(),
    config.MeshConfig(),
    config.LoRAConfig(),
    config.LossConfig(),
    config.TrainConfig(),
)
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
"""Sizes of the checkpoints on the hub: nothing is downloaded to plan."""


def plan_embed(
    topology: str,
    model: config.ModelConfig,
    data: config.DataConfig = _NO_DATA,
    embed: config.EmbedConfig = _EMBED,
    mesh: config.MeshConfig = _MESH,
    batch: int | None = None,
    tokens: int | None = None,
    params: Params | None = None,
    largest: bool = False,
) -> Plan:
    """Say what the step of embed (of finetune: --step finetune) needs and costs at least, by compiling it for TPUs.

    Args:
        topology: v3-8, v4-8, v5e-8, v6e-8, or a larger slice, up to v5e-256.
        model: Which model; its weights are not read.
        data: If data.path is given, the lengths of its first rows are read.
        embed: Pooling, layer and batching.
        mesh: How devices are laid out; all of the slice's are used, whatever mesh.data says.
        batch: Rows of the whole slice at once; what embed.batch_tokens allows if absent.
        tokens: Tokens of a row; what data.max_tokens and the model allow if absent.
        params: Instead of mesh.params.
        largest: Find the largest batch that fits also where this one does.

    Raises:
        InputError: The settings do not fit each other, or the compiler failed.
    """
    tpu, transformer = find_slice(topology), model_size(model)
    transformer.resolve_layer(embed.layer)
    width = _width(transformer, data.max_tokens, tokens)
    devices = _data_devices(tpu.host, mesh)
    views = embed.phases * (2 if embed.strand == "both" else 1)
    if batch is None:
        budget = batch_shapes(
            [width], devices=devices, tokens_per_device=embed.batch_tokens, most_rows=data.block_rows * views
        )
        batch = budget[0].rows * tpu.hosts
    return _plan(
        EmbedProgram(transformer=transformer, dtype=_dtype(model), embed=embed, attention=model.attention),
        topology,
        model,
        mesh if params is None else dataclasses.replace(mesh, params=params),
        BatchShape(batch, width),
        workload=embedding_workload(data, embed, transformer, devices) if data.path else None,
        views=views,
        largest=largest,
    )


def plan_finetune(
    topology: str,
    model: config.ModelConfig,
    data: config.ExamplesConfig = _NO_EXAMPLES,
    lora: config.LoRAConfig = _LORA,
    loss: config.LossConfig = _LOSS,
    train: config.TrainConfig = _TRAIN,
    mesh: config.MeshConfig = _MESH,
    batch: int | None = None,
    tokens: int | None = None,
    params: Params | None = None,
    species: int = 10_000,
    largest: bool = False,
) -> Plan:
    """Say what the step of finetune, optimizer included, needs and costs at least, by compiling it for TPUs.

    Args:
        topology: v3-8, v4-8, v5e-8, v6e-8, or a larger slice, up to v5e-256.
        model: Which model; its weights are not read.
        data: If data.path is given, the lengths of its first rows are read; labels are not.
        lora: The adapters.
        loss: Objective and heads.
        train: What is trained, and how a batch is worked.
        mesh: How devices are laid out; all of the slice's are used, whatever mesh.data says.
        batch: Rows of an optimizer step; train.batch_size if absent.
        tokens: Tokens of a row; what data.max_tokens and the model allow if absent.
        params: Instead of mesh.params.
        species: That the heads tell apart.
        largest: Find the largest batch that fits, without accumulation, also where this one does.

    Raises:
        InputError: The settings do not fit each other, or the compiler failed.
    """
    find_slice(topology)
    transformer = model_size(model)
    if batch is not None:
        train = dataclasses.replace(train, batch_size=batch)
    if species < 1:
        raise InputError(f"--species {species} is too small; pass at least 1")
    return _plan(
        FinetuneProgram(
            transformer=transformer,
            dtype=_dtype(model),
            lora=lora,
            loss=loss,
            train=train,
            species=species,
            attention=model.attention,
        ),
        topology,
        model,
        mesh if params is None else dataclasses.replace(mesh, params=params),
        BatchShape(train.batch_size, _width(transformer, data.max_tokens, tokens)),
        workload=training_workload(data, train, transformer) if data.path else None,
        views=1,
        largest=largest,
    )


STEPS: dict[str, Callable[..., Plan]] = {"embed": plan_embed, "finetune": plan_finetune}


def write_json(plan: Plan, path: str) -> None:
    """Writes `Plan.to_json` to a file.

    Raises:
        InputError: It cannot be written.
    """
    try:
        with whole_file(path) as partial:
            partial.write_text(plan.to_json() + "\n")
    except OSError as error:
        raise InputError(f"--json {path}: cannot be written ({error.strerror}); pass another path") from error


def model_size(model: config.ModelConfig) -> TransformerConfig:
    """The sizes of a checkpoint, without its weights.

    Raises:
        InputError: They are not known.
    """
    name = model.checkpoint
    preset = name.removeprefix(RANDOM) if name.startswith(RANDOM) else _PUBLISHED.get(name.removeprefix(_HUB))
    if model.adapter is not None:
        raise InputError("--model.adapter is not planned for; leave it out, it adds little to the model's own products")
    if preset in PRESETS:
        return PRESETS[preset]
    directory = Path(name).expanduser()
    if directory.is_dir():
        return read_config(directory)
    known = ", ".join(f"{RANDOM}{preset}" for preset in PRESETS)
    raise InputError(
        f"--model.checkpoint {name!r} is not a directory here and its size is not known; pass a directory with "
        f"config.json, or one of {known}"
    )


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
    plan = Plan(
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
    if compiled is not None and (largest or not plan.fits):
        plan = dataclasses.replace(plan, largest=_largest(plan, tpu, devices, hosts))
    return dataclasses.replace(plan, notes=tuple(_notes(plan, tpu, devices)))


def _largest(plan: Plan, tpu: Slice, devices: int, hosts: int) -> tuple[int, int | None]:
    """Compiles for other numbers of rows, each worked at once."""
    tokens = plan.shape.tokens

    def bytes_of(rows: int) -> int:
        program = _unaccumulated(plan.program, rows * tokens)
        shape = BatchShape(rows * devices, tokens)
        traced, compiled = trace_and_compile(program, tpu, plan.mesh, [shape], shape)
        if isinstance(compiled, TooLarge):
            return traced[0].argument_bytes + compiled.temporaries
        assert compiled is not None
        return compiled.hbm_bytes

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
    """What to know, and what to change where it does not fit."""
    notes, mesh = [], plan.mesh
    if mesh.data not in (-1, devices):
        notes.append(f"mesh.data {mesh.data} is for another slice: planned with {devices}; run with --mesh.data -1")
    if plan.program.by_host and plan.tpu.hosts > 1:
        notes.append(f"each host embeds batches of its own: compiled for the {tpu.devices} devices of one")
    if plan.compiled is None:
        notes.append(f"arithmetic only, nothing was compiled: libtpu is not installed; {INSTALL}")
    if plan.fits is False:
        notes += _mend(plan, tpu, devices)
    return notes


def _mend(plan: Plan, tpu: Slice, devices: int) -> list[str]:
    mend, program = [], plan.program
    if plan.largest is not None and plan.largest[0]:
        rows = plan.largest[0]
        budget = rows // (devices * plan.hosts) * plan.shape.tokens
        group = "train" if isinstance(program, FinetuneProgram) else "embed"
        mend.append(f"smaller batch: --{group}.batch_tokens {budget} ({rows:,} rows at once)")
    if isinstance(program, FinetuneProgram) and program.train.remat == "none":
        mend.append("compute layers again in the backward pass: --train.remat layer")
    if plan.mesh.params == "replicated" and devices > 1:
        mesh = dataclasses.replace(plan.mesh, params="fsdp")
        shape = BatchShape(plan.shape.rows // plan.hosts, plan.shape.tokens)
        traced, _ = trace_and_compile(program, tpu, mesh, [shape], None)
        less, now = traced[0].argument_bytes / _GIB, plan.traced.argument_bytes / _GIB
        mend.append(f"split the parameters: --mesh.params fsdp keeps {less:.2f} GiB of them a device, not {now:.2f}")
    if program.dtype == "float32":
        mend.append("half the parameters' bytes: --model.dtype bfloat16")
    mend.append("narrower rows: a smaller --data.max_tokens")
    return mend


def _hours(workload: Workload | None, traced: list[Traced], chip: Chip, devices: int, hosts: int) -> float | None:
    """Least time of a workload's batches, shared by the hosts."""
    if workload is None:
        return None
    seconds = {one.shape: max(roofline(one, chip, devices)) for one in traced}
    return sum(count * seconds[shape] for shape, count in workload.batches.items()) / hosts / 3600.0


def _not_padding(workload: Workload | None, program: Program, devices: int) -> float | None:
    """Share of the trunk's products that rows of just their own tokens would take."""
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
    """Raises InputError where the attention asked for cannot work on such devices."""
    where = Site(
        platform="tpu",
        device_kind=chip.device_kind,
        capability=None,
        dtype=program.dtype,
        heads=program.transformer.num_attention_heads,
        head_dim=program.transformer.head_dim,
        sharing=mesh.model,
    )
    choose(program.attention, where, tokens=0)


def _dtype(model: config.ModelConfig) -> str:
    return "bfloat16" if model.dtype == "auto" else model.dtype


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
