"""Opens existing tables, reads their metadata and checks SQL conditions on them."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory
from bioscan_jax.table.storage import open_dataset, storage_errors, table_path

if TYPE_CHECKING:
    import lance

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"`]*\"|`[^\"`]*`|\border\b", re.IGNORECASE)
"""SQL strings, quoted names, and `order`, the one taxonomic rank that is a keyword."""


def check_name(table: str) -> None:
    """Raises InputError for a table name that is not allowed, such as a path."""
    if not table.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"--table {table!r} must be letters, digits, '-' and '_'")


def open_existing(uri: str, table: str) -> "lance.LanceDataset":
    """Opens the latest version of a table.

    Args:
        uri: Database directory or object-store URL.
        table: Name of the table.

    Raises:
        InputError: There is no such table (the message lists those that exist), or it cannot be read.
    """
    check_name(table)
    found = open_dataset(table_path(uri, table))
    if found is None:
        local = local_directory(uri)
        names = sorted(path.stem for path in local.glob("*.lance")) if local is not None else []
        there = f" (there are: {', '.join(names[:10])})" if names else ""
        raise InputError(f"{uri} has no table {table!r}{there}; check the directory and the name")
    return found


def check_condition(sql: str) -> str:
    """Checks that a filter is one SQL expression, and returns it with names quoted as Lance expects.

    Lance parses an expression from the start of a string and ignores the rest, so that `depth > 3; DROP TABLE x` or a
    forgotten AND would go unnoticed. It also reads double quotes as string quotes, so that `"order" = 'Diptera'` would
    silently match no row.

    Args:
        sql: Columns are bare, in double quotes as in standard SQL, or in backticks; `order`, a rank, is never a keyword.

    Raises:
        InputError: It is not one expression.
    """
    import duckdb

    try:
        # No text can close both of these brackets by itself
        for whole in ("SELECT (\n{}\n)", "SELECT CASE WHEN\n{}\nTHEN 1 END"):
            if len(duckdb.extract_statements(whole.format(_with_names_in(sql, '"')))) != 1:
                raise InputError(f"--filter {sql!r} is more than one condition; pass one SQL expression")
    except duckdb.Error as error:
        text = " ".join(re.split(r"\n\s*LINE \d+:", str(error))[0].split())
        raise InputError(f"--filter {sql!r} is no SQL condition ({text[:200]}); pass one expression") from error
    return _with_names_in(sql, "`")


def _with_names_in(sql: str, mark: str) -> str:
    """Replaces the quotes around names, and puts `order` in quotes."""

    def quoted(found: re.Match) -> str:
        text = found[0]
        return text if text[0] == "'" else f"{mark}{text.lower() if text[0] in 'oO' else text[1:-1]}{mark}"

    return _QUOTED.sub(quoted, sql)


def schema_metadata(dataset: "lance.LanceDataset") -> dict[str, str]:
    """Returns the metadata of a table's schema: its plan and what made its vectors."""
    return {key.decode(): value.decode() for key, value in (dataset.schema.metadata or {}).items()}


def check_finished(uri: str, table: str, dataset: "lance.LanceDataset") -> None:
    """Checks that no unfinished `embed` run owns the table: resuming it requires the rows and columns it left.

    Raises:
        InputError: Rows are missing.
    """
    facts = schema_metadata(dataset)
    if "rows" not in facts or "bundle" in facts:
        return
    rejects = open_dataset(table_path(uri, f"{table}_rejects"))
    found = dataset.count_rows() + (0 if rejects is None else rejects.count_rows())
    if found < int(facts["rows"]):
        wanted = int(facts["rows"])
        raise InputError(
            f"{dataset.uri} is unfinished ({found:,} of {wanted:,} rows); finish the run that makes it first"
        )


def take_rows(dataset: "lance.LanceDataset", rows: Int64[np.ndarray, " some"], columns: Sequence[str]) -> pa.Table:
    """Returns rows of a table by position, in the order asked for; each is read once, however often it is asked for."""
    distinct, place = np.unique(rows, return_inverse=True)
    with storage_errors(dataset.uri):
        return dataset.take(distinct, columns=list(columns)).take(pa.array(place))


def vector_index(dataset: "lance.LanceDataset") -> Literal["none", "ivf_sq", "ivf_pq"]:
    """Returns the kind of vector index the table has, of those that `build_indexes` makes."""
    kinds = {i.index_type.lower() for i in dataset.describe_indices() if "vector" in i.field_names}
    return "ivf_sq" if "ivf_sq" in kinds else "ivf_pq" if "ivf_pq" in kinds else "none"
