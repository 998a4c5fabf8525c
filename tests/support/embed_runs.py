"""Runs of scripts/embed.py in processes of their own, killed at random moments and compared with a whole run."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support.places import SCRIPTS

from bioscan_jax.barcodes.simulate import simulate

BLOCK_ROWS = 128
TABLES = ("sequences", "sequences_rejects")


def write_input(directory: Path, rows: int, seed: int = 0) -> Path:
    """Writes three Parquet files with all kinds of rejects (also whole blocks), repeats, lower case and gaps."""
    table = simulate(species=-(-rows // 10), per_species=10, length=400, seed=seed).slice(0, rows)
    sequences = table["dna_sequence"].to_pylist()
    for row in range(rows):
        if row % 17 == 5 or 5 <= row // BLOCK_ROWS <= 6 or row // BLOCK_ROWS == (rows - 1) // BLOCK_ROWS:
            sequences[row] = [None, "", "MKVLAAGIVGPRE", "NNNNNNNNNNNN", " "][row % 5]
        elif row % 11 == 3:
            sequences[row] = sequences[row - row % 11 + 1]
        elif row % 13 == 4:  # a repeat from up to six blocks ago; the job keeps the vectors of three
            sequences[row] = sequences[max(1, row - 7 * (row % 109))]
        elif row % 7 == 2:
            sequences[row] = f"{sequences[row][:50]}-{sequences[row][50:90].lower()}RU{sequences[row][92:]}"
    table = table.set_column(table.column_names.index("dna_sequence"), "dna_sequence", [sequences])
    genus = table["genus"].dictionary_encode()
    table = table.set_column(table.column_names.index("genus"), "genus", genus)
    directory.mkdir(parents=True)
    cuts = [0, rows // 3, rows // 3 + 1, rows]
    for number, (first, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        pq.write_table(table.slice(first, end - first), directory / f"part-{number}.parquet", row_group_size=300)
    return directory


def command(data: Path, uri: Path, cache: Path, *more: str) -> list[str]:
    flags = {
        "model.checkpoint": "random:tiny-v2",
        "data.path": data,
        "data.block_rows": BLOCK_ROWS,
        "embed.max_shapes": 2,
        "embed.cache_rows": 3 * BLOCK_ROWS,
        "mesh.compilation_cache": cache,
        "sink.uri": uri,
    }
    return [sys.executable, str(SCRIPTS / "embed.py"), *(f"--{name}={value}" for name, value in flags.items()), *more]


def environment() -> dict[str, str]:
    """Returns an environment with one CPU device, without the eight simulated ones of the tests."""
    return {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUMPY_RANK_PROMOTION")}


def start(arguments: list[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment())


def run(arguments: list[str], seconds: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), timeout=seconds
    )


def lines(stderr: str) -> list[str]:
    """Returns the lines that are not progress bars."""
    texts = [line.split("\r")[-1].strip() for line in stderr.split("\n")]
    return [text for text in texts if text and not text.startswith(("embed:", "load weights:"))]


def files(uri: Path) -> set[str]:
    return {os.path.join(where, name) for where, _, names in os.walk(uri) for name in names}


@dataclass(frozen=True)
class Table:
    """A table and its rejects, read from disk."""

    vectors: pa.Table
    rejects: pa.Table

    @classmethod
    def read(cls, uri: Path) -> "Table":
        return cls(*(lance.dataset(str(uri / f"{name}.lance")).to_table().combine_chunks() for name in TABLES))

    def differences(self, other: "Table") -> list[str]:
        """Lists what differs in any bit, metadata included."""
        found = []
        for name, one, two in (("vectors", self.vectors, other.vectors), ("rejects", self.rejects, other.rejects)):
            if not one.schema.equals(two.schema, check_metadata=True):
                found.append(f"{name}: schema")
            elif one.num_rows != two.num_rows:
                found.append(f"{name}: {one.num_rows} rows instead of {two.num_rows}")
            else:
                found += [f"{name}: {column}" for column in one.column_names if not one[column].equals(two[column])]
        bits = [table.vectors["vector"].combine_chunks().flatten().to_numpy().tobytes() for table in (self, other)]
        return found + ["vectors: bits"] * (bits[0] != bits[1])


def unnamed_files(uri: Path) -> list[str]:
    """Lists files that a finished table does not need and that a run should have removed."""
    needed = {str(uri / ".sequences.lock"), str(uri / "sequences.run.json")}
    for name in TABLES:
        path = uri / f"{name}.lance"
        dataset = lance.dataset(str(path))
        for fragment in dataset.get_fragments():
            needed |= {str(path / "data" / file.path) for file in fragment.data_files()}
            deletions = fragment.deletion_file()
            needed |= set() if deletions is None else {str(path / deletions)}
        indexes = [segment.uuid for index in dataset.describe_indices() for segment in index.segments]
        for index in indexes:
            needed |= {str(file) for file in (path / "_indices" / str(index)).iterdir()}
        versions, transactions = list((path / "_versions").glob("*.manifest")), list((path / "_transactions").iterdir())
        needed |= {str(path / "_versions" / "latest_version_hint.json")}
        needed |= {str(file) for kind in (versions, transactions) if len(kind) == 1 for file in kind}
    return sorted(files(uri) - needed)


def rows_there(uri: Path) -> int:
    """Counts rows of the table and its rejects; more than are committed if the kill fell between the two."""
    counts = []
    for name in TABLES:
        try:
            counts.append(lance.dataset(str(uri / f"{name}.lance")).count_rows())
        except ValueError:
            counts.append(0)
    return sum(counts)


def kill_once(
    arguments: list[str], uri: Path, chance: random.Random, seconds: float, number: int = signal.SIGKILL
) -> str | None:
    """Starts the job and ends it with a signal at a random moment.

    Args:
        arguments: The command.
        uri: Database that it writes.
        chance: Source of randomness for the moment.
        seconds: Duration of an uninterrupted run.
        number: SIGKILL, or SIGTERM, which the job answers with the number of rows that are safe.

    Returns:
        When it was killed, or None if it had already finished.
    """
    before, process = files(uri), start(arguments)
    kind = chance.choice(["time", "time", "time", "file", "file", "file", "file", "index"])
    wait, delay = chance.uniform(0.1, seconds), chance.choice([0.0, chance.uniform(0, 0.03)])
    file, begun = chance.randint(1, 40), time.monotonic()
    while process.poll() is None:
        new = files(uri) - before if kind != "time" else set()
        if kind == "time" and time.monotonic() - begun > wait:
            break
        if kind == "file" and len(new) >= file:
            time.sleep(delay)
            break
        if kind == "index" and any("_indices" in file for file in new):
            time.sleep(delay)
            break
        time.sleep(0.001)
    ended = time.monotonic() - begun
    committed = rows_there(uri) if number == signal.SIGTERM else 0
    process.send_signal(number)
    _, stderr = process.communicate()
    stopping = time.monotonic() - begun - ended
    if process.returncode == 0:
        return None
    if number == signal.SIGTERM and process.returncode in (-number, 128 + number):
        found = re.search(r"stopped with ([\d,]+) of", stderr)
        safe = 0 if found is None else int(found[1].replace(",", ""))
        if found is not None and not committed <= safe <= rows_there(uri):
            raise AssertionError(f"{committed} rows were there, then {rows_there(uri)}, but it says {safe} are safe")
    elif process.returncode != -9:
        raise AssertionError(f"the job ended by itself with code {process.returncode}: {stderr[-2000:]}")
    reached = stderr.replace("\r", "\n").strip().rsplit("\n", 1)[-1].strip().split("|")[0] or "before the first bar"
    why = {"time": "by the clock", "file": f"at new file {file}", "index": "while indexing"}[kind]
    return f"{ended:5.1f} s, {why}, {reached}" + (f", ended {stopping:.1f} s later" * (number == signal.SIGTERM))


@dataclass(frozen=True)
class Uninterrupted:
    """An uninterrupted run, with which every other run is compared."""

    data: Path
    cache: Path
    rows: int
    seconds: float
    table: Table

    @classmethod
    def make(cls, directory: Path, rows: int, seed: int = 0) -> "Uninterrupted":
        """Writes the input and embeds it without interruption."""
        data, cache, uri = write_input(directory / "input", rows, seed), directory / "cache", directory / "whole"
        begun = time.monotonic()
        process = run(command(data, uri, cache))
        if process.returncode:
            raise AssertionError(process.stderr)
        made = cls(data, cache, rows, time.monotonic() - begun, Table.read(uri))
        if wrong := made.compare(uri):
            raise AssertionError(wrong)
        return made

    def command(self, uri: Path, *more: str) -> list[str]:
        return command(self.data, uri, self.cache, *more)

    def compare(self, uri: Path) -> list[str]:
        """Lists what is wrong with a finished table."""
        found = Table.read(uri)
        numbers = [table["source_row"].to_numpy() for table in (found.vectors, found.rejects)]
        whole = np.array_equal(np.sort(np.concatenate(numbers)), np.arange(self.rows))
        ordered = all((part[1:] > part[:-1]).all() for part in numbers)
        wrong = found.differences(self.table) + [f"left behind: {file}" for file in unnamed_files(uri)]
        return wrong + ["rows are missing or repeated"] * (not whole) + ["rows are out of order"] * (not ordered)


def campaign(
    whole: Uninterrupted,
    directory: Path,
    kills: int,
    seed: int,
    say: Callable = print,
    number: int = signal.SIGKILL,
) -> list[str]:
    """Ends `kills` runs with a signal, finishes the last one, and compares every finished table.

    Returns:
        Descriptions of what is wrong with the tables.
    """
    chance, wrong = random.Random(seed), []
    killed = tables = 0
    while killed < kills:
        uri, unfinished = directory / f"table-{tables}", True
        arguments = command(whole.data, uri, directory / "cache")  # of its own, since a kill may damage it
        while unfinished and killed < kills:
            when = kill_once(arguments, uri, chance, whole.seconds, number)
            unfinished = when is not None
            killed += unfinished
            say(f"kill {killed:3d}: {when}, {rows_there(uri)} rows there" if unfinished else "ended before its kill")
        last = run(arguments) if unfinished else None
        found = [last.stderr] if last is not None and last.returncode else whole.compare(uri)
        say(f"table {tables}: {'; '.join(found) or 'identical to the uninterrupted one'}")
        wrong += [f"table {tables}: {text}" for text in found]
        tables += 1
    return wrong
