"""Candidates by alignment: how many letters of two barcodes agree where both have been sequenced.

Edlib (Sosic & Sikic 2017, doi:10.1093/bioinformatics/btw753) finds the best alignment by edit distance, bit-parallel:
on barcodes about ten times faster than a scored alignment, and below a distance already reached faster still.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float32, Float64, Int64

_QUERIES = 64
"""Aligned by one process before it gets more."""
_STEP = re.compile(r"(\d+)([=XID])")
_ANY = [("N", base) for base in "ACGT"]
Counts = TypeVar("Counts", int, np.ndarray)


@dataclass(frozen=True, eq=False)
class Aligned:
    """The candidates of each query that were aligned in full, best first."""

    place: Int64[np.ndarray, "queries aligned"]
    """Which of the candidates; -1 past the last."""
    matches: Int64[np.ndarray, "queries aligned"]
    columns: Int64[np.ndarray, "queries aligned"]
    """Of the alignment, without gaps at either end and without N."""

    @property
    def identity(self) -> Float32[np.ndarray, "queries aligned"]:
        """Matches / columns without terminal gaps (VSEARCH's --iddef 2) and without N; NaN past the last."""
        share = self.matches / np.maximum(self.columns, 1)
        return np.where(self.place >= 0, share, np.nan).astype(np.float32)

    @property
    def distances(self) -> Float64[np.ndarray, "queries aligned"]:
        """`distance`; inf past the last."""
        return np.where(self.place >= 0, distance(self.matches, self.columns), np.inf)


def align_pair(one: str, other: str) -> tuple[int, int]:
    """Matches, and columns that compare two bases or a base and a gap, of the best semi-global alignment.

    The shorter sequence is laid into the longer one at the least edit distance; what sticks out at either end of
    either is not counted. N agrees with any base, and its columns are left out: they say nothing (pairwise deletion).
    """
    import edlib

    short, long = sorted((one, other), key=len)
    same = _equalities(short, long)
    found = edlib.align(short, long, mode="HW", task="path", additionalEqualities=same)
    steps = [(int(length), kind) for length, kind in _STEP.findall(found["cigar"] or "")]
    here, there = 0, found["locations"][0][0] or 0
    while steps and steps[0][1] in "ID":
        length, kind = steps.pop(0)
        here, there = (here + length, there) if kind == "I" else (here, there + length)
    while steps and steps[-1][1] in "ID":
        del steps[-1]
    matches = sum(length for length, kind in steps if kind == "=")
    columns = sum(length for length, _ in steps)
    if same is None:
        return matches, columns
    unknown = 0
    for length, kind in steps:
        if kind == "=":
            pairs = zip(short[here : here + length], long[there : there + length], strict=True)
            unknown += sum("N" in pair for pair in pairs)
        here, there = here + (kind != "D") * length, there + (kind != "I") * length
    return matches - unknown, columns - unknown


def distance(matches: Counts, columns: Counts) -> Any:
    """(differences + 1/2) / (columns + 1): above 0, and of equal identities the longer one is nearer."""
    return (columns - matches + 0.5) / (columns + 1)


def _equalities(one: str, other: str) -> list[tuple[str, str]] | None:
    return _ANY if "N" in one or "N" in other else None


def best_of(query: str, candidates: Sequence[str], most: int) -> list[tuple[int, int, int]]:
    """The best candidates by `distance`: their places, matches and columns.

    First all are compared by edit distance a known base of the shorter sequence (what sticks out at both ends counts
    there), each only as far as it can still be among the `most` best; these are then aligned in full. Among equals
    the candidate that came first, which is the nearer one by vector, stays first.
    """
    import edlib

    kept: list[tuple[float, int]] = []
    seen: dict[str, float] = {}
    unknown = query.count("N")
    for place, candidate in enumerate(candidates):
        share = seen.get(candidate)
        if share is None:
            short, long = sorted((query, candidate), key=len)
            known = max(len(short) - unknown - candidate.count("N"), 1)
            bound = int(kept[most - 1][0] * known) if len(kept) >= most else -1
            same = _equalities(short, long)
            found = edlib.align(short, long, mode="HW", task="distance", k=bound, additionalEqualities=same)
            edits = found["editDistance"]
            share = float("inf") if edits < 0 else edits / known
            seen[candidate] = share
        if len(kept) < most or (share, place) < kept[most - 1]:
            kept.append((share, place))
            kept.sort()
            del kept[most:]
    full = [(place, *align_pair(query, candidates[place])) for share, place in kept if share != float("inf")]
    return sorted(full, key=lambda one: (distance(one[1], one[2]), one[0]))


Worker = ProcessPoolExecutor | None


@contextmanager
def workers(processes: int) -> Iterator[Worker]:
    """Processes to align in (edlib holds Python's lock); None for one, which is this one."""
    if processes < 2:
        yield None
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
        yield pool


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever; Ctrl-C is the parent's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def align(
    queries: Sequence[str],
    rows: Int64[np.ndarray, "queries k"],
    distinct: Int64[np.ndarray, " distinct"],
    sequences: Sequence[str],
    most: int,
    worker: Worker,
    on_rows: Callable[[int], Any] = lambda rows: None,
) -> Aligned:
    """Aligns each query with its candidates.

    Args:
        queries: Cleaned DNA.
        rows: Candidates of each; -1 for none.
        distinct: All rows that occur, ascending.
        sequences: Cleaned DNA of these.
        most: How many candidates of each are aligned in full.
        worker: From `workers`.
        on_rows: Called with the number of queries just done.
    """
    jobs = []
    for start in range(0, len(queries), _QUERIES):
        part = rows[start : start + _QUERIES]
        used = np.unique(part[part >= 0])
        texts = [sequences[i] for i in np.searchsorted(distinct, used)]
        places = [np.searchsorted(used, row[row >= 0]) for row in part]
        jobs.append((list(queries[start : start + _QUERIES]), places, texts, most))
    every = map(_align_some, jobs) if worker is None else worker.map(_align_some, jobs)
    shape = (len(queries), min(most, rows.shape[1]))
    place, matches, columns = (np.full(shape, fill, np.int64) for fill in (-1, 0, 0))
    query = 0
    for some in every:
        for found in some:
            # Places are those of `rows`: its candidates come before its -1.
            for i, (at, same, length) in enumerate(found):
                place[query, i], matches[query, i], columns[query, i] = at, same, length
            query += 1
        on_rows(len(some))
    return Aligned(place, matches, columns)


def _align_some(job: tuple[list[str], list[np.ndarray], list[str], int]) -> list[list[tuple[int, int, int]]]:
    queries, places, texts, most = job
    return [best_of(query, [texts[i] for i in of], most) for query, of in zip(queries, places, strict=True)]
