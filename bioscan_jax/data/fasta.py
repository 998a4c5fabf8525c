"""Converts FASTA and FASTQ to Parquet, once: Parquet can be read from any row group, text only from the start."""

import fcntl
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.data.files import Files
from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file

SCHEMA = pa.schema([("sequence_id", pa.string()), ("description", pa.string()), ("dna_sequence", pa.string())])
_ROW_GROUP_ROWS = 8192
# Chromosomes end a row group early, so that memory and 32-bit offsets suffice.
_ROW_GROUP_LETTERS = 64 << 20
_KEY = b"bioscan_jax.fasta"
_LAYOUT = 1


def transcode(found: Files, target: Path, *, on_rows: Callable[[int], None] | None = None) -> Path:
    """Writes the records of FASTA or FASTQ files, in order, to one Parquet file.

    Columns are `sequence_id` (first word of the header), `description` (the rest; null where there is none) and
    `dna_sequence`, unchanged. The file appears whole or not at all. It is kept if it exists and was made from the same
    files (names, sizes and modification times). Processes that share the directory wait for one another.

    Args:
        found: The FASTA or FASTQ files, plain or gzipped.
        target: Parquet file to write; its directory is created.
        on_rows: Called after each row group with its number of rows.

    Returns:
        `target`.

    Raises:
        InputError: A file is malformed, truncated or unreadable, there are no records, or `target` cannot be written.
    """
    stamps = [_stamp(found, path, name) for path, name in zip(found.paths, found.names, strict=True)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent):
            if _made_from(target) != stamps:
                with whole_file(target, locked=True) as partial:
                    _write(found, stamps, partial, on_rows)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free space or pass another place"
        ) from error
    return target


def read_origins(target: Path) -> list[dict[str, Any]]:
    """Returns the name, bytes, rows and sha256 of each FASTA file that `target` was made from.

    The hash covers headers and sequences, so that it depends on neither line breaks nor compression.
    """
    return json.loads(pq.read_metadata(target).metadata[_KEY])["origins"]


def _stamp(found: Files, path: str, name: str) -> dict[str, str | int]:
    """Name, bytes and version (mtime in ns, or the file system's own key), which differ if the file changed."""
    if found.filesystem is None:
        status = os.stat(path)
        return {"name": name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"name": name, "bytes": found.filesystem.size(path) or 0, "ukey": str(found.filesystem.ukey(path))}


def _made_from(target: Path) -> list[dict[str, Any]] | None:
    """Stamps of the files that `target` was made from; None if it is absent, damaged or not made by `transcode`."""
    try:
        note = json.loads((pq.read_metadata(target).metadata or {}).get(_KEY, b"{}"))
    except (OSError, pa.ArrowException):
        return None
    return note.get("stamps") if note.get("layout") == _LAYOUT else None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a lock that the kernel releases even if the process is killed."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(found: Files, stamps: list, partial: Path, on_rows: Callable[[int], None] | None) -> None:
    made: list[dict[str, str | int]] = []
    columns: tuple[list, list, list] = ([], [], [])

    with pq.ParquetWriter(partial, SCHEMA, compression="zstd", use_dictionary=False) as writer:

        def flush() -> None:
            rows = len(columns[0])
            if rows:
                writer.write_table(pa.table(list(columns), schema=SCHEMA), row_group_size=rows)
                for column in columns:
                    column.clear()
                if on_rows is not None:
                    on_rows(rows)

        letters = 0
        for path, stamp in zip(found.paths, stamps, strict=True):
            digest, rows = hashlib.sha256(), 0
            for header, sequence in _records(found, path):
                words = header.split(None, 1)
                if not words:
                    raise InputError(f"{found.url(path)}: record {rows} (counted from 0) has no id after '>' or '@'")
                digest.update(f"{header}\n{sequence}\n".encode())
                rows += 1
                columns[0].append(words[0])
                columns[1].append(words[1].rstrip() if len(words) == 2 else None)
                columns[2].append(sequence)
                letters += len(sequence)
                if len(columns[0]) == _ROW_GROUP_ROWS or letters >= _ROW_GROUP_LETTERS:
                    flush()
                    letters = 0
            made.append({"name": stamp["name"], "bytes": stamp["bytes"], "rows": rows, "sha256": digest.hexdigest()})
        flush()
        if not any(origin["rows"] for origin in made):
            raise InputError(f"no sequences in {found.url(found.paths[0])} (files looked at: {len(made)})")
        note = {"layout": _LAYOUT, "stamps": stamps, "origins": made}
        writer.add_key_value_metadata({_KEY.decode(): json.dumps(note)})


def _records(found: Files, path: str) -> Iterator[tuple[str, str]]:
    """Yields header and sequence of each record; raises InputError for any malformed file."""
    import dnaio

    shown = found.url(path)
    try:
        with _text(found, path) as stream, dnaio.open(cast(BinaryIO, stream), open_threads=0) as reader:
            for record in reader:
                yield record.name, record.sequence
    except dnaio.UnknownFileFormat as error:
        raise InputError(
            f"{shown} does not start with '>' (FASTA) or '@' (FASTQ); pass a FASTA or FASTQ file"
        ) from error
    except (dnaio.FileFormatError, UnicodeError) as error:
        line = None if isinstance(error, UnicodeError) or error.line is None else error.line + 1
        if line is None and (line := _first_not_ascii(found, path)):
            what = "a character that is not ASCII"
        else:
            what = " ".join(str(error).split())
        raise InputError(f"{shown} line {line}: {what}; fix that record or get the file again") from error
    except (EOFError, zlib.error, OSError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{shown} cannot be read to its end ({what}); get the file again") from error


@contextmanager
def _text(found: Files, path: str) -> Iterator[io.IOBase]:
    with found.open(path) as stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            yield stream
            return
        with gzip.open(cast(BinaryIO, stream)) as text:
            yield cast(io.IOBase, text)


def _first_not_ascii(found: Files, path: str) -> int | None:
    with _text(found, path) as stream:
        return next((number for number, line in enumerate(stream, 1) if not line.isascii()), None)
