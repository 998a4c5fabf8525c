"""Where a sample was taken, as a second input: checked columns, features, and an encoder with its own head."""

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from jaxtyping import Array, Float32

from bioscan_jax.errors import InputError
from bioscan_jax.model.heads import CLASS_MULTIPLE, Dense, HeadKind, RankLogits, make_head
from bioscan_jax.model.tree import TaxonTree
from bioscan_jax.sharding import Layout

METADATA_COLUMNS = ("depth", "latitude", "longitude")
"""Metres below the surface, degrees north, degrees east."""
_BOUNDS = {"depth": (-10.0, 12000.0), "latitude": (-90.0, 90.0), "longitude": (-180.0, 180.0)}
_FILLERS = (-9999.0, 9999.0, -999.0)


def check_metadata(table: pa.Table, first_row: int = 0) -> Float32[np.ndarray, "rows 3"]:
    """Reads the columns depth, latitude and longitude; null and NaN become NaN.

    Args:
        table: Has the three columns, numbers in each (or nothing but nulls).
        first_row: Number of the table's first row, for messages.

    Raises:
        InputError: A column is missing or not of numbers; a value is out of range (depth -10 to 12000 m) or one of the
            fillers -9999, 9999 and -999.
    """
    return np.stack([_check_column(table, name, first_row) for name in METADATA_COLUMNS], axis=1)


def _check_column(table: pa.Table, name: str, first_row: int) -> Float32[np.ndarray, " rows"]:
    if name not in table.column_names:
        raise InputError(f"there is no column {name}, which metadata needs; add it, null where it is not known")
    column = table.column(name)
    kinds = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal, pa.types.is_null)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise InputError(f"the column {name} is of type {column.type}; make it numbers, null where it is not known")
    values = column.cast(pa.float64()).to_numpy()
    low, high = _BOUNDS[name]
    filler = np.isin(values, _FILLERS)
    wrong = np.flatnonzero(filler | (values < low) | (values > high))
    if len(wrong):
        row = int(wrong[0])
        why = "is a filler, not a value" if filler[row] else f"is outside {low:g} to {high:g}"
        raise InputError(
            f"the {name} {values[row]:g} of row {first_row + row} {why} "
            f"({len(wrong)} such rows); set it to null where it is not known"
        )
    return values.astype(np.float32)


def metadata_features(metadata: Float32[Array, "b 3"]) -> Float32[Array, "b 6"]:
    """Depth, latitude and longitude as features of order 1, without a seam at the date line or a pole.

    Features: the position on the unit sphere (x, y, z), log(1 + depth) over that of 12,000 m with the sign of depth,
    and one indicator each for a missing position and a missing depth. What is missing is 0.

    Args:
        metadata: Metres, degrees, degrees; NaN is missing. A position lacks as a whole if either degree does.
    """
    missing = jnp.isnan(metadata)
    depth, latitude, longitude = jnp.moveaxis(jnp.where(missing, 0.0, metadata), 1, 0)
    no_depth, no_position = missing[:, 0], missing[:, 1] | missing[:, 2]
    north, east = jnp.deg2rad(latitude), jnp.deg2rad(longitude)
    sphere = (jnp.cos(north) * jnp.cos(east), jnp.cos(north) * jnp.sin(east), jnp.sin(north))
    scaled = jnp.sign(depth) * jnp.log1p(jnp.abs(depth)) / jnp.log1p(_BOUNDS["depth"][1])
    return jnp.stack(
        [
            *(jnp.where(no_position, 0.0, axis) for axis in sphere),
            scaled,
            no_position.astype(jnp.float32),
            no_depth.astype(jnp.float32),
        ],
        axis=1,
    )


class MetadataEncoder(nnx.Module):
    """Two hidden layers with GELU from where a sample was taken to the taxa's log-probabilities."""

    def __init__(
        self,
        kind: HeadKind,
        tree: TaxonTree,
        *,
        rngs: nnx.Rngs,
        hidden_size: int = 128,
        multiple: int = CLASS_MULTIPLE,
    ):
        init = jax.nn.initializers.lecun_normal()
        self.first = Dense(6, hidden_size, axes=(None, None), init=init, rngs=rngs)
        self.second = Dense(hidden_size, hidden_size, axes=(None, None), init=init, rngs=rngs)
        self.head = make_head(kind, hidden_size, tree, rngs=rngs, multiple=multiple)

    def __call__(self, metadata: Float32[Array, "b 3"], layout: Layout | None = None) -> RankLogits:
        """Log-probabilities of the taxa from metres, degrees, degrees; NaN is missing."""
        x = jax.nn.gelu(self.first(metadata_features(metadata)), approximate=False)
        return self.head(jax.nn.gelu(self.second(x), approximate=False), layout)
