"""Nearest rows of a vector table, exact and by its index."""

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from bioscan_jax import config
from bioscan_jax.errors import InputError
from bioscan_jax.matching.neighbours import by_index, exact, nearest, search_kind
from bioscan_jax.matching.reference import Reference, open_reference
from bioscan_jax.table.index import build_indexes

FACTS = {"plan": "0", "plan_facts": '{"data": {"sequence_column": "dna_sequence"}}', "weights_sha256": "0"}


def clustered(rows: int, width: int, seed: int, scatter: float = 0.3) -> np.ndarray:
    """Vectors around one centre for each 60 rows, all with a large common part, as pooled states have."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(-(-rows // 60), width))
    vectors = centres[random.integers(len(centres), size=rows)] + scatter * random.normal(size=(rows, width))
    return (vectors + 2.0).astype(np.float32)


def write(
    directory: Path, vectors: np.ndarray, kind: str = "none", per_file: int = 1000, dna: list[str] | None = None
) -> config.ReferenceConfig:
    schema = pa.schema(
        [("sequence_id", pa.string()), ("depth", pa.int64()), ("vector", pa.list_(pa.float32(), vectors.shape[1]))],
        metadata=FACTS,
    )
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    rows = np.arange(len(vectors))
    table = pa.table([pa.array(rows.astype(str)), pa.array(rows % 7), column], schema=schema)
    table = table if dna is None else table.append_column("dna_sequence", pa.array(dna))
    dataset = lance.write_dataset(table, str(directory / "t.lance"), max_rows_per_file=per_file)
    build_indexes(dataset, kind)  # pyright: ignore[reportArgumentType]
    return config.ReferenceConfig(uri=str(directory), table="t")


def by_hand(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    one, other = queries.astype(np.float64), vectors[rows].astype(np.float64)
    scores = one @ other.T / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows[order], np.take_along_axis(scores, order, 1)


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), wanted.tolist(), strict=True)]))


@pytest.mark.parametrize("condition", [None, "depth < 2"])
def test_exact_compares_with_every_row_that_passes_the_filter(tmp_path: Path, condition: str | None) -> None:
    vectors = clustered(9000, 16, 0)  # more than one block is read
    reference = open_reference(write(tmp_path, vectors), condition)
    rows = np.arange(9000) if condition is None else np.flatnonzero(np.arange(9000) % 7 < 2)
    assert reference.chosen.tolist() == rows.tolist()
    queries = clustered(50, 16, 1)
    found = exact(queries, reference, 12)
    wanted, scores = by_hand(queries, vectors, rows, 12)
    np.testing.assert_allclose(found.similarity, scores, atol=1e-6)
    assert recall(found.rows, wanted) > 0.999


def test_equal_vectors_come_in_the_order_of_the_table(tmp_path: Path) -> None:
    vectors = np.tile(np.array([[1.0, 2.0], [2.0, -1.0]], np.float32), (40, 1))
    found = exact(vectors[:1], open_reference(write(tmp_path, vectors)), 5)
    assert found.rows[0].tolist() == [0, 2, 4, 6, 8]
    np.testing.assert_allclose(found.similarity, 1.0, atol=1e-6)


@pytest.mark.parametrize("kept", [1 << 20, 0])
def test_vectors_that_fit_the_memory_are_read_once(tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bioscan_jax.matching.reference._KEPT_BYTES", kept)
    reference = open_reference(write(tmp_path, clustered(20, 4, 0), dna=["ACGT" * 9] * 5 + ["ACGTA" * 9] * 15))
    for copies, rows in ((False, 2), (True, 20)):
        ((first, vectors),) = reference.blocks(copies=copies)
        ((again, same),) = reference.blocks(copies=copies)
        assert len(first) == rows
        np.testing.assert_array_equal(again, first)
        np.testing.assert_array_equal(same, vectors)
        assert (same is vectors) == bool(kept)


def test_k_beyond_the_table_finds_every_row(tmp_path: Path) -> None:
    found = exact(clustered(3, 4, 1), open_reference(write(tmp_path, clustered(20, 4, 0))), 100)
    assert found.rows.shape == (3, 20)
    assert all(sorted(row) == list(range(20)) for row in found.rows.tolist())


@pytest.mark.parametrize("condition", [None, "depth = 3"])
def test_the_index_finds_only_rows_that_pass_the_filter(tmp_path: Path, condition: str | None) -> None:
    vectors = clustered(6000, 32, 0)
    reference = open_reference(write(tmp_path, vectors, "ivf_sq"), condition)
    queries = clustered(40, 32, 1)
    settings = config.IdentifyConfig(k=10, search="index")
    found = nearest(queries, reference, settings)
    assert (np.diff(found.similarity, axis=1) <= 0).all()
    assert np.isin(found.rows, reference.chosen).all()
    wanted = exact(queries, reference, 10)
    assert recall(found.rows, wanted.rows) >= 0.95
    same = found.rows == wanted.rows
    np.testing.assert_allclose(found.similarity[same], wanted.similarity[same], atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "ivf_sq"])
def test_copies_count_once(tmp_path: Path, kind: str) -> None:
    """Of 40 copies, written with gaps and in lower case, only the first that passes the filter is found."""
    random = np.random.default_rng(0)
    distinct = clustered(600, 32, 0)
    of = np.concatenate([np.zeros(40, np.int64), np.arange(600)])
    random.shuffle(of)
    texts = np.array(["".join(random.choice(list("ACGT"), 50)) for _ in range(600)])
    dna = [text if row % 2 else text[:9].lower() + "-" + text[9:] for row, text in enumerate(texts[of])]
    where = write(tmp_path, distinct[of], kind, dna=dna)
    for condition in (None, "depth < 5"):
        reference = open_reference(where, condition)
        first = {one: row for row, one in reversed(list(enumerate(of))) if condition is None or row % 7 < 5}
        assert reference.copies.distinct == len(first)
        assert all(reference.copies.first[row] == first[of[row]] for row in reference.chosen)
        assert (np.delete(reference.copies.first, reference.chosen) == -1).all()
        settings = config.IdentifyConfig(k=10, search="index" if kind == "ivf_sq" else "exact")
        found = nearest(distinct[:1], reference, settings, copies=False).rows[0].tolist()
        assert len(set(of[found])) == 10
        assert found == [first[of[row]] for row in found]
        assert found[0] == first[0]
        assert set(of[nearest(distinct[:1], reference, settings).rows[0]]) == {0}
    assert nearest(distinct[:1], reference, config.IdentifyConfig(k=1000), copies=False).rows.shape[1] == len(first)


@pytest.mark.parametrize("deleted", ["depth = 9", "depth IN (1, 2)", "sequence_id = '1500'"])
def test_addresses_become_positions_after_deletions_and_compaction(tmp_path: Path, deleted: str) -> None:
    given = write(tmp_path, clustered(4000, 4, 0), per_file=500)
    dataset = lance.dataset(f"{tmp_path}/t.lance")
    dataset.delete(deleted)
    dataset.optimize.compact_files(target_rows_per_fragment=1000, materialize_deletions=False)
    dataset.delete("sequence_id IN ('7', '2600')")
    reference = open_reference(given, "depth IN (3, 5)")
    ids = reference.dataset.to_table(columns=["sequence_id", "depth"])
    assert reference.chosen.tolist() == np.flatnonzero(np.isin(ids["depth"], (3, 5))).tolist()
    addresses = reference.dataset.to_table(columns=[], with_row_address=True)["_rowaddr"].to_numpy()
    shuffled = np.random.default_rng(0).permutation(len(ids))
    assert reference.addresses.positions(addresses[shuffled]).tolist() == shuffled.tolist()


@pytest.mark.slow
def test_recall_at_10_over_60000_rows(tmp_path: Path) -> None:
    vectors = clustered(60_300, 64, 0)
    reference = open_reference(write(tmp_path, vectors[:60_000], "ivf_sq", per_file=8192))
    queries = vectors[60_000:]
    assert search_kind(reference, "auto") == "index"
    settings = config.IdentifyConfig(k=10)
    assert recall(by_index(queries, reference, settings).rows, exact(queries, reference, 10).rows) >= 0.95


def test_auto_is_exact_without_an_index_or_in_a_small_table(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plain: Reference = open_reference(write(tmp_path / "a", clustered(300, 8, 0)))
    assert search_kind(plain, "auto") == "exact"
    with pytest.raises(InputError, match="has no vector index; run bioscan embed again with --sink.index ivf_sq"):
        search_kind(plain, "index")
    (tmp_path / "b").mkdir()
    indexed = open_reference(write(tmp_path / "b", clustered(300, 8, 0), "ivf_sq"))
    assert (search_kind(indexed, "auto"), search_kind(indexed, "index")) == ("exact", "index")
