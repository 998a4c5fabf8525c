"""The model that is fine-tuned: a transformer with adapters, taxonomic heads on its vectors, and a metadata encoder."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from bioscan_jax import config
from bioscan_jax.devices.sharding import Layout, stored_shardings
from bioscan_jax.model.config import TransformerConfig
from bioscan_jax.model.heads import IndependentHead, MarginalHead, TaxonTree, make_head
from bioscan_jax.model.layers import RowKeys
from bioscan_jax.model.lora import add_adapters
from bioscan_jax.model.metadata import MetadataEncoder
from bioscan_jax.model.pooling import Pooling, pool
from bioscan_jax.model.transformer import NucleotideTransformer

Arrays = dict[str, Any]
"""Parameters by dotted path: arrays, or their shapes in an abstract model."""


class Classifier(nnx.Module):
    """A transformer (`trunk`) with optional taxonomic head and metadata encoder."""

    def __init__(
        self,
        trunk: NucleotideTransformer,
        *,
        pooling: Pooling,
        head: IndependentHead | MarginalHead | None = None,
        encoder: MetadataEncoder | None = None,
    ):
        self.trunk, self.head, self.encoder = trunk, head, encoder
        self.pooling: Pooling = pooling

    def vectors(
        self, ids: Int[Array, "b s"], layout: Layout, *, keys: RowKeys | None = None, remat: bool = False
    ) -> tuple[Float[Array, "b d"], Float[Array, "b s d"]]:
        """Returns the pooled last hidden states in float32, and the last hidden states.

        Args:
            ids: Token ids.
            layout: Placement of arrays on the devices.
            keys: Random keys of the adapters' dropout; None for no dropout.
            remat: Recompute layers in the backward pass.
        """
        hidden = self.trunk.hidden_state(ids, layout=layout, keys=keys, remat=remat)
        return pool(layout.on_batch(hidden), ids, self.pooling, self.trunk.config.pad_token_id), hidden


def is_new(path: tuple, variable: Any) -> bool:
    """Returns whether a parameter is not from the checkpoint: it belongs to an adapter, a head or the encoder."""
    return isinstance(variable, nnx.LoRAParam) or path[0] in ("head", "encoder")


def abstract_classifier(
    transformer: TransformerConfig,
    dtype: Any,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    tree: TaxonTree | None,
) -> Classifier:
    """Builds a classifier with shapes in place of arrays; allocates nothing."""
    return nnx.eval_shape(lambda: _build(transformer, dtype, loss, lora, tree, 0))


def make_classifier(
    trunk: NucleotideTransformer,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    tree: TaxonTree | None,
    layout: Layout,
    *,
    seed: int,
) -> Classifier:
    """Adds seeded adapters, heads and encoder to a trunk; new parameters are made on their devices.

    Args:
        trunk: On the mesh; its arrays are used without a copy.
        loss: Selects the heads.
        lora: Adapters; None for none.
        tree: The taxa; None for an objective without labels.
        layout: Placement of arrays on the devices.
        seed: Of the new parameters.

    Raises:
        InputError: A target of the adapters is unknown, or already has an adapter.
    """
    dtype = trunk.word_embeddings.dtype
    abstract = abstract_classifier(trunk.config, dtype, loss, lora, tree)
    graph, new, _ = nnx.split(abstract, is_new, ...)
    shardings = stored_shardings(new, layout)

    def init() -> Arrays:
        return named_arrays(nnx.state(_build(trunk.config, dtype, loss, lora, tree, seed), is_new))

    by_name = {dotted(path): sharding for path, sharding in shardings.items()}
    added = jax.jit(init, out_shardings=by_name)() if by_name else {}
    pretrained = {f"trunk.{dotted(path)}": value for path, value in nnx.to_flat_state(nnx.state(trunk))}
    rows = []
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        if is_new(path, variable):
            rows.append((path, variable.replace(added[dotted(path)])))
        else:
            rows.append((path, pretrained[dotted(tuple(part for part in path if part != "base"))]))
    classifier = nnx.merge(graph, nnx.from_flat_state(rows))
    classifier.trunk.float32_products, classifier.trunk.attention = trunk.float32_products, trunk.attention
    return classifier


def named_arrays(state: nnx.State) -> Arrays:
    """Returns the arrays of a state by dotted path."""
    return {dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def with_arrays(template: nnx.State, arrays: Arrays) -> nnx.State:
    """Returns a state like `template` that holds these arrays."""
    rows = [(path, variable.replace(arrays[dotted(path)])) for path, variable in nnx.to_flat_state(template)]
    return nnx.from_flat_state(rows)


def dotted(path: tuple) -> str:
    """Returns a parameter's path as text, such as `head.leaves.linear.kernel`."""
    return ".".join(map(str, path))


def _build(
    transformer: TransformerConfig,
    dtype: Any,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    tree: TaxonTree | None,
    seed: int,
) -> Classifier:
    trunk = NucleotideTransformer(transformer, rngs=nnx.Rngs(0), dtype=dtype, lm_head=tree is None)
    rngs = nnx.Rngs(seed)
    head = encoder = None
    if lora is not None:
        add_adapters(trunk, lora, rngs)
    if tree is not None:
        head = make_head(loss.head, transformer.hidden_size, tree, rngs=rngs, scale=loss.scale)
        encoder = MetadataEncoder(loss.head, tree, rngs=rngs, scale=loss.scale) if loss.with_metadata else None
    return Classifier(trunk, pooling=loss.pooling, head=head, encoder=encoder)
