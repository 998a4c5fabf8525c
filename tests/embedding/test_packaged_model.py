"""The model in the package, on the barcodes in the package."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from support.commands import call

import bioscan_jax as bj
from bioscan_jax.checkpoints.hub import DEFAULT_DIRECTORY
from bioscan_jax.data.files import DEMO, find_files

COMPLEMENT = str.maketrans("ACGTN", "TGCAN")


@pytest.fixture(scope="module")
def model():
    return bj.load()


@pytest.fixture(scope="module")
def barcodes():
    return pq.read_table(find_files(DEMO).paths[0])


@pytest.fixture(scope="module")
def vectors(model, barcodes):
    return model.encode(barcodes["dna_sequence"])


def test_it_fits_the_package():
    assert sum(file.stat().st_size for file in DEFAULT_DIRECTORY.iterdir()) <= 12_000_000


def test_a_barcode_is_near_those_of_its_genus(vectors, barcodes):
    """Chance is below 2%. Of the species, all but 22 were in the training; of the barcodes, none."""
    taxa = np.array([lineage.split(";") for lineage in barcodes["taxonomy"].to_pylist()])
    species, genus, family = taxa[:, 6], taxa[:, 5], taxa[:, 4]
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -1)
    again = np.array([np.count_nonzero(species == name) > 1 for name in species])
    assert (species[cosines.argmax(1)] == species)[again].mean() > 0.95
    cosines[species[:, None] == species] = -1
    for names, least in ((genus, 0.8), (family, 0.7)):
        others = np.array(
            [np.any((names == name) & (species != own)) for name, own in zip(names, species, strict=True)]
        )
        assert others.sum() > 100
        assert (names[cosines.argmax(1)] == names)[others].mean() > least


def test_both_strands_have_one_vector(model, vectors, barcodes):
    reverse = [s.translate(COMPLEMENT)[::-1] for s in barcodes["dna_sequence"].to_pylist()[:20]]
    np.testing.assert_allclose(model.encode(reverse), vectors[:20], atol=2e-6)


def test_the_demonstration_prints_relatives_and_what_the_model_is_worth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = call("embed", "--config", "demo")
    assert ran.returncode == 0, ran.stderr
    assert "560 in the table" in ran.stdout
    assert "whose species was held out" in ran.stdout
    own, *neighbours = ran.stdout.split("nearest neighbours of ")[1].splitlines()
    genus = own.split(";")[5]
    assert len(neighbours) == 5
    assert all(f";{genus};" in line for line in neighbours)
