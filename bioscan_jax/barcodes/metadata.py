"""Where a sample was taken: the columns depth, latitude and longitude, checked."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from bioscan_jax.errors import InputError

METADATA_COLUMNS = ("depth", "latitude", "longitude")
"""Metres below the surface, degrees north, degrees east."""
METADATA_BOUNDS = {"depth": (-10.0, 12000.0), "latitude": (-90.0, 90.0), "longitude": (-180.0, 180.0)}
_FILLERS = (-9999.0, 9999.0, -999.0)


def check_metadata(table: pa.Table, *, locate: Callable[[int], str] = "row {}".format) -> Float32[np.ndarray, "rows 3"]:
    """Reads the columns depth, latitude and longitude; null and NaN become NaN.

    Args:
        table: Has the three columns, numbers in each (or nothing but nulls).
        locate: Says where a row of the table is.

    Raises:
        InputError: A column is missing or not of numbers; a value is out of range (depth -10 to 12000 m) or one of the
            fillers -9999, 9999 and -999.
    """
    return np.stack([_check_column(table, name, locate) for name in METADATA_COLUMNS], axis=1)


def _check_column(table: pa.Table, name: str, locate: Callable[[int], str]) -> Float32[np.ndarray, " rows"]:
    if name not in table.column_names:
        raise InputError(f"there is no column {name}, which metadata needs; add it, null where it is not known")
    column = table.column(name)
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise InputError(f"the column {name} is of type {column.type}; make it numbers, null where it is not known")
    values = column.cast(pa.float64()).to_numpy()
    low, high = METADATA_BOUNDS[name]
    filler = np.isin(values, _FILLERS)
    wrong = np.flatnonzero(filler | (values < low) | (values > high))
    if len(wrong):
        row = int(wrong[0])
        why = "is a filler, not a value" if filler[row] else f"is outside {low:g} to {high:g}"
        raise InputError(
            f"the {name} {values[row]:g} of {locate(row)} {why} "
            f"({len(wrong)} such among {len(values)} rows); set it to null where it is not known"
        )
    return values.astype(np.float32)
