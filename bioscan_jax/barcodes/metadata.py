"""Checks the sampling metadata: the columns depth, latitude and longitude."""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from bioscan_jax.errors import InputError

METADATA_COLUMNS = ("depth", "latitude", "longitude")
"""Metres below the surface, degrees north, degrees east."""
METADATA_BOUNDS = {"depth": (-10.0, 12000.0), "latitude": (-90.0, 90.0), "longitude": (-180.0, 180.0)}
"""Smallest and largest accepted value of each."""
_FILLERS = (-9999.0, 9999.0, -999.0)


def check_metadata(
    table: pa.Table,
    *,
    locate: Callable[[int], str] = "row {}".format,
    columns: Mapping[str, str] | None = None,
) -> Float32[np.ndarray, "rows 3"]:
    """Returns the columns depth, latitude and longitude; null becomes NaN.

    Args:
        table: A table with the three columns, each numeric or all null.
        locate: Returns the place of a row of the table, for messages.
        columns: Names of the three in the table, where they are called otherwise.

    Raises:
        InputError: A column is missing or not numeric; a value is out of range (depth -10 to 12000 m) or one of the
            fillers -9999, 9999 and -999.
    """
    return np.stack(
        [_check_column(table, name, (columns or {}).get(name, name), locate) for name in METADATA_COLUMNS], axis=1
    )


def _check_column(
    table: pa.Table, name: str, called: str, locate: Callable[[int], str]
) -> Float32[np.ndarray, " rows"]:
    if called not in table.column_names:
        raise InputError(f"there is no column {name}, which metadata needs; add it, null where unknown")
    column = table.column(called)
    numeric = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
    if not any(is_type(column.type) for is_type in numeric):
        raise InputError(f"the column {called} is of type {column.type}; make it numbers, null where unknown")
    values = column.cast(pa.float64()).to_numpy()
    low, high = METADATA_BOUNDS[name]
    filler = np.isin(values, _FILLERS)
    wrong = np.flatnonzero(filler | (values < low) | (values > high))
    if len(wrong):
        row = int(wrong[0])
        why = "is a filler, not a value" if filler[row] else f"is outside {low:g} to {high:g}"
        raise InputError(
            f"the {name} {values[row]:g} of {locate(row)} {why} "
            f"({len(wrong)} such values in {len(values)} rows); set it to null where unknown"
        )
    return values.astype(np.float32)
