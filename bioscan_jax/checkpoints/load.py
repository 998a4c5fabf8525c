"""Loads the model named by `--model.checkpoint` onto the mesh, with its vocabulary and provenance."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.hub import Provenance, ResolvedCheckpoint, resolve_checkpoint, resolve_part
from bioscan_jax.checkpoints.keys import has_lm_head, load_model, random_model
from bioscan_jax.checkpoints.model_card import trained_facts
from bioscan_jax.checkpoints.orbax import has_converted_head, is_converted, load_converted, read_provenance
from bioscan_jax.checkpoints.peft import Adapter, read_adapter
from bioscan_jax.checkpoints.projection_files import has_projection, read_projection
from bioscan_jax.checkpoints.readers import sha256_of, weight_files
from bioscan_jax.devices.memory import memory_errors
from bioscan_jax.devices.sharding import Layout, compute_dtype
from bioscan_jax.errors import InputError
from bioscan_jax.model.attention import attention_setting, choose_attention
from bioscan_jax.model.config import PRESETS, TransformerConfig, read_config
from bioscan_jax.model.projection import Projection
from bioscan_jax.model.transformer import NucleotideTransformer

RANDOM = "random:"
_RECORDED_RANDOM = re.compile(rf"({RANDOM}\S+) \(seeded random weights, seed (\d+): not trained\)")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on its mesh, its vocabulary and its provenance."""

    model: NucleotideTransformer
    config: TransformerConfig
    vocabulary: Vocabulary
    layout: Layout
    get_provenance: Callable[[], Provenance]
    """Called by `provenance`; may block."""
    adapter: Adapter | None = None
    """The adapter around its layers, if any."""
    projection: Projection | None = None
    """From its pooled vectors to the vectors that are stored, if any."""
    projection_setting: str = "none"
    """`ModelConfig.projection`, as it was given."""

    @property
    def provenance(self) -> Provenance:
        """Identity of the weights; waits for their files to be hashed, which runs in a background thread.

        Raises:
            OSError: A file could not be read again.
        """
        return self.get_provenance()

    @property
    def facts(self) -> dict[str, Any]:
        """The provenance and what describes the projection, for a table's metadata."""
        found = dataclasses.asdict(self.provenance)
        if self.projection is not None:
            found |= projection_facts(self.projection, self.projection_setting)
        return found

    @property
    def trained_facts(self) -> dict[str, Any]:
        """What the export of its adapter says of the training."""
        return trained_facts((self.adapter and self.adapter.facts) or {})


def projection_facts(projection: Projection, setting: str) -> dict[str, str]:
    """Returns what a table's metadata says of a projection; `setting` is where it is, as `ModelConfig.projection`."""
    return {
        "projection": setting,
        "projection_sha256": projection.sha256,
        "projection_description": projection.description,
    }


def read_vocabulary(directory: Path, transformer: TransformerConfig) -> Vocabulary:
    """Reads `vocab.txt` and checks that the model has an embedding for each id in use.

    Raises:
        InputError: It is missing, malformed, or belongs to another model.
    """
    vocabulary = Vocabulary.from_file(directory / "vocab.txt")
    check_vocabulary(vocabulary, transformer, str(directory / "vocab.txt"))
    return vocabulary


def check_vocabulary(vocabulary: Vocabulary, transformer: TransformerConfig, where: str) -> None:
    """Raises InputError if the ids in use do not fit the model.

    Both model families number the single letters last, at the end of the embedding table, and columns after them; ids
    past it (v1's <eos>, <bos>) are never used.
    """
    special = (vocabulary.cls_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.unk_id)
    highest = max(
        *special, vocabulary.letter_ids.max(), vocabulary.sixmer_ids.max(), vocabulary.column_ids.max(initial=0)
    )
    if highest != transformer.vocab_size - 1:
        raise InputError(
            f"{where}: its last letter has id {highest}, config.json has {transformer.vocab_size} embeddings; "
            "v1 and v2 number their tokens differently, use the model's own vocab.txt"
        )
    for name, ours, theirs in (
        ("pad", vocabulary.pad_id, transformer.pad_token_id),
        ("mask", vocabulary.mask_id, transformer.mask_token_id),
    ):
        if ours != theirs:
            raise InputError(f"{where}: <{name}> is id {ours}, in config.json {theirs}; use the model's own vocab.txt")


def load_weights(
    model: config.ModelConfig,
    layout: Layout,
    *,
    lm_head: bool | None = False,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> LoadedModel:
    """Loads the model named by `--model.checkpoint`.

    A directory or hub id holds Hugging Face files, or the output of `convert`. `random:PRESET` makes seeded random
    weights of a preset size. `--model.adapter` puts an adapter around the layers without merging it.

    Args:
        model: Checkpoint, revision, dtype, seed, adapter, projection, attention.
        layout: Placement of the parameters on the devices.
        lm_head: Also load the masked-language-model head; None if there is one.
        on_bytes: Called with the number of file bytes just read.

    Raises:
        InputError: The checkpoint, the adapter or the projection is wrong, or `--model.attention` is not supported on
            these devices.
    """
    split = "--mesh.params fsdp or --mesh.model 2, which split them over the devices"
    with memory_errors(f"loading the weights of {model.checkpoint}", f"pass --model.dtype bfloat16, or {split}"):
        loaded = _load_base(model, layout, lm_head, on_bytes)
    loaded.model.attention = model.attention
    if model.adapter is None:
        return _with_projection(loaded, model)
    directory = resolve_part(model.adapter, "model.adapter")
    adapter = read_adapter(directory, loaded.model, layout, base=loaded.provenance)
    provenance = dataclasses.replace(loaded.provenance, adapter=model.adapter, adapter_sha256=adapter.sha256)
    return _with_projection(
        dataclasses.replace(loaded, get_provenance=lambda: provenance, adapter=adapter),
        model,
    )


def _with_projection(loaded: LoadedModel, model: config.ModelConfig) -> LoadedModel:
    """Adds the projection that `--model.projection` names.

    Raises:
        InputError: It cannot be read, or belongs to another model.
    """
    if model.projection == "none":
        return loaded
    if model.projection != "auto":
        directory = resolve_part(model.projection, "model.projection")
    elif model.adapter is not None:
        directory = resolve_part(model.adapter, "model.adapter")
    elif model.checkpoint.startswith(RANDOM):
        return loaded
    else:
        directory = resolve_checkpoint(model.checkpoint, model.revision).directory
    if model.projection == "auto" and not has_projection(directory):
        return loaded
    projection, provenance = read_projection(directory), loaded.provenance
    fix = f"pass the model it was fitted on ({provenance.model} is another), or --model.projection none"
    own = {"weights_sha256": provenance.weights_sha256, "adapter_sha256": provenance.adapter_sha256}
    projection.inputs.check(dataclasses.replace(projection.inputs, **own), f"--model.projection {directory}", fix)
    loaded.config.resolve_layer(projection.inputs.layer)
    if projection.features != loaded.config.hidden_size:
        raise InputError(
            f"--model.projection {directory}: it takes vectors of {projection.features} numbers, those of "
            f"{provenance.model} have {loaded.config.hidden_size}; {fix}"
        )
    return dataclasses.replace(loaded, projection=projection, projection_setting=model.projection)


def recorded_model(facts: Mapping[str, Any]) -> config.ModelConfig:
    """Returns the config that loads the model described by a provenance, as a table or an adapter records it."""
    name = facts["model"]
    settings: dict[str, Any] = {"revision": facts.get("revision"), "adapter": facts.get("adapter")}
    settings["dtype"] = facts.get("dtype", "auto")
    settings["projection"] = facts.get("projection", "none")
    if found := _RECORDED_RANDOM.fullmatch(name):
        return config.ModelConfig(checkpoint=found[1], seed=int(found[2]), **settings)
    return config.ModelConfig(checkpoint=name, **settings)


def _load_base(
    model: config.ModelConfig, layout: Layout, lm_head: bool | None, on_bytes: Callable[[int], object]
) -> LoadedModel:
    dtype = compute_dtype(model.dtype)
    if model.checkpoint.startswith(RANDOM):
        return _random(model, dtype, layout, lm_head is not False)
    found = resolve_checkpoint(model.checkpoint, model.revision)
    transformer = read_config(found.directory)
    _check_attention(model, transformer, dtype, layout)
    vocabulary = read_vocabulary(found.directory, transformer)
    get_provenance = _in_background(lambda: _provenance_of(found, dtype)).result
    if lm_head is None:
        lm_head = (has_converted_head if is_converted(found.directory) else has_lm_head)(found.directory)
    if is_converted(found.directory):
        transformer_model = load_converted(found.directory, transformer, dtype, layout, lm_head=lm_head)
    else:
        transformer_model = load_model(found.directory, transformer, dtype, layout, lm_head=lm_head, on_bytes=on_bytes)
    return LoadedModel(
        model=transformer_model,
        config=transformer,
        vocabulary=vocabulary,
        layout=layout,
        get_provenance=get_provenance,
    )


def _provenance_of(found: ResolvedCheckpoint, dtype: DTypeLike) -> Provenance:
    if is_converted(found.directory):
        return dataclasses.replace(read_provenance(found.directory), dtype=jax.numpy.dtype(dtype).name)
    return Provenance(
        model=found.name,
        revision=found.revision,
        weights_sha256=sha256_of(weight_files(found.directory)),
        license=found.license,
        dtype=jax.numpy.dtype(dtype).name,
    )


def _in_background(task: Callable[[], Provenance]) -> Future[Provenance]:
    """Runs a task in its own thread."""
    pool = ThreadPoolExecutor(1, "provenance")
    future = pool.submit(task)
    pool.shutdown(wait=False)
    return future


def _check_attention(
    model: config.ModelConfig, transformer: TransformerConfig, dtype: DTypeLike, layout: Layout
) -> None:
    """Raises InputError if `--model.attention` is not supported on these devices, before any weight is read."""
    heads, head_dim = transformer.num_attention_heads, transformer.head_dim
    setting = attention_setting(layout, heads=heads, head_dim=head_dim, dtype=dtype)
    choose_attention(model.attention, setting, tokens=0)


def _random(model: config.ModelConfig, dtype: DTypeLike, layout: Layout, lm_head: bool) -> LoadedModel:
    preset = model.checkpoint.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise InputError(f"--model.checkpoint {model.checkpoint!r}: no such preset; use one of {', '.join(PRESETS)}")
    transformer = PRESETS[preset]
    _check_attention(model, transformer, dtype, layout)
    identity = f"random weights of {transformer}, seed {model.seed}, jax {jax.__version__}"
    return LoadedModel(
        model=random_model(transformer, dtype, layout, seed=model.seed, lm_head=lm_head),
        config=transformer,
        vocabulary=Vocabulary.published("v2" if transformer.gated else "v1"),
        layout=layout,
        get_provenance=lambda: Provenance(
            model=f"{model.checkpoint} (seeded random weights, seed {model.seed}: not trained)",
            revision=None,
            weights_sha256=hashlib.sha256(identity.encode()).hexdigest(),
            license=None,
            dtype=jax.numpy.dtype(dtype).name,
        ),
    )
