"""What taxonomic heads say of vectors, as voters beside the nearest references."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int32

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, read_heads
from bioscan_jax.errors import InputError
from bioscan_jax.matching.queries import Embedder
from bioscan_jax.matching.reference import Taxa, numbered
from bioscan_jax.matching.vote import HeadVotes

_MOST_TAXA = 8
"""The most probable taxa of each rank that get a voice."""


def open_heads(directory: str, embedder: Embedder) -> Heads:
    """Reads heads that were trained on such vectors.

    Raises:
        InputError: There are none, or they take vectors of another kind.
    """
    heads = read_heads(Path(directory).expanduser(), embedder.loaded.layout)
    last = embedder.loaded.config.num_hidden_layers
    if heads.pooling != embedder.embed.pooling or embedder.embed.layer != last:
        raise InputError(
            f"--heads {directory}: they take the {heads.pooling} of the last layer, the table has the "
            f"{embedder.embed.pooling} of layer {embedder.embed.layer} of {last}; embed the reference so, or leave it out"
        )
    width = embedder.loaded.config.hidden_size
    if heads.hidden_size != width:
        raise InputError(
            f"--heads {directory}: they take vectors of {heads.hidden_size} numbers, the table has {width}; pass heads "
            "of its model"
        )
    return heads


def head_votes(heads: Heads, vectors: Float32[np.ndarray, "queries hidden"], taxa: Taxa) -> HeadVotes:
    """The most probable taxa of each rank, numbered as the reference's are.

    Args:
        heads: From `open_heads`.
        vectors: Of the queries.
        taxa: Of the reference and the heads' label space.
    """
    log_probs = heads.head(jnp.asarray(vectors)).log_probs
    lineages, probabilities = [], []
    codes = [
        numbered(pa.array(known, pa.string()), names)
        for known, names in zip(heads.space.names, taxa.names, strict=True)
    ]
    species = np.asarray(log_probs[-1])
    for rank in range(len(RANKS)):
        size = len(heads.space.names[rank])
        found = np.exp(np.asarray(log_probs[rank])[:, :size])
        best = np.argsort(-found, axis=1, kind="stable")[:, :_MOST_TAXA]
        paths: Int32[np.ndarray, "queries taxa 7"] = heads.space.paths[rank][best]
        known = [
            np.where(paths[..., r] >= 0, np.append(codes[r], -1)[paths[..., r]], -1).astype(np.int32)
            for r in range(len(RANKS))
        ]
        lineages.append(np.stack(known, axis=2))
        voice = np.zeros((*best.shape, len(RANKS)), np.float32)
        voice[:, :, rank] = np.take_along_axis(found, best, 1)
        probabilities.append(voice)
    with np.errstate(invalid="ignore"):
        entropy = -np.where(np.isfinite(species), np.exp(species) * species, 0.0).sum(axis=1)
    return HeadVotes(np.concatenate(lineages, 1), np.concatenate(probabilities, 1), entropy.astype(np.float32))
