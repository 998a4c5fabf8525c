"""Aligns queries with their candidates: how many bases of two barcodes agree where both have been sequenced.

Edlib (Sosic & Sikic 2017, doi:10.1093/bioinformatics/btw753) finds the alignment with the least edit distance
by bit-parallel dynamic programming: about ten times faster on barcodes than a scored alignment, and faster still where
only the distance is asked for, which is what scores a candidate.

Identity is matches / compared columns. A column is compared where both sequences have a known base, or one has a known
base and the other a gap; gaps at the ends and columns with N are not (VSEARCH's --iddef 2, with N left out). In placing
the sequences, N differs from every base, so that a stretch of N attracts nothing.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int64

_QUERIES = 64
"""Queries per task of a worker process."""
_WORD, _WORDS = 12, 32
"""Length of the words by which two sequences are put in register, and how many are looked up: 12 bases occur by chance
once in 25,000 barcodes."""
_REGISTERS = 8
"""Words by which two sequences are laid side by side without gaps, at most."""
_LIKELY = 0.2
"""Edits per base that candidates rarely exceed: this bound, tried first, saves about a fifth of the time."""
_AS_PURINES = str.maketrans("GT", "AC")
"""A for purines, C for pyrimidines: a transition (A-G, C-T) leaves the letter as it is, a transversion does not."""
_STEP = re.compile(r"(\d+)([=XID])")
_EQUAL, _ENDS = re.compile(r"(\d+)="), re.compile(r"^\d+(?=I)|\d+(?=I$)")
"""Lengths of the steps with equal bases, and of the bases before and after what the longer sequence faces."""
_LEAST_OVERLAP, _ENOUGH_OVERLAP = 32, 100
"""Half of the shorter sequence must be compared, but never fewer and never more bases than these: at 100 bases, the
standard error of an identity of 97% is 1.7 points, about half the distance between species."""
Counts = TypeVar("Counts", int, np.ndarray)


@dataclass(frozen=True)
class Floors:
    """What an alignment must have to be evidence for a name.

    Example:
        >>> Floors().holds(np.array([0, 3, 20]), np.array([40, 40, 40]), np.array([60, 100, 60])).tolist()
        [True, False, False]
    """

    overlap: int | None = None
    """Fewest compared bases; half of the shorter sequence if None, at least 32 and at most 100."""
    identity: float = 0.65

    def required(self, shorter: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Returns the fewest compared bases, given the length of the shorter sequence."""
        if self.overlap is not None:
            return np.full_like(shorter, self.overlap)
        return np.clip(shorter // 2, _LEAST_OVERLAP, _ENOUGH_OVERLAP)

    def holds(
        self,
        differences: Int64[np.ndarray, "*shape"],
        compared: Int64[np.ndarray, "*shape"],
        shorter: Int64[np.ndarray, "*shape"],
    ) -> Bool[np.ndarray, "*shape"]:
        """Tells which alignments are evidence.

        Args:
            differences: Differing bases and gaps.
            compared: Compared bases.
            shorter: Length of the shorter sequence, N included.
        """
        return (compared >= self.required(shorter)) & (differences <= (1 - self.identity) * compared)


def align_pair(one: str, other: str) -> tuple[int, int]:
    """Counts matches and compared columns of the best semi-global alignment.

    The shorter sequence is placed inside the longer one, or across one of its ends if that at least halves the
    distance (a smaller gain could be chance). Overhanging bases at either end of either sequence are not counted.
    """
    found = align_within(one, other)
    parts = overlapping_parts(one, other, _half_distance(found))
    over = None if parts is None else align_within(*parts)
    return found if over is None or 2 * distance(*over) > distance(*found) else over


def align_cigar(query: str, reference: str) -> tuple[int, str]:
    """Describes the alignment that `align_pair` counts.

    Returns:
        The position in the reference where it begins, from 0, and a CIGAR as in SAM: = for equal bases, X for different
        ones and for N, I and D for bases that only the query or only the reference has, S for bases of the query outside
        the alignment. The CIGAR is empty if no base faces another.

    Example:
        >>> align_cigar("TTACGTACGTAC", "GGGGACGTCCGTACGG")
        (4, '2S4=1X5=')
    """
    short, long = _by_length(query, reference)
    found = align_within(short, long)
    skipped, facing = 0, _overhang(short, long, _half_distance(found))
    if facing is not None:
        parts = _facing_parts(short, long, facing)
        if 2 * distance(*align_within(*parts)) <= distance(*found):
            (short, long), skipped = parts, facing
    steps, first = _steps(short, long)
    faced = [place for place, (_, kind) in enumerate(steps) if kind in "=X"]
    if not faced:
        return 0, ""
    starts = [
        max(0, -skipped) + sum(length for length, kind in steps[: faced[0]] if kind == "I"),
        max(0, skipped) + first,
    ]
    steps = steps[faced[0] : faced[-1] + 1]
    if len(reference) < len(query):
        starts.reverse()
        steps = [(length, {"I": "D", "D": "I"}.get(kind, kind)) for length, kind in steps]
    after = len(query) - starts[0] - sum(length for length, kind in steps if kind != "D")
    whole = [(starts[0], "S"), *steps, (after, "S")]
    return starts[1], "".join(f"{length}{kind}" for length, kind in whole if length)


def overlapping_parts(one: str, other: str, share: float) -> tuple[str, str] | None:
    """Returns the overlapping parts of two sequences where the shorter one extends past an end of the longer one.

    The overlap is found through a half of the shorter sequence that occurs in the longer one with at most `share` edits
    per base, so it spans at least half of the shorter one, less these edits. None if there is no such half, or nothing
    overhangs.
    """
    short, long = _by_length(one, other)
    facing = _overhang(short, long, share)
    return None if facing is None else _facing_parts(short, long, facing)


def _overhang(short: str, long: str, share: float) -> int | None:
    """Returns which base of the longer sequence faces the first one of the shorter, which extends past an end of it."""
    import edlib

    middle = len(short) // 2
    for first, half in ((0, short[:middle]), (middle, short[middle:])):
        if not half:
            continue
        unknown = half.count("N")
        at = -1 if unknown else long.find(half)
        if at < 0:
            bound = int(share * len(half)) + unknown
            found = edlib.align(half, _other_n(long), mode="HW", task="locations", k=bound)
            if found["editDistance"] < 0:
                continue
            at = found["locations"][0][0] or 0
        facing = at - first
        if len(_facing_parts(short, long, facing)[0]) < len(short):
            return facing
    return None


def _facing_parts(short: str, long: str, facing: int) -> tuple[str, str]:
    return short[max(0, -facing) : len(long) - facing], long[max(0, facing) : len(short) + facing]


def align_within(one: str, other: str) -> tuple[int, int]:
    """Counts matches and compared columns, as `align_pair` does, of the shorter sequence placed inside the longer one.

    The alignment is one with the least edit distance; gaps at the ends of the shorter sequence are not counted.
    """
    return _place(one, other)[:2]


def _place(one: str, other: str, bound: int = -1) -> tuple[int, int, int, int]:
    """Places the shorter sequence inside the longer one; counts matches, compared columns, edits and known bases.

    Edits and known bases, those of the shorter sequence that face no N, include its ends; columns with N are no edits.
    With more than `bound` edits, N included, there are no known bases; -1 is no bound.
    """
    short, long = _by_length(one, other)
    blurred, here = "N" in one or "N" in other, 0
    if short in long and not blurred:
        return len(short), len(short), 0, len(short)
    if not blurred:
        found = _align(short, long, bound)
        cigar, edits = found["cigar"] or "", max(found["editDistance"], 0)
        matches = sum(map(int, _EQUAL.findall(cigar)))
        outside = sum(map(int, _ENDS.findall(cigar)))
        return matches, matches + edits - outside, edits, len(short) if cigar else 0
    steps, there = _steps(short, long, bound)
    faced = [place for place, (_, kind) in enumerate(steps) if kind in "=X"] or [len(steps)]
    matches = columns = edits = known = 0
    for place, (length, kind) in enumerate(steps):
        mine, theirs = length * (kind != "D"), length * (kind != "I")
        if kind != "=":
            pairs = zip_longest(short[here : here + mine], long[there : there + theirs])
            length -= sum("N" in pair for pair in pairs)
        here, there = here + mine, there + theirs
        matches += length * (kind == "=")
        columns += length * (faced[0] <= place <= faced[-1])
        edits += length * (kind != "=")
        known += length * (kind != "D")
    return matches, columns, edits, known


def _steps(short: str, long: str, bound: int = -1) -> tuple[list[tuple[int, str]], int]:
    """Places the shorter sequence inside the longer one; returns lengths and kinds of the steps, and where they begin."""
    found = _align(short, long, bound)
    steps = [(int(length), kind) for length, kind in _STEP.findall(found["cigar"] or "")]
    return steps, (found["locations"] or [(0, 0)])[0][0] or 0


def _align(short: str, long: str, bound: int) -> dict[str, Any]:
    import edlib

    return edlib.align(short, _other_n(long), mode="HW", task="path", k=bound)


def _by_length(one: str, other: str) -> tuple[str, str]:
    """Returns the shorter of two sequences, then the longer one."""
    return (one, other) if len(one) <= len(other) else (other, one)


def _half_distance(counts: tuple[int, int]) -> float:
    """Returns half of the differences per compared column."""
    matches, columns = counts
    return (columns - matches) / max(columns, 1) / 2


def _other_n(long: str) -> str:
    """Returns a sequence with another letter for N, which then differs from that of the sequence it is aligned with."""
    return long.replace("N", "M")


def distance(matches: Counts, columns: Counts) -> Any:
    """Returns (differences + 1/2) / (columns + 1): above 0, and of equal identities the longer alignment is nearer."""
    return (columns - matches + 0.5) / (columns + 1)


def _distance(counts: tuple[int, int]) -> float:
    edits, known = counts
    return distance(known - edits, known)


def edit_counts(query: str, candidates: Sequence[str], at_most: float = float("inf")) -> list[tuple[int, int] | None]:
    """Counts edits and known bases of each candidate's alignment, without the alignment itself.

    The shorter sequence is placed inside the longer one; its known bases are those that face no N, and only they have
    edits. Where it extends past an end of the longer one, the overlapping parts count instead, if that at least halves
    the distance.

    Args:
        query: Cleaned DNA.
        candidates: Cleaned DNA; equal ones are aligned once.
        at_most: A bound that saves time: None is returned for a candidate with more edits per known base.
    """
    found: dict[str, tuple[int, int] | None] = {}
    for candidate in dict.fromkeys(candidates):
        placed = _placed(query, candidate, at_most)
        found[candidate] = None if placed is None else placed[0]
    return [found[candidate] for candidate in candidates]


_Counts = tuple[int, int]
"""Edits and known bases."""


def _placed(query: str, candidate: str, at_most: float = float("inf")) -> tuple[_Counts, tuple[str, str]] | None:
    """Counts as `edit_counts` does; also returns the two sequences, or their overlapping parts, that were compared."""
    counts, compared = _edits(query, candidate, at_most), (query, candidate)
    # Each base outside the overlap is one edit at most: to halve the edits, half as many must lie outside.
    if counts is None or (counts[0] and _may_extend(query, candidate, (counts[0] + 1) // 2)):
        enough = min(at_most if counts is None else counts[0] / counts[1], 1.0) / 2
        parts = overlapping_parts(query, candidate, enough)
        over = None if parts is None else _edits(*parts, enough)
        if parts is not None and over is not None and (counts is None or 2 * _distance(over) <= _distance(counts)):
            counts, compared = over, parts
    return None if counts is None else (counts, compared)


def _transversions(counts: _Counts, compared: tuple[str, str]) -> int:
    """Counts the edits that are left where A counts as G and C as T: transversions and gaps, at most all edits."""
    edits, known = counts
    one, other = (text.translate(_AS_PURINES) for text in compared)
    found = _edits(one, other, edits / known) if edits else None
    return edits if found is None else min(found[0], edits)


def _edits(one: str, other: str, at_most: float = float("inf")) -> tuple[int, int] | None:
    """Counts edits to place the shorter sequence inside the longer one, and its known bases; None if over the bound."""
    import edlib

    short, long = _by_length(one, other)
    of_short, of_long = short.count("N"), long.count("N")
    if of_short and of_long:  # columns with N cannot be counted without the alignment
        bound = -1 if at_most == float("inf") else int(at_most * len(short)) + of_short + of_long
        _, _, edits, known = _place(short, long, bound)
        if bound >= 0 and not known:
            return None
    else:
        unknown, task = of_short + min(of_long, len(short)), "locations" if of_long else "distance"
        for most in (at_most,) if at_most <= _LIKELY else (_LIKELY, at_most):
            bound = -1 if most == float("inf") else int(most * len(short)) + unknown
            found = edlib.align(short, long, mode="HW", task=task, k=bound)
            if found["editDistance"] >= 0:
                break
        else:
            return None
        unknown = of_short
        if of_long:
            first, last = found["locations"][0]
            unknown = long.count("N", first or 0, last + 1)
        edits, known = max(found["editDistance"] - unknown, 0), max(len(short) - unknown, 0)
    return None if edits > at_most * max(known, 1) else (edits, max(known, 1))


def is_near(one: str, other: str, at_most: float) -> bool:
    """Tells whether two sequences differ, by `edit_counts`, by at most so many edits per known base.

    Most pairs that do agree in so many bases without a gap, which is seen sooner, where a word of both shows how they lie.
    """
    short, long = _by_length(one, other)
    of_short, size = short.count("N"), len(short)
    most = of_short + at_most * (size - of_short - long.count("N"))
    letters, others = (np.frombuffer(text.encode(), np.uint8) for text in (short, _other_n(long)))
    for start in range(0, size - _WORD + 1, size // _REGISTERS or 1):
        at = long.find(short[start : start + _WORD]) - start
        if at < -start:
            continue
        first, last = max(-at, 0), min(size, len(long) - at)
        outside = size - (last - first)  # one edit each, at most
        if outside + np.count_nonzero(letters[first:last] != others[first + at : last + at]) <= most:
            return True
    return edit_counts(one, [other], at_most)[0] is not None


def _may_extend(one: str, other: str, least: int) -> bool:
    """Tells whether `least` bases of the shorter sequence may extend past an end of the longer one.

    Not so if a word of both shows how they lie, within what a gap may shift it by.
    """
    short, long = _by_length(one, other)
    first, reach = 1 - least, len(long) - len(short) + least + _WORD - 1
    for start in range(0, len(short) - _WORD + 1, len(short) // _WORDS or 1):
        word = short[start : start + _WORD]
        begin = start + first
        if long.find(word, begin if begin > 0 else 0, start + reach) >= 0 and "N" not in word:
            return False
    return True


Pool = ProcessPoolExecutor | None


@contextmanager
def worker_pool(processes: int) -> Iterator[Pool]:
    """Starts processes for the alignments (edlib holds the GIL); yields None for one, which is this process."""
    if processes < 2:
        yield None
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _end_with_parent) as pool:
        with _without_program():
            for _ in range(processes):
                pool.submit(_start)
        yield pool


@contextmanager
def _without_program() -> Iterator[None]:
    """Hides the running program from processes started meanwhile, which would run it again.

    A script of a few lines has no `if __name__ == "__main__"`, and nothing of it is needed in a worker.
    """
    main = vars(sys.modules["__main__"])
    kept = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main |= dict.fromkeys(kept)
    try:
        yield
    finally:
        main |= kept


def _start() -> None:
    """Makes a worker ready while its parent does other work."""
    import edlib  # noqa: F401


def _end_with_parent() -> None:
    """Ends a worker when its parent is killed: it would wait for work for ever. The parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def edit_distances(
    queries: Sequence[str],
    rows: Int64[np.ndarray, "queries k"],
    distinct: Int64[np.ndarray, " distinct"],
    sequences: Sequence[str],
    pool: Pool,
    floors: Floors,
    on_rows: Callable[[int], Any] = lambda rows: None,
    *,
    saturation: float = 0.0,
) -> tuple[Float64[np.ndarray, "queries k"], Float64[np.ndarray, "queries k"]]:
    """Returns the `distance` of each query to each of its candidates by `edit_counts`, and that by transversions alone.

    Both are inf where there is no evidence. Transitions, which are most of the differences between near species and come
    and go fastest (Brown et al. 1982, doi:10.1007/BF01734101), do not count in the second; gaps do.

    Args:
        queries: Cleaned DNA.
        rows: Table rows of each query's candidates; -1 for none.
        distinct: All rows that occur, ascending.
        sequences: Cleaned DNA of the distinct rows.
        pool: From `worker_pool`.
        floors: What counts as evidence.
        on_rows: Called with the number of queries just finished.
        saturation: Of a query with a candidate within this distance, both are the first, which saves time.
    """
    found, work = np.full((2, *rows.shape), np.inf), partial(_distances_some, floors=floors, saturation=saturation)
    for query, one in enumerate(_in_parts(work, queries, rows, distinct, sequences, pool, on_rows)):
        found[:, query, rows[query] >= 0] = one
    return found[0], found[1]


def compared(
    queries: Sequence[str],
    rows: Int64[np.ndarray, "queries k"],
    distinct: Int64[np.ndarray, " distinct"],
    sequences: Sequence[str],
    pool: Pool,
) -> Int64[np.ndarray, "queries k 2"]:
    """Aligns queries and candidates in full; returns matches and compared columns by `align_pair`.

    Arguments as those of `edit_distances`; -1 where there is no candidate.
    """
    found = np.full((*rows.shape, 2), -1, np.int64)
    for query, counts in enumerate(_in_parts(_align_some, queries, rows, distinct, sequences, pool)):
        found[query, rows[query] >= 0] = np.array(counts, np.int64).reshape(-1, 2)
    return found


_Job = tuple[list[str], list[np.ndarray], list[str]]
"""Queries, the indices of the candidates of each, and the candidates' DNA."""


def _in_parts(
    work: Callable[[_Job], list[Any]],
    queries: Sequence[str],
    rows: np.ndarray,
    distinct: np.ndarray,
    sequences: Sequence[str],
    pool: Pool,
    on_rows: Callable[[int], Any] = lambda rows: None,
) -> Iterator[Any]:
    """Yields the results of each query, in order; the processes of the pool work on some queries at a time."""
    jobs = []
    for start in range(0, len(queries), _QUERIES):
        part = rows[start : start + _QUERIES]
        used = np.unique(part[part >= 0])
        texts = [sequences[i] for i in np.searchsorted(distinct, used)]
        jobs.append((list(queries[start : start + _QUERIES]), [np.searchsorted(used, r[r >= 0]) for r in part], texts))
    for finished in map(work, jobs) if pool is None else pool.map(work, jobs):
        yield from finished
        on_rows(len(finished))


def _distances_some(job: _Job, floors: Floors, saturation: float) -> list[Float64[np.ndarray, "2 candidates"]]:
    return [
        _both_distances(query, [job[2][i] for i in some], floors, saturation)
        for query, some in zip(*job[:2], strict=True)
    ]


def _both_distances(
    query: str, candidates: Sequence[str], floors: Floors, saturation: float
) -> Float64[np.ndarray, "2 candidates"]:
    """Returns what `edit_distances` does, of one query."""
    placed = [one for one in (_placed(query, candidate) for candidate in candidates) if one is not None]
    edits, known = np.array([counts for counts, _ in placed], np.int64).reshape(-1, 2).T
    shorter = np.array([min(len(query), len(candidate)) for candidate in candidates], np.int64)
    evidence = floors.holds(edits, known, shorter)
    near = np.where(evidence, np.minimum(distance(known - edits, known), 1.0), np.inf)
    if near.min(initial=np.inf) <= saturation:
        return np.stack([near, near])
    left = np.array(
        [_transversions(*one) if there else 0 for one, there in zip(placed, evidence, strict=True)], np.int64
    )
    return np.stack([near, np.where(evidence, np.minimum(distance(known - left, known), 1.0), np.inf)])


def _align_some(job: _Job) -> list[list[tuple[int, int]]]:
    queries, candidates, texts = job
    return [[align_pair(query, texts[i]) for i in some] for query, some in zip(queries, candidates, strict=True)]


def none_nearer(
    queries: Sequence[str], distances: Sequence[float], sequences: Sequence[str], pool: Pool, floors: Floors
) -> Bool[np.ndarray, " queries"]:
    """Tells of each query whether none of some sequences with evidence is nearer, by `edit_counts`, than a distance."""
    parts = [slice(start, start + _QUERIES) for start in range(0, len(queries), _QUERIES)]
    jobs = [(list(queries[part]), list(distances[part]), list(sequences), floors) for part in parts]
    found = map(_none_nearer, jobs) if pool is None else pool.map(_none_nearer, jobs)
    return np.array([one for some in found for one in some], bool)


def _none_nearer(job: tuple[list[str], list[float], list[str], Floors]) -> list[bool]:
    queries, distances, texts, floors = job
    lengths = np.array([len(text) for text in texts], np.int64)

    def is_nearest(query: str, least: float) -> bool:
        # Up to one edit per two bases, edits / known is at most the distance: the bound loses none that is nearer.
        counts = edit_counts(query, texts, min(least, 0.5))
        there = np.array([place for place, one in enumerate(counts) if one is not None], np.int64)
        edits, known = np.array([one for one in counts if one is not None], np.int64).reshape(-1, 2).T
        evidence = floors.holds(edits, known, np.minimum(lengths[there], len(query)))
        return bool((distance(known - edits, known)[evidence] >= least).all())

    return [is_nearest(query, least) for query, least in zip(queries, distances, strict=True)]
