"""DNA barcodes to vectors with the Nucleotide Transformer, in JAX."""

from bioscan_jax.config import (
    Checkpoint,
    Data,
    Embed,
    Examples,
    LoRA,
    Loss,
    Mesh,
    Model,
    Simulate,
    Sink,
    Tracking,
    Train,
)
from bioscan_jax.embed import embed
from bioscan_jax.errors import InputError
from bioscan_jax.finetune import TrainingSummary, finetune
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
    "Checkpoint",
    "Data",
    "Embed",
    "Examples",
    "InputError",
    "Interrupted",
    "Layout",
    "LoRA",
    "LoadedModel",
    "Loss",
    "Mesh",
    "Model",
    "NucleotideTransformer",
    "RunSummary",
    "Simulate",
    "Sink",
    "Tracking",
    "Train",
    "TrainingSummary",
    "TransformerConfig",
    "Vocabulary",
    "clean",
    "embed",
    "encode",
    "finetune",
    "load",
    "make_layout",
]
