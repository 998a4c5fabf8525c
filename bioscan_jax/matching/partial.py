"""Keeps the answers of finished blocks beside the output, so that the same command continues after a kill."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.cache import cache_directory
from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import Location, check_output, local_directory, locate
from bioscan_jax.output import whole_file

_FACTS = "run.json"
_RECALL = b"recall"
_ENDS = (".npz", ".rejects", ".parquet")
"""Files of a block; the last one is written last."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockAnswers:
    """What one block of queries adds to a run."""

    answers: pa.Table
    rejects: pa.Table
    arrays: dict[str, np.ndarray]
    """Of the usable queries: taxa, sure and truth where they have labels, and the vectors of the novel ones."""
    recall: dict[str, tuple[int, float]]
    """Number of sampled queries and their share, by what was measured."""


@dataclass(frozen=True)
class PartialAnswers:
    """The answers of the blocks finished so far; each is on the disk before the next one begins."""

    directory: Path | None
    """On this machine; None where nothing is kept."""
    place: Location | None = None
    """Where the output is remote: the directory beside it, with the same files."""
    blocks: list[BlockAnswers] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Queries answered."""
        return sum(block.answers.num_rows for block in self.blocks)

    def add(self, block: BlockAnswers) -> None:
        """Keeps the answers of the next block.

        Raises:
            InputError: They cannot be written.
        """
        if self.directory is not None:
            name = self.directory / f"{len(self.blocks):08d}"
            try:
                np.savez(name.with_suffix(".npz"), **block.arrays)  # pyright: ignore[reportArgumentType]
                pq.write_table(block.rejects, name.with_suffix(".rejects"))
                noted = block.answers.replace_schema_metadata({_RECALL: json.dumps(block.recall)})
                with whole_file(name.with_suffix(".parquet"), locked=True) as path:
                    pq.write_table(noted, path)
                if self.place is not None:
                    for end in _ENDS:
                        _put(self.place, name.with_suffix(end))
            except OSError as error:
                raise InputError(f"{self.directory}: cannot be written ({error}); free space there") from error
        self.blocks.append(block)


@contextmanager
def partial_answers(output: str, facts: dict[str, Any], *, blocks: int) -> Iterator[PartialAnswers]:
    """Opens what an earlier run of the same command answered, in .NAME.blocks beside the output.

    Where the output is in a bucket, the blocks are there too, with a copy in the cache of this machine, so that the
    command continues on any machine. They are removed at the end and where another command made them; after a kill,
    Ctrl-C or an error they stay. An input of one block, or an output that is no file, keeps nothing.

    Args:
        output: The file to be written in the end.
        facts: All that the answers depend on, as JSON.
        blocks: Number of blocks of queries.
    """
    check_output(output)
    path, place = local_directory(output, flag="output"), None
    if path is None and blocks >= 2:
        place = locate(re.sub(r"([^/:]+)$", r".\1.blocks", output), "output")
        path = cache_directory() / "answers" / hashlib.sha256(output.encode()).hexdigest()[:16]
        path.parent.mkdir(parents=True, exist_ok=True)
    if path is None or blocks < 2 or (path.exists() and not path.is_file()):
        yield PartialAnswers(None)
        return
    path = path.resolve()
    directory = path.with_name(f".{path.name}.blocks")
    wanted = json.dumps(facts, sort_keys=True, default=str)
    try:
        if place is not None:
            _fetch(place, directory)
        with suppress(FileNotFoundError):
            if (directory / _FACTS).read_text() != wanted:
                logger.warning(f"the answers that another command left unfinished for {output} are removed")
                _remove(directory, place)
        directory.mkdir(exist_ok=True)
        with whole_file(directory / _FACTS, locked=True) as file:
            file.write_text(wanted)
        if place is not None:
            _put(place, directory / _FACTS)
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error}); free space or pass another") from error
    found = PartialAnswers(directory, place)
    for number in range(blocks):
        name = directory / f"{number:08d}.parquet"
        if not name.is_file():
            break
        found.blocks.append(_read(name))
    if found.blocks:
        logger.info(f"{found.rows:,} queries were answered before; the others follow")
    try:
        yield found
    except Exception:
        if not found.blocks:
            _remove(directory, place)
        raise
    _remove(directory, place)


def _put(place: Location, file: Path) -> None:
    with place.staging() as staging:
        place.put(Path(shutil.copy(file, staging)), file.name)


def _fetch(place: Location, directory: Path) -> None:
    """Makes the local directory what the place has."""
    shutil.rmtree(directory, ignore_errors=True)
    for name in place.sizes():
        directory.mkdir(exist_ok=True)
        os.replace(place.fetch(name, directory), directory / name)


def _remove(directory: Path, place: Location | None) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if place is not None:
        for name in sorted(place.sizes(), reverse=True):  # run.json, by which another command would know it, last
            place.remove(name)


def _read(name: Path) -> BlockAnswers:
    try:
        answers = pq.read_table(name)
        recall = json.loads((answers.schema.metadata or {})[_RECALL])
        with np.load(name.with_suffix(".npz"), allow_pickle=False) as arrays:
            kept = dict(arrays)
        rejects = pq.read_table(name.with_suffix(".rejects"))
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise InputError(f"{name} is damaged ({error}); remove {name.parent} to begin again") from error
    return BlockAnswers(
        answers=answers.replace_schema_metadata(None),
        rejects=rejects,
        arrays=kept,
        recall={what: (count, share) for what, (count, share) in recall.items()},
    )
