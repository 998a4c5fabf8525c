# The public names: what `import bioscan_jax` offers, and where each is defined.

from .barcodes.cleaning import clean
from .barcodes.tokenizer import Vocabulary, encode
from .bundles.bundle import bundle
from .bundles.manifest import verify_bundle
from .bundles.merge import import_bundle
from .bundles.sync import sync
from .checkpoints.convert import convert
from .checkpoints.push import push_to_hub
from .config import (
    ArchiveConfig,
    CalibrateConfig,
    CheckpointConfig,
    DataConfig,
    EmbedConfig,
    ExamplesConfig,
    FleetConfig,
    IdentifyConfig,
    LoRAConfig,
    LossConfig,
    MeshConfig,
    MetricConfig,
    ModelConfig,
    QueryConfig,
    ReferenceConfig,
    SideTableConfig,
    SimulateConfig,
    SinkConfig,
    TrackingConfig,
    TrainConfig,
)
from .devices.sharding import Layout, make_layout
from .embedding.encoder import Encoder, StreamBlock
from .embedding.load import load
from .embedding.project import ProjectSummary, project
from .embedding.summary import RunSummary
from .errors import InputError, Interrupted
from .fleet.run import embed
from .matching.calibration import CalibrationSummary, calibrate
from .matching.identify import IdentifySummary, identify
from .matching.search import Table, open_table
from .model.config import PRESETS, TransformerConfig
from .model.transformer import NucleotideTransformer
from .planning.describe import describe
from .planning.fleet import FleetPlan, plan_fleet
from .planning.plan import Plan, plan
from .reports.run import ReportSummary, map_html, report
from .table.annotate import annotate
from .table.compact import compact
from .table.query import query
from .training.export import export
from .training.metric import MetricSummary, fit_metric
from .training.run import TrainingSummary, finetune

__all__ = [
    "ArchiveConfig",
    "CalibrateConfig",
    "CalibrationSummary",
    "CheckpointConfig",
    "DataConfig",
    "EmbedConfig",
    "Encoder",
    "ExamplesConfig",
    "FleetConfig",
    "FleetPlan",
    "IdentifyConfig",
    "IdentifySummary",
    "InputError",
    "Interrupted",
    "Layout",
    "LoRAConfig",
    "LossConfig",
    "MeshConfig",
    "MetricConfig",
    "MetricSummary",
    "ModelConfig",
    "NucleotideTransformer",
    "PRESETS",
    "Plan",
    "ProjectSummary",
    "QueryConfig",
    "ReferenceConfig",
    "ReportSummary",
    "RunSummary",
    "SideTableConfig",
    "SimulateConfig",
    "SinkConfig",
    "StreamBlock",
    "Table",
    "TrackingConfig",
    "TrainConfig",
    "TrainingSummary",
    "TransformerConfig",
    "Vocabulary",
    "annotate",
    "bundle",
    "compact",
    "calibrate",
    "clean",
    "convert",
    "describe",
    "embed",
    "encode",
    "export",
    "finetune",
    "fit_metric",
    "identify",
    "import_bundle",
    "load",
    "make_layout",
    "map_html",
    "open_table",
    "plan",
    "plan_fleet",
    "project",
    "push_to_hub",
    "query",
    "report",
    "sync",
    "verify_bundle",
]
