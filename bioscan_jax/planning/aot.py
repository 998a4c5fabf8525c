"""Traces a step and compiles it for TPUs without having one, with libtpu's compiler in a separate process."""

import dataclasses
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import jax
import numpy as np

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.chips import Slice
from bioscan_jax.devices.memory import NeededMemory, needed_memory
from bioscan_jax.devices.sharding import Layout, make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.planning import hlo
from bioscan_jax.planning.flops import dots
from bioscan_jax.planning.programs import Program, argument_bytes

INSTALL = "pip install 'jax[tpu]==0.10.2' (the extra `aot` of bioscan_jax); no TPU is needed"
_SECONDS_AT_MOST = 1200
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # JAX looks for a TPU otherwise, and takes libtpu's lock
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",  # any known one; the topology names the actual target
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # these programs cannot be loaded without a TPU
}
"""Environment of the compiling process, set before it imports JAX."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Counts of a step that need no compiler."""

    shape: BatchShape
    matmul_flops: int
    """FLOPs of the matrix products, summed over all devices that share the batch."""
    matmul_passes: int
    """The same, each product multiplied by the bfloat16 passes that it needs."""
    argument_bytes: int
    """Bytes on one device: parameters, the optimizer's state and the batch."""


@dataclass(frozen=True, kw_only=True)
class Compiled(NeededMemory):
    """The compiler's report on a step."""

    collectives: tuple[hlo.Collective, ...]
    trip_counts: tuple[int | None, ...]
    seconds: float
    libtpu: str


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """The compiler gave up: the temporaries alone exceed the memory."""

    temporaries: int


@dataclass(frozen=True, kw_only=True)
class _Request:
    program: Program
    tpu: Slice
    mesh: config.MeshConfig
    traced: tuple[BatchShape, ...]
    compiled: BatchShape | None


def has_compiler() -> bool:
    """Returns whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def trace_and_compile(
    program: Program, tpu: Slice, mesh: config.MeshConfig, traced: Sequence[BatchShape], compiled: BatchShape | None
) -> tuple[list[Traced], Compiled | TooLarge | None]:
    """Traces a step for several batch shapes and compiles it for one, in a separate process.

    Args:
        program: The step.
        tpu: Devices that share one batch.
        mesh: How they are laid out; all of them are used, whatever `mesh.data` is.
        traced: Batch shapes to trace.
        compiled: Batch shape to compile for, which needs `has_compiler`; None for none.

    Raises:
        InputError: The devices do not suit the step, or the compiler failed.
    """
    request = _Request(program=program, tpu=tpu, mesh=mesh, traced=tuple(traced), compiled=compiled)
    devices = f"--xla_force_host_platform_device_count={tpu.devices}"
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()}
    try:
        ran = subprocess.run(
            [sys.executable, "-c", "from bioscan_jax.planning.aot import serve; serve()"],
            input=pickle.dumps(request),
            env=environment,
            capture_output=True,
            timeout=_SECONDS_AT_MOST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"the compiler did not finish within {_SECONDS_AT_MOST} s for {compiled}; pass a smaller --batch or --tokens"
        ) from None
    if ran.returncode:
        messages = [line for line in ran.stderr.decode(errors="replace").splitlines() if line.strip()]
        raise InputError(
            f"the compiler failed for {compiled} on {tpu.topology[0]} with exit code {ran.returncode}: "
            f"{messages[-1] if messages else 'without a message'}; versions of libtpu other than that of "
            "jax[tpu]==0.10.2 may crash"
        )
    answer = pickle.loads(ran.stdout)
    if isinstance(answer, InputError):
        raise answer
    return answer


def serve() -> None:
    """Answers one pickled request from stdin, pickled to stdout; libtpu's own output goes to stderr instead."""
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)
        request: _Request = pickle.load(sys.stdin.buffer)
        answer: object
        try:
            answer = _answer(request)
        except InputError as error:
            answer = error
        pickle.dump(answer, stdout)


def _answer(request: _Request) -> tuple[list[Traced], Compiled | TooLarge | None]:
    """Traces and compiles in this process, which must have as many devices as the request."""
    layout = make_layout(dataclasses.replace(request.mesh, data=-1))
    # The devices here are CPUs, which have no TPU kernels; dense attention has the same matrix products.
    dense = dataclasses.replace(request.program, attention="dense")
    traced = [trace(dense, layout, shape) for shape in request.traced]
    if request.compiled is None:
        return traced, None
    return traced, compile_step(request.program, on_topology(layout, request.tpu), request.compiled)


def trace(program: Program, layout: Layout, shape: BatchShape) -> Traced:
    """Counts the FLOPs and argument bytes of a step, on devices of any kind."""
    step, arguments = program.build(layout, shape)
    found = dots(step.trace(*arguments).jaxpr)
    return Traced(
        shape=shape,
        matmul_flops=sum(dot.flops for dot in found),
        matmul_passes=sum(dot.flops * dot.passes for dot in found),
        argument_bytes=argument_bytes(arguments),
    )


def on_topology(layout: Layout, tpu: Slice) -> Layout:
    """Moves a layout to the devices of a slice; needs libtpu, and `ENVIRONMENT` set before JAX was imported."""
    from jax.experimental import topologies

    name, options = tpu.topology
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    mesh = layout.mesh
    there = jax.sharding.Mesh(devices.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)
    return dataclasses.replace(layout, mesh=there)


def compile_step(program: Program, layout: Layout, shape: BatchShape) -> Compiled | TooLarge:
    """Compiles a step for the devices of a topology."""
    step, arguments = program.build(layout, shape)
    lowered = step.trace(*arguments).lower()
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"temporaries \(([\d.]+)G\) exceeds", str(error)):
            return TooLarge(temporaries=int(float(found.group(1)) * 2**30))
        raise
    seconds = time.perf_counter() - start
    memory, text = needed_memory(compiled), compiled.as_text()
    assert memory is not None  # libtpu says it
    return Compiled(
        **dataclasses.asdict(memory),
        collectives=tuple(hlo.collectives(text)),
        trip_counts=tuple(hlo.trip_counts(text)),
        seconds=seconds,
        libtpu=metadata.version("libtpu"),
    )
