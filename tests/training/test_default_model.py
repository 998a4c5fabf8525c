"""A model without layers that counts 6-mers, with a metric folded into its embeddings."""

import numpy as np
import pyarrow.parquet as pq
import pytest

import bioscan_jax as bj
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.training.default_model import COUNTED_AT, train_default_model, write_sixmer_counts

ONE = bj.MeshConfig(data=1)
COMPLEMENT = str.maketrans("ACGT", "TGCA")


def dna(seed: int, rows: int, length: int) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("ACGT"), length)) for _ in range(rows)]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("counts") / "model"
    write_sixmer_counts(directory)
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
    assert size < 2 * folded.vocabulary.sixmer_ids.size * 24 * 2 + 200_000


def test_a_directory_that_exists_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(bj.InputError, match="not empty; choose another --output"):
        train_default_model(bj.DataConfig(path="x"), str(tmp_path / "model"), work=str(tmp_path / "w"))
