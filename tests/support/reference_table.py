"""Simulated barcodes: some embedded as a reference table, the others as queries of seen and unseen species."""

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
    """A reference table and queries."""

    uri: str
    queries: str
    """Parquet with labels: two barcodes of each seen species, all eight of each unseen one."""
    fasta: str
    """FASTA file with the first twenty queries."""
    unseen: frozenset[str]


def make_world(
    directory: Path, *, species: int = 60, index: Literal["none", "ivf_sq", "ivf_pq"] = "none", layer: int = 0
) -> World:
    """Embeds the reference without every fifth species; two of eight barcodes of the others are queries."""
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
    embed_reference(directory / "reference.parquet", uri, index=index, layer=layer)
    return World(uri, str(directory / "queries.parquet"), str(directory / "queries.fasta"), unseen)


def embed_reference(
    path: Path,
    uri: str,
    *,
    index: Literal["none", "ivf_sq", "ivf_pq"] = "none",
    layer: int = 0,
    strand: Literal["forward", "both"] = "forward",
) -> None:
    """Embeds a Parquet file as the reference table of a database."""
    data, sink = config.DataConfig(path=str(path)), config.SinkConfig(uri=uri, index=index)
    how = config.EmbedConfig(layer=layer, phases=6, strand=strand, max_shapes=1)
    embed(MODEL, data, sink, how, config.MeshConfig(compilation_cache=None), progress=False)
