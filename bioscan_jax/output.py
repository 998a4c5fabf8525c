"""The files that a command is asked for: there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bioscan_jax.errors import InputError


def output_path(output: str) -> Path:
    """Where `--output` points to.

    Raises:
        InputError: Its directory is not there, or it is one itself.
    """
    path = Path(output).expanduser()
    if not path.parent.is_dir():
        raise InputError(f"--output {output}: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise InputError(f"--output {output}: that is a directory; pass a file")
    return path


@contextmanager
def written_whole(output: str) -> Iterator[Path]:
    """A path beside it to write to, which takes its place at the end and is gone after a failure.

    Raises:
        InputError: As for `output_path`; or it cannot be written.
    """
    path = output_path(output)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error}); free space or pass another") from error
    finally:
        with suppress(OSError):
            partial.unlink()
