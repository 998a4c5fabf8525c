"""The vote of the nearest references, against one written out in loops; taxonomic heads as voters beside them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from support.reference_table import World, make_world

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, taxon_tree, write_heads
from bioscan_jax.errors import InputError
from bioscan_jax.matching.candidates import open_matcher
from bioscan_jax.matching.identify import identify
from bioscan_jax.matching.reference import Taxa, _distinct, _lineages_of_sequences, fill_gaps
from bioscan_jax.matching.vote import HeadVotes, Voting, head_votes, vote
from bioscan_jax.model.heads import HeadKind, make_head

LINEAGES = st.lists(st.integers(-1, 2), min_size=7, max_size=7)
CANDIDATES = st.lists(st.tuples(LINEAGES, st.sampled_from([0.5, 0.5, 1.0, 3.0, np.inf])), min_size=1, max_size=6)
POWER_8 = Voting(power=8.0)


def is_of(lineage: list[int], path: list[int], rank: int) -> bool:
    """Whether a lineage has a path's name at a rank, and no other name than the path's above it."""
    above = zip(lineage[:rank], path[:rank], strict=True)
    return lineage[rank] == path[rank] >= 0 and all(one == other or -1 in (one, other) for one, other in above)


def by_hand(candidates: list[tuple[list[int], float]], power: float) -> tuple[list[int], list[float]]:
    """The heaviest path and its shares for one query."""
    least = min(distance for _, distance in candidates)
    weights = [0.0 if distance == np.inf else (least / distance) ** power for _, distance in candidates]
    fit = [lineage for (lineage, _), weight in zip(candidates, weights, strict=True) if weight > 0]
    path = [-1] * 7
    for rank in range(len(RANKS)):
        weights_of: dict[int, float] = {}
        for (lineage, _), weight in zip(candidates, weights, strict=True):
            if lineage in fit and lineage[rank] >= 0 and weight > 0:
                weights_of[lineage[rank]] = weights_of.get(lineage[rank], 0.0) + weight
        if weights_of:
            most = max(weights_of.values())
            # dicts keep the order of the candidates, so that the nearest comes first among equals
            best = next(taxon for taxon, weight in weights_of.items() if abs(weight - most) < 1e-9)
            fit = [lineage for lineage in fit if lineage[rank] in (-1, best)]
            # max takes the first of equals, the nearest
            path = max((one for one in fit if one[rank] == best), key=lambda one: sum(name >= 0 for name in one))
    shares, ceiling = [], 1.0
    for rank, name in enumerate(path):
        of = sum(w for (lineage, _), w in zip(candidates, weights, strict=True) if is_of(lineage, path, rank))
        whole = sum(w for (lineage, _), w in zip(candidates, weights, strict=True) if lineage[rank] >= 0)
        ceiling = ceiling if name < 0 else min(of / whole, ceiling)
        shares.append(0.0 if name < 0 else ceiling)
    return path, shares


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
def test_the_vote_is_the_one_written_out(queries: list, power: float) -> None:
    queries = [sorted(candidates, key=lambda one: one[1]) for candidates in queries]
    lineages, distances = arrays(queries)
    found = vote(lineages, distances, Voting(power=power))
    for row, candidates in enumerate(queries):
        taxa, shares = ([-1] * 7, [0.0] * 7) if candidates[0][1] == np.inf else by_hand(candidates, power)
        assert found.taxa[row].tolist() == taxa
        np.testing.assert_allclose(found.share[row], shares, atol=1e-9)
        assert found.nearest[row] == candidates[0][1]
        assert taxa in [lineage for lineage, _ in candidates] or taxa == [-1] * 7  # no mixture of two


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 2.0), min_size=1, max_size=6), st.sampled_from([0.02, 0.5]))
def test_a_temperature_weights_by_the_softmax_of_the_scores(scores: list[float], temperature: float) -> None:
    distances = 5.0 - np.sort(np.array([scores]))[:, ::-1]
    weights = Voting(identity_weight=4.0, temperature=temperature).weights(np.append(distances, [[np.inf]], axis=1))
    scaled = -distances[0] / temperature
    expected = np.exp(scaled - np.logaddexp.reduce(scaled))
    np.testing.assert_allclose(weights[0, :-1] / weights.sum(), expected, rtol=1e-9, atol=1e-12)
    assert weights[0, -1] == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(CANDIDATES, min_size=1, max_size=4))
def test_near_and_other_are_distances_to_the_taxon_and_to_another(queries: list) -> None:
    queries = [sorted(candidates, key=lambda one: one[1]) for candidates in queries]
    found = vote(*arrays(queries), POWER_8)
    for row, candidates in enumerate(queries):
        there = [distance for _, distance in candidates if distance < np.inf]
        far = max(there) if there else -np.inf
        for rank in range(len(RANKS)):
            path = found.taxa[row].tolist()
            same = [d for lineage, d in candidates if is_of(lineage, path, rank) and d < np.inf]
            different = [d for lineage, d in candidates if lineage[rank] >= 0 and not is_of(lineage, path, rank)]
            different = [d for d in different if d < np.inf]
            assert found.near[row, rank] == (min(same) if same else far)
            assert found.other[row, rank] == (min(different) if different else far)


def test_a_tie_goes_to_the_nearer_and_an_unnamed_rank_still_votes_below() -> None:
    first, second = [0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1]
    assert vote(*arrays([[(second, 0.5), (first, 0.5)]]), POWER_8).taxa[0, 6] == 1
    assert vote(*arrays([[(first, 0.5), (second, 0.5)]]), POWER_8).taxa[0, 6] == 0
    gap = [0, 0, 0, 0, -1, 1, 1]
    found = vote(*arrays([[(gap, 0.5), (first, 0.6)]]), POWER_8)
    assert found.taxa[0].tolist() == [0, 0, 0, 0, -1, 1, 1]  # its own ancestors, not those of the other one
    assert found.share[0, 5] > 0.5


def test_an_equal_name_in_another_family_is_another_taxon() -> None:
    one, homonym = [0, 0, 0, 0, 0, 5, 1], [0, 0, 0, 0, 1, 5, 2]
    found = vote(*arrays([[(one, 0.5), (homonym, 0.5), (homonym, 0.6)]]), Voting(power=0.5))
    assert found.taxa[0].tolist() == homonym
    np.testing.assert_allclose(found.share[0, 4:], found.share[0, 4])
    assert found.other[0, 5] == 0.5


def test_blank_ranks_take_names_only_from_a_lineage_with_all_names_of_the_row() -> None:
    full, other_family = [0, 0, 0, 4, 5, 6, 7], [0, 0, 0, 4, 9, 6, 7]
    same_genus, no_genus, shorter = [0, 0, 0, -1, -1, 6, 8], [0, 0, 0, 4, 5, -1, -1], [0, 0, 0, -1, -1, 6, -1]
    given = np.array([full, [0, 0, 0, -1, -1, 6, 7], same_genus, no_genus, shorter], np.int32)
    filled = fill_gaps(given).tolist()
    assert filled == [full, full, same_genus, no_genus, [0, 0, 0, 4, 5, 6, -1]]
    assert fill_gaps(given[1:]).tolist() == given[1:].tolist()  # without the full one
    doubtful = np.array([full, other_family, [0, 0, 0, 4, -1, 6, 7]], np.int32)
    assert fill_gaps(doubtful).tolist() == doubtful.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), LINEAGES), min_size=1, max_size=12), st.data())
def test_a_sequence_has_one_vote_that_its_names_share(rows: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    """Row i of a reference has one of four sequences and a lineage; candidates are the first rows of sequences."""
    sequence = np.array([one for one, _ in rows])
    first = np.array([sequence.tolist().index(one) for one in sequence])
    codes = np.array([lineage for _, lineage in rows], np.int32)
    distinct, lineage_of = _distinct([codes[:5], codes[5:]])
    assert distinct[lineage_of].tolist() == codes.tolist()
    lineages, shares, starts = _lineages_of_sequences(distinct, lineage_of, first, len(rows))
    taxa = Taxa((), lineages, shares, starts, ())
    candidates = data.draw(st.lists(st.sampled_from([*np.unique(first).tolist(), -1]), min_size=1, max_size=4))
    places, found = (one[0] for one in taxa.voters(np.array([candidates])))
    expected = []
    for place, candidate in enumerate(candidates):
        own = [lineage for row, (_, lineage) in enumerate(rows) if first[row] == candidate]
        for lineage in sorted({*map(tuple, own)}, key=lambda one: (-own.count(list(one)), one)):
            names = [{one[rank] for one in own} - {-1} for rank in range(7)]
            lines = [sum(one[rank] == lineage[rank] for one in {*map(tuple, own)}) for rank in range(7)]
            share = [1 / len(names[rank]) / lines[rank] if name >= 0 else 0.0 for rank, name in enumerate(lineage)]
            expected.append((place, lineage, pytest.approx(share)))
    there = found >= 0
    given = zip(places[there].tolist(), taxa.lineages[found[there]], taxa.shares[found[there]], strict=True)
    assert [(place, tuple(lineage.tolist()), share.tolist()) for place, lineage, share in given] == expected
    assert (places[~there] == -1).all()


def test_a_head_is_pooled_linearly() -> None:
    lineages, distances = arrays([[([0, 0, 0, 0, 0, 0, 0], 0.5), ([0, 0, 0, 0, 0, 0, 1], 0.5)]])
    paths, probabilities = np.zeros((1, 2, 7), np.int32), np.zeros((1, 2, 7), np.float32)
    paths[0, 1, 6] = 1
    probabilities[0, 0, :6], probabilities[0, :, 6] = 1.0, (0.1, 0.9)
    heads = HeadVotes(paths, probabilities, np.zeros(1, np.float32))
    found = vote(lineages, distances, Voting(power=8.0, head_weight=0.25), heads)
    assert found.taxa[0, 6] == 1
    np.testing.assert_allclose(found.share[0], [1, 1, 1, 1, 1, 1, 0.75 * 0.5 + 0.25 * 0.9], atol=1e-6)
    ignored = vote(lineages, distances, POWER_8, heads)
    np.testing.assert_allclose(ignored.share, vote(lineages, distances, POWER_8).share)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), species=30, layer=-1)


def make_heads(world: World, directory: Path, kind: HeadKind, *, width: int = 64, pooling: str = "mean") -> Path:
    """Random heads over the taxa of the queries, some of which no reference has."""
    space = LabelSpace.build([pq.read_table(world.queries)])
    head = make_head(kind, width, taxon_tree(space), rngs=nnx.Rngs(1))
    for _, variable in nnx.to_flat_state(nnx.state(head)):  # far from uniform, so that there is a best one
        variable.set_value(10.0 * variable.get_value())
    directory.mkdir()
    write_heads(directory, Heads(kind=kind, pooling=pooling, space=space, head=head, encoder=None))  # pyright: ignore
    return directory


def width_of(world: World) -> int:
    import lance

    return lance.dataset(f"{world.uri}/sequences.lance").schema.field("vector").type.list_size


@pytest.mark.parametrize("kind", ["marginal", "independent"])
def test_a_head_votes_for_its_most_probable_taxa_of_each_rank(world: World, tmp_path: Path, kind: HeadKind):
    width = width_of(world)
    directory = make_heads(world, tmp_path / "heads", kind, width=width)
    matcher = open_matcher(
        config.ReferenceConfig(uri=world.uri), config.IdentifyConfig(heads=str(directory)), None, None
    )
    assert matcher.heads is not None
    vectors = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    found = head_votes(matcher.heads, vectors, matcher.taxa)
    log_probs = matcher.heads.head(jnp.asarray(vectors)).log_probs
    for rank in range(len(RANKS)):
        names = matcher.heads.space.names[rank]
        expected = np.exp(np.asarray(log_probs[rank]))[:, : len(names)]
        for row in range(5):
            weights_of = {
                matcher.taxa.names[rank][int(taxon)].as_py(): float(p)
                for taxon, p in zip(found.lineages[row, :, rank], found.probabilities[row, :, rank], strict=True)
                if p > 0
            }
            best = np.argsort(-expected[row])[:8]
            assert weights_of == {
                names[i]: pytest.approx(expected[row, i], rel=1e-5) for i in best if expected[row, i] > 0
            }
    species = np.asarray(log_probs[-1], np.float64)
    entropy = [-sum(np.exp(x) * x for x in row if np.isfinite(x)) for row in species]
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4, atol=1e-6)


def test_the_vote_changes_and_the_names_stay_a_path(world: World, tmp_path: Path):
    directory = make_heads(world, tmp_path / "heads", "marginal", width=width_of(world))
    reference, query = config.ReferenceConfig(uri=world.uri), config.QueryConfig(path=world.queries)
    answers = {}
    for name, heads in (("plain", None), ("heads", str(directory))):
        output = tmp_path / f"{name}.parquet"
        settings = config.IdentifyConfig(k=5, heads=heads, processes=1)
        identify(reference, query, str(output), settings, progress=False)
        answers[name] = pq.read_table(output)
    # The nearest reference's species has nearly all of the references' half; the head's half goes elsewhere.
    plain, pooled = (answers[name]["species_confidence"].to_numpy() for name in ("plain", "heads"))
    assert np.median(plain) > 0.9
    assert np.mean(pooled < plain - 0.3) > 0.5
    lineages = {
        row["species"]: tuple(row[rank] for rank in RANKS)
        for table in (world.queries, str(Path(world.queries).with_name("reference.parquet")))
        for row in pq.read_table(table).to_pylist()
    }
    for row in answers["heads"].to_pylist():
        assert tuple(row[rank] for rank in RANKS) == lineages[row["species"]]


def test_heads_of_other_vectors_are_refused(world: World, tmp_path: Path):
    reference = config.ReferenceConfig(uri=world.uri)
    width = width_of(world)
    others: list[tuple[HeadKind, str, int, str]] = [
        ("marginal", "cls", width, "cls pooling of the last layer"),
        ("marginal", "mean", width + 8, "numbers, the table has"),
        ("independent", "mean", width + 8, "numbers, the table has"),
    ]
    for number, (kind, pooling, numbers, words) in enumerate(others):
        directory = make_heads(world, tmp_path / str(number), kind, width=numbers, pooling=pooling)
        with pytest.raises(InputError, match=f"^--heads .*{words}"):
            open_matcher(reference, config.IdentifyConfig(heads=str(directory)), None, None)
    with pytest.raises(InputError, match="has no heads.safetensors"):
        open_matcher(reference, config.IdentifyConfig(heads=str(tmp_path)), None, None)
