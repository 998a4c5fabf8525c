"""DNA barcodes to vectors with the Nucleotide Transformer, in JAX."""

from bioscan_jax.config import Data, Embed, Mesh, Model, Simulate, Sink
from bioscan_jax.embed import embed
from bioscan_jax.errors import InputError
from bioscan_jax.interrupt import Interrupted
from bioscan_jax.model.config import PRESETS, TransformerConfig
from bioscan_jax.model.load import LoadedModel, load
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.sequences import clean
from bioscan_jax.sharding import Layout, make_layout
from bioscan_jax.summary import RunSummary
from bioscan_jax.tokenizer import Vocabulary, encode

__all__ = [
    "PRESETS",
    "Data",
    "Embed",
    "InputError",
    "Interrupted",
    "Layout",
    "LoadedModel",
    "Mesh",
    "Model",
    "NucleotideTransformer",
    "RunSummary",
    "Simulate",
    "Sink",
    "TransformerConfig",
    "Vocabulary",
    "clean",
    "embed",
    "encode",
    "load",
    "make_layout",
]
