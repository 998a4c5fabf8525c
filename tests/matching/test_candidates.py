"""The order of candidates by the score of cosine and identity."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_table import World, embed_reference, make_world

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.matching.candidates import Candidates, rank_candidates
from bioscan_jax.matching.identify import IdentifySummary, identify
from bioscan_jax.matching.vote import BY_SIMILARITY, Voting

THOUSANDTHS = st.integers(1, 1000).map(lambda number: number / 1000)
ONE = st.tuples(THOUSANDTHS, THOUSANDTHS)


def candidates_of(queries: list[list[tuple[float, float]]], *, aligned: bool = True) -> Candidates:
    """Candidates with these cosines and edit distances, nearest by vector first; row i is the i-th of a query."""
    width = max(map(len, queries))
    rows, cosines = np.full((len(queries), width), -1), np.full((len(queries), width), -np.inf, np.float32)
    edits = np.full((len(queries), width), np.inf)
    for query, found in enumerate(queries):
        found = sorted(found, key=lambda one: -one[0])
        rows[query, : len(found)] = np.arange(len(found))
        cosines[query, : len(found)], edits[query, : len(found)] = np.array(found).T
    return Candidates(
        ids=pa.array([str(i) for i in range(len(queries))]),
        kept=np.ones(len(queries), bool),
        rejects=pa.table({}),
        texts=["ACGT"] * len(queries),
        vectors=np.zeros((len(queries), 2), np.float32),
        rows=rows,
        similarity=cosines,
        edit_distances=edits if aligned else None,
        transversions=edits / 2 if aligned else None,
        heads=None,
        truth=None,
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(ONE, min_size=1, max_size=6), min_size=1, max_size=3),
    st.sampled_from([0.0, 1.0, 4.0, 16.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.integers(1, 8),
)
def test_candidates_are_ordered_by_cosine_and_identity(
    queries: list, weight: float, saturation: float, most: int
) -> None:
    found = candidates_of(queries)
    voting = Voting(identity_weight=weight, saturation=saturation, temperature=0.1)
    ranked = rank_candidates(found, voting, most)
    for query, row in enumerate(ranked.rows):
        assert found.edit_distances is not None
        share = 0.5 if found.edit_distances[query].min() > saturation else 1.0
        pairs = [
            (round(max(1 - float(cosine), 1e-6) + weight * share * edits, 6), place)
            for place, (cosine, edits) in enumerate(
                zip(found.similarity[query], found.edit_distances[query], strict=True)
            )
            if found.rows[query, place] >= 0
        ]
        expected = sorted(pairs)[:most]
        there = row[row >= 0]
        assert there.tolist() == [place for _, place in expected]
        np.testing.assert_allclose(
            ranked.distances[query, : len(there)], [distance for distance, _ in expected], atol=2e-6
        )
        assert (ranked.similarity[query, : len(there)] == found.similarity[query, there]).all()
        assert np.isinf(ranked.distances[query, len(there) :]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(ONE, min_size=1, max_size=6), min_size=1, max_size=3))
def test_a_weight_of_0_is_the_order_of_the_cosine(queries: list) -> None:
    plain = rank_candidates(candidates_of(queries, aligned=False), BY_SIMILARITY, 1)
    fused = rank_candidates(candidates_of(queries), Voting(identity_weight=0.0, temperature=0.1), 6)
    np.testing.assert_array_equal(fused.rows, plain.rows)
    np.testing.assert_array_equal(fused.similarity, plain.similarity)
    np.testing.assert_array_equal(fused.distances, plain.distances)


def test_copies_stay_in_the_order_of_the_table() -> None:
    ranked = rank_candidates(
        candidates_of([[(0.5, 0.2)] * 3 + [(0.25, 0.01)] * 3]), Voting(identity_weight=4.0, temperature=0.1), 6
    )
    assert ranked.rows.tolist() == [[3, 4, 5, 0, 1, 2]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def identify_with(world: World, output: Path, **settings) -> IdentifySummary:
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    return identify(reference, query, str(output), config.IdentifyConfig(k=10, **settings), progress=False)


def answer(world: World, output: Path, **settings) -> pa.Table:
    identify_with(world, output, **settings)
    return pq.read_table(output)


def test_the_identity_joins_the_similarity_in_the_answers(world: World, tmp_path: Path) -> None:
    plain = answer(world, tmp_path / "plain.parquet")
    cosine = answer(world, tmp_path / "0.parquet", rerank="alignment", processes=1, identity_weight=0.0)
    for name in ("nearest_id", "similarity", "identity", "novelty"):
        assert cosine[name].equals(plain[name])
    heavy = answer(world, tmp_path / "9.parquet", rerank="alignment", processes=1, identity_weight=1e6, saturation=1.0)
    gained = heavy["identity"].to_numpy() - plain["identity"].to_numpy()
    assert gained.mean() > 0.001
    assert (gained >= -0.01).all()  # an identity is screened by edits, which count a gap at an end too
    fused = answer(world, tmp_path / "4.parquet", rerank="alignment", processes=1)
    score = [found["similarity"].to_numpy() + 4 * found["identity"].to_numpy() for found in (plain, fused, heavy)]
    assert score[1].mean() >= max(score[0].mean(), score[2].mean())


@pytest.mark.slow
def test_several_processes_answer_as_one(world: World, tmp_path: Path) -> None:
    one = answer(world, tmp_path / "1.parquet", rerank="alignment", processes=1)
    assert answer(world, tmp_path / "2.parquet", rerank="alignment", processes=2).equals(one)


def test_copies_unknown_bases_and_blank_ranks_in_the_reference(tmp_path: Path) -> None:
    """A reference that is mostly N names nothing, copies vote as one, and no name gets the ancestors of another."""
    make_world(tmp_path, species=20)
    given = pq.read_table(tmp_path / "reference.parquet").to_pylist()
    blurred = [
        row | {"dna_sequence": "N" * 270 + row["dna_sequence"][270:], "sequence_id": f"n{i}"}
        for i, row in enumerate(given[::9])
    ]
    copies = [row | {"sequence_id": f"copy{i}"} for i, row in enumerate(given)]
    copies += [given[0] | {"sequence_id": f"more{i}"} for i in range(33)]
    tie = given[0] | {"sequence_id": "tie", "genus": "Otherus", "species": "Otherus alius"}
    blank = given[7]["species"]
    rows = [
        row | ({"order": None, "family": None} if row["species"] == blank else {})
        for row in [*given, *copies, tie, *blurred]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "reference.parquet")
    random = np.random.default_rng(0)
    odd = ["".join(random.choice(list("ACGT"), 120)), given[0]["dna_sequence"][:5], given[0]["dna_sequence"][:60]]
    asked = given[:40] + [given[0] | {"sequence_id": f"odd{i}", "dna_sequence": text} for i, text in enumerate(odd)]
    pq.write_table(pa.Table.from_pylist(asked), tmp_path / "queries.parquet")
    embed_reference(tmp_path / "reference.parquet", str(tmp_path / "more"))
    world = World(str(tmp_path / "more"), str(tmp_path / "queries.parquet"), "", frozenset())
    report = identify_with(world, tmp_path / "a.parquet", rerank="alignment", processes=1)
    found = pq.read_table(tmp_path / "a.parquet").to_pylist()
    whole = found[:40]
    assert [row["nearest_id"] for row in whole] == [row["sequence_id"] for row in given[:40]]
    assert [row["identity"] for row in whole] == [row["coverage"] for row in whole] == [1.0] * 40
    assert [row["overlap"] for row in whole] == [len(row["dna_sequence"]) for row in given[:40]]
    for row, true in zip(whole, given, strict=False):
        gone = ("order", "family") if true["species"] == blank else ()
        assert [row[rank] for rank in RANKS] == [None if rank in gone else true[rank] for rank in RANKS]
        assert row["unnamed"] is None
    assert sum(row["family"] is None for row in whole) == sum(row["species"] == blank for row in given[:40]) > 0
    # 35 copies with one name and one with another are a tie; without them, a species has its six barcodes at most.
    assert whole[0]["species_confidence"] == pytest.approx(whole[0]["genus_confidence"])
    assert whole[0]["species_confidence"] == pytest.approx(0.5, abs=0.1)
    assert whole[0]["family_confidence"] > 0.9
    assert all(1 <= row["support"] <= 6 for row in whole)
    assert [row["unnamed"] for row in found[40:]] == ["identity", "overlap", None]
    for row in found[40:42]:
        assert {row[rank] for rank in RANKS} == {row["novelty"]} == {None}
        assert row["species_confidence"] == row["support"] == 0
    assert 55 < found[42]["overlap"] < 65
    assert report.unnamed == {"identity": 1, "overlap": 1}
    assert "unnamed  1 identity, 1 overlap below the floor" in str(report)
    assert f"{len(rows):,} references ({len(given) + len(blurred):,} distinct)" in report.search


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"identity_weight": 2.0}, "belong to --rerank alignment"),
        ({"min_overlap": 0}, "--min_overlap 0 is too small"),
        ({"min_identity": 97.0}, "--min_identity 97.0 is outside 0 to 1"),
        ({"temperature": 0.1}, "belong to --rerank alignment"),
        ({"rerank": "alignment", "identity_weight": -1.0}, "--identity_weight -1.0"),
        ({"rerank": "alignment", "saturation": 1.5}, "--saturation 1.5"),
        ({"rerank": "alignment", "temperature": 0.0}, "--temperature 0.0"),
        ({"rerank": "alignment", "temperature": float("nan")}, "--temperature nan"),
    ],
)
def test_a_wrong_weight_is_refused(flags: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        config.IdentifyConfig(**flags)
