from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def barcodes(tmp_path_factory) -> Path:
    """72 simulated barcodes of 12 species."""
    from bioscan_jax.barcodes.simulate import write_simulated  # tests/conftest.py chooses the devices first

    path = tmp_path_factory.mktemp("data") / "barcodes.parquet"
    return write_simulated(str(path), species=12, per_species=6, length=120, seed=0)
