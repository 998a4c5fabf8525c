"""The cache of compiled programs: where JAX keeps them, and how much room they take."""

import os
import time
from pathlib import Path

import jax

from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory, locate

MOST_BYTES = 2 << 30
"""Room for compiled programs in a local directory, unless JAX_COMPILATION_CACHE_MAX_SIZE says otherwise."""
_STORES = ("gs://", "s3://", "az://")
_LOCK_SECONDS = 10.0


def use_compile_cache(cache: str) -> None:
    """Makes JAX keep compiled programs in a directory or URL; in a directory, the longest unused make room for new ones.

    Raises:
        InputError: JAX cannot write there.
    """
    local = local_directory(cache, flag="mesh.compilation_cache")
    if local is None:
        if not cache.startswith(_STORES):
            raise InputError(f"--mesh.compilation_cache {cache}: JAX writes to {', '.join(_STORES)} or a directory")
        locate(cache, "mesh.compilation_cache")
    jax.config.update("jax_compilation_cache_dir", cache if local is None else str(local))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if local is not None and _can_be_bounded(local) and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)


def _can_be_bounded(directory: Path) -> bool:
    """Returns whether JAX can bound a cache: it takes a lock there, and notes when each program was used.

    A program without a note, which was kept before there was a bound or by a process that was killed, gets one: JAX
    would fail at it.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        return False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lockfile", timeout=_LOCK_SECONDS):
            for program in directory.glob("*-cache"):
                note = program.with_name(f"{program.name.removesuffix('-cache')}-atime")
                if not note.exists() or note.stat().st_size != 8:
                    note.write_bytes(time.time_ns().to_bytes(8, "little"))
    except (OSError, NotImplementedError, Timeout):  # cannot be written, or has no locks: JAX uses what is there
        return False
    return True
