"""The projection from a model's pooled vectors to the vectors that are stored and compared.

It stands behind pooling, as Dense and Normalize do in sentence-transformers: centre, linear map (principal axes times
whitening), optional residual networks beside it, and length 1. All of it is computed in float32.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bioscan_jax.errors import InputError
from bioscan_jax.model.pooling import Pooling

_SMALLEST_NORM = 1e-12
"""Norms are raised to this, so that a zero vector stays zero."""


@dataclass(frozen=True, kw_only=True)
class ProjectionInputs:
    """The raw vectors that a projection was fitted on: vectors made in another way must not be projected with it."""

    weights_sha256: str
    """Of the model's weights, as in a table's provenance."""
    adapter_sha256: str | None = None
    """Of the model's adapter, if any."""
    pooling: Pooling
    layer: int
    """Hidden state that is pooled, counted from 0 (the token embeddings)."""
    strand: Literal["forward", "both"]
    phases: int
    groups: int = 1
    """Groups of views that are averaged apart and concatenated; only 1 is implemented."""
    max_tokens: int
    """Longest token row, CLS included."""
    overlong: Literal["truncate", "window", "error"]

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> "ProjectionInputs":
        """Returns what the plan of a table of raw vectors says about them."""
        model, embed, data = plan["model"], plan["embed"], plan["data"]
        return cls(
            weights_sha256=model["weights_sha256"],
            adapter_sha256=model.get("adapter_sha256"),
            pooling=embed["pooling"],
            layer=embed["layer"],
            strand=embed["strand"],
            phases=embed["phases"],
            max_tokens=data["max_tokens"],
            overlong=data["overlong"],
        )

    def check(self, vectors: "ProjectionInputs", where: str, fix: str) -> None:
        """Checks that vectors were made as the projection needs them.

        Args:
            vectors: How they were made.
            where: Begins the message: the table or the flags that made them.
            fix: Ends the message.

        Raises:
            InputError: They were made in another way; the message names the first difference.
        """
        for name in (one.name for one in dataclasses.fields(self)):
            needed, found = getattr(self, name), getattr(vectors, name)
            if needed != found:
                if name.endswith("sha256"):
                    needed, found = (value and value[:12] for value in (needed, found))
                raise InputError(
                    f"{where}: the vectors have {name} {found}, but the projection was fitted on {name} {needed}; {fix}"
                )


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualNetwork:
    """Two layers with GELU (tanh form) and a linear skip connection.

    Example:
        >>> network = ResidualNetwork(skip=jnp.eye(2), w1=jnp.zeros((2, 3)), b1=jnp.zeros(3), w2=jnp.ones((3, 2)))
        >>> network(jnp.array([[3.0, 4.0]]))
        Array([[3., 4.]], dtype=float32)
    """

    w1: Float[Array | np.ndarray, "mid hidden"]
    b1: Float[Array | np.ndarray, " hidden"]
    w2: Float[Array | np.ndarray, "hidden out"]
    b2: Float[Array | np.ndarray, " out"] | None = None
    skip: Float[Array | np.ndarray, "mid out"] | None = None
    """Added linear map of the input; none if absent."""
    input_length: float | None = field(default=None, metadata={"static": True})
    """Inputs are scaled to this length; used as they are if absent."""

    def __call__(self, whitened: Float[Array, "b mid"]) -> Float[Array, "b out"]:
        """Returns the network's outputs, not yet of length 1."""
        x = whitened if self.input_length is None else self.input_length * unit(whitened)
        y = _dot(jax.nn.gelu(_dot(x, self.w1) + self.b1[None]), self.w2)
        if self.b2 is not None:
            y = y + self.b2[None]
        return y if self.skip is None else y + _dot(x, self.skip)


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """A map from raw vectors to unit vectors; a JAX pytree whose leaves are its arrays.

    With z = (x - mean) @ linear, the result is the unit vector of the concatenation of weights[0] * unit(z) and, for
    each network, weights[i + 1] * unit(network(z)). Parts with weight 0 are left out.

    Example:
        >>> inputs = ProjectionInputs(
        ...     weights_sha256="", pooling="mean", layer=0, strand="forward", phases=6, max_tokens=2048, overlong="truncate"
        ... )
        >>> projection = Projection(mean=np.ones(2, np.float32), linear=np.eye(2, dtype=np.float32), inputs=inputs)
        >>> projection.dimension
        2
        >>> np.asarray(projection(jnp.array([[4.0, 5.0]]))).round(3)
        array([[0.6, 0.8]], dtype=float32)
    """

    mean: Float[Array | np.ndarray, " features"]
    """Subtracted from raw vectors."""
    linear: Float[Array | np.ndarray, "features mid"] | None
    """Principal axes times whitening; None where the model's embeddings contain it already."""
    networks: tuple[ResidualNetwork, ...] = ()
    weights: tuple[float, ...] = field(default=(1.0,), metadata={"static": True})
    """Of the whitened vector, then of each network's output, in the concatenation."""
    inputs: ProjectionInputs = field(metadata={"static": True})
    description: str = field(default="", metadata={"static": True})
    """How it was fitted, in one line; not part of its identity."""

    def __call__(self, vectors: Float[Array, "b features"]) -> Float[Array, "b dimension"]:
        """Projects raw vectors in float32; the results have length 1."""
        centred = vectors.astype(jnp.float32) - self.mean[None]
        whitened = centred if self.linear is None else _dot(centred, self.linear)
        parts = []
        for part, weight in zip((None, *self.networks), self.weights, strict=True):
            if weight:
                parts.append(weight * unit(whitened if part is None else part(whitened)))
        return unit(jnp.concatenate(parts, axis=1))

    @property
    def features(self) -> int:
        """Numbers per raw vector."""
        return self.mean.shape[0]

    @property
    def dimension(self) -> int:
        """Numbers per projected vector."""
        whitened = self.features if self.linear is None else self.linear.shape[1]
        widths = [whitened, *(network.w2.shape[1] for network in self.networks)]
        return sum(width for width, weight in zip(widths, self.weights, strict=True) if weight)

    @property
    def arrays(self) -> dict[str, Float[Array | np.ndarray, "..."]]:
        """The arrays by name, as in the file."""
        found: dict[str, Any] = {"mean": self.mean}
        if self.linear is not None:
            found["linear"] = self.linear
        for number, network in enumerate(self.networks):
            for name in ("w1", "b1", "w2", "b2", "skip"):
                if (array := getattr(network, name)) is not None:
                    found[f"networks.{number}.{name}"] = array
        return found

    @property
    def sha256(self) -> str:
        """Identity: of the arrays in float32 and the settings, whatever format they are stored in."""
        digest = hashlib.sha256()
        settings = {
            "weights": self.weights,
            "input_lengths": [network.input_length for network in self.networks],
            "inputs": dataclasses.asdict(self.inputs),
        }
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, array in sorted(self.arrays.items()):
            values = np.ascontiguousarray(array, "<f4")
            digest.update(f"\n{name} {values.shape}\n".encode() + values.tobytes())
        return digest.hexdigest()


def _register(kind: Any) -> None:
    """Registers a dataclass as a JAX pytree; fields with `static` in their metadata are not leaves.

    `jax.tree_util.register_dataclass` would call `__init__`, where the tests check shapes, also for trees of shardings.
    """
    leaves, static = ([f.name for f in dataclasses.fields(kind) if ("static" in f.metadata) == s] for s in (0, 1))

    def flatten(tree: Any) -> tuple[list, tuple]:
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(tree, name)) for name in leaves]
        return keyed, tuple(getattr(tree, name) for name in static)

    def unflatten(facts: tuple, children: Any) -> Any:
        tree = object.__new__(kind)
        for name, value in zip([*leaves, *static], [*children, *facts], strict=True):
            object.__setattr__(tree, name, value)
        return tree

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)


_register(ResidualNetwork)
_register(Projection)


def unit(vectors: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Scales vectors to length 1; a zero vector stays zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), _SMALLEST_NORM)


def _dot(x: Float[Array, "b k"], matrix: Float[Array | np.ndarray, "k d"]) -> Float[Array, "b d"]:
    """Multiplies in full float32 on every kind of device."""
    return jnp.dot(x, matrix, precision="highest", preferred_element_type=jnp.float32)
