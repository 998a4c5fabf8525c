import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bioscan_jax.bundles.quantise import PRECISIONS, Quantiser, bytes_per_vector, fit, recall
from bioscan_jax.errors import InputError


def clustered(rows: int, hidden: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(rows // 20, hidden))
    return (centres[rng.integers(0, len(centres), rows)] + 0.2 * rng.normal(size=(rows, hidden))).astype(np.float32)


def blocks_of(vectors: np.ndarray, rows: int = 64):
    return lambda: (vectors[start : start + rows] for start in range(0, len(vectors), rows))


def fitted(vectors: np.ndarray, seed: int = 0):
    return fit(PRECISIONS, blocks_of(vectors), len(vectors), seed)


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (9, 4), elements=st.floats(-60000, 60000, width=32)))
def test_int8_is_within_half_a_step_and_float32_exact(vectors):
    quantisers = fitted(vectors)
    assert set(quantisers) == {"float32", "float16", "int8"}  # too few vectors for 256 centroids
    assert quantisers["float32"].encode(vectors) is vectors
    int8 = quantisers["int8"]
    codes = int8.encode(vectors)
    assert codes.dtype == np.uint8
    error = np.abs(int8.decode(codes).astype(np.float64) - vectors)
    scale = np.abs(vectors).max(initial=0)
    assert (error <= int8.step / 2 + 1e-5 * scale + 1e-30).all()
    assert np.array_equal(quantisers["float16"].decode(quantisers["float16"].encode(vectors)), vectors.astype("f2"))


def test_pq_chooses_the_nearest_centroid_of_each_piece():
    vectors = clustered(600, 24)
    pq = fitted(vectors)["pq"]
    assert pq.codebook.shape == (3, 256, 8)
    codes = pq.encode(vectors)
    assert codes.shape == (600, bytes_per_vector("pq", 24)) == (600, 3)
    for piece in range(3):
        part = vectors[:, piece * 8 : piece * 8 + 8].astype(np.float64)
        distances = ((part[:, None] - pq.codebook[piece][None]) ** 2).sum(2)
        taken = distances[np.arange(600), codes[:, piece]]
        assert np.allclose(taken, distances.min(1), atol=1e-6)
        assert np.array_equal(pq.decode(codes)[:, piece * 8 : piece * 8 + 8], pq.codebook[piece][codes[:, piece]])


def test_codes_are_reproducible_and_decodable_from_a_file(tmp_path):
    vectors = clustered(500, 16)
    for name, quantiser in fitted(vectors).items():
        codes = quantiser.encode(vectors)
        assert np.array_equal(fitted(vectors)[name].encode(vectors), codes)
        if name in ("int8", "pq"):
            quantiser.save(tmp_path / name)
            quantiser = Quantiser.load(name, tmp_path / name)
        assert np.array_equal(quantiser.decode(codes), fitted(vectors)[name].decode(codes))
        assert codes.nbytes == 500 * bytes_per_vector(name, 16)


def test_float16_overflow_is_left_out_or_rejected():
    vectors = clustered(40, 8)
    vectors[7, 3] = 7e4
    assert "float16" not in fitted(vectors)
    with pytest.raises(InputError, match="70000, too large for float16"):
        Quantiser("float16").encode(vectors)


def brute_force(vectors: np.ndarray, decoded: np.ndarray, asked: np.ndarray) -> float:
    """Recall@10 by full matrices, ties of the true tenth counted as found."""

    def cosines(searched: np.ndarray) -> np.ndarray:
        wide, queries = searched.astype(np.float64), vectors[asked].astype(np.float64)
        table = (queries @ wide.T) / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(wide, axis=1)
        table[np.arange(len(asked)), asked] = -np.inf
        return table

    true, near = cosines(vectors), cosines(decoded)
    found = np.argsort(-near, axis=1, kind="stable")[:, :10]
    tenth = -np.sort(-true, axis=1)[:, 9]
    return float(np.mean(np.take_along_axis(true, found, 1) >= tenth[:, None] - 1e-12))


@pytest.mark.parametrize("twice", [False, True])
def test_recall_equals_brute_force(twice):
    vectors = clustered(700, 24)
    if twice:
        vectors[350:] = vectors[:350]
    quantisers = fitted(vectors)
    found = recall(quantisers, blocks_of(vectors), 700, queries=700, most_rows=700, seed=3)
    for name, quantiser in quantisers.items():
        decoded = quantiser.decode(quantiser.encode(vectors))
        assert found[name] == pytest.approx(brute_force(vectors, decoded, np.arange(700)), abs=1e-3)
    assert found["float32"] == 1.0
    assert found["pq"] < found["int8"] <= found["float16"] <= 1.0
    assert found["pq"] > 0.1


def test_recall_of_a_sample_is_seeded_and_exact():
    vectors = clustered(900, 16)
    quantisers = {"pq": fitted(vectors)["pq"]}
    rng = np.random.default_rng(5)
    searched = np.sort(rng.choice(900, 400, replace=False))
    asked = np.searchsorted(searched, np.sort(rng.choice(searched, 50, replace=False)))
    part = vectors[searched]
    decoded = quantisers["pq"].decode(quantisers["pq"].encode(part))
    given = {"queries": 50, "most_rows": 400}
    found = recall(quantisers, blocks_of(vectors), 900, seed=5, **given)["pq"]
    assert found == pytest.approx(brute_force(part, decoded, asked), abs=1e-9)
    assert found == recall(quantisers, blocks_of(vectors, 100), 900, seed=5, **given)["pq"]
    assert found != recall(quantisers, blocks_of(vectors), 900, seed=6, **given)["pq"]


def test_recall_of_very_few_rows():
    vectors = clustered(40, 8)[:3]
    quantisers = fitted(vectors)
    assert set(recall(quantisers, blocks_of(vectors), 3, queries=9, most_rows=9, seed=0).values()) == {1.0}
    one = vectors[:1]
    assert recall(fitted(one), blocks_of(one), 1, queries=9, most_rows=9, seed=0)["int8"] == 1.0
