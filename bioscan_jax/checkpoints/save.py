"""Writes a loaded model as a checkpoint, or its adapter alone, so that loading the directory gives it back."""

import dataclasses
from pathlib import Path

from flax import nnx

from bioscan_jax.checkpoints.head_files import Heads
from bioscan_jax.checkpoints.hub import resolve_checkpoint
from bioscan_jax.checkpoints.load import RANDOM, LoadedModel, load_weights
from bioscan_jax.checkpoints.peft import write_adapter
from bioscan_jax.checkpoints.publish import write_merged
from bioscan_jax.config import ModelConfig
from bioscan_jax.errors import InputError
from bioscan_jax.model.transformer import NucleotideTransformer


def save_model(
    directory: Path, loaded: LoadedModel, wanted: ModelConfig | None, *, heads: Heads | None, merge: bool
) -> None:
    """Writes a model with its projection and heads.

    Args:
        directory: Created, complete or not at all.
        loaded: The model.
        wanted: What it was loaded by, for the parts of the checkpoint that vectors do not need; None if it was not.
        heads: Taxonomic heads trained on its vectors.
        merge: Write a whole checkpoint, with any adapter merged into its weights; or the adapter alone.

    Raises:
        InputError: There is no adapter to write alone, or the directory or the base weights have a fault.
    """
    base = dataclasses.replace(loaded.provenance, adapter=None, adapter_sha256=None)
    facts = loaded.trained_facts
    if not merge:
        if loaded.adapter is None:
            raise InputError(f"{base.model} has no adapter to write alone; pass merge=True")
        parts = {"heads": heads, "projection": loaded.projection}
        write_adapter(directory, loaded.model, loaded.adapter.lora, provenance=base, facts=facts, **parts)
        return
    if (made_by := loaded.provenance).adapter is not None:
        facts |= {"adapter": made_by.adapter, "adapter_sha256": made_by.adapter_sha256}
    write_merged(
        directory,
        _with_lm_head(loaded, wanted),
        loaded.vocabulary,
        provenance=base,
        base=_base_directory(wanted),
        heads=heads,
        projection=loaded.projection,
        facts=facts,
    )


def _with_lm_head(loaded: LoadedModel, wanted: ModelConfig | None) -> NucleotideTransformer:
    """Returns the model with its language-model head, which published checkpoints have and vectors do not need."""
    if loaded.model.lm_head is not None or not loaded.config.num_hidden_layers:
        return loaded.model
    if wanted is None:
        raise InputError("this model was not made by load, so its language-model head cannot be read")
    plain = dataclasses.replace(wanted, adapter=None, projection="none")
    base = load_weights(plain, loaded.layout, lm_head=True)
    model = nnx.merge(*nnx.split(loaded.model))
    model.lm_head = nnx.data(base.model.lm_head)
    return model


def _base_directory(wanted: ModelConfig | None) -> Path | None:
    if wanted is None or wanted.checkpoint.startswith(RANDOM):
        return None
    return resolve_checkpoint(wanted.checkpoint, wanted.revision).directory
