"""Memory: what a compiled program needs, what a device and this machine have, and errors where it runs out."""

import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bioscan_jax.errors import InputError, one_line

_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class NeededMemory:
    """The compiler's report, in bytes per device."""

    arguments: int
    outputs: int
    aliased: int
    """Outputs stored in the memory of donated arguments."""
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """Memory that the program needs at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


def needed_memory(compiled: jax.stages.Compiled) -> NeededMemory | None:
    """Returns what the compiler says of a program's memory; None where the platform does not say.

    Example:
        >>> import jax.numpy as jnp
        >>> memory = needed_memory(jax.jit(jnp.sin).lower(jnp.ones(256)).compile())
        >>> memory is not None and memory.arguments
        1024
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return NeededMemory(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of memory that a program may use."""

    total: int
    free: int


def host_memory() -> Memory:
    """Returns the memory of this machine that this process may use: what a container or `ulimit -v` allows, if less.

    Example:
        >>> host_memory().total >= host_memory().free > 0
        True
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = [Memory(total, total)]
    with suppress(OSError, TypeError):
        given = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
        found.append(Memory(total, int(given[1]) * 1024))  # pyright: ignore[reportOptionalSubscript]
    for directory, limit, used in _memory_groups():
        with suppress(OSError, ValueError, TypeError):  # "max" is no limit
            most, now = int((directory / limit).read_text()), int((directory / used).read_text())
            cached = re.search(r"^(?:total_)?inactive_file (\d+)", (directory / "memory.stat").read_text(), re.M)
            found.append(Memory(most, most - now + int(cached[1])))  # pyright: ignore[reportOptionalSubscript]
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most != resource.RLIM_INFINITY:
        with suppress(OSError):
            now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(Memory(most, most - now))
    return Memory(min(one.total for one in found), max(0, min(one.free for one in found)))


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """Yields the control groups (versions 2 and 1) that may limit this process, and their files of limit and use."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = _CGROUPS / controllers
            limit, used = "memory.max", "memory.current"
            if controllers:
                limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            below = root / path.lstrip("/")
            for directory in {root, below, *below.parents} - {*root.parents}:
                yield directory, limit, used


def device_memory(device: Any) -> Memory | None:
    """Returns the memory of a device, of CPU devices an equal share of the host's; None where that is not known."""
    if device.platform == "cpu":
        host, devices = host_memory(), len(jax.local_devices(backend="cpu"))
        return Memory(host.total // devices, host.free // devices)
    statistics = device.memory_stats() or {}
    if "bytes_limit" not in statistics:
        return None
    return Memory(statistics["bytes_limit"], statistics["bytes_limit"] - statistics["bytes_in_use"])


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an exception of Python, NumPy, Arrow or XLA says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    words = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "out of memory")  # CUDA's own are INTERNAL
    return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


@contextmanager
def memory_errors(task: str, advice: str | Callable[[], str]) -> Iterator[None]:
    """Raises the error of memory that ran out in its block as a one-line InputError; works as a decorator too.

    Args:
        task: What was being done.
        advice: What to change; a function is called after the failure, when the memory is free again.

    Example:
        >>> with memory_errors("sorting", "pass fewer rows"):
        ...     raise MemoryError("10 GiB")
        Traceback (most recent call last):
        ...
        bioscan_jax.errors.InputError: out of memory while sorting (MemoryError 10 GiB); pass fewer rows
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(task, error, advice if isinstance(advice, str) else advice()) from error


def out_of_memory(task: str, error: BaseException, advice: str) -> InputError:
    """Returns the one-line error of memory that ran out; for the arguments see `memory_errors`."""
    return InputError(f"out of memory while {task} ({one_line(error, 120)}); {advice}")
