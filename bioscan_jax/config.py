"""The settings of a run: frozen dataclasses, one per subject, checked when they are created."""

import dataclasses
import math
import numbers
import os
import types
from dataclasses import field
from typing import Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from bioscan_jax.errors import InputError, shown

DEFAULT_METADATA_WEIGHT = 0.3
"""Share of the total loss that goes to the metadata prediction."""

COSINE_SCALE = 16.0
"""Cosines are multiplied by this before the softmax."""


IdSource = Literal["column", "header", "file_row"]
"""Where unique ids come from."""


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"--{flag} {value} is too small; pass at least {least}")


_Settings = TypeVar("_Settings")
_KINDS: dict[Any, tuple[type, str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    type(None): (type(None), "None"),
}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def _settings(cls: type[_Settings]) -> type[_Settings]:
    """Makes a frozen dataclass that refuses values of another type, or outside a Literal; paths become text."""
    check: Any = getattr(cls, "__post_init__", lambda self: None)

    def __post_init__(self: Any) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, one.name, value := os.fspath(value))
            check_value(f"{cls.__name__}({one.name}=...)", value, one.type)
        check(self)

    cls.__post_init__ = __post_init__  # pyright: ignore[reportAttributeAccessIssue]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def check_value(name: str, value: object, kind: Any) -> None:
    """Checks that a value is of a type made of Literal, str, int, float, bool and None; other types pass.

    Raises:
        InputError: It is not; the message tells what is allowed.

    Example:
        >>> check_value("on_error", "rais", Literal["raise", "nan"])
        Traceback (most recent call last):
        bioscan_jax.errors.InputError: on_error got 'rais'; pass 'raise' or 'nan'
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    allowed: list[str] = []
    for one in kinds:
        if get_origin(one) is Literal:
            if value in get_args(one):
                return
            allowed += map(repr, get_args(one))
        elif one in _KINDS:
            if isinstance(value, _KINDS[one][0]):
                return
            allowed.append(_KINDS[one][1])
        else:
            return
    raise InputError(
        f"{name} got {shown(value)}; pass {', '.join(allowed[:-1])}{' or ' * (len(allowed) > 1)}{allowed[-1]}"
    )


@_settings
class ModelConfig:
    """The model's weights and the precision to run them in.

    Example:
        >>> ModelConfig(checkpoint="random:tiny-v2").dtype
        'auto'
    """

    checkpoint: str
    """Directory or URL, Hugging Face hub id, default for the model in the package, or random:PRESET for random weights."""
    revision: str | None = None
    """Commit of the Hugging Face repository; required with a hub id, so that the run can be repeated."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of weights and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    seed: int = 0
    """Seed of random:PRESET weights; ignored for a real checkpoint."""
    adapter: str | None = None
    """Directory, URL or OWNER/NAME@COMMIT on the Hugging Face hub of a LoRA adapter (PEFT format) trained on this
    checkpoint; none if absent."""
    projection: str = "auto"
    """Directory, URL or OWNER/NAME@COMMIT of a projection of the pooled vectors (from fit-metric). auto is the one beside
    the weights (or beside the adapter), if there is one; none stores raw vectors."""
    attention: Literal["auto", "dense", "splash", "cudnn"] = "auto"
    """How attention is computed. auto is dense below 512 tokens, else splash (TPU v4 or newer) or cuDNN flash (NVIDIA).

    auto stays with dense where the faster kernel does not work. The choice changes vectors by rounding only, so a table
    may be continued with another one.
    """


@_settings
class DataConfig:
    """The barcodes to embed, and how they become tokens.

    Example:
        >>> DataConfig(path="barcodes.parquet", block_rows=1024).sequence_column
        'dna_sequence'
    """

    path: str
    """Parquet or FASTA/FASTQ (plain, gz, bz2, xz or zst): a file, a directory, a glob or an fsspec URL such as gs://..."""
    sequence_column: str = "dna_sequence"
    """Parquet column that holds the DNA; BOLD's, BIOSCAN-5M's and others' names of it are known."""
    id_column: str = "sequence_id"
    """Parquet column that holds unique ids; without a `sequence_id` or one like BOLD's `processid`, ids become FILE:ROW."""
    id: IdSource = "column"
    """column: id_column, or the first word of a FASTA header. header: the whole FASTA header. file_row: FILE:ROW."""
    max_tokens: int | None = None
    """Most tokens per sequence, with CLS (about one per 6 bases); the model's limit if absent."""
    overlong: Literal["truncate", "window", "error"] = "truncate"
    """Sequences over max_tokens: truncate cuts them, window averages several pieces, error rejects them."""
    block_rows: int = 8192
    """Rows read and batched together; long blocks are saved in parts, so that a killed run loses about 20 s of work."""
    scratch: str | None = None
    """Directory for the Parquet form of FASTA, kept and used again by all runs on the same files; if absent, it is beside
    the table (a temporary directory if that is in a bucket) until the table is finished."""

    def __post_init__(self) -> None:
        _at_least("data.max_tokens", self.max_tokens, 2)
        _at_least("data.block_rows", self.block_rows, 1)


@_settings
class MeshConfig:
    """The devices to use and how arrays are split over them.

    Example:
        >>> MeshConfig(model=2).data  # all devices, in pairs that share each layer
        -1
    """

    data: int = -1
    """Devices that split each batch between them; -1 uses all, divided by `model`."""
    model: int = 1
    """Devices that split each layer between them (tensor parallelism); raise it if one cannot hold the model."""
    params: Literal["replicated", "fsdp"] = "replicated"
    """replicated: each data device holds all weights. fsdp: they are split, and gathered layer by layer when needed."""
    distributed: bool = False
    """Run as one of several processes, one per host (calls jax.distributed.initialize)."""
    coordinator: str | None = None
    """HOST:PORT of process 0; found automatically on Cloud TPU, SLURM and similar clusters."""
    processes: int | None = None
    """Number of processes; found automatically as above."""
    process_id: int | None = None
    """Number of this process, from 0; found automatically as above."""
    compilation_cache: str | None = "~/.cache/bioscan_jax/xla"
    """Directory or URL that keeps compiled programs; null disables it, JAX_COMPILATION_CACHE_DIR overrides it.

    In a directory they take at most 2 GiB, or JAX_COMPILATION_CACHE_MAX_SIZE bytes (-1: no bound).
    """

    def __post_init__(self) -> None:
        _at_least("mesh.model", self.model, 1)
        if self.data != -1:
            _at_least("mesh.data", self.data, 1)


@_settings
class FleetConfig:
    """Workers on the machines of a Ray cluster, which embed the blocks of one table.

    Example:
        >>> FleetConfig(address="auto", resources={"TPU": 4.0}).workers is None
        True
    """

    address: str
    """local starts Ray on this machine. auto joins the cluster that this machine is in, HOST:6379 names that cluster, and
    ray://HOST:10001 reaches one from outside."""
    workers: int | None = None
    """Most workers at a time; as many as the cluster has room for if absent."""
    resources: dict[str, int | float] = field(default_factory=lambda: {"CPU": 1.0})
    """What one worker takes of its machine, such as '{"TPU": 4}' or '{"GPU": 1, "CPU": 8}'."""
    mixed: bool = False
    """Allow workers on different kinds of devices, whose vectors differ by rounding."""
    blocks_ahead: int | None = None
    """How many blocks may be handed out beyond the committed ones; 16 for each worker if absent."""
    start_seconds: float = 45.0
    """How long to wait for the first machine; raise it where an autoscaler has to start one."""

    def __post_init__(self) -> None:
        _at_least("fleet.workers", self.workers, 1)
        _at_least("fleet.blocks_ahead", self.blocks_ahead, 1)
        if not self.resources or not all(0 < amount < math.inf for amount in self.resources.values()):
            raise InputError(f"--fleet.resources {self.resources} must have amounts above 0, such as '{{\"CPU\": 8}}'")
        if not 0 < self.start_seconds < math.inf:
            raise InputError(f"--fleet.start_seconds {self.start_seconds} must be above 0")


@_settings
class EmbedConfig:
    """How a sequence's tokens become one vector, and how many are processed at once.

    Example:
        >>> EmbedConfig(phases=6, strand="both").pooling
        'mean'
    """

    pooling: Literal["mean", "mean_no_cls", "cls", "max"] = "mean"
    """How token vectors become one: their mean (with or without the CLS token), CLS alone, or the maximum."""
    layer: int = -1
    """Layer whose output is pooled: 0 is the token embeddings, k follows layer k, -1 is after the final LayerNorm."""
    strand: Literal["forward", "both"] = "forward"
    """both averages the vectors of the sequence and of its reverse complement."""
    phases: int = 1
    """Average over this many start positions (1 to 6) of the 6-mer reading; 6 makes vectors robust to a shifted start."""
    batch_tokens: int = 16384
    """Tokens per data device in one batch, with padding; lower it if memory runs out."""
    max_shapes: int = 8
    """Most batch shapes (rows x tokens) to choose; fewer start faster, more waste less on padding.

    They are chosen from rows sampled evenly. A block that they fit badly adds shapes of a fixed set: one for each of 28
    widths up to 2,048 tokens, and rarely any.
    """
    deduplicate: bool = True
    """Embed equal sequences once and copy the vector to each row."""
    cache_rows: int = 65536
    """How many earlier rows to search for a repeat; costs host memory of up to one vector per row."""

    def __post_init__(self) -> None:
        if not 1 <= self.phases <= 6:
            raise InputError(f"--embed.phases {self.phases} is outside 1 to 6: a 6-mer frame has six starts")
        _at_least("embed.batch_tokens", self.batch_tokens, 2)
        _at_least("embed.max_shapes", self.max_shapes, 1)
        _at_least("embed.cache_rows", self.cache_rows, 0)

    @property
    def views(self) -> int:
        """Readings of a sequence that its vector averages: start phases times strands."""
        return self.phases * (2 if self.strand == "both" else 1)


@_settings
class SinkConfig:
    """The Lance table that the vectors are written to.

    Example:
        >>> SinkConfig(uri="runs/coi").table
        'sequences'
    """

    uri: str
    """Directory (or object-store URL) of the LanceDB database."""
    table: str = "sequences"
    """Name of the vector table; rejected rows go to TABLE_rejects."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Number format of the stored vectors; float16 halves the table."""
    index: Literal["none", "ivf_sq", "ivf_pq"] = "none"
    """Vector index built once the table is complete, with one on sequence_id; ivf_pq is smaller, ivf_sq more exact."""
    max_bytes_per_file: int = 3 << 30
    """Start a new data file at about this many bytes; the default fits a FAT32 USB stick."""

    def __post_init__(self) -> None:
        _at_least("sink.max_bytes_per_file", self.max_bytes_per_file, 1 << 20)
        if not self.table.replace("_", "").replace("-", "").isalnum():
            raise InputError(f"--sink.table {self.table!r} must be letters, digits, '-' and '_'")


@_settings
class SideTableConfig:
    """A table that comes beside the barcodes, such as metadata, and how its text is written.

    Example:
        >>> SideTableConfig(path="cruise.csv", delimiter=";").quoting
        'auto'
    """

    path: str
    """Parquet, CSV or TSV file (text also as .gz, .bz2, .xz, .zst), or a directory of them; name=value folders are columns."""
    delimiter: str = "auto"
    """Character between cells, or tab, comma, semicolon, bar; auto takes the one that fits the header."""
    quoting: Literal["auto", "double", "none"] = "auto"
    """double: cells may stand in quotes, as in RFC 4180; none: a quote is text; auto is none for tab-separated files."""
    encoding: str = "auto"
    """Such as cp1252 or utf-16; auto is that of a byte order mark, else UTF-8."""
    id_column: str = "sequence_id"
    """Column with the ids of the barcodes, such as processid or gbifID."""


@_settings
class SimulateConfig:
    """Simulated barcodes: sequences evolved along a random seven-rank tree.

    Example:
        >>> SimulateConfig(species=5, per_species=2).length
        658
    """

    species: int = 200
    """Species in the tree."""
    per_species: int = 10
    """Barcodes per species."""
    length: int = 658
    """Bases of a full barcode."""
    seed: int = 0
    """Seed of the tree and the mutations."""
    path: str | None = None
    """Parquet file to write. Barcodes are simulated only if data.path is this file; data.path if absent."""

    def __post_init__(self) -> None:
        _at_least("simulate.species", self.species, 1)
        _at_least("simulate.per_species", self.per_species, 1)
        _at_least("simulate.length", self.length, 50)


@_settings
class LoRAConfig:
    """Low-rank adapters that are trained while the model stays frozen.

    Example:
        >>> LoRAConfig(rank=8, targets=("all_linear",)).alpha
        32.0
    """

    rank: int = 16
    """Rank of each adapter's matrices; higher can learn more and needs more memory."""
    alpha: float = 32.0
    """Adapter outputs are multiplied by alpha / rank."""
    dropout: float = 0.1
    """Share of each adapter's inputs set to zero while training, against overfitting."""
    targets: tuple[str, ...] = ("query", "value")
    """Layers with an adapter: query, key, value, attention_output, feed_forward_in, feed_forward_out, or all_linear."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"--lora.dropout {self.dropout} is outside 0 to 1")
        if not 0.0 < self.alpha < float("inf"):
            raise InputError(f"--lora.alpha {self.alpha} must be more than 0")


@_settings
class ExamplesConfig:
    """The labelled barcodes to train on, and which of them are held out.

    Example:
        >>> ExamplesConfig(path="coi.parquet", split="held_out_species").validation
        0.1
    """

    path: str
    """Parquet with names, in a column of lineages or in rank columns: a file, a directory, a glob or an fsspec URL such as gs://..."""
    sequence_column: str = "dna_sequence"
    """Parquet column that holds the DNA; BOLD's, BIOSCAN-5M's and others' names of it are known."""
    id_column: str = "sequence_id"
    """Parquet column that holds unique ids; without a `sequence_id` or one like BOLD's `processid`, ids become FILE:ROW."""
    id: IdSource = "column"
    """column: id_column, or the first word of a FASTA header. header: the whole FASTA header. file_row: FILE:ROW."""
    max_tokens: int | None = None
    """Most tokens per sequence, with CLS; longer ones are cut. The model's limit if absent."""
    split: Literal["random", "held_out_species", "held_out_genera"] = "random"
    """What validation and test rows never share with training rows: the sequence, the species or the genus."""
    split_column: str | None = None
    """Column that assigns each row to train, validation, test or unused; replaces `split` and the shares."""
    validation: float = 0.1
    """Share of the distinct sequences (or held-out taxa) used for validation."""
    test: float = 0.0
    """Share kept for a final test; no training run reads it."""
    split_seed: int = 0
    """Seed of the split; another one holds out other rows."""
    scratch: str | None = None
    """Directory for working files, and for the Parquet form of FASTA, which is kept and used again by all runs on the
    same files; if absent, they are in the run's directory (the cache if that is in a bucket) until the run is finished."""

    def __post_init__(self) -> None:
        _at_least("data.max_tokens", self.max_tokens, 2)


@_settings
class LossConfig:
    """The loss that training minimises.

    Example:
        >>> LossConfig(metadata=True).metadata_share
        0.3
    """

    head: Literal["marginal", "independent", "cosine"] = "marginal"
    """marginal: one softmax over the finest taxa, summed up the tree. independent: one softmax per rank. cosine: one
    softmax per rank, of cosines between the vector and a trained vector of each taxon."""
    scale: float = COSINE_SCALE
    """Cosines are multiplied by this before the softmax, for head cosine and for the contrastive loss."""
    contrastive: float = 0.0
    """Weight of a contrastive loss beside the heads': each barcode's softmax over its cosines with the others of the
    batch should fall on those of its genus (of other species), family (other genera) and so on; 0 for none."""
    contrastive_weights: tuple[float, float, float, float] = (0.1, 0.3, 1.0, 0.3)
    """Weights of order, family, genus and species in the contrastive loss."""
    pooling: Literal["mean", "mean_no_cls", "cls", "max"] = "mean"
    """How token vectors become the one vector that the heads classify."""
    rank_weights: tuple[float, float, float, float, float, float, float] = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
    """Weight of each rank in the loss, from kingdom to species."""
    metadata: bool | None = None
    """Also predict the ranks from depth, latitude and longitude; if absent, only where metadata_weight is given."""
    metadata_weight: float | None = None
    """Share of the total loss that goes to the metadata prediction; 0.3 if absent."""
    mask_rate: float = 0.15
    """Share of the tokens to predict with --train.objective mlm."""

    def __post_init__(self) -> None:
        if not all(0 <= weight < float("inf") for weight in self.rank_weights) or not any(self.rank_weights):
            raise InputError(f"--loss.rank_weights {list(self.rank_weights)} must be at least 0, and not all 0")
        weights = self.contrastive_weights
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            raise InputError(f"--loss.contrastive_weights {list(weights)} must be at least 0, and not all 0")
        if not 0.0 <= self.contrastive < float("inf"):
            raise InputError(f"--loss.contrastive {self.contrastive} must be at least 0")
        if not 0.0 < self.scale < float("inf"):
            raise InputError(f"--loss.scale {self.scale} must be more than 0")
        for flag, share in (("metadata_weight", self.metadata_weight), ("mask_rate", self.mask_rate)):
            if share is not None and not 0.0 < share < 1.0:
                raise InputError(f"--loss.{flag} {share} is not between 0 and 1")
        if self.metadata is False and self.metadata_weight is not None:
            raise InputError(f"--loss.metadata_weight {self.metadata_weight} needs --loss.metadata true; leave one out")

    @property
    def with_metadata(self) -> bool:
        """Whether the loss includes the metadata prediction."""
        return bool(self.metadata) or self.metadata_weight is not None

    @property
    def metadata_share(self) -> float:
        """The metadata prediction's share of the total loss, where it is included."""
        return DEFAULT_METADATA_WEIGHT if self.metadata_weight is None else self.metadata_weight


@_settings
class TrainConfig:
    """How the model is trained.

    Example:
        >>> TrainConfig(epochs=3, batch_size=64).mode
        'lora'
    """

    output_dir: str = "runs/finetune"
    """Directory or URL for checkpoints, labels, metrics and curves; the same command continues the run there."""
    objective: Literal["taxonomy", "mlm"] = "taxonomy"
    """taxonomy learns the seven ranks; mlm predicts masked 6-mers and reads no labels."""
    mode: Literal["lora", "full"] = "lora"
    """lora trains adapters on a frozen model; full trains all weights, in float32, and needs far more memory."""
    epochs: int = 10
    """Passes over the training rows."""
    batch_size: int = 32
    """Barcodes per optimizer step, over all devices."""
    learning_rate: float = 2e-4
    """Peak learning rate of AdamW, reached after the warm-up."""
    warmup_steps: int = 500
    """Steps in which the learning rate rises from 0; then it falls along a cosine to 0 at the last step."""
    weight_decay: float = 0.01
    """Weight decay of AdamW; biases and norms are exempt."""
    clip_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    batch_tokens: int = 16384
    """Tokens per data device processed at once, with padding; a larger batch is accumulated in equal parts."""
    max_shapes: int = 4
    """Most token widths to compile; fewer start faster, more waste less on padding."""
    remat: Literal["none", "layer"] = "none"
    """layer stores only each layer's input and recomputes the rest: less memory, about a third more work."""
    reverse_complement: float = 0.5
    """Share of the barcodes reverse-complemented, drawn anew each epoch."""
    subsequence: float = 0.5
    """Share of the barcodes cut to a random stretch, drawn anew each epoch; it may start and end at any base."""
    shortest: int = 150
    """Fewest bases of such a stretch."""
    start_phase: float = 0.0
    """Share of the barcodes that lose their first 0 to 5 bases, so that 6-mers start elsewhere; drawn anew each epoch."""
    substitutions: float = 0.0
    """Share of the bases replaced by another base, drawn anew each epoch."""
    balance: Literal["none", "kingdom", "phylum", "class", "order", "family", "genus", "species"] = "none"
    """Draw rows with replacement so that all taxa of this rank are seen equally often."""
    sampler: Literal["rows", "genera"] = "rows"
    """rows fills a batch with rows in random order, of similar length. genera fills it with several species of a genus
    and several rows of a species, as --loss.contrastive needs; a species with fewer rows has some of them twice."""
    species_per_genus: int = 4
    """Species of a genus that come together, as far as it has them; for sampler genera."""
    rows_per_species: int = 2
    """Rows of a species that come together; for sampler genera."""
    patience: int | None = None
    """Stop after this many epochs without a lower validation loss; if absent, train all epochs.

    The validation loss, by which the best parameters are chosen, too, is that of the heads: a contrastive loss depends
    on which rows share a batch, and is not part of it.
    """
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    seed: int = 0
    """Seed of new parameters, row order, augmentation, dropout and masking."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "max_shapes", "log_every", "patience", "shortest")
        for name in (*positive, "species_per_genus", "rows_per_species"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if self.sampler == "genera":
            together = self.species_per_genus * self.rows_per_species
            if self.batch_size % together:
                raise InputError(
                    f"--train.batch_size {self.batch_size} is no multiple of {self.species_per_genus} species x "
                    f"{self.rows_per_species} rows of a genus; pass a multiple of {together}"
                )
            if self.balance != "none":
                raise InputError(f"--train.balance {self.balance} is for --train.sampler rows; leave one out")
        for name in ("warmup_steps", "seed"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if not 0.0 <= self.weight_decay < float("inf"):
            raise InputError(f"--train.weight_decay {self.weight_decay} must be at least 0")
        _at_least("train.batch_tokens", self.batch_tokens, 2)
        for name in ("learning_rate", "clip_norm"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"--train.{name} {getattr(self, name)} must be more than 0")
        for name in ("reverse_complement", "subsequence", "start_phase", "substitutions"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"--train.{name} {getattr(self, name)} is outside 0 to 1")


@_settings
class CheckpointConfig:
    """How often training saves its state; it also saves on SIGTERM and at the end.

    Example:
        >>> CheckpointConfig(interval_minutes=10.0).keep
        2
    """

    interval_minutes: float = 30.0
    """Minutes between two checkpoints."""
    keep: int = 2
    """How many of the newest checkpoints to keep; the best one is kept as well."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.keep", self.keep, 1)
        if not self.interval_minutes >= 0:
            raise InputError(f"--checkpoint.interval_minutes {self.interval_minutes} must be at least 0")


@_settings
class TrackingConfig:
    """Weights & Biases logging, of training and of embedding; bioscan embed has it disabled unless a mode is given.

    Example:
        >>> TrackingConfig(mode="offline").project
        'bioscan_jax'
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online if WANDB_API_KEY or a login is found, else offline; disabled sends nothing."""
    project: str = "bioscan_jax"
    """Weights & Biases project."""
    name: str | None = None
    """Name of the run; Weights & Biases invents one if absent."""


SearchKind = Literal["auto", "exact", "index"]
QueryStrand = Literal["both", "plus"]
AnswerFormat = Literal["parquet", "tsv", "sintax", "dwca"]


@_settings
class ReferenceConfig:
    """The table of vectors that barcodes are compared with.

    Example:
        >>> ReferenceConfig(uri="runs/coi").table
        'sequences'
    """

    uri: str
    """Directory (or object-store URL) of the LanceDB database."""
    table: str = "sequences"
    """Name of the vector table."""


@_settings
class QueryConfig:
    """The barcodes to identify.

    Example:
        >>> QueryConfig(path="unknown.fasta").sequence_column
        'dna_sequence'
    """

    path: str
    """Parquet or FASTA/FASTQ (plain, gz, bz2, xz or zst): a file, a directory, a glob or an fsspec URL such as gs://..."""
    sequence_column: str = "dna_sequence"
    """Parquet column that holds the DNA; BOLD's, BIOSCAN-5M's and others' names of it are known."""
    id_column: str = "sequence_id"
    """Parquet column that holds unique ids; without a `sequence_id` or one like BOLD's `processid`, ids become FILE:ROW."""
    id: IdSource = "column"
    """column: id_column, or the first word of a FASTA header. header: the whole FASTA header. file_row: FILE:ROW."""


@_settings
class IdentifyConfig:
    """How barcodes are named; a calibration is valid only for the settings it was made with.

    Example:
        >>> IdentifyConfig(k=20, rerank="alignment").aligned
        32
    """

    k: int = 50
    """Nearest neighbours per barcode; references with the same sequence count as one, whose vote their names share."""
    rerank: Literal["none", "alignment"] = "none"
    """alignment scores each of the k neighbours by cosine + identity_weight * identity, the share of its aligned bases
    that agree; none by the cosine alone."""
    identity_weight: float | None = None
    """Weight of the identity in that score; 0 is the cosine alone. Fitted by calibrate if absent; 6 without a
    calibration."""
    saturation: float | None = None
    """A barcode whose neighbours all differ from it by more than this share of its bases is compared without transitions
    (A-G, C-T), many of which have been overwritten by then in COI; 1 always counts them, as slower markers need. Fitted by
    calibrate if absent; 0.05 without a calibration. With rerank alignment only."""
    temperature: float | None = None
    """A neighbour whose score is lower by this has 1/e of the best one's weight in the vote. Fitted by calibrate if
    absent; 0.02 without a calibration. With rerank alignment only."""
    aligned: int = 32
    """Aligned neighbours that vote: the best of the k by their score."""
    min_overlap: int | None = None
    """Fewest bases that must be compared with a reference for it to name a barcode. If absent, half of the shorter
    sequence, at least 32 and at most 100."""
    min_identity: float = 0.65
    """Lowest identity at which a reference names a barcode: sequences without a common origin reach about 0.55 over 650
    bases and 0.65 over 100."""
    filter: str | None = None
    """SQL condition on the reference's columns, such as "marker_gene = 'COI'"; only matching rows are used."""
    search: SearchKind = "auto"
    """exact compares all vectors, index is faster; auto uses the table's index, if any, from 50,000 rows on."""
    strand: QueryStrand = "both"
    """plus compares queries as they are written; both also compares the reverse complement of those that resemble no
    reference as they are written, and takes the strand that does so more."""
    nprobes: int | None = None
    """Partitions of the index to search, at least 50 if absent; more find more true neighbours and take longer."""
    refine_factor: int | None = None
    """The index returns refine_factor * k candidates, which are then compared by exact vectors."""
    heads: str | None = None
    """Directory of an export, or OWNER/NAME@COMMIT, whose taxonomic heads were trained on these vectors; they vote too."""
    processes: int = 2
    """Worker processes for alignment."""
    batch_tokens: int = EmbedConfig.batch_tokens
    """Tokens per data device in one batch, with padding; lower it if memory runs out."""

    def __post_init__(self) -> None:
        _at_least("k", self.k, 1)
        _at_least("aligned", self.aligned, 1)
        of_alignment = (self.identity_weight, self.saturation, self.temperature)
        if self.rerank == "none" and of_alignment != (None, None, None):
            raise InputError(
                "--identity_weight, --saturation and --temperature belong to --rerank alignment; pass it with them"
            )
        if not 0 <= (self.identity_weight or 0) < math.inf:
            raise InputError(f"--identity_weight {self.identity_weight} is no weight; pass 0 or more")
        if not 0 <= (self.saturation or 0) <= 1:
            raise InputError(f"--saturation {self.saturation} is no share of the bases; pass 0 to 1")
        if not 0 < (1 if self.temperature is None else self.temperature) < math.inf:
            raise InputError(f"--temperature {self.temperature} is no temperature; pass a number above 0")
        _at_least("min_overlap", self.min_overlap, 1)
        if not 0 <= self.min_identity <= 1:
            raise InputError(f"--min_identity {self.min_identity} is outside 0 to 1")
        _at_least("nprobes", self.nprobes, 1)
        _at_least("refine_factor", self.refine_factor, 1)
        _at_least("processes", self.processes, 1)
        _at_least("batch_tokens", self.batch_tokens, 2)


@_settings
class ArchiveConfig:
    """What a Darwin Core archive says beside the identifications.

    Example:
        >>> ArchiveConfig(title="Fish of the Kiel Fjord, 12S eDNA", creator="Ada Lovelace").license is None
        True
    """

    taxon_ids: SideTableConfig | str | None = None
    """Table of scientific names and their WoRMS or GBIF ids, in columns such as name and AphiaID, or name and taxonID."""
    title: str | None = None
    """Title of the data set."""
    creator: str | None = None
    """Given name and surname of its creator and contact."""
    organization: str | None = None
    """Institution of the creator, or alone in place of a person."""
    email: str | None = None
    """Address of the creator."""
    license: Literal["CC0-1.0", "CC-BY-4.0", "CC-BY-NC-4.0"] | None = None
    """License of the data set, one of those that GBIF accepts."""


@_settings
class CalibrateConfig:
    """The precision required of answers.

    Example:
        >>> CalibrateConfig(precision=0.99).risk
        0.05
    """

    precision: float = 0.95
    """Share of the answers at each rank that must be right, with confidence 1 - `risk`."""
    risk: float = 0.05
    """Accepted probability that a threshold misses the precision, given how the labelled barcodes were drawn."""
    held_out: float = 0.5
    """Share of the labelled barcodes used only to measure the result, not to fit it."""
    seed: int = 0
    """Seed of that split; equal sequences stay on one side."""
    overlap: Literal["exclude", "keep"] = "exclude"
    """What to do with labelled barcodes whose id or sequence is in the reference: exclude leaves them out; keep does
    not, so that confidence and precision hold for barcodes that are in the reference themselves."""

    def __post_init__(self) -> None:
        for name in ("precision", "risk", "held_out"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise InputError(f"--{name} {getattr(self, name)} is outside 0 to 1")


@_settings
class MetricConfig:
    """How a projection is fitted to a vector table; what is absent is chosen by held-out species.

    Example:
        >>> MetricConfig(components=512, shrinkage=0.1).network
        False
    """

    components: int | None = None
    """Principal axes that are whitened; chosen among 128 to 1,536 if absent."""
    shrinkage: float | None = None
    """Share of the scatter replaced by a multiple of the identity, 0 to 1; chosen among .03 to .5 if absent."""
    scatter: Literal["genus", "both", "species", "family"] | None = None
    """Variation that is whitened: between species of a genus, rows of a species, both added, or genera of a family."""
    dimensions: int | None = None
    """Length of the whitened vector: the axes with most variance after whitening; at most 1,024 if absent."""
    filter: str | None = None
    """SQL condition on the table's columns, such as "marker_gene = 'COI'"; only matching rows are used."""
    held_out: float = 0.2
    """Share of the species of each genus held out while settings are chosen; a quarter of it is the share of the genera."""
    sample_rows: int = 20_000
    """Most rows among which the held-out rows look for their neighbour while settings are chosen."""
    seed: int = 0
    """Seed of the held-out species, of the sample and of the network."""
    network: bool = False
    """Also train a residual network on the whitened vectors."""
    weight: float | None = None
    """Weight of the whitened vector beside the network's; 0 leaves it out; chosen among 0 to 1 if absent."""
    network_rows: int = 131_072
    """Most rows that the network is trained on; they are held in memory."""
    hidden: int = 512
    """Hidden units of the network."""
    width: int = 256
    """Length of the network's vector."""
    steps: int = 240
    """Most optimizer steps; fewer if the held-out species are named best earlier."""
    species_per_batch: int = 1000
    """Species per step, drawn by whole genera, with two rows each."""
    learning_rate: float = 3e-4
    """Highest learning rate of AdamW; it falls along a cosine."""
    weight_decay: float = 0.01
    """Weight decay of AdamW; biases and the skip connection are exempt."""
    input_dropout: float = 0.1
    """Share of the whitened vector set to zero in training."""
    hidden_dropout: float = 0.2
    """Share of the hidden units set to zero in training."""
    scale: float = COSINE_SCALE
    """Cosines are multiplied by this before the softmax."""
    rank_weights: tuple[float, float, float, float] = (0.1, 0.3, 1.0, 0.3)
    """Weights of order, family, genus and species in the loss."""
    evaluate_every: int = 20
    """Steps between evaluations on the held-out species."""
    patience: int = 3
    """Evaluations without a better one after which the search for the number of steps ends."""
    checkpoint_every: int = 20
    """Steps between checkpoints; the same command continues after the last one."""

    def __post_init__(self) -> None:
        least = {"components": 1, "dimensions": 1, "sample_rows": 2, "network_rows": 2, "hidden": 1, "width": 1}
        least |= {
            "steps": 2,
            "species_per_batch": 2,
            "evaluate_every": 1,
            "patience": 1,
            "checkpoint_every": 1,
            "seed": 0,
        }
        for name, smallest in least.items():
            _at_least(name, getattr(self, name), smallest)
        for name in ("shrinkage", "input_dropout", "hidden_dropout"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise InputError(f"--{name} {value} is outside 0 to 1")
        if not 0.0 < self.held_out <= 0.5:
            raise InputError(f"--held_out {self.held_out} is outside 0 to 0.5")
        if self.weight is not None and not 0.0 <= self.weight < float("inf"):
            raise InputError(f"--weight {self.weight} must be at least 0")
        for name in ("learning_rate", "scale"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"--{name} {getattr(self, name)} must be more than 0")
        if not all(0 <= weight < float("inf") for weight in self.rank_weights) or not any(self.rank_weights):
            raise InputError(f"--rank_weights {list(self.rank_weights)} must be at least 0, and not all 0")
        if self.components is not None and self.dimensions is not None and self.dimensions > self.components:
            raise InputError(f"--dimensions {self.dimensions} exceeds --components {self.components}; lower it")
