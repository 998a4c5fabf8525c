"""Small random projections, and models that have one."""

import dataclasses

import numpy as np
from flax import nnx

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.projection_files import read_projection
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.model.config import PRESETS
from bioscan_jax.model.projection import Projection, ProjectionInputs, ResidualNetwork
from bioscan_jax.model.transformer import NucleotideTransformer


def random_inputs(**settings):
    """The raw vectors that they are for."""
    known = {"pooling": "mean", "layer": 0, "strand": "forward", "phases": 6, "max_tokens": 2048}
    return ProjectionInputs(**({"weights_sha256": "0" * 64, "overlong": "truncate"} | known | settings))


def random_projection(features=64, mid=24, networks=(), weights=None, seed=0, description="random", **inputs):
    """A projection to `mid` numbers and, beside them, one network per (hidden, out, input_length) of `networks`."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    made = tuple(
        ResidualNetwork(
            w1=draw(mid, hidden) / 4,
            b1=draw(hidden),
            w2=draw(hidden, out) / 4,
            b2=draw(out) if number % 2 else None,
            skip=None if number % 2 else draw(mid, out),
            input_length=length,
        )
        for number, (hidden, out, length) in enumerate(networks)
    )
    return Projection(
        mean=draw(features) / 20,
        linear=draw(features, mid),
        networks=made,
        weights=weights or (1.0,) * (1 + len(made)),
        inputs=random_inputs(**inputs),
        description=description,
    )


def write_projected_model(directory, *, preset="tiny-v2", layers=None, networks=(), seed=0, mid=24, **inputs):
    """Writes a checkpoint of random weights with a random projection beside it; returns the projection."""
    config = PRESETS[preset]
    config = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers if layers is None else layers)
    model = NucleotideTransformer(config, rngs=nnx.Rngs(seed), lm_head=True)
    vocabulary = Vocabulary.published("v2" if config.gated else "v1")
    base = Provenance(model=f"random {preset}", revision=None, weights_sha256="c" * 64, license=None, dtype="float32")
    settings = {"max_tokens": config.max_tokens, "weights_sha256": base.weights_sha256} | inputs
    projection = random_projection(config.hidden_size, mid, networks, seed=seed, **settings)
    write_merged(directory, model, vocabulary, provenance=base, base=None, projection=projection)
    return read_projection(directory)


def _gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def project_in_float64(projection, vectors):
    """What a projection must give, in float64."""
    z = (vectors.astype(np.float64) - projection.mean) @ projection.linear
    parts = [projection.weights[0] * _unit(z)] if projection.weights[0] else []
    for network, weight in zip(projection.networks, projection.weights[1:], strict=True):
        x = z if network.input_length is None else network.input_length * _unit(z)
        y = _gelu(x @ network.w1.astype(np.float64) + network.b1) @ network.w2
        y = y + (0 if network.b2 is None else network.b2) + (0 if network.skip is None else x @ network.skip)
        if weight:
            parts.append(weight * _unit(y))
    return _unit(np.concatenate(parts, axis=1))
