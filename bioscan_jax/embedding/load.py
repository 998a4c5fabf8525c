"""Loads a model by name, with the adapter, the projection and the heads that belong to it."""

import dataclasses
import os
from typing import Literal

from bioscan_jax.checkpoints.head_files import HEADS_FILE, read_heads
from bioscan_jax.checkpoints.hub import DEFAULT, DEFAULT_DIRECTORY, download_parts, is_on_hub, pinned, resolve_part
from bioscan_jax.checkpoints.load import load_weights, recorded_model
from bioscan_jax.checkpoints.peft import CONFIG_FILE, adapter_base
from bioscan_jax.config import MeshConfig, ModelConfig
from bioscan_jax.devices.sharding import make_layout, start_devices
from bioscan_jax.embedding.encoder import Encoder
from bioscan_jax.location import local_copy
from bioscan_jax.notebook import progress_bar


def load(
    checkpoint: str | os.PathLike[str] = DEFAULT,
    *,
    revision: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    projection: str | os.PathLike[str] = "auto",
    heads: str | os.PathLike[str] | None = None,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    seed: int = 0,
    attention: Literal["auto", "dense", "splash", "cudnn"] = "auto",
    mesh: MeshConfig | None = None,
    progress: bool = False,
) -> Encoder:
    """Loads a model to embed sequences with.

    Args:
        checkpoint: A hub id or a directory with a checkpoint (Hugging Face's format or converted), with an adapter or
            with what `save_pretrained` wrote, or random:PRESET for seeded random weights; the model in the package if
            absent.
        revision: Commit of the hub id; without it the newest one is taken, with a warning.
        adapter: Directory with a LoRA adapter for the checkpoint, in PEFT's format, or OWNER/NAME@COMMIT on the hub
            (without @COMMIT the newest one, with a warning).
        projection: Directory with a projection of the pooled vectors, or OWNER/NAME@COMMIT; `auto` takes the one beside
            the weights (or beside the adapter), if there is one, `none` returns raw vectors. What it was fitted on
            (pooling, layer, strand, phases, max_tokens, overlong) becomes the default of every call.
        heads: Directory with taxonomic heads, or OWNER/NAME@COMMIT; those beside the adapter or the checkpoint if absent.
        dtype: Of parameters and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU.
        seed: Of random:PRESET weights.
        attention: As `ModelConfig.attention`.
        mesh: Devices; all of them if absent.
        progress: Show a bar on the terminal.

    Raises:
        InputError: Anything about the checkpoint, the adapter, the projection or the heads is wrong.

    Example:
        >>> import bioscan_jax as bj
        >>> bj.load("random:tiny-v2", seed=1).dimension
        64
    """
    mesh = mesh or MeshConfig()
    name, adapter_name = os.fspath(checkpoint), None if adapter is None else pinned(os.fspath(adapter))
    if on_hub := is_on_hub(name):
        revision = revision or pinned(name).rpartition("@")[2]
        given = download_parts(name, revision, "model.checkpoint")
    else:
        given = DEFAULT_DIRECTORY if name == DEFAULT else local_copy(name, "model.checkpoint")
    wanted = ModelConfig(
        checkpoint=name,
        revision=revision,
        dtype=dtype,
        seed=seed,
        adapter=adapter_name,
        projection=pinned(os.fspath(projection)),
        attention=attention,
    )
    if adapter is None and (given / CONFIG_FILE).is_file() and not (given / "config.json").is_file():
        base = recorded_model(adapter_base(given))
        own = base.revision if on_hub else revision or base.revision
        if own is None and is_on_hub(base.checkpoint):
            own = pinned(base.checkpoint).rpartition("@")[2]
        adapter = f"{name}@{revision}" if on_hub else name
        wanted = dataclasses.replace(wanted, checkpoint=base.checkpoint, revision=own, seed=base.seed, adapter=adapter)
    start_devices(mesh)
    with progress_bar(unit="B", unit_scale=True, desc="load weights", disable=not progress, leave=False) as bar:
        loaded = load_weights(wanted, make_layout(mesh), on_bytes=bar.update)
    beside = [given] if adapter_name is None else [resolve_part(adapter_name, "model.adapter"), given]
    found = next((directory for directory in beside if (directory / HEADS_FILE).is_file()), None)
    where = found if heads is None else resolve_part(pinned(os.fspath(heads)), "heads")
    return Encoder(loaded=loaded, heads=None if where is None else read_heads(where, loaded.layout), wanted=wanted)
