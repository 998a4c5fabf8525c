"""Alignments of candidates, compared with plain dynamic programming."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.matching.alignment import (
    align,
    align_pair,
    align_within,
    best_candidates,
    distance,
    overlapping_parts,
    worker_pool,
)

DNA = st.text("ACGTN", min_size=1, max_size=14)


def agree(one: str, other: str) -> bool:
    return one == other or "N" in (one, other)


def least_distance(short: str, long: str) -> int:
    """Edits to find `short` anywhere in `long`."""
    row = [0] * (len(long) + 1)
    for i, a in enumerate(short, 1):
        before, row = row, [i]
        for j, b in enumerate(long, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (not agree(a, b))))
    return min(row)


def shared(one: str, other: str) -> float:
    short, long = sorted((one, other), key=len)
    return least_distance(short, long) / max(len(short) - (one + other).count("N"), 1)


@settings(max_examples=300, deadline=None)
@given(DNA, DNA)
def test_the_alignment_is_one_of_least_distance(one: str, other: str) -> None:
    matches, columns = align_within(one, other)
    short, long = sorted((one, other), key=len)
    edits = least_distance(short, long)
    assert 0 <= matches <= min(columns, len(short))
    # Bases of the shorter one that overhang at either end are edits, but no columns.
    assert 0 <= edits - (columns - matches) <= len(short) - matches
    if edits == 0:
        assert matches == columns
        assert columns == len(short) or "N" in one + other


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("ACGTACGTAC", "ACGTACGTAC", (10, 10)),
        ("ACGTACGTAC", "TTTTACGTACGTACGGGG", (10, 10)),  # overhanging bases are not counted
        ("ACGTACGTAC", "ACGTTCGTAC", (9, 10)),
        ("ACGTACGTAC", "ACGTACTAC", (9, 10)),  # a gap inside is a column
        ("ACGTNCGTAC", "ACGTACGTAC", (9, 9)),  # N agrees with any base and is not counted
        ("ACGTACGTAC", "TTACGTNNGTTCGG", (7, 8)),
        ("NNNN", "ACGTACGT", (0, 0)),
    ],
)
def test_identities_as_vsearch_counts_them(one: str, other: str, expected: tuple[int, int]) -> None:
    assert align_pair(one, other) == expected


@settings(max_examples=200, deadline=None)
@given(DNA, DNA)
def test_an_overlap_is_taken_only_if_it_halves_the_distance(one: str, other: str) -> None:
    found, within = align_pair(one, other), align_within(one, other)
    assert found == within or 2 * distance(*found) <= distance(*within)
    parts = overlapping_parts(one, other, 0.5)
    if parts is not None:
        short, long = sorted((one, other), key=len)
        assert parts[0] in short
        assert parts[1] in long
        assert short.startswith(parts[0]) != long.startswith(parts[1]) or short.endswith(parts[0])
        assert len(short) // 2 <= len(parts[0]) + 1
        assert len(parts[0]) < len(short)


def test_barcodes_of_neighbouring_regions_are_compared_where_they_overlap() -> None:
    random = np.random.default_rng(0)
    gene = "".join(random.choice(list("ACGT"), 900))
    query, relative = gene[:500], gene[200:860]
    changed = relative[:100] + ("A" if relative[100] != "A" else "C") + relative[101:]
    assert align_pair(query, changed) == align_pair(changed, query) == (299, 300)
    others = ["".join(random.choice(list("ACGT"), 600)) for _ in range(40)]
    assert best_candidates(query, [*others, changed], 5)[0] == (40, 299, 300)


@settings(max_examples=150, deadline=None)
@given(DNA, st.lists(DNA, min_size=1, max_size=8), st.integers(1, 4))
def test_the_best_by_edit_distance_are_aligned(query: str, candidates: list[str], most: int) -> None:
    found = best_candidates(query, candidates, most)
    whole = {candidate: shared(query, candidate) for candidate in candidates}
    worst = sorted(whole.values())[most - 1] if most < len(whole) else None
    best = dict(whole)
    for candidate in whole if worst is not None else ():
        enough = min(whole[candidate] if whole[candidate] <= worst else np.inf, worst) / 2
        parts = overlapping_parts(query, candidate, enough)
        if parts is not None and shared(*parts) <= enough:
            best[candidate] = shared(*parts)
    shares = sorted((best[candidate], place) for place, candidate in enumerate(candidates))
    assert sorted(place for place, *_ in found) == sorted(place for _, place in shares[:most])
    distances = [(columns - matches + 0.5) / (columns + 1) for _, matches, columns in found]
    assert distances == sorted(distances)
    for place, matches, columns in found:
        assert (matches, columns) == align_pair(query, candidates[place])


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_give_the_same_in_the_order_of_the_queries(processes: int) -> None:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ACGT"), 40)) for _ in range(30)]
    queries = [texts[i % 30][:30] for i in range(150)]
    rows = np.stack([random.permutation(30)[:10] for _ in queries]).astype(np.int64)
    rows[3, 5:] = -1
    with worker_pool(processes) as pool:
        found = align(queries, rows, np.arange(30), texts, 4, pool)
    assert found.index.shape == (150, 4)
    for row, query in enumerate(queries):
        there = rows[row][rows[row] >= 0]
        expected = best_candidates(query, [texts[i] for i in there], 4)
        assert [tuple(one) for one in zip(found.index[row], found.matches[row], found.columns[row], strict=True)] == [
            (place, matches, columns) for place, matches, columns in expected
        ]
        if row % 30 in there:
            assert found.identity[row, 0] == 1.0


def test_unknown_bases_make_no_reference_nearer() -> None:
    query = "ACGTTGCAGGCTTAACCGTA"
    relative, blurred = "ACGTTGCAGGCTTAACCGTT", "ACGTTGCNNNNNNAACGCTA"
    assert [place for place, *_ in best_candidates(query, [blurred, relative], 2)] == [1, 0]


def test_identity_is_nan_where_there_is_no_candidate() -> None:
    rows = np.array([[0, -1, -1]])
    found = align(["ACGT"], rows, np.array([0]), ["ACGT"], 2, None)
    assert found.index.tolist() == [[0, -1]]
    assert re.sub(r"\s+", " ", str(found.identity)) == "[[ 1. nan]]"
