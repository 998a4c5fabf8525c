"""The steps that run, with shapes in place of arrays: what can be traced and compiled without a weight in memory."""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bioscan_jax import config
from bioscan_jax.barcodes.tokenizer import Vocabulary
from bioscan_jax.checkpoints.keys import abstract_model
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.embedding.encoder import make_embed_step
from bioscan_jax.model.attention import AttentionChoice
from bioscan_jax.model.classifier import abstract_classifier
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.heads import TaxonTree
from bioscan_jax.training.step import abstract_arguments, make_train_step, microbatch_shape, split_trainable

SPECIES_PER_TAXON = (24_000, 6_000, 2_000, 400, 80, 5, 1)
"""Of the regular tree that stands for labels not read yet, kingdom to species; each is a multiple of the next."""

_STEPS = 1000
"""Of a training; the program is the same for any number but for the constants of the learning rate."""


@dataclass(frozen=True, kw_only=True)
class EmbedProgram:
    """`bioscan_jax.embedding.encoder.make_embed_step`."""

    name: ClassVar[str] = "embed"
    by_host: ClassVar[bool] = True
    """Each host runs it on its own devices, for blocks of its own."""
    transformer: TransformerConfig
    dtype: str
    """Of parameters and products."""
    embed: config.EmbedConfig
    attention: AttentionChoice = "auto"

    def build(self, layout: Layout, shape: BatchShape) -> tuple[Any, tuple]:
        """The jitted step, and its arguments as ShapeDtypeStructs with shardings."""
        graph, state = nnx.split(abstract_model(self.transformer, self.dtype, lm_head=False))
        model = nnx.merge(graph, _placed(state, layout))
        model.attention = self.attention
        step, state = make_embed_step(model, layout, self.embed)
        ids = jax.ShapeDtypeStruct((shape.rows, shape.tokens), jnp.int32, sharding=layout.batched(2))
        return step, (state, ids)


@dataclass(frozen=True, kw_only=True)
class FinetuneProgram:
    """`bioscan_jax.training.step.make_train_step`."""

    name: ClassVar[str] = "finetune"
    by_host: ClassVar[bool] = False
    """All devices work on one batch."""
    transformer: TransformerConfig
    dtype: str
    """Of the frozen parameters, and of the products; a model that is trained whole is kept in float32."""
    lora: config.LoRAConfig
    loss: config.LossConfig
    train: config.TrainConfig
    species: int
    """Of the heads; their other ranks are in proportion."""
    attention: AttentionChoice = "auto"

    def build(self, layout: Layout, shape: BatchShape) -> tuple[Any, tuple]:
        """The jitted step, and its arguments as ShapeDtypeStructs with shardings.

        Args:
            layout: Where arrays live.
            shape: Rows of one optimizer step, worked in the parts that `train.batch_tokens` allows.
        """
        lora = self.lora if self.train.mode == "lora" else None
        tree = regular_tree(self.species) if self.train.objective == "taxonomy" else None
        whole = self.train.mode == "full"
        classifier = abstract_classifier(self.transformer, "float32" if whole else self.dtype, self.loss, lora, tree)
        classifier.trunk.attention = self.attention
        if whole and self.dtype != "float32":
            classifier.trunk.float32_products = "default"
        vocabulary = Vocabulary.published("v2" if self.transformer.gated else "v1")
        special = (vocabulary.cls_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.unk_id)
        model = split_trainable(classifier, layout, self.loss, self.train, tree=tree, special_ids=special)
        parts, rows = microbatch_shape(shape.rows, shape.tokens, layout.data_devices, self.train.batch_tokens)
        step = make_train_step(model, _STEPS)
        return step, abstract_arguments(model, _STEPS, parts, rows, shape.tokens)


Program: TypeAlias = EmbedProgram | FinetuneProgram
"""A step and what decides its compiled form, but for the shape of its batch."""


def regular_tree(species: int) -> TaxonTree:
    """A tree in which all taxa of a rank have as many species, for sizes alone."""
    paths = np.arange(species, dtype=np.int32)[:, None] // np.array(SPECIES_PER_TAXON, np.int32)
    return TaxonTree(tuple((paths[-1] + 1).tolist()), paths)


def argument_bytes(arguments: tuple) -> int:
    """Bytes on one device of a step's arguments."""
    leaves = [leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
        for leaf in leaves
        if leaf.sharding is not None
    )


def _placed(state: nnx.State, layout: Layout) -> nnx.State:
    shardings = stored_shardings(state, layout)
    rows = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        rows.append((path, variable.replace(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path]))))
    return nnx.from_flat_state(rows)
