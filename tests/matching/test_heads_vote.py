"""Taxonomic heads as voters beside the nearest references."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx
from support.identified import World, make_world

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, taxon_tree, write_heads
from bioscan_jax.errors import InputError
from bioscan_jax.matching.heads import head_votes
from bioscan_jax.matching.identify import identify
from bioscan_jax.matching.match import prepare
from bioscan_jax.model.heads import HeadKind, make_head


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
def test_the_most_probable_taxa_of_each_rank_get_a_voice(world: World, tmp_path: Path, kind: HeadKind):
    width = width_of(world)
    directory = make_heads(world, tmp_path / "heads", kind, width=width)
    matcher = prepare(config.ReferenceConfig(uri=world.uri), config.IdentifyConfig(heads=str(directory)), None, None)
    assert matcher.heads is not None
    vectors = np.random.default_rng(0).normal(size=(5, width)).astype(np.float32)
    found = head_votes(matcher.heads, vectors, matcher.taxa)
    log_probs = matcher.heads.head(jnp.asarray(vectors)).log_probs
    for rank in range(len(RANKS)):
        names = matcher.heads.space.names[rank]
        expected = np.exp(np.asarray(log_probs[rank]))[:, : len(names)]
        for row in range(5):
            voices = {
                matcher.taxa.names[rank][int(taxon)].as_py(): float(p)
                for taxon, p in zip(found.lineages[row, :, rank], found.probabilities[row, :, rank], strict=True)
                if p > 0
            }
            best = np.argsort(-expected[row])[:8]
            assert voices == {names[i]: pytest.approx(expected[row, i], rel=1e-5) for i in best if expected[row, i] > 0}
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
    for number, (changed, said) in enumerate(
        [
            ({"pooling": "cls", "width": width}, "they take the cls of the last layer"),
            ({"width": width + 8}, "numbers, the table has"),
        ]
    ):
        for kind in ("marginal", "independent"):
            directory = make_heads(world, tmp_path / f"{kind}{number}", kind, **changed)
            with pytest.raises(InputError, match=f"^--heads .*{said}"):
                prepare(reference, config.IdentifyConfig(heads=str(directory)), None, None)
    with pytest.raises(InputError, match="has no heads.safetensors"):
        prepare(reference, config.IdentifyConfig(heads=str(tmp_path)), None, None)
