"""A trunk with what is trained on it: adapters inside, taxonomic heads on its vectors, an encoder of metadata."""

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
"""Parameters by their dotted paths: arrays, or their shapes where nothing is computed."""


class Classifier(nnx.Module):
    """Token ids to vectors, and vectors to taxa."""

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
        """The pooled last hidden states in float32, and the states.

        Args:
            ids: Token ids.
            layout: Where arrays live.
            keys: Of the adapters' dropout; None for none.
            remat: Compute layers again in the backward pass.
        """
        hidden = self.trunk.hidden_state(ids, layout=layout, keys=keys, remat=remat)
        return pool(layout.on_batch(hidden), ids, self.pooling, self.trunk.config.pad_token_id), hidden


def is_new(path: tuple, variable: Any) -> bool:
    """Whether a parameter of a classifier is not the checkpoint's: an adapter's, a head's or the encoder's."""
    return isinstance(variable, nnx.LoRAParam) or path[0] in ("head", "encoder")


def abstract_classifier(
    transformer: TransformerConfig,
    dtype: Any,
    loss: config.LossConfig,
    lora: config.LoRAConfig | None,
    tree: TaxonTree | None,
) -> Classifier:
    """A classifier with shapes in place of arrays; allocates nothing."""
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
    """Puts seeded adapters, heads and encoder on a trunk, each made where it lives.

    Args:
        trunk: On the mesh; its arrays are kept as they are.
        loss: Which heads there are.
        lora: Adapters; None for none.
        tree: The taxa; None for an objective without labels.
        layout: Where arrays live.
        seed: Of the new parameters.

    Raises:
        InputError: A target of the adapters is unknown, or has one already.
    """
    dtype = trunk.word_embeddings.dtype
    abstract = abstract_classifier(trunk.config, dtype, loss, lora, tree)
    graph, new, _ = nnx.split(abstract, is_new, ...)
    shardings = stored_shardings(new, layout)

    def init() -> Arrays:
        made = nnx.state(_build(trunk.config, dtype, loss, lora, tree, seed), is_new)
        return named_arrays(made)

    placed = {_dotted(path): sharding for path, sharding in shardings.items()}
    made = jax.jit(init, out_shardings=placed)() if placed else {}
    kept = {f"trunk.{_dotted(path)}": value for path, value in nnx.to_flat_state(nnx.state(trunk))}
    rows = []
    for path, variable in nnx.to_flat_state(nnx.state(abstract)):
        if is_new(path, variable):
            rows.append((path, variable.replace(made[_dotted(path)])))
        else:
            rows.append((path, kept[_dotted(tuple(part for part in path if part != "base"))]))
    made_of = nnx.merge(graph, nnx.from_flat_state(rows))
    made_of.trunk.float32_products, made_of.trunk.attention = trunk.float32_products, trunk.attention
    return made_of


def named_arrays(state: nnx.State) -> Arrays:
    """The arrays of a state by their dotted paths."""
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def with_arrays(template: nnx.State, arrays: Arrays) -> nnx.State:
    """A state like `template` that holds these arrays."""
    rows = [(path, variable.replace(arrays[_dotted(path)])) for path, variable in nnx.to_flat_state(template)]
    return nnx.from_flat_state(rows)


def _dotted(path: tuple) -> str:
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
        head = make_head(loss.head, transformer.hidden_size, tree, rngs=rngs)
        encoder = MetadataEncoder(loss.head, tree, rngs=rngs) if loss.with_metadata else None
    return Classifier(trunk, pooling=loss.pooling, head=head, encoder=encoder)
