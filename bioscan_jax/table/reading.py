"""Tables that are there, opened to be read."""

import re
from typing import TYPE_CHECKING, Literal

from bioscan_jax.errors import InputError
from bioscan_jax.table.storage import local_directory, open_dataset, table_path

if TYPE_CHECKING:
    import lance

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"[^\"`]*\"|`[^\"`]*`|\border\b", re.IGNORECASE)
"""Texts, quoted names, and the one rank that is a keyword."""


def check_name(table: str) -> None:
    """Raises InputError for a table name that could not be one of ours, such as a path."""
    if not table.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"--table {table!r} must be letters, digits, '-' and '_'")


def existing(uri: str, table: str) -> "lance.LanceDataset":
    """The latest version of a table.

    Args:
        uri: Database directory or object-store URL.
        table: Name of the table.

    Raises:
        InputError: There is no such table (those that there are are named), or it cannot be read.
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
    """Makes sure that a filter is one SQL expression and nothing else.

    Lance reads an expression from the start of a text and passes over the rest: `depth > 3; DROP TABLE x`, or a
    forgotten AND, would go unnoticed. And it takes what is in double quotes for a text, so that `"order" = 'Diptera'`
    would hold for no row without a word.

    Args:
        sql: Columns are bare, in double quotes as in standard SQL, or in backticks; `order`, a rank, is never a keyword.

    Returns:
        The same condition as Lance reads it.

    Raises:
        InputError: It is not one.
    """
    import duckdb

    try:
        # What closes one of the two brackets itself cannot also close the other
        for whole in ("SELECT (\n{}\n)", "SELECT CASE WHEN\n{}\nTHEN 1 END"):
            if len(duckdb.extract_statements(whole.format(_with_names_in(sql, '"')))) != 1:
                raise InputError(f"--filter {sql!r} is more than one condition; pass one SQL expression")
    except duckdb.Error as error:
        text = " ".join(re.split(r"\n\s*LINE \d+:", str(error))[0].split())
        raise InputError(f"--filter {sql!r} is no SQL condition ({text[:200]}); pass one expression") from error
    return _with_names_in(sql, "`")


def _with_names_in(sql: str, mark: str) -> str:
    """The same SQL with quoted names, and `order`, in these quotes."""

    def quoted(found: re.Match) -> str:
        text = found[0]
        return text if text[0] == "'" else f"{mark}{text.lower() if text[0] in 'oO' else text[1:-1]}{mark}"

    return _QUOTED.sub(quoted, sql)


def metadata(dataset: "lance.LanceDataset") -> dict[str, str]:
    """What the table says of itself: what made its vectors, its plan."""
    return {key.decode(): value.decode() for key, value in (dataset.schema.metadata or {}).items()}


def check_finished(uri: str, table: str, dataset: "lance.LanceDataset") -> None:
    """Refuses a table that a run of embed has begun and not ended: it goes on with the rows and columns it knows.

    Raises:
        InputError: The table is such a one.
    """
    facts = metadata(dataset)
    if "rows" not in facts or "bundle" in facts:
        return
    rejects = open_dataset(table_path(uri, f"{table}_rejects"))
    found = dataset.count_rows() + (0 if rejects is None else rejects.count_rows())
    if found < int(facts["rows"]):
        wanted = int(facts["rows"])
        raise InputError(
            f"{dataset.uri} is unfinished ({found:,} of {wanted:,} rows); run what makes it to its end first"
        )


def vector_index(dataset: "lance.LanceDataset") -> Literal["none", "ivf_sq", "ivf_pq"]:
    """The kind of vector index that the table has, of those that `build_indexes` makes."""
    kinds = {i.index_type.lower() for i in dataset.describe_indices() if "vector" in i.field_names}
    return "ivf_sq" if "ivf_sq" in kinds else "ivf_pq" if "ivf_pq" in kinds else "none"
