"""Small random projections."""

import numpy as np

from bioscan_jax.model.projection import Projection, ProjectionInputs, ResidualNetwork


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
