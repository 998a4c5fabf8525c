"""A model without layers that counts 6-mers, with a metric folded into its embeddings."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import bioscan_jax as bj
from bioscan_jax.barcodes.columns import Columns
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.training.default_model import _CONTRASTS, COUNTED_AT, train_default_model, write_counts

ONE = bj.MeshConfig(data=1)
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def dna(seed: int, rows: int, length: int) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("ACGT"), length)) for _ in range(rows)]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("counts") / "model"
    write_counts(directory, None)
    return bj.load(directory, mesh=ONE)


def test_a_vector_is_the_share_of_each_6_mer(counts):
    (sequence,) = dna(0, 1, 90)
    vector = counts.encode(sequence, layer=COUNTED_AT.layer, phases=COUNTED_AT.phases)
    windows = [sequence[i : i + 6] for i in range(85)]
    distinct = {min(w, w.translate(COMPLEMENT)[::-1]) for w in windows}
    assert counts.dimension == 2080
    assert np.count_nonzero(vector) == len(distinct)
    assert vector.sum() / vector[vector > 0].min() == pytest.approx(85, rel=1e-5)


def test_both_strands_have_the_same_vector(counts):
    sequences = dna(1, 8, 120)
    reverse = [s.translate(COMPLEMENT)[::-1] for s in sequences]
    both = [counts.encode(s, layer=0, phases=6) for s in (sequences, reverse)]
    np.testing.assert_allclose(both[0], both[1], atol=1e-8)


def test_bases_count_in_their_columns_less_the_mean_of_the_column(tmp_path):
    (gene,) = dna(2, 1, 120)
    columns = Columns.of(pa.array([gene] * 45, pa.large_string()))
    write_counts(tmp_path / "model", columns)
    model = bj.load(tmp_path / "model", mesh=ONE)
    part, other = gene[20:110], dna(3, 1, 90)[0]
    vectors = model.encode([part, part.translate(COMPLEMENT)[::-1], other], layer=0, phases=6)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-8)
    tokens = 91 + sum(1 + (90 - phase) // 6 + (90 - phase) % 6 for phase in range(6))
    bases = vectors[:, 2080:].reshape(3, 120, 3) @ _CONTRASTS.T * tokens
    wanted = np.zeros((120, 4))
    wanted[np.arange(20, 110), ["ACTG".index(base) for base in part]] = 1
    frequencies = np.array([45 + 5, 5, 5, 5]) / 65
    for found, row in zip(bases[0, 20:110], wanted[20:110], strict=True):
        np.testing.assert_allclose(found, row - frequencies[(1 - row).astype(int)], atol=0.03)
    assert not bases[0, :20].any()
    assert not bases[0, 110:].any()
    assert not bases[2].any()
    np.testing.assert_allclose(vectors[:, :2080].sum(axis=1) * tokens, 85 / 4, rtol=1e-5)
    hidden = model.hidden_states(part)[0]
    assert hidden.shape == (1, 16, model.dimension)


@pytest.mark.slow
def test_the_folded_model_gives_the_vectors_of_the_projection(tmp_path):
    """Within the rounding of float16, in which it is stored."""
    data = bj.DataConfig(
        path=str(write_simulated(tmp_path / "in.parquet", species=60, per_species=4, length=200, seed=0))
    )
    settings = bj.MetricConfig(components=24, shrinkage=0.1, scatter="genus", network=True, steps=8, hidden=16, width=8)
    train_default_model(data, str(tmp_path / "model"), settings, work=str(tmp_path / "work"), mesh=ONE, progress=False)
    folded = bj.load(tmp_path / "model", mesh=ONE)
    whole = bj.load(tmp_path / "work/counts", projection=str(tmp_path / "work/projection"), mesh=ONE)
    sequences = pq.read_table(data.path)["dna_sequence"]
    found, wanted = folded.encode(sequences), whole.encode(sequences)
    assert folded.dimension == whole.dimension == found.shape[1]
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    size = sum(file.stat().st_size for file in (tmp_path / "model").iterdir())
    assert size < 2 * len(folded.vocabulary.tokens) * 24 * 2 + 200_000
    assert len(folded.vocabulary.column_ids) == 200


def test_a_directory_that_exists_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(bj.InputError, match="not empty; choose another --output"):
        train_default_model(bj.DataConfig(path="x"), str(tmp_path / "model"), work=str(tmp_path / "w"))
