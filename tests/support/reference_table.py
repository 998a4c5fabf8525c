"""Simulated barcodes, embedded as a reference, and queries of known, unseen and no species."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax import config
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.embedding.run import embed

MODEL = config.ModelConfig(checkpoint="random:tiny-v2", seed=3)


@dataclass(frozen=True)
class World:
    """A reference and queries against it."""

    uri: str
    queries: str
    """Parquet with labels: six of ten of a species in the reference, and the species that are not."""
    fasta: str
    """The first twenty of them."""
    unseen: frozenset[str]


def make_world(
    directory: Path, *, species: int = 60, index: Literal["none", "ivf_sq", "ivf_pq"] = "none", layer: int = 0
) -> World:
    """Every fifth species is not in the reference; of the others, two of eight barcodes are queries."""
    table = simulate(species=species, per_species=8, length=300, seed=1)
    names = sorted(set(table["species"].to_pylist()))
    unseen = frozenset(names[::5])
    asked = [name in unseen or row % 8 >= 6 for row, name in enumerate(table["species"].to_pylist())]
    pq.write_table(table.filter(pa.array([not one for one in asked])), directory / "reference.parquet")
    queries = table.filter(pa.array(asked))
    pq.write_table(queries, directory / "queries.parquet")
    rows = queries.slice(0, 20).to_pylist()
    (directory / "queries.fasta").write_text("".join(f">{r['sequence_id']}\n{r['dna_sequence']}\n" for r in rows))
    uri = str(directory / "db")
    data, sink = config.DataConfig(path=str(directory / "reference.parquet")), config.SinkConfig(uri=uri, index=index)
    how = config.EmbedConfig(layer=layer, phases=6, max_shapes=1)
    embed(MODEL, data, sink, how, config.MeshConfig(compilation_cache=None), progress=False)
    return World(uri, str(directory / "queries.parquet"), str(directory / "queries.fasta"), unseen)
