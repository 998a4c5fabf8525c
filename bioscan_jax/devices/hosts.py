"""What several processes tell each other, through the key-value store that jax.distributed keeps on process 0.

Collectives on the devices could carry it too, but they queue behind the devices' work, have time limits of their own
(30 s on CPU) and leave a process for good in a call that another one failed to reach.
"""

import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

# The store has no public name; multihost_utils and orbax take it from here as well.
from jax._src import distributed

from bioscan_jax import config
from bioscan_jax.errors import InputError, Interrupted

_GATHERED = "bioscan_jax/gathered"
_FAILED = "bioscan_jax/failed"
_LOOK_MILLISECONDS = 500
"""How often a waiting process looks whether another one has failed."""
_calls = itertools.count()


def join(mesh: config.MeshConfig) -> None:
    """Makes this process one of several; once they are joined, another call changes nothing.

    Raises:
        InputError: The coordinator, the number of processes or this one's number is wrong, or cannot be found out.
    """
    if jax.distributed.is_initialized():
        return
    if mesh.coordinator is not None:
        _check_coordinator(mesh.coordinator, here=mesh.process_id == 0)
    # JAX's own preemption service would take each SIGTERM before stop_on_signals does, and may hang at exit after one.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(mesh.coordinator, mesh.processes, mesh.process_id)
    except (ValueError, RuntimeError) as error:
        given = f"coordinator {mesh.coordinator}, processes {mesh.processes}, process_id {mesh.process_id}"
        raise InputError(
            f"jax.distributed cannot start with {given} ({' '.join(str(error).split())}); pass --mesh.coordinator "
            "HOST:PORT (a free port of process 0), --mesh.processes and --mesh.process_id, or none of them on Cloud TPU"
        ) from error
    jax.devices()  # the processes wait for each other here, before one of them can fail alone


def _check_coordinator(coordinator: str, *, here: bool) -> None:
    port = coordinator.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--mesh.coordinator {coordinator!r} has no port; pass HOST:PORT of process 0")
    if here:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:  # where JAX itself finds the port taken, it may crash
            mend = "pass another port, or stop what listens there"
            why = os.strerror(error.errno) if error.errno else error
            raise InputError(f"--mesh.coordinator {coordinator!r}: {why}; {mend}") from error


def gather_bytes(payload: bytes) -> Sequence[bytes]:
    """Every process's payload, in the order of the processes, on every process.

    All processes must call it the same number of times, from one thread at a time. It waits as long as the others
    take; jax.distributed ends this process where another one dies without a word.

    Raises:
        InputError: Another process failed (see `failing_together`), or `--mesh.distributed` was forgotten.
    """
    processes, process = jax.process_count(), jax.process_index()
    if processes == 1:
        return [payload]
    store = distributed.global_state.client
    if store is None:
        raise InputError(f"there are {processes} processes that do not know each other; pass --mesh.distributed true")
    _raise_if_failed(store)
    number = next(_calls)
    store.key_value_set_bytes(f"{_GATHERED}/{number}/{process}", payload)
    every = [_wait_for(store, f"{_GATHERED}/{number}/{other}") for other in range(processes)]
    if number:  # all are past the call before this one, so nobody still wants its payloads
        store.key_value_delete(f"{_GATHERED}/{number - 1}/{process}")
    return every


def agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag as it is on any process; the rules of `gather_bytes` hold."""
    every = gather_bytes(bytes(flags))
    return tuple(any(one) for one in zip(*every, strict=True))


@contextmanager
def failing_together() -> Iterator[None]:
    """Tells the other processes when this one fails, so that their `gather_bytes` raises within a second.

    A requested stop (`Interrupted`) is not a failure. Processes that failed must be started again. Also a decorator.
    """
    try:
        yield
    except Interrupted:
        raise
    except BaseException as error:
        state = distributed.global_state
        if state.client is not None:
            what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            message = f"process {state.process_id} on {socket.gethostname()} failed, and the others with it: {what}"
            with suppress(jax.errors.JaxRuntimeError):  # the store may have gone, or hold this process's failure
                if not state.client.key_value_dir_get(_FAILED):
                    state.client.key_value_set(f"{_FAILED}/{state.process_id}", message)
        raise


def _wait_for(store: Any, key: str) -> bytes:
    while True:
        try:
            return store.blocking_key_value_get_bytes(key, _LOOK_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        _raise_if_failed(store)


def _raise_if_failed(store: Any) -> None:
    for _, message in store.key_value_dir_get(_FAILED):
        raise InputError(message)
