"""The steps of embed and finetune with shapes instead of arrays: traced and compiled without weights in memory."""

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
from bioscan_jax.embedding.dispatch import bytes_ahead
from bioscan_jax.embedding.step import make_embed_step
from bioscan_jax.model.attention import AttentionChoice
from bioscan_jax.model.classifier import abstract_classifier
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.heads import TaxonTree
from bioscan_jax.model.transformer import first_layers
from bioscan_jax.training.step import abstract_arguments, make_train_step, microbatch_shape, split_trainable

SPECIES_PER_TAXON = (24_000, 6_000, 2_000, 400, 80, 5, 1)
"""Species per taxon of the regular tree that replaces unread labels, kingdom to species; each divides the one before."""

_STEPS = 1000
"""Optimizer steps of a run; they only change constants of the learning rate in the program."""


@dataclass(frozen=True, kw_only=True)
class EmbedProgram:
    """The embedding step, `bioscan_jax.embedding.step.make_embed_step`."""

    name: ClassVar[str] = "embed"
    by_host: ClassVar[bool] = True
    """Each host runs it on its own devices, for its own blocks."""
    transformer: TransformerConfig
    dtype: str
    """Dtype of parameters and matrix products."""
    embed: config.EmbedConfig
    attention: AttentionChoice = "auto"

    def bytes_ahead(self, shape: BatchShape, devices: int) -> int:
        """Returns the most bytes that batches started ahead, and vectors not yet copied, occupy on one of the devices."""
        return -(-bytes_ahead(shape, self.transformer.hidden_size) // devices)

    def build(self, layout: Layout, shape: BatchShape) -> tuple[Any, tuple]:
        """Builds the jitted step and its arguments as ShapeDtypeStructs with shardings."""
        graph, state = nnx.split(abstract_model(self.transformer, self.dtype, lm_head=False))
        model = nnx.merge(graph, _placed(state, layout))
        model = first_layers(model, self.transformer.resolve_layer(self.embed.layer))
        model.attention = self.attention
        step, state = make_embed_step(model, layout, self.embed)
        ids = jax.ShapeDtypeStruct((shape.rows, shape.tokens), jnp.int32, sharding=layout.batched(2))
        return step, (state, ids)


@dataclass(frozen=True, kw_only=True)
class FinetuneProgram:
    """The training step, `bioscan_jax.training.step.make_train_step`."""

    name: ClassVar[str] = "finetune"
    by_host: ClassVar[bool] = False
    """All devices share one batch."""
    transformer: TransformerConfig
    dtype: str
    """Dtype of frozen parameters and matrix products; a fully trained model is kept in float32."""
    lora: config.LoRAConfig
    loss: config.LossConfig
    train: config.TrainConfig
    species: int
    """Species that the heads distinguish; the higher ranks are in proportion."""
    attention: AttentionChoice = "auto"

    def bytes_ahead(self, shape: BatchShape, devices: int) -> int:
        """Returns 0: one step runs at a time."""
        return 0

    def build(self, layout: Layout, shape: BatchShape) -> tuple[Any, tuple]:
        """Builds the jitted step and its arguments as ShapeDtypeStructs with shardings.

        Args:
            layout: Where arrays are placed.
            shape: Rows of one optimizer step, split into the microbatches that `train.batch_tokens` allows.
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
"""A step and everything that determines its compiled form, except the shape of its batch."""


def regular_tree(species: int) -> TaxonTree:
    """Makes a tree in which all taxa of a rank have equally many species; only its sizes matter."""
    paths = np.arange(species, dtype=np.int32)[:, None] // np.array(SPECIES_PER_TAXON, np.int32)
    return TaxonTree(tuple((paths[-1] + 1).tolist()), paths)


def argument_bytes(arguments: tuple) -> int:
    """Returns the bytes of a step's arguments on one device."""
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
