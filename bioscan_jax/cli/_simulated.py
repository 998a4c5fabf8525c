"""Simulated barcodes for the demonstrations, and what a demonstration does with a user's own file."""

import re
from pathlib import Path

from bioscan_jax import config


def write_if_wanted(simulate: config.SimulateConfig | None, path: str) -> bool:
    """Writes simulated barcodes if the settings ask for them at the data's path.

    Args:
        simulate: The barcodes to simulate. Its `path` is the file they go to; without one they go to the data's path.
        path: The data's path (`--data.path`).

    Returns:
        Whether the data are simulated. False where the user passed a file of their own beside a demonstration's config.
    """
    from bioscan_jax.barcodes.simulate import write_simulated

    if simulate is None or simulate.path not in (None, path):
        return False
    write_simulated(
        path,
        species=simulate.species,
        per_species=simulate.per_species,
        length=simulate.length,
        seed=simulate.seed,
    )
    print(f"{path}: SIMULATED barcodes, evolved along a random tree; not biology")
    return True


def name_for(path: str) -> str:
    """A name made from a data path, for what a demonstration writes: letters, digits, "-" and "_"."""
    stem = Path(path.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "own"
