"""Asks a process of its own for the devices, and whether a step fits on them, since a busy TPU may never answer."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field

import jax

# JAX falls back to the next platform without raising; its reasons have no public name.
from jax._src import xla_bridge

from bioscan_jax import config
from bioscan_jax.data.batching import BatchShape, batch_shapes
from bioscan_jax.devices.memory import Memory, device_memory, is_out_of_memory
from bioscan_jax.devices.sharding import compute_dtype, make_layout
from bioscan_jax.embedding.fitting import Fit, find_fit
from bioscan_jax.errors import InputError
from bioscan_jax.planning.programs import EmbedProgram, FinetuneProgram, Program
from bioscan_jax.training.step import microbatch_shape

_KILLED_SECONDS = 2.0
"""Most seconds to wait for a killed process, which a driver may hold for good."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What JAX finds on this machine."""

    platform: str
    """tpu, gpu or cpu."""
    kind: str
    """`jax.Device.device_kind`."""
    count: int
    memory: Memory | None
    """Of each device; None where it is not known."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why JAX passed over a platform that it tried first: tpu or cuda."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step to compile for the devices that are here."""

    program: Program
    """Its dtype may be auto."""
    mesh: config.MeshConfig
    rows: int
    """Embed: most rows of a block. Finetune: rows of an optimizer step."""
    tokens: int


@dataclass(frozen=True, kw_only=True)
class StepFit:
    """How a step fits on the devices."""

    shape: BatchShape
    devices: int
    """Devices that split the batch."""
    dtype: str
    found: Fit | None
    """None where the memory or what the step needs is unknown."""


@dataclass(frozen=True)
class Failure:
    """Why there is no answer."""

    text: str
    """The last line that the process wrote; empty if it was still at work."""


def ask(question: Step | None, seconds: float) -> Devices | StepFit | Failure | InputError:
    """Asks a new process, and never waits longer than it is told; where this one has started a TPU or GPU, asks itself.

    Args:
        question: The step that should fit; None asks for the devices.
        seconds: Most seconds to wait; the process is killed then.

    Returns:
        The answer; a Failure without text if there was none in time; the InputError that the run itself would raise.
    """
    if xla_bridge.backends_are_initialized() and jax.default_backend() != "cpu":
        return _answer(question)  # a notebook: its TPU or GPU is its own, and another process could not have it
    process = subprocess.Popen(
        [sys.executable, "-c", "from bioscan_jax.planning.probe import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    try:
        answer, messages = process.communicate(pickle.dumps(question), timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_SECONDS)
        return Failure("")
    if process.returncode:
        lines = [line.strip() for line in messages.decode(errors="replace").splitlines() if line.strip()]
        return Failure(lines[-1][:300] if lines else f"exit code {process.returncode}")
    return pickle.loads(answer)


def serve() -> None:
    """Answers one pickled question from stdin, pickled to stdout; what libraries print goes to stderr instead."""
    with os.fdopen(os.dup(1), "wb") as stdout:
        os.dup2(2, 1)
        question: Step | None = pickle.load(sys.stdin.buffer)
        pickle.dump(_answer(question), stdout)


def _answer(question: Step | None) -> Devices | StepFit | InputError:
    try:
        return _devices() if question is None else _fit(question)
    except InputError as error:
        return error


def _devices() -> Devices:
    devices = jax.local_devices()
    one = devices[0]
    errors = {name: " ".join(text.split())[:200] for name, text in xla_bridge._backend_errors.items()}
    return Devices(
        platform=one.platform, kind=one.device_kind, count=len(devices), memory=device_memory(one), errors=errors
    )


def _fit(step: Step) -> StepFit:
    layout, program, tokens = make_layout(step.mesh), step.program, step.tokens
    devices, memory = layout.data_devices, device_memory(layout.mesh.devices.flat[0])
    dtype = program.dtype if program.dtype != "auto" else jax.numpy.dtype(compute_dtype("auto")).name
    program = dataclasses.replace(program, dtype=dtype)
    if isinstance(program, EmbedProgram):
        budget = program.embed.batch_tokens
        [shape] = batch_shapes([tokens], devices=devices, tokens_per_device=budget, most_rows=step.rows)
    else:
        shape = BatchShape(microbatch_shape(step.rows, tokens, devices, program.train.batch_tokens)[1], tokens)

    def compile_step(shape: BatchShape) -> jax.stages.Compiled:
        whole, of_shape = shape, program
        if isinstance(program, FinetuneProgram):
            budget = max(2, shape.rows // devices * tokens)
            of_shape = dataclasses.replace(program, train=dataclasses.replace(program.train, batch_tokens=budget))
            whole = BatchShape(step.rows, tokens)
        run, arguments = of_shape.build(layout, whole)
        return run.lower(*arguments).compile()

    found = None
    if memory is not None:
        try:
            found = find_fit(compile_step, shape, devices, memory.free, weights_placed=False)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return StepFit(shape=shape, devices=devices, dtype=dtype, found=found)
