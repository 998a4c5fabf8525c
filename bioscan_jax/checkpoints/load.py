"""From what the user named to a model on the mesh, with its vocabulary and its provenance."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
from jax.typing import DTypeLike

from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.converted import Provenance, is_converted, read_provenance, restore
from bioscan_jax.checkpoints.keys import load_model, random_model
from bioscan_jax.checkpoints.origin import Origin, resolve
from bioscan_jax.checkpoints.peft import Adapter, read_adapter
from bioscan_jax.checkpoints.readers import sha256_of, weight_files
from bioscan_jax.devices.sharding import Layout, compute_dtype
from bioscan_jax.errors import InputError
from bioscan_jax.model.attention import choose, site
from bioscan_jax.model.config import PRESETS, TransformerConfig, read_config
from bioscan_jax.model.transformer import NucleotideTransformer

RANDOM = "random:"


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model on its mesh."""

    model: NucleotideTransformer
    config: TransformerConfig
    vocabulary: Vocabulary
    layout: Layout
    described: Callable[[], Provenance]
    """See `provenance`."""
    adapter: Adapter | None = None
    """What is around its layers, if anything."""

    @property
    def provenance(self) -> Provenance:
        """What the weights are; waits until their files have been hashed, which goes on behind the loading.

        Raises:
            OSError: A file could not be read again.
        """
        return self.described()


def read_vocabulary(directory: Path, transformer: TransformerConfig) -> Vocabulary:
    """Reads `vocab.txt`, and checks that the model has a row for each id in use.

    Raises:
        InputError: It is missing, malformed, or of another model.
    """
    vocabulary = Vocabulary.from_file(directory / "vocab.txt")
    check_vocabulary(vocabulary, transformer, str(directory / "vocab.txt"))
    return vocabulary


def check_vocabulary(vocabulary: Vocabulary, transformer: TransformerConfig, where: str) -> None:
    """Raises InputError where the ids in use do not fit the model.

    Both families number their letters last, at the end of the embedding table; ids past it (v1's <eos>, <bos>) are
    never used.
    """
    special = (vocabulary.cls_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.unk_id)
    highest = max(*special, vocabulary.letter_ids.max(), vocabulary.sixmer_ids.max())
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
            raise InputError(f"{where}: <{name}> is id {ours}, config.json says {theirs}")


def load_weights(
    wanted: config.ModelConfig,
    layout: Layout,
    *,
    lm_head: bool = False,
    on_bytes: Callable[[int], object] = lambda n: None,
) -> LoadedModel:
    """Loads what `--model.checkpoint` names.

    A directory or hub id holds Hugging Face files, or what `scripts/convert.py` wrote. `random:PRESET` makes seeded
    random weights of a known size. `--model.adapter` puts an adapter around its layers, not merged.

    Args:
        wanted: Checkpoint, revision, dtype, seed, adapter, attention.
        layout: Where the parameters go.
        lm_head: Also load the masked-language-model head.
        on_bytes: Called with the number of file bytes just read.

    Raises:
        InputError: Anything about the checkpoint or the adapter is wrong, or the attention cannot work here.
    """
    loaded = _load_base(wanted, layout, lm_head, on_bytes)
    loaded.model.attention = wanted.attention
    if wanted.adapter is None:
        return loaded
    directory = Path(os.path.expanduser(wanted.adapter))
    adapter = read_adapter(directory, loaded.model, layout, base=loaded.provenance)
    provenance = dataclasses.replace(loaded.provenance, adapter=wanted.adapter, adapter_sha256=adapter.sha256)
    return dataclasses.replace(loaded, described=lambda: provenance, adapter=adapter)


def _load_base(
    wanted: config.ModelConfig, layout: Layout, lm_head: bool, on_bytes: Callable[[int], object]
) -> LoadedModel:
    dtype = compute_dtype(wanted.dtype)
    if wanted.checkpoint.startswith(RANDOM):
        return _random(wanted, dtype, layout, lm_head)
    origin = resolve(wanted.checkpoint, wanted.revision)
    transformer = read_config(origin.directory)
    _check_attention(wanted, transformer, dtype, layout)
    vocabulary = read_vocabulary(origin.directory, transformer)
    described = _behind(lambda: _describe(origin, dtype)).result
    if is_converted(origin.directory):
        model = restore(origin.directory, transformer, dtype, layout, lm_head=lm_head)
    else:
        model = load_model(origin.directory, transformer, dtype, layout, lm_head=lm_head, on_bytes=on_bytes)
    return LoadedModel(model=model, config=transformer, vocabulary=vocabulary, layout=layout, described=described)


def _describe(origin: Origin, dtype: DTypeLike) -> Provenance:
    if is_converted(origin.directory):
        return dataclasses.replace(read_provenance(origin.directory), dtype=jax.numpy.dtype(dtype).name)
    return Provenance(
        model=origin.name,
        revision=origin.revision,
        weights_sha256=sha256_of(weight_files(origin.directory)),
        license=origin.license,
        dtype=jax.numpy.dtype(dtype).name,
    )


def _behind(task: Callable[[], Provenance]) -> Future[Provenance]:
    """Runs a task in a thread of its own."""
    pool = ThreadPoolExecutor(1, "behind")
    future = pool.submit(task)
    pool.shutdown(wait=False)
    return future


def _check_attention(
    wanted: config.ModelConfig, transformer: TransformerConfig, dtype: DTypeLike, layout: Layout
) -> None:
    """Raises InputError where the attention asked for cannot work here, before any weight is read."""
    heads, head_dim = transformer.num_attention_heads, transformer.head_dim
    choose(wanted.attention, site(layout, heads=heads, head_dim=head_dim, dtype=dtype), tokens=0)


def _random(wanted: config.ModelConfig, dtype: DTypeLike, layout: Layout, lm_head: bool) -> LoadedModel:
    preset = wanted.checkpoint.removeprefix(RANDOM)
    if preset not in PRESETS:
        raise InputError(f"--model.checkpoint {wanted.checkpoint!r}: no such preset; known are {', '.join(PRESETS)}")
    transformer = PRESETS[preset]
    _check_attention(wanted, transformer, dtype, layout)
    identity = f"random weights of {transformer}, seed {wanted.seed}, jax {jax.__version__}"
    return LoadedModel(
        model=random_model(transformer, dtype, layout, seed=wanted.seed, lm_head=lm_head),
        config=transformer,
        vocabulary=Vocabulary.published("v2" if transformer.gated else "v1"),
        layout=layout,
        described=lambda: Provenance(
            model=f"{wanted.checkpoint} (seeded random weights, seed {wanted.seed}: not trained)",
            revision=None,
            weights_sha256=hashlib.sha256(identity.encode()).hexdigest(),
            license=None,
            dtype=jax.numpy.dtype(dtype).name,
        ),
    )
