"""Checkpoints with seeded random weights that both sides of a comparison read."""

from pathlib import Path

import jax.numpy as jnp

from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import random_model
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.model.config import PRESETS, TransformerConfig
from bioscan_jax.model.transformer import NucleotideTransformer

_ONE_FILE = 1 << 50


def preset_size(preset: str) -> TransformerConfig:
    """Returns the configuration of a published model.

    Raises:
        InputError: There is no such preset.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset!r}: no such preset; known are {', '.join(PRESETS)}")
    return PRESETS[preset]


def write_random(directory: Path, transformer: TransformerConfig, seed: int) -> NucleotideTransformer:
    """Writes a float32 checkpoint in one safetensors file under the published names; returns its model."""
    model = random_model(transformer, jnp.float32, make_layout(config.MeshConfig(data=1)), seed=seed, lm_head=True)
    nothing = Provenance(model="random", revision=None, weights_sha256="none", license=None, dtype="float32")
    vocabulary = Vocabulary.published("v2" if transformer.gated else "v1")
    write_merged(directory, model, vocabulary, provenance=nothing, base=None, max_shard_bytes=_ONE_FILE)
    return model
