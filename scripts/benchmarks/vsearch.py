"""The program vsearch: global alignment of queries with a reference."""

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bioscan_jax.errors import InputError
from bioscan_jax.matching.neighbours import Neighbours

QUICK, DEEP = (8, 64), (64, 256)
"""Numbers of accepted and rejected targets after which VSEARCH stops searching."""
INSTALL = "run apt-get install vsearch"


def installed() -> bool:
    """Whether the program is there."""
    return shutil.which("vsearch") is not None


def require_vsearch() -> None:
    """Raises InputError if the program is not installed."""
    if not installed():
        raise InputError(f"vsearch is not installed: {INSTALL} to compare with it")


def version() -> str:
    """Returns the program's name and version."""
    done = subprocess.run(["vsearch", "--version"], capture_output=True, text=True, check=False)
    return (done.stderr + done.stdout).split(",")[0].strip()


def write_fasta(sequences: Iterable[str | None], path: Path) -> None:
    """Writes sequences under their row numbers; those without a base are left out."""
    with path.open("w") as file:
        for row, text in enumerate(sequences):
            if text:
                file.write(f">{row}\n{text}\n")


def usearch_global(
    queries: Path,
    reference: Path,
    output: Path,
    *,
    effort: tuple[int, int],
    threads: int,
    hits: int = 1,
    both_strands: bool = False,
) -> None:
    """Aligns queries with the reference and writes the best hits, to be read by `read_hits`.

    Args:
        queries: From `write_fasta`.
        reference: From `write_fasta`.
        output: File to write.
        effort: `QUICK` or `DEEP`.
        threads: Cores to use.
        hits: Most hits per query.
        both_strands: Also try the reverse complement of each query.

    Raises:
        RuntimeError: It failed; the message ends with its own.
    """
    accepts, rejects = effort
    flags = {"usearch_global": queries, "db": reference, "id": 0.5, "threads": threads}
    flags |= {"maxaccepts": accepts, "maxrejects": rejects, "maxhits": hits}
    flags |= {"strand": "both" if both_strands else "plus", "userout": output, "userfields": "query+target+id"}
    command = ["vsearch", "--quiet", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"vsearch failed: {' '.join(done.stderr.split())[-300:]}")


def read_hits(path: Path, queries: int, hits: int = 1) -> Neighbours:
    """Reads the hits of each query, best first; the similarity is the fraction of identical columns."""
    rows = np.full((queries, hits), -1, np.int64)
    identity = np.full((queries, hits), -np.inf, np.float32)
    filled = np.zeros(queries, np.int64)
    with path.open() as file:
        for line in file:
            query, target, percent = line.split("\t")
            place = filled[int(query)]
            if place < hits:
                rows[int(query), place], identity[int(query), place] = int(target), float(percent) / 100
                filled[int(query)] += 1
    return Neighbours(rows, identity)
