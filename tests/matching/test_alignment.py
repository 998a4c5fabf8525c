"""Alignments of candidates, compared with plain dynamic programming."""

import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.matching.alignment import (
    Floors,
    _edits,
    _place,
    align_cigar,
    align_pair,
    align_within,
    compared,
    distance,
    edit_counts,
    edit_distances,
    is_near,
    none_nearer,
    overlapping_parts,
    worker_pool,
)

DNA = st.text("ACGTN", min_size=1, max_size=14)
ALL = Floors(overlap=0, identity=0.0)
"""Every alignment is evidence."""
KNOWN = st.text("ACGT", min_size=1, max_size=14)


def least_distance(short: str, long: str) -> int:
    """Edits to find `short` anywhere in `long`, where N differs from every base."""
    row = [0] * (len(long) + 1)
    for i, a in enumerate(short, 1):
        before, row = row, [i]
        for j, b in enumerate(long, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b or a == "N")))
    return min(row)


def counted(one: str, other: str) -> int:
    """Edits to place the shorter of two sequences inside the longer one."""
    short, long = sorted((one, other), key=len)
    return least_distance(short, long)


@settings(max_examples=300, deadline=None)
@given(DNA, DNA)
def test_the_alignment_is_one_of_least_distance(one: str, other: str) -> None:
    matches, columns, edits, known = _place(one, other)
    assert align_within(one, other) == (matches, columns)
    short, unknown = min(one, other, key=len), (one + other).count("N")
    assert 0 <= matches <= min(columns, known)
    assert 0 <= counted(one, other) - edits <= unknown  # columns with N are no edits
    assert 0 <= len(short) - known <= unknown
    # Bases of the shorter one that overhang at either end are edits, but no columns.
    assert 0 <= edits - (columns - matches) <= known - matches


@settings(max_examples=300, deadline=None)
@given(DNA, DNA)
def test_the_cigar_describes_the_counted_alignment(query: str, reference: str) -> None:
    start, cigar = align_cigar(query, reference)
    pairs, here, there = [], 0, start
    for length, kind in re.findall(r"(\d+)([=XIDS])", cigar):
        for _ in range(int(length)):
            one, other = query[here] if kind != "D" else "-", reference[there] if kind in "=XD" else "-"
            assert kind != "=" or one == other
            pairs += [(one, other)] * (kind != "S")
            here, there = here + (kind != "D"), there + (kind in "=XD")
    known = [(one, other) for one, other in pairs if "N" not in one + other]
    matches, columns = align_pair(query, reference)
    assert (sum(one == other for one, other in known), len(known)) == (matches, columns)
    assert not cigar or here == len(query)


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
        ("ACGTACGTAC", "ACGTTCGTAC" + "N" * 20, (9, 10)),  # a stretch of N attracts nothing
        ("ACGTNNGTAC", "ACGTGTAC", (8, 8)),  # N against a gap is not compared either
    ],
)
def test_identities_as_vsearch_counts_them(one: str, other: str, expected: tuple[int, int]) -> None:
    assert align_pair(one, other) == expected


@settings(max_examples=200, deadline=None)
@given(DNA, DNA)
def test_edits_are_those_of_the_alignment(one: str, other: str) -> None:
    short, long = sorted((one, other), key=len)
    _, _, edits, known = _place(one, other)
    found = _edits(one, other)
    if "N" not in long or "N" in short:
        assert found == (edits, max(known, 1))
    else:  # N of the longer sequence that face a gap are no bases of the shorter one
        assert found is not None
        assert abs(found[0] - edits) <= long.count("N")
        assert abs(found[1] - known) <= long.count("N")


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
        half = len(short) // 2
        assert len(parts[0]) >= half - int(0.5 * half) - short[:half].count("N")
        assert len(parts[0]) < len(short)


def test_barcodes_of_neighbouring_regions_are_compared_where_they_overlap() -> None:
    random = np.random.default_rng(0)
    gene = "".join(random.choice(list("ACGT"), 900))
    query, relative = gene[:500], gene[200:860]
    changed = relative[:100] + ("A" if relative[100] != "A" else "C") + relative[101:]
    assert align_pair(query, changed) == align_pair(changed, query) == (299, 300)
    others = ["".join(random.choice(list("ACGT"), 600)) for _ in range(40)]
    counts = edit_counts(query, [*others, changed])
    assert counts[-1] == (1, 300)
    assert all(found is not None and found[0] / found[1] > 0.3 for found in counts[:-1])
    for start, end in ((0, 300), (100, 500)):  # one inside the other is in register, and is not cut
        assert edit_counts(query, [gene[start:end]]) == [(0, end - start)]
    # Equal lengths, as most barcodes have: 40 bases stick out at either end.
    assert edit_counts(gene[:600], [gene[40:640]]) == edit_counts(gene[40:640], [gene[:600]]) == [(0, 560)]


@settings(max_examples=200, deadline=None)
@given(KNOWN, st.lists(KNOWN, min_size=1, max_size=6))
def test_edits_are_those_of_the_whole_or_of_an_overlap_that_halves_them(query: str, candidates: list[str]) -> None:
    for candidate, counts in zip(candidates, edit_counts(query, candidates), strict=True):
        assert counts is not None
        edits, known = counts
        whole, length = counted(query, candidate), min(len(query), len(candidate))
        if (edits, known) != (whole, length):
            parts = overlapping_parts(query, candidate, min(whole / length, 1.0) / 2) or ("", "")
            assert edits == counted(*parts)
            assert 2 * (edits + 0.5) / (known + 1) <= (whole + 0.5) / (length + 1)


@settings(max_examples=200, deadline=None)
@given(DNA, st.lists(DNA, min_size=1, max_size=6), st.floats(0.0, 1.0))
def test_a_bound_leaves_out_only_what_is_farther(query: str, candidates: list[str], bound: float) -> None:
    whole = edit_counts(query, candidates)
    for candidate, one, bounded in zip(candidates, whole, edit_counts(query, candidates, bound), strict=True):
        assert one is not None
        if bounded is not None:
            assert bounded[0] / bounded[1] <= bound
        elif one[0] / one[1] <= bound:  # only an overlap, which does not halve the bound, is near enough
            edits, known = _edits(query, candidate) or (0, 1)
            assert edits > bound * known or not _place(query, candidate)[3]  # or nothing is compared


@settings(max_examples=200, deadline=None)
@given(st.text("ACGTN", min_size=1, max_size=40), DNA, st.integers(0, 39), st.floats(0.0, 1.0))
def test_what_agrees_without_gaps_is_near(one: str, part: str, cut: int, bound: float) -> None:
    for other in (one[cut:] + part, part + one[:cut] + "N", one[:cut] + part + one[cut:]):
        if other:
            assert is_near(one, other, bound) == (edit_counts(one, [other], bound) != [None])


def drawn(distinct: int, queries: int) -> tuple[list[str], list[str], np.ndarray]:
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("ACGT"), 40)) for _ in range(distinct)]
    rows = np.stack([random.permutation(distinct)[:10] for _ in range(queries)]).astype(np.int64)
    return texts, [texts[i % distinct][:30] for i in range(queries)], rows


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_give_the_same_in_the_order_of_the_queries(processes: int) -> None:
    texts, queries, rows = drawn(30, 150)
    rows[3, 5:] = -1
    done = []
    with worker_pool(processes) as pool:
        found, transversions = edit_distances(queries, rows, np.arange(30), texts, pool, ALL, done.append)
        counts = compared(queries, rows, np.arange(30), texts, pool)
        nearest = none_nearer(queries, found.min(axis=1).tolist(), texts, pool, ALL)
    assert sum(done) == 150
    for row, query in enumerate(queries):
        for place, one in enumerate(rows[row]):
            if one < 0:
                assert found[row, place] == np.inf
                assert counts[row, place].tolist() == [-1, -1]
                continue
            [(edits, known)] = edit_counts(query, [texts[one]])  # pyright: ignore[reportGeneralTypeIssues]
            assert found[row, place] == min((edits + 0.5) / (known + 1), 1.0)
            assert 0 < transversions[row, place] <= found[row, place]
            assert tuple(counts[row, place]) == align_pair(query, texts[one])
        assert nearest[row] == (row % 30 in rows[row][rows[row] >= 0])


def test_unknown_bases_make_no_reference_nearer() -> None:
    query = "ACGTTGCAGGCTTAACCGTA"
    relative, blurred = "ACGTTGCAGGCTTAACCGTT", "ACGTTGCNNNNNNAACGCTA"
    texts = [blurred, relative, "N" * 20]
    near = edit_distances([query], np.array([[0, 1, 2]]), np.arange(3), texts, None, ALL)[0][0]
    assert near.argsort().tolist() == [1, 0, 2]


def test_transitions_do_not_count_as_transversions_and_gaps_do() -> None:
    random = np.random.default_rng(0)
    gene = "".join(random.choice(list("ACGT"), 300))
    transition, transversion = str.maketrans("ACGT", "GTAC"), str.maketrans("ACGT", "CATG")

    def changed(text: str, table: dict[int, int]) -> str:
        return "".join(base.translate(table) if place % 40 == 20 else base for place, base in enumerate(text))

    texts = [changed(gene, transition), changed(gene, transversion), gene[:150] + gene[151:], gene]
    query = gene[:5] + "N" + gene[6:]
    edits, transversions = edit_distances([query], np.arange(4)[None], np.arange(4), texts, None, ALL)
    np.testing.assert_allclose(edits[0] * 300 - 0.5, [7, 7, 1, 0], atol=0.1)
    np.testing.assert_allclose(transversions[0] * 300 - 0.5, [0, 7, 1, 0], atol=0.1)


def test_unknown_bases_count_only_where_they_face_the_other_sequence() -> None:
    query = "ACGTTGCAGGCTTAACCGTA"
    assert edit_counts(query, [query + "N" * 12, "N" * 12 + query[:10] + "A" + query[11:]]) == [(0, 20), (1, 20)]
    assert edit_counts(query, ["N" * 50]) in ([(20, 20)], [(0, 1)])  # nothing in common, or nothing compared


def test_short_or_unlike_alignments_are_no_evidence() -> None:
    random = np.random.default_rng(0)
    gene, other = ("".join(random.choice(list("ACGT"), 600)) for _ in range(2))
    gappy = other[:60] + "N" * 480 + other[-60:]
    texts = [gene, gappy]

    def distances(query: str, floors: Floors) -> list[float]:
        return edit_distances([query], np.array([[0, 1]]), np.arange(2), texts, None, floors)[0][0].tolist()

    for query in (other[200:320], gene[:5], gene[300:320] + "N" * 300):  # random, short, and blurred
        assert distances(query, Floors()) == [np.inf, np.inf]
    for query in (gene[100:140], gene[:120], gene[:40] + "N" * 30):
        assert distances(query, Floors())[0] < 0.02
    assert distances(gene[:120], Floors(overlap=121))[0] == np.inf
    assert distances(gene[:5], Floors(overlap=5))[0] < 0.1
    changed = gene[:60] + other[:60]
    assert distances(changed, Floors(identity=0.9))[0] == np.inf
    least = distances(gene[:120], ALL)
    assert none_nearer([gene[:120], gappy[:60] + gappy[-60:]], [least[0], np.inf], texts, None, Floors()).all()


@pytest.mark.parametrize(("shorter", "required"), [(5, 32), (63, 32), (64, 32), (150, 75), (200, 100), (658, 100)])
def test_half_of_the_shorter_sequence_must_be_compared(shorter: int, required: int) -> None:
    assert Floors().required(np.array([shorter])).tolist() == [required]
    assert Floors(overlap=7).required(np.array([shorter])).tolist() == [7]


def test_workers_do_not_run_the_program_again(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "print('once')\n"
        "from bioscan_jax.matching.alignment import worker_pool\n"
        "with worker_pool(2) as pool:\n"
        "    print(list(pool.map(len, ['ACGT'])))\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "once\n[4]\n"), done.stderr
