"""How large a bundle becomes in each precision, what that costs, and which one fits."""

import re
from typing import TYPE_CHECKING

import pyarrow as pa

from bioscan_jax.bundles.parts import Rows, parquet_bytes
from bioscan_jax.bundles.quantise import PRECISIONS, Precision, Quantiser, bytes_per_vector, fit, recall
from bioscan_jax.errors import InputError

if TYPE_CHECKING:
    import lance

_SAMPLED_ROWS = 1024
_OVERHEAD_BYTES = 65536
"""Of a Parquet file's footer and a manifest's line, generously."""
_UNITS = {
    "": 1,
    **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 25GB, 500 MiB or 1000.

    Raises:
        InputError: It is no size, or not more than 0.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[(found[2] or "").upper()]) if found else 0
    if size < 1:
        raise InputError(f"--budget {text!r} is no size; pass one such as 25GB, 500MB or 2GiB")
    return size


def row_bytes(taken: Rows) -> int:
    """Bytes of a row's columns before compression."""
    batch = next(taken.batches(None, 0, min(taken.rows, _SAMPLED_ROWS)))
    return -(-batch.nbytes // len(batch))


def estimates(taken: Rows, beside_bytes: int, part_rows: int) -> dict[Precision, int]:
    """About the size of the bundle in each precision: codes in full, other columns as a sample of rows compresses."""
    sample = _sampled(taken.dataset, taken.filter, taken.rows)
    rest = parquet_bytes(sample) / sample.num_rows * taken.rows
    if taken.rejects is not None and (rejects := taken.rejects.count_rows()):
        sample = _sampled(taken.rejects, None, rejects)
        rest += parquet_bytes(sample) / sample.num_rows * rejects
    fixed = beside_bytes + _OVERHEAD_BYTES * (3 + taken.rows // part_rows)
    hidden, own = taken.hidden_size, PRECISIONS.index(taken.own_precision)
    codebook: dict[Precision, int] = {"int8": 8 * hidden, "pq": 4 * 256 * hidden}
    return {
        precision: int(
            1.1 * rest + taken.rows * bytes_per_vector(precision, hidden) + codebook.get(precision, 0) + fixed
        )
        for precision in PRECISIONS[own:]
    }


def _sampled(dataset: "lance.LanceDataset", filter_sql: str | None, rows: int) -> pa.Table:
    """Rows from the start, the middle and the end, without vectors."""
    columns = [name for name in dataset.schema.names if name != "vector"]
    each = -(-_SAMPLED_ROWS // 4)
    starts = sorted({max(0, (rows - each) * part // 3) for part in range(4)})
    return pa.concat_tables(
        dataset.to_table(columns=columns, filter=filter_sql, offset=start, limit=each) for start in starts
    )


def choose(
    taken: Rows,
    estimates: dict[Precision, int],
    precision: Precision | None,
    limit: int | None,
    *,
    recall_queries: int,
    recall_rows: int,
    seed: int,
) -> tuple[Precision, Quantiser, list[str]]:
    """The precision to write, and a line for each that was weighed."""
    if limit is None and precision in (None, taken.own_precision):
        return taken.own_precision, Quantiser(taken.own_precision), []
    if precision is not None and precision not in estimates:
        raise InputError(f"--precision {precision}: the table's vectors are {taken.own_precision}; leave it out")
    weighed = tuple(estimates) if precision is None else (precision,)
    quantisers = fit(weighed, taken.blocks, taken.rows, seed)
    if precision is not None and precision not in quantisers:
        raise InputError(f"--precision {precision} cannot hold these {taken.rows:,} vectors; pass another")
    costs = recall(quantisers, taken.blocks, taken.rows, queries=recall_queries, most_rows=recall_rows, seed=seed)
    fits: list[Precision] = [name for name in quantisers if limit is None or estimates[name] <= limit]
    if not fits:
        least = min(quantisers, key=lambda name: estimates[name])
        raise InputError(
            f"--budget {limit:,} bytes is too small: {least}, the smallest, needs about {estimates[least]:,}; "
            "pass more, or take fewer rows with --filter"
        )
    searched = min(recall_rows, taken.rows)
    lines = [f"recall@10 of {min(recall_queries, searched):,} rows among {searched:,}, against {taken.own_precision}:"]
    for name in quantisers:
        note = "  <- taken" if name == fits[0] else "" if name in fits else "  over the budget"
        lines.append(f"  {name:8} about {estimates[name]:>15,} bytes  recall@10 {costs[name]:.4f}{note}")
    return fits[0], quantisers[fits[0]], lines
