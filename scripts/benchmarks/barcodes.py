"""Barcodes to measure with: from a file if one is given, simulated otherwise."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax import config
from bioscan_jax.barcodes.simulate import simulate
from bioscan_jax.data.parquet import open_source

_BARCODE_BASES = 658


def describe_input(data: config.DataConfig | None, seed: int) -> str:
    """Describes the barcodes, as an entry of the figures."""
    return f"simulated, seed {seed}" if data is None else f"{data.path}, seed {seed}"


def barcodes(data: config.DataConfig | None, rows: int, seed: int) -> pa.ChunkedArray:
    """Returns consecutive sequences from a random row on; all of them if there are fewer than `rows`.

    Args:
        data: Source of the barcodes; 658 bp are simulated if absent.
        rows: Number of sequences.
        seed: Random seed of the simulation, or of the first row.
    """
    if data is None:
        table = simulate(species=-(-rows // 10), per_species=10, length=_BARCODE_BASES, seed=seed)
        return table["dna_sequence"].slice(0, rows)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(data, scratch=Path(scratch))
        source = source.select([source.sequence_column], source.block_rows)
        first = int(np.random.default_rng(seed).integers(max(source.rows - rows, 0) + 1))
        last = min(first + rows, source.rows)
        blocks = [source[block].table for block in range(first // source.block_rows, -(-last // source.block_rows))]
        offset = first % source.block_rows
        return pa.concat_tables(blocks)[source.sequence_column].slice(offset, last - first)


def write_repeated(sequences: pa.ChunkedArray, rows: int, path: Path) -> None:
    """Writes `rows` rows to a Parquet file, repeating the sequences under new ids."""
    schema = pa.schema([("sequence_id", pa.string()), ("dna_sequence", pa.string())])
    texts = sequences.cast(pa.string())
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, len(texts)):
            part = texts.slice(0, rows - first)
            names = pa.array([f"row-{first + i}" for i in range(len(part))])
            writer.write_table(pa.table([names, part], schema=schema), row_group_size=1 << 15)
