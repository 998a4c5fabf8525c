"""The golden models with trained-looking adapters, and label spaces with heads."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from flax import nnx
from support.golden import golden_config
from support.places import GOLDEN

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.checkpoints.head_files import Heads, taxon_tree
from bioscan_jax.checkpoints.hub import Provenance
from bioscan_jax.checkpoints.keys import load_model
from bioscan_jax.devices.sharding import make_layout, stored_shardings
from bioscan_jax.model.heads import make_head
from bioscan_jax.model.lora import TARGETS, LoRALinear, add_adapters
from bioscan_jax.model.metadata import MetadataEncoder

ONE = config.MeshConfig(data=1)
EVERY = config.LoRAConfig(rank=8, alpha=12.0, dropout=0.25, targets=("all_linear",))
BASE = Provenance(
    model="mine/v", revision="a" * 40, weights_sha256="b" * 64, license="cc-by-nc-sa-4.0", dtype="float32"
)
"""Provenance written beside the golden weights."""


@functools.cache
def _parts(family):
    return nnx.split(load_model(GOLDEN / family, golden_config(family), jnp.float32, make_layout(ONE), lm_head=True))


def golden_model(family, mesh=ONE):
    """Returns a new float32 copy of a golden model on the mesh, with its language-model head."""
    graph, state = _parts(family)
    shardings = stored_shardings(state, make_layout(mesh))
    flat = nnx.to_flat_state(state)
    placed = [(path, v.replace(jax.device_put(v.get_value(), shardings[path]))) for path, v in flat]
    return nnx.merge(graph, nnx.from_flat_state(placed))


def adapt(model, lora=EVERY):
    """Adds adapters to a model in place, with non-zero b as after training."""
    add_adapters(model, lora, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for parent, attribute in TARGETS.values():
        layer = getattr(getattr(model.layers, parent), attribute)
        if isinstance(layer, LoRALinear):
            layer.b[...] = jnp.asarray(0.1 * rng.standard_normal(layer.b[...].shape), jnp.float32)
    return model


def token_rows(transformer):
    """Returns four rows of ids, one of them padded."""
    ids = np.random.default_rng(0).integers(6, transformer.vocab_size, (4, 19))
    ids[:, 0] = 3
    ids[1, 11:] = 1
    return jnp.asarray(ids)


def relative(ours, theirs, ids):
    """Returns the largest difference at real tokens, relative to the largest value."""
    real = np.asarray(ids) != 1
    ours, theirs = np.asarray(ours)[real], np.asarray(theirs)[real]
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def arrays(model, *filters):
    """Returns parameters by path, as numpy arrays."""
    return {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(nnx.state(model, *filters))}


def label_space(species=3):
    above = ["Metazoa", "Chordata", "Mammalia", "Carnivora", "Felidae", "Felis"]
    epithets = ["".join(letters) for letters in itertools.islice(itertools.product("abcde", repeat=5), species)]
    lineages = [[*above, f"Felis {epithet}"] for epithet in epithets]
    lineages.append(["Metazoa", "Chordata", None, None, "Salmonidae", None, None])
    space = LabelSpace.build([pa.table(dict(zip(RANKS, map(list, zip(*lineages, strict=True)), strict=True)))])
    assert len(space.names[-1]) == species
    return space


def random_heads(kind, *, encoder=True):
    """Returns random heads for the vectors of a golden model."""
    space = label_space()
    tree, rngs = taxon_tree(space), nnx.Rngs(5)
    return Heads(
        kind=kind,
        pooling="mean",
        space=space,
        head=make_head(kind, 16, tree, rngs=rngs, scale=7.5),
        encoder=MetadataEncoder(kind, tree, rngs=rngs, scale=7.5) if encoder else None,
    )
