"""DNA barcodes to vectors with the Nucleotide Transformer, in JAX."""

from bioscan_jax.barcodes.cleaning import clean
from bioscan_jax.barcodes.tokenizer import Vocabulary, encode
from bioscan_jax.checkpoints.load import LoadedModel, load_weights
from bioscan_jax.config import (
    CalibrateConfig,
    CheckpointConfig,
    DataConfig,
    EmbedConfig,
    ExamplesConfig,
    IdentifyConfig,
    LoRAConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    QueryConfig,
    ReferenceConfig,
    SimulateConfig,
    SinkConfig,
    TrackingConfig,
    TrainConfig,
)
from bioscan_jax.devices.sharding import Layout, make_layout
from bioscan_jax.embedding.run import embed
from bioscan_jax.embedding.summary import RunSummary
from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.matching.calibration import CalibrationSummary, calibrate
from bioscan_jax.matching.identify import IdentifySummary, identify
from bioscan_jax.matching.search import Table, open_table
from bioscan_jax.model.config import PRESETS, TransformerConfig
from bioscan_jax.model.transformer import NucleotideTransformer
from bioscan_jax.training.run import TrainingSummary, finetune

__all__ = [
    "PRESETS",
    "CalibrateConfig",
    "CalibrationSummary",
    "CheckpointConfig",
    "DataConfig",
    "EmbedConfig",
    "ExamplesConfig",
    "IdentifyConfig",
    "IdentifySummary",
    "InputError",
    "Interrupted",
    "Layout",
    "LoRAConfig",
    "LoadedModel",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "NucleotideTransformer",
    "QueryConfig",
    "ReferenceConfig",
    "RunSummary",
    "SimulateConfig",
    "SinkConfig",
    "Table",
    "TrackingConfig",
    "TrainConfig",
    "TrainingSummary",
    "TransformerConfig",
    "Vocabulary",
    "calibrate",
    "clean",
    "embed",
    "encode",
    "finetune",
    "identify",
    "load_weights",
    "make_layout",
    "open_table",
]
