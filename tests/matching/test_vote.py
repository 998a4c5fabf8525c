"""The vote of the nearest references, against one written out in loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.matching.vote import HeadVotes, vote

LINEAGES = st.lists(st.integers(-1, 2), min_size=7, max_size=7)
CANDIDATES = st.lists(st.tuples(LINEAGES, st.sampled_from([0.5, 0.5, 1.0, 3.0, np.inf])), min_size=1, max_size=6)


def by_hand(candidates: list[tuple[list[int], float]], power: float) -> tuple[list[int], list[float]]:
    """The heaviest path and its shares for one query."""
    least = min(distance for _, distance in candidates)
    weights = [0.0 if distance == np.inf else (least / distance) ** power for _, distance in candidates]
    fits = [True] * len(candidates)
    taxa, shares, ceiling = [], [], 1.0
    for rank in range(len(RANKS)):
        voices: dict[int, float] = {}
        for (lineage, _), weight, allowed in zip(candidates, weights, fits, strict=True):
            if allowed and lineage[rank] >= 0 and weight > 0:
                voices[lineage[rank]] = voices.get(lineage[rank], 0.0) + weight
        if not voices:
            taxa.append(-1)
            shares.append(0.0)
            continue
        most = max(voices.values())
        # dicts keep the order of the candidates, so that the nearest comes first among equals
        best = next(taxon for taxon, weight in voices.items() if abs(weight - most) < 1e-9)
        whole = sum(w for (lineage, _), w in zip(candidates, weights, strict=True) if lineage[rank] >= 0)
        ceiling = min(voices[best] / whole, ceiling)
        taxa.append(best)
        shares.append(ceiling)
        fits = [fit and lineage[rank] in (-1, best) for fit, (lineage, _) in zip(fits, candidates, strict=True)]
    return taxa, shares


def arrays(queries: list[list[tuple[list[int], float]]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, queries))
    lineages = np.full((len(queries), width, 7), -1, np.int32)
    distances = np.full((len(queries), width), np.inf)
    for row, candidates in enumerate(queries):
        for place, (lineage, distance) in enumerate(candidates):
            lineages[row, place], distances[row, place] = lineage, distance
    return lineages, distances


@settings(max_examples=200, deadline=None)
@given(st.lists(CANDIDATES, min_size=1, max_size=4), st.sampled_from([1.0, 8.0]))
def test_it_is_the_vote_written_out(queries: list, power: float) -> None:
    queries = [sorted(candidates, key=lambda one: one[1]) for candidates in queries]
    lineages, distances = arrays(queries)
    found = vote(lineages, distances, power)
    for row, candidates in enumerate(queries):
        taxa, shares = ([-1] * 7, [0.0] * 7) if candidates[0][1] == np.inf else by_hand(candidates, power)
        assert found.taxa[row].tolist() == taxa
        np.testing.assert_allclose(found.share[row], shares, atol=1e-9)
        assert found.nearest[row] == candidates[0][1]


@settings(max_examples=100, deadline=None)
@given(st.lists(CANDIDATES, min_size=1, max_size=4))
def test_near_and_other_are_distances_to_the_taxon_and_to_another(queries: list) -> None:
    queries = [sorted(candidates, key=lambda one: one[1]) for candidates in queries]
    found = vote(*arrays(queries), 8.0)
    for row, candidates in enumerate(queries):
        there = [distance for _, distance in candidates if distance < np.inf]
        far = max(there) if there else -np.inf
        for rank, taxon in enumerate(found.taxa[row].tolist()):
            same = [d for lineage, d in candidates if lineage[rank] == taxon >= 0 and d < np.inf]
            different = [d for lineage, d in candidates if lineage[rank] not in (-1, taxon) and d < np.inf]
            assert found.near[row, rank] == (min(same) if same else far)
            assert found.other[row, rank] == (min(different) if different else far)


def test_a_tie_goes_to_the_nearer_and_an_unknown_rank_keeps_its_voice_below() -> None:
    first, second = [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]
    assert vote(*arrays([[(second, 0.5), (first, 0.5)]]), 8.0).taxa[0, 6] == 1
    assert vote(*arrays([[(first, 0.5), (second, 0.5)]]), 8.0).taxa[0, 6] == 0
    gap = [0, 0, 0, 0, -1, 1, 1]
    found = vote(*arrays([[(gap, 0.5), (first, 0.6)]]), 8.0)
    assert found.taxa[0].tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_a_head_is_pooled_linearly() -> None:
    lineages, distances = arrays([[([0, 0, 0, 0, 0, 0, 0], 0.5), ([0, 0, 0, 0, 0, 0, 1], 0.5)]])
    paths, probabilities = np.zeros((1, 2, 7), np.int32), np.zeros((1, 2, 7), np.float32)
    paths[0, 1, 6] = 1
    probabilities[0, 0, :6], probabilities[0, :, 6] = 1.0, (0.1, 0.9)
    heads = HeadVotes(paths, probabilities, np.zeros(1, np.float32))
    found = vote(lineages, distances, 8.0, heads, head_weight=0.25)
    assert found.taxa[0, 6] == 1
    np.testing.assert_allclose(found.share[0], [1, 1, 1, 1, 1, 1, 0.75 * 0.5 + 0.25 * 0.9], atol=1e-6)
    ignored = vote(lineages, distances, 8.0, heads, head_weight=0.0)
    np.testing.assert_allclose(ignored.share, vote(lineages, distances, 8.0).share)
