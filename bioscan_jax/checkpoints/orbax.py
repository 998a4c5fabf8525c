"""The converted form of a checkpoint: Flax weights in an orbax directory, read shard by shard at every later start."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import jax
from flax import nnx
from jax.typing import DTypeLike

from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import abstract_model
from bioscan_jax.checkpoints.projection_files import write_projection
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.errors import InputError, one_line
from bioscan_jax.model.classifier import named_arrays, with_arrays
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer

if TYPE_CHECKING:
    from orbax.checkpoint import v1 as ocp

PROVENANCE_FILE = "bioscan_jax.json"
FORMAT = 1
CHUNK_BYTES = 64 << 20
"""Largest piece of a stored array; each piece is compressed on its own."""


def is_converted(directory: Path) -> bool:
    """Returns whether the directory was written by `save_converted`."""
    return (directory / PROVENANCE_FILE).is_file()


def has_converted_head(directory: Path) -> bool:
    """Returns whether converted weights include the masked-language-model head."""
    return (directory / "weights" / "lm_head").is_dir()


def read_provenance(directory: Path) -> Provenance:
    """Reads the provenance of converted weights.

    Raises:
        InputError: The file is damaged or has another format.
    """
    path = directory / PROVENANCE_FILE
    try:
        raw = json.loads(path.read_text())
        if raw.pop("format") != FORMAT:
            raise InputError(f"{path}: made by another version of bioscan_jax; convert the weights again")
        return Provenance(**raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged ({one_line(error)}); convert the weights again") from None


def save_converted(
    directory: Path,
    model: NucleotideTransformer,
    config: TransformerConfig,
    vocabulary: Vocabulary,
    provenance: Provenance,
    projection: Projection | None = None,
) -> None:
    """Writes a directory that `--model.checkpoint` accepts; the provenance file is written last and marks it complete.

    Raises:
        InputError: The model has an adapter, or the directory is not empty or cannot be written.
    """
    from orbax.checkpoint import v1 as ocp

    if provenance.adapter is not None:
        raise InputError(
            f"--model.adapter {provenance.adapter!r} cannot be converted; convert the checkpoint without it and pass "
            "--model.adapter to the commands that make vectors"
        )
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory}: not empty; choose another --output or remove it")
    trunk, head = _split(nnx.state(model))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        trees = {"trunk": trunk} | ({"lm_head": head} if head else {})
        with _limited_memory(trees, max(array.dtype.itemsize for array in trunk.values())):
            ocp.save_checkpointables(str(directory.absolute() / "weights"), trees)
        (directory / "config.json").write_text(config.to_json())
        (directory / "vocab.txt").write_text(vocabulary.text())
        if projection is not None:
            write_projection(directory, projection)
        facts = dataclasses.asdict(provenance).items()
        record = {"format": FORMAT} | {k: v for k, v in facts if not k.startswith("adapter")}
        (directory / PROVENANCE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error}); free space or choose another --output") from None


def load_converted(
    directory: Path, config: TransformerConfig, dtype: DTypeLike, layout: Layout, *, lm_head: bool
) -> NucleotideTransformer:
    """Reads converted weights; each device reads its own shard.

    Raises:
        InputError: The checkpoint is damaged, has another architecture, or lacks the head that `lm_head` asks for.
    """
    from orbax.checkpoint import v1 as ocp

    stored = read_provenance(directory).dtype
    if lm_head and (directory / "weights").is_dir() and not has_converted_head(directory):
        raise InputError(
            f"{directory} has no masked-language-model head (lm_head), which this needs: it was converted from a "
            "checkpoint without one; pass a checkpoint that has it"
        )
    graph, state = nnx.split(abstract_model(config, dtype, lm_head=lm_head))
    shardings = stored_shardings(state, layout)

    def abstract(path: tuple, variable: nnx.Variable) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(variable.get_value().shape, dtype, sharding=shardings[path])

    wanted = nnx.from_flat_state(
        [(path, variable.replace(abstract(path, variable))) for path, variable in nnx.to_flat_state(state)]
    )
    trunk, head = _split(wanted)
    try:
        trees = {"trunk": trunk} | ({"lm_head": head} if head else {})
        with _limited_memory(trees, max(jax.numpy.dtype(d).itemsize for d in (dtype, stored))):
            parts = ocp.load_checkpointables(str(directory.absolute() / "weights"), trees)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{directory}: the converted weights cannot be read ({one_line(error, 200)}); convert them again"
        ) from None
    values = parts["trunk"] | parts.get("lm_head", {})
    return nnx.merge(graph, with_arrays(state, values))


def _limited_memory(trees: dict, itemsize: int) -> "ocp.Context":
    """Limits orbax to one large array at a time, in small pieces, so that buffers add little to the weights in memory."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    largest = max(leaf.size for leaf in jax.tree.leaves(trees)) * itemsize + (1 << 20)
    context.memory.read_concurrent_bytes = context.memory.write_concurrent_bytes = largest
    return context


def _split(state: nnx.State) -> tuple[dict, dict]:
    """Arrays by dotted path: of the trunk, and of the language-model head."""
    arrays = named_arrays(state)
    trunk = {name: array for name, array in arrays.items() if not name.startswith("lm_head.")}
    return trunk, {name: array for name, array in arrays.items() if name not in trunk}
