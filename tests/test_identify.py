"""Barcodes to names, from files to files."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from identified import World, make_world

from bioscan_jax import config
from bioscan_jax.errors import InputError
from bioscan_jax.identify import identify
from bioscan_jax.matching.answers import ANSWERS
from bioscan_jax.taxonomy import RANKS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def ask(world: World, path: str, output: Path, **more) -> None:
    settings = config.Identify(k=10, rerank="alignment", filter=more.pop("filter", None))
    reference = config.Reference(uri=more.pop("uri", world.uri))
    identify(reference, config.Query(path=path), str(output), settings, progress=False, **more)


def test_names_known_species_and_keeps_the_published_columns(world: World, tmp_path: Path):
    ask(world, world.queries, tmp_path / "a.parquet")
    found, given = pq.read_table(tmp_path / "a.parquet"), pq.read_table(world.queries)
    assert found.schema.names == ANSWERS.names
    assert found["sequence_id"].to_pylist() == given["sequence_id"].to_pylist()
    pairs = list(zip(found["species"].to_pylist(), given["species"].to_pylist(), strict=True))
    known = [answer == truth for answer, truth in pairs if truth not in world.unseen]
    assert sum(known) / len(known) > 0.9
    for row in found.to_pylist():
        shares = [row[f"{rank}_confidence"] for rank in RANKS]
        assert shares == sorted(shares, reverse=True)
        assert row["novel"] is None
        assert row["abstained_at"] is None


def test_fasta_is_answered_as_parquet(world: World, tmp_path: Path):
    ask(world, world.queries, tmp_path / "a.parquet")
    ask(world, world.fasta, tmp_path / "b.parquet")
    whole, some = pq.read_table(tmp_path / "a.parquet"), pq.read_table(tmp_path / "b.parquet")
    assert some.select(["sequence_id", *RANKS]).equals(whole.slice(0, 20).select(["sequence_id", *RANKS]))


@pytest.mark.parametrize("condition", ["depht > 3", "true; DROP TABLE sequences", "species = 'nobody'"])
def test_a_wrong_filter_is_one_line_and_leaves_no_file(world: World, tmp_path: Path, condition: str):
    with pytest.raises(InputError, match="filter") as caught:
        ask(world, world.fasta, tmp_path / "a.parquet", filter=condition)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_missing_table_or_empty_input_is_one_line(world: World, tmp_path: Path):
    (empty := tmp_path / "empty.fasta").write_text("")
    for path, uri in ((str(empty), world.uri), (world.fasta, str(tmp_path / "none"))):
        with pytest.raises(InputError) as caught:
            ask(world, path, tmp_path / "a.parquet", uri=uri)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "a.parquet").exists()
