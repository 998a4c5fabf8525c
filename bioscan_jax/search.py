"""Nearest neighbours in a vector table."""

import pyarrow as pa

from bioscan_jax.sink import table_path


def nearest(uri: str, table: str, row: int, k: int) -> pa.Table:
    """The k nearest rows to one row of the table by cosine distance, that row left out.

    Args:
        uri: Database directory or URL.
        table: Name of the vector table.
        row: Position in the table.
        k: Number of neighbours.

    Returns:
        All columns but the vector, and `_distance` (1 - cosine), nearest first.
    """
    import lance

    dataset = lance.dataset(table_path(uri, table))
    query = dataset.take([row], columns=["vector", "source_row"])
    columns = [name for name in dataset.schema.names if name != "vector"]
    nearby = {"column": "vector", "q": query["vector"][0].values, "k": k + 1, "metric": "cosine"}
    found = dataset.to_table(columns=[*columns, "_distance"], nearest=nearby)
    keep = [i for i, source in enumerate(found["source_row"].to_pylist()) if source != query["source_row"][0].as_py()]
    return found.take(keep[:k])


def describe_neighbours(uri: str, table: str, k: int) -> str:
    """The k nearest neighbours of a table's first row, as lines of text."""
    import lance

    first = lance.dataset(table_path(uri, table)).take([0], columns=_shown(uri, table)).to_pylist()[0]
    lines = [f"nearest neighbours of {_line(first)}"]
    for found in nearest(uri, table, 0, k).to_pylist():
        lines.append(f"  cosine {1 - found['_distance']:.4f}  {_line(found)}")
    return "\n".join(lines)


def _shown(uri: str, table: str) -> list[str]:
    import lance

    names = lance.dataset(table_path(uri, table)).schema.names
    return ["sequence_id", *(["taxonomy"] if "taxonomy" in names else [])]


def _line(row: dict) -> str:
    return "  ".join(str(row[name]) for name in ("sequence_id", "taxonomy") if row.get(name) is not None)
