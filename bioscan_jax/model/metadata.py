"""Sample metadata (depth, latitude, longitude) as a second input: features, and an encoder with its own head."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from bioscan_jax import config
from bioscan_jax.barcodes.metadata import METADATA_BOUNDS
from bioscan_jax.devices.sharding import Layout
from bioscan_jax.model.heads import CLASS_MULTIPLE, Dense, HeadKind, RankLogProbs, TaxonTree, make_head


def metadata_features(metadata: Float32[Array, "b 3"]) -> Float32[Array, "b 6"]:
    """Scales depth, latitude and longitude to features of order 1 that are continuous at the date line and the poles.

    Features: the position on the unit sphere (x, y, z), log(1 + depth) relative to that of 12,000 m with the sign of
    depth, and one indicator each for a missing position and a missing depth. Missing values are 0.

    Args:
        metadata: Metres, degrees, degrees; NaN if missing. A position is missing if either degree is.
    """
    missing = jnp.isnan(metadata)
    depth, latitude, longitude = jnp.moveaxis(jnp.where(missing, 0.0, metadata), 1, 0)
    no_depth, no_position = missing[:, 0], missing[:, 1] | missing[:, 2]
    north, east = jnp.deg2rad(latitude), jnp.deg2rad(longitude)
    sphere = (jnp.cos(north) * jnp.cos(east), jnp.cos(north) * jnp.sin(east), jnp.sin(north))
    scaled = jnp.sign(depth) * jnp.log1p(jnp.abs(depth)) / jnp.log1p(METADATA_BOUNDS["depth"][1])
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
    """Two hidden layers with GELU and a head: sample metadata to log-probabilities of the taxa."""

    def __init__(
        self,
        kind: HeadKind,
        tree: TaxonTree,
        *,
        rngs: nnx.Rngs,
        hidden_size: int = 128,
        multiple: int = CLASS_MULTIPLE,
        scale: float = config.COSINE_SCALE,
    ):
        init = jax.nn.initializers.lecun_normal()
        self.first = Dense(6, hidden_size, axes=(None, None), init=init, rngs=rngs)
        self.second = Dense(hidden_size, hidden_size, axes=(None, None), init=init, rngs=rngs)
        self.head = make_head(kind, hidden_size, tree, rngs=rngs, multiple=multiple, scale=scale)

    def __call__(self, metadata: Float32[Array, "b 3"], layout: Layout | None = None) -> RankLogProbs:
        """Returns log-probabilities of the taxa from metres, degrees, degrees; NaN if missing."""
        return self.head(self._hidden(metadata), layout)

    def of_labels(
        self, metadata: Float32[Array, "b 3"], labels: Int32[Array, "b 7"], layout: Layout | None = None
    ) -> Float32[Array, "b 7"]:
        """Returns the log-probability of one taxon per rank for each row; any number where the label is -1."""
        return self.head.of_labels(self._hidden(metadata), labels, layout)

    def _hidden(self, metadata: Float32[Array, "b 3"]) -> Float32[Array, "b hidden"]:
        x = jax.nn.gelu(self.first(metadata_features(metadata)), approximate=False)
        return jax.nn.gelu(self.second(x), approximate=False)
