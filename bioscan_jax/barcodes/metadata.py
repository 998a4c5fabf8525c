"""Reads and checks the sampling metadata: the columns depth, latitude and longitude."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc
from jaxtyping import Float32, Float64

from bioscan_jax.barcodes.aliases import find_column
from bioscan_jax.errors import InputError, shown

METADATA_COLUMNS = ("depth", "latitude", "longitude")
"""Metres below the surface, degrees north, degrees east."""
METADATA_BOUNDS = {"depth": (-10.0, 12000.0), "latitude": (-90.0, 90.0), "longitude": (-180.0, 180.0)}
"""Smallest and largest accepted value of each."""
_FILLERS = (-9999.0, 9999.0, -999.0)
_COORDINATES = (
    r"^\s*[\[(]?\s*(?P<latitude>[-+]?[0-9]+\.?[0-9]*)\s*(?P<north>[NSns]?)\s*[,; ]"
    r"\s*(?P<longitude>[-+]?[0-9]+\.?[0-9]*)\s*(?P<east>[EWew]?)\s*[\])]?\s*$"
)


def find_metadata(columns: Sequence[str]) -> dict[str, str]:
    """Returns the columns of depth, latitude and longitude, as far as there are any.

    Where neither of the two has one, a column that joins them counts as that of both.

    Example:
        >>> find_metadata(["processid", "coord", "depth"])
        {'depth': 'depth', 'latitude': 'coord', 'longitude': 'coord'}
    """
    found = {name: column for name in METADATA_COLUMNS if (column := find_column(name, columns)) is not None}
    joined = find_column("coordinates", columns)
    if joined is not None and not found.keys() & {"latitude", "longitude"}:
        found |= {"latitude": joined, "longitude": joined}
    return found


def split_coordinates(
    column: pa.Array | pa.ChunkedArray,
) -> tuple[Float64[np.ndarray, " rows"], Float64[np.ndarray, " rows"]]:
    """Splits texts such as '[44.5, -80.2]' (BOLD) and '44.5 N 80.2 W' (GenBank) into degrees north and east.

    Returns:
        Latitudes and longitudes; NaN where a text is null or not of this form.

    Example:
        >>> split_coordinates(pa.array(["[44.5, -80.25]", "44.5 N 80.25 W", "(1,2)", "unknown", None]))[1].tolist()
        [-80.25, -80.25, 2.0, nan, nan]
    """
    parts = pc.extract_regex(column.cast(pa.string()), _COORDINATES)

    def degrees(number: str, side: str, negative: str) -> np.ndarray:
        values = pc.struct_field(parts, number).cast(pa.float64()).to_numpy(zero_copy_only=False)
        sides = pc.utf8_upper(pc.struct_field(parts, side))
        flipped = pc.fill_null(pc.equal(sides, negative), False).to_numpy(zero_copy_only=False)
        return np.where(flipped, -values, values)

    parts = parts.combine_chunks() if isinstance(parts, pa.ChunkedArray) else parts
    return degrees("latitude", "north", "S"), degrees("longitude", "east", "W")


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
        columns: Names of the three in the table, where they are called otherwise; see `find_metadata`.

    Raises:
        InputError: A column is missing or not numeric; a value is out of range (depth -10 to 12000 m) or one of the
            fillers -9999, 9999 and -999.
    """
    return np.stack([_check_column(table, name, columns or {}, locate) for name in METADATA_COLUMNS], axis=1)


def _part(column: pa.ChunkedArray, name: str, locate: Callable[[int], str]) -> pa.ChunkedArray:
    """Returns latitude or longitude of a column that joins them, null where it is blank."""
    latitude, longitude = split_coordinates(column)
    given = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(column.cast(pa.string())), ""), False)
    unread = np.flatnonzero(np.isnan(latitude) & given.to_numpy())
    if len(unread):
        row = int(unread[0])
        raise InputError(
            f"the coordinates {shown(column[row].as_py())} of {locate(row)} cannot be read ({len(unread)} such values in "
            f"{len(column)} rows); write '[latitude, longitude]' in degrees, or leave them blank where unknown"
        )
    return pa.chunked_array([pa.array(latitude if name == "latitude" else longitude, from_pandas=True)])


def _check_column(
    table: pa.Table, name: str, columns: Mapping[str, str], locate: Callable[[int], str]
) -> Float32[np.ndarray, " rows"]:
    called = columns.get(name, name)
    if called not in table.column_names:
        raise InputError(f"there is no column {name}, which metadata needs; add it, null where unknown")
    column = table.column(called)
    if name != "depth" and "latitude" in columns and columns["latitude"] == columns.get("longitude"):
        column = _part(column, name, locate)
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
