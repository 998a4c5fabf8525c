"""Small vector tables, written through the sink as embed writes them."""

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from bioscan_jax.barcodes.schemas import REJECTS
from bioscan_jax.table.columns import vector_schema
from bioscan_jax.table.plan import Plan
from bioscan_jax.table.sink import SinkBlock, VectorTable

HIDDEN, BLOCK_ROWS = 16, 100
COLUMNS = pa.schema(
    [
        ("dna_sequence", pa.string()),
        ("genus", pa.dictionary(pa.int32(), pa.string())),
        ("depth", pa.float64()),
        ("station", pa.int32()),
        ("seen", pa.timestamp("s")),
    ]
)


def vectors_of(rows: int, hidden: int = HIDDEN, seed: int = 0) -> np.ndarray:
    """Returns clustered vectors, with duplicates, and with -0.0 and a subnormal number."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, hidden))
    vectors = (centres[rng.integers(0, 12, rows)] + 0.3 * rng.normal(size=(rows, hidden))).astype(np.float32)
    vectors[rows // 2 : rows // 2 + 5] = vectors[:5]
    vectors[1, :4] = [-0.0, 1e-40, np.float32(np.pi), -1.5]
    return vectors


def make_table(uri: Path | str, rows: int = 500, *, dtype: str = "float32", index: str = "none", **changed) -> pa.Table:
    """Writes a table and its rejects (every seventh input row); returns the rows of the table in order."""
    weights, prefix, seed = changed.get("weights", "w" * 64), changed.get("prefix", "s"), changed.get("seed", 0)
    hidden = changed.get("hidden", HIDDEN)
    schema = vector_schema(COLUMNS, hidden, dtype)
    plan = Plan({"data": {"sequence_column": "dna_sequence"}, "model": {"weights_sha256": weights}, "rows": rows})
    made_by = {"weights_sha256": weights, "dtype": "float32", "pooling": "mean", "layer": "2", "strand": "forward"}
    made_by |= {"phases": "1", "max_tokens": "512", "model": "nt", "license": "none"} | changed.get("made_by", {})
    given = {"schema": schema, "plan": plan, "provenance": made_by, "rows": rows, "block_rows": BLOCK_ROWS}
    values = vectors_of(rows, hidden, seed).astype(dtype)
    table = VectorTable.open(str(uri), "sequences", **given, max_bytes_per_file=3 << 30)
    with table:
        for block in range(table.next_block, changed.get("stop_after", -(-rows // BLOCK_ROWS))):
            here = np.arange(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, rows))
            table.append(
                [SinkBlock(block, _good(here[here % 7 != 3], values, prefix), _bad(here[here % 7 == 3], prefix))]
            )
        if changed.get("finish", "stop_after" not in changed):
            table.finish(index)
    (Path(uri) / "sequences.run.json").write_text('{"speed": 1}')
    return read(uri)


def _good(rows: np.ndarray, values: np.ndarray, prefix: str) -> pa.Table:
    columns = {
        "sequence_id": pa.array([f"{prefix}{row}" for row in rows], pa.string()),
        "source_row": pa.array(rows, pa.uint64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(values[rows].ravel()), values.shape[1]),
        "dna_sequence": pa.array(["ACGT"[row % 4] * (5 + row % 9) for row in rows], pa.string()),
        "genus": pa.array([None if row % 5 == 0 else f"g{row % 3}" for row in rows], pa.string()),
        "depth": pa.array([None if row % 4 == 0 else row * 7.25 - 100 for row in rows], pa.float64()),
        "station": pa.array(rows % 11, pa.int32()),
        "seen": pa.array(rows, pa.timestamp("s")),
    }
    return pa.table(columns)


def _bad(rows: np.ndarray, prefix: str) -> pa.Table:
    ids = [f"{prefix}{row}" for row in rows]
    columns = [ids, rows.astype(np.uint64), ["empty"] * len(rows), [None] * len(rows), [""] * len(rows)]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, REJECTS, strict=True)], schema=REJECTS)


def read(uri: Path | str, name: str = "sequences") -> pa.Table:
    """Returns all rows in order."""
    return lance.dataset(f"{uri}/{name}.lance").to_table().combine_chunks()


def same_bits(one: pa.Table, other: pa.Table) -> bool:
    """Returns whether two tables agree in schema, metadata and every bit of every value."""
    if not one.schema.equals(other.schema, check_metadata=True) or one.num_rows != other.num_rows:
        return False
    for name in one.column_names:
        a, b = one[name].combine_chunks(), other[name].combine_chunks()
        if name == "vector":
            a, b = (np.asarray(x.flatten()).view(np.uint8) for x in (a, b))
            if not np.array_equal(a, b):
                return False
        elif not a.equals(b):
            return False
    return True
