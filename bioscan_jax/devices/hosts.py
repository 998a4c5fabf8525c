"""Messages between processes, through the key-value store that jax.distributed keeps on process 0.

Device collectives are not used for this: they queue behind the devices' work, have time limits of their own (30 s on
CPU), and hang a process for good if another one fails before it joins the call.
"""

import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

# The store has no public name; jax.experimental.multihost_utils and orbax import it from here as well.
from jax._src import distributed

from bioscan_jax import config
from bioscan_jax.errors import InputError, Interrupted

_GATHERED = "bioscan_jax/gathered"
_FAILED = "bioscan_jax/failed"
_POLL_MILLISECONDS = 500
"""How often a waiting process checks whether another one has failed."""
_calls = itertools.count()


def initialize_distributed(mesh: config.MeshConfig) -> None:
    """Connects this process to the others of the run; does nothing if it is connected already.

    Raises:
        InputError: The coordinator, the number of processes or this process's number is wrong or cannot be detected.
    """
    if jax.distributed.is_initialized():
        return
    if mesh.coordinator is not None:
        _check_coordinator(mesh.coordinator, here=mesh.process_id == 0)
    # JAX's own preemption service would catch SIGTERM before stop_on_signals does, and may hang at exit afterwards.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(mesh.coordinator, mesh.processes, mesh.process_id)
    except (ValueError, RuntimeError) as error:
        given = f"coordinator {mesh.coordinator}, processes {mesh.processes}, process_id {mesh.process_id}"
        raise InputError(
            f"jax.distributed cannot start with {given} ({' '.join(str(error).split())}); pass --mesh.coordinator "
            "HOST:PORT (a free port of process 0), --mesh.processes and --mesh.process_id, or none of them on Cloud TPU"
        ) from error
    jax.devices()  # waits for all processes, so that none fails before the others can hear of it


def _check_coordinator(coordinator: str, *, here: bool) -> None:
    port = coordinator.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--mesh.coordinator {coordinator!r} has no port; pass HOST:PORT of process 0")
    if here:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # JAX itself may crash on a port in use
            why = os.strerror(error.errno) if error.errno else error
            raise InputError(
                f"--mesh.coordinator {coordinator!r}: {why}; pass another port, or stop the program that uses it"
            ) from error


def gather_bytes(payload: bytes) -> Sequence[bytes]:
    """Returns the payloads of all processes, in process order, on every process.

    All processes must call it equally often, from one thread at a time. It waits as long as the others take;
    jax.distributed ends this process if another one is killed.

    Raises:
        InputError: Another process failed (see `propagate_failure`), or `--mesh.distributed` is missing.
    """
    processes, process = jax.process_count(), jax.process_index()
    if processes == 1:
        return [payload]
    store = distributed.global_state.client
    if store is None:
        raise InputError(f"there are {processes} processes that are not connected; pass --mesh.distributed true")
    _raise_if_failed(store)
    number = next(_calls)
    store.key_value_set_bytes(f"{_GATHERED}/{number}/{process}", payload)
    payloads = [_wait_for(store, f"{_GATHERED}/{number}/{other}") for other in range(processes)]
    if number:  # all processes have left the previous call, so its payloads are no longer needed
        store.key_value_delete(f"{_GATHERED}/{number - 1}/{process}")
    return payloads


def any_process(*flags: bool) -> tuple[bool, ...]:
    """Returns for each flag whether it is true on any process; called like `gather_bytes`."""
    return tuple(map(any, zip(*gather_bytes(bytes(flags)), strict=True)))


@contextmanager
def propagate_failure() -> Iterator[None]:
    """Reports an exception of this process to the others, so that their `gather_bytes` raises within a second.

    Works as a context manager and as a decorator. A requested stop (`Interrupted`) is not a failure. After a failure
    all processes must be started again.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        state = distributed.global_state
        if state.client is not None:
            what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            message = f"process {state.process_id} on {socket.gethostname()} failed, so all processes stop: {what}"
            with suppress(jax.errors.JaxRuntimeError):  # the store may be gone, or already hold this process's failure
                if not state.client.key_value_dir_get(_FAILED):
                    state.client.key_value_set(f"{_FAILED}/{state.process_id}", message)
        raise


def _wait_for(store: Any, key: str) -> bytes:
    while True:
        try:
            return store.blocking_key_value_get_bytes(key, _POLL_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        _raise_if_failed(store)


def _raise_if_failed(store: Any) -> None:
    for _, message in store.key_value_dir_get(_FAILED):
        raise InputError(message)
