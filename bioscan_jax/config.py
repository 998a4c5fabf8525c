"""What a run is asked to do: frozen dataclasses, one per concern, checked when they are made."""

from dataclasses import dataclass
from typing import Literal

from bioscan_jax.errors import InputError

DEFAULT_METADATA_WEIGHT = 0.3
"""Share of the metadata's loss in the total."""


def _at_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise InputError(f"--{flag} {value} is too small; pass at least {least}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights to use, and in which precision."""

    checkpoint: str
    """Local directory, Hugging Face hub id, or random:PRESET for seeded random weights."""
    revision: str | None = None
    """Commit of the hub repository; required for a hub id, so that a run can be repeated."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Parameters and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    seed: int = 0
    """Seed of random:PRESET weights; not used for a real checkpoint."""
    adapter: str | None = None
    """Directory with a LoRA adapter for this checkpoint, in PEFT's format."""
    attention: Literal["auto", "dense", "splash", "cudnn"] = "auto"
    """auto is dense below 512 tokens, from there on splash (TPU v4 and newer) or cuDNN's flash (NVIDIA) where it works.

    Like the devices it changes vectors by rounding alone, and another choice may go on with a table.
    """


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the barcodes are and how they become tokens."""

    path: str
    """Parquet or FASTA (plain or gzipped): a file, a directory, a glob or an fsspec URL."""
    sequence_column: str = "dna_sequence"
    """Parquet column with the DNA."""
    id_column: str = "sequence_id"
    """Parquet column with unique ids; where there is no `sequence_id`, ids are FILE:ROW."""
    max_tokens: int | None = None
    """Longest row of tokens, CLS included; the model's own limit if absent."""
    overlong: Literal["truncate", "window", "error"] = "truncate"
    """A sequence over max_tokens is cut, embedded in windows, or sent to the rejects."""
    block_rows: int = 8192
    """Rows read, embedded and committed together; the unit of resuming."""

    def __post_init__(self) -> None:
        _at_least("data.max_tokens", self.max_tokens, 2)
        _at_least("data.block_rows", self.block_rows, 1)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The devices and how arrays are laid over them."""

    data: int = -1
    """Devices along the batch; -1 takes all that `model` leaves."""
    model: int = 1
    """Devices that share one layer's heads and feed-forward (tensor parallelism)."""
    params: Literal["replicated", "fsdp"] = "replicated"
    """Whole parameters on each data device, or split over them and gathered layer by layer."""
    distributed: bool = False
    """Call jax.distributed.initialize: several hosts, one process each."""
    coordinator: str | None = None
    """HOST:PORT of process 0; found by itself on Cloud TPU, SLURM and the like."""
    processes: int | None = None
    """Number of processes; found by itself as above."""
    process_id: int | None = None
    """This process's number; found by itself as above."""
    compilation_cache: str | None = "~/.cache/bioscan_jax/xla"
    """Directory that keeps compiled programs between runs; null switches it off, JAX_COMPILATION_CACHE_DIR replaces it."""

    def __post_init__(self) -> None:
        _at_least("mesh.model", self.model, 1)
        if self.data != -1:
            _at_least("mesh.data", self.data, 1)


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """How a sequence's tokens become one vector, and how many go to a device at once."""

    pooling: Literal["mean", "mean_no_cls", "cls", "max"] = "mean"
    """Over the tokens of a view; mean counts CLS, as the model card does."""
    layer: int = -1
    """Hidden state to pool: 0 the embeddings, k after layer k, -1 after the final LayerNorm."""
    strand: Literal["forward", "both"] = "forward"
    """both averages the sequence and its reverse complement."""
    phases: int = 1
    """Average over this many start offsets (1 to 6) of the 6-mer frame."""
    batch_tokens: int = 16384
    """Tokens per data device in one batch, padding included."""
    max_shapes: int = 8
    """Compiled (batch, tokens) shapes at most."""
    deduplicate: bool = True
    """Embed a repeated sequence once and write its vector to each row."""
    cache_rows: int = 65536
    """Rows behind the current block in which a repeat is still found; host memory up to this times a stored vector."""

    def __post_init__(self) -> None:
        if not 1 <= self.phases <= 6:
            raise InputError(f"--embed.phases {self.phases} is outside 1 to 6: a 6-mer frame has six starts")
        _at_least("embed.batch_tokens", self.batch_tokens, 2)
        _at_least("embed.max_shapes", self.max_shapes, 1)
        _at_least("embed.cache_rows", self.cache_rows, 0)


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """The Lance table that takes the vectors."""

    uri: str
    """Directory (or object-store URL) of the LanceDB database."""
    table: str = "sequences"
    """Name of the vector table; rejected rows go to TABLE_rejects."""
    vector_dtype: Literal["float32", "float16"] = "float32"
    """Type the vectors are stored in."""
    index: Literal["none", "ivf_sq", "ivf_pq"] = "none"
    """Vector index built when the table is complete, with one on sequence_id."""
    max_bytes_per_file: int = 3 << 30
    """Data files stay below this, so that they fit a FAT32 stick; soft limit."""

    def __post_init__(self) -> None:
        _at_least("sink.max_bytes_per_file", self.max_bytes_per_file, 1 << 20)
        if not self.table.replace("_", "").replace("-", "").isalnum():
            raise InputError(f"--sink.table {self.table!r} must be letters, digits, '-' and '_'")


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Simulated barcodes: sequences evolved along a random seven-rank tree."""

    species: int = 200
    """Species of the tree."""
    per_species: int = 10
    """Barcodes of each."""
    length: int = 658
    """Bases of a full barcode."""
    seed: int = 0
    """Of the tree and the mutations."""
    path: str | None = None
    """Parquet file to write; only if data.path names the same file are barcodes simulated. data.path if absent."""

    def __post_init__(self) -> None:
        _at_least("simulate.species", self.species, 1)
        _at_least("simulate.per_species", self.per_species, 1)
        _at_least("simulate.length", self.length, 50)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters on a frozen model."""

    rank: int = 16
    """Columns of each adapter."""
    alpha: float = 32.0
    """An adapter is scaled by alpha / rank."""
    dropout: float = 0.1
    """Share of an adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("query", "value")
    """Layers to adapt: query, key, value, attention_output, feed_forward_in, feed_forward_out, or all_linear."""

    def __post_init__(self) -> None:
        _at_least("lora.rank", self.rank, 1)
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"--lora.dropout {self.dropout} is outside 0 to 1")
        if not 0.0 < self.alpha < float("inf"):
            raise InputError(f"--lora.alpha {self.alpha} must be more than 0")


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """The labelled barcodes to train on, and which of them are kept aside."""

    path: str
    """Parquet: a file, a directory, a glob or an fsspec URL; with `taxonomy` or the seven rank columns."""
    sequence_column: str = "dna_sequence"
    """Column with the DNA."""
    id_column: str = "sequence_id"
    """Column with unique ids; where there is no `sequence_id`, ids are FILE:ROW."""
    max_tokens: int | None = None
    """Longest row of tokens, CLS included; the model's own limit if absent. Longer sequences are cut."""
    split: Literal["random", "held_out_species", "held_out_genera"] = "random"
    """What validation and test rows have that training rows have not: the sequence, the species, the genus."""
    split_column: str | None = None
    """Column that says train, validation, test or unused; then `split` and the shares are not used."""
    validation: float = 0.1
    """Share of the distinct sequences (or taxa) to validate on."""
    test: float = 0.0
    """Share of them kept for a test; no training run looks at these."""
    split_seed: int = 0
    """Another seed keeps other rows aside."""

    def __post_init__(self) -> None:
        _at_least("data.max_tokens", self.max_tokens, 2)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training minimises."""

    head: Literal["marginal", "independent"] = "marginal"
    """One softmax over the finest taxa, summed up the tree; or one softmax a rank."""
    pooling: Literal["mean", "mean_no_cls", "cls", "max"] = "mean"
    """Over the tokens; the vector that the heads see."""
    rank_weights: tuple[float, float, float, float, float, float, float] = (2.0, 1.8, 1.5, 1.2, 1.0, 0.8, 0.6)
    """Kingdom to species."""
    metadata: bool | None = None
    """Also predict the ranks from depth, latitude and longitude; if absent, where metadata_weight is given."""
    metadata_weight: float | None = None
    """Share of the metadata's loss in the total; 0.3 if absent."""
    mask_rate: float = 0.15
    """Share of the tokens to be predicted by mlm."""

    def __post_init__(self) -> None:
        if not all(0 <= weight < float("inf") for weight in self.rank_weights) or not any(self.rank_weights):
            raise InputError(f"--loss.rank_weights {list(self.rank_weights)} must be at least 0, and not all 0")
        for flag, share in (("metadata_weight", self.metadata_weight), ("mask_rate", self.mask_rate)):
            if share is not None and not 0.0 < share < 1.0:
                raise InputError(f"--loss.{flag} {share} is not between 0 and 1")
        if self.metadata is False and self.metadata_weight is not None:
            raise InputError(f"--loss.metadata_weight {self.metadata_weight} needs --loss.metadata true; leave one out")

    @property
    def with_metadata(self) -> bool:
        """Whether the metadata have a share in the loss."""
        return bool(self.metadata) or self.metadata_weight is not None

    @property
    def metadata_share(self) -> float:
        """Of the metadata's loss in the total, where they have one."""
        return DEFAULT_METADATA_WEIGHT if self.metadata_weight is None else self.metadata_weight


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How training goes."""

    output_dir: str = "runs/finetune"
    """The run's directory: checkpoints, label space, metrics, curves; the same command goes on there."""
    objective: Literal["taxonomy", "mlm"] = "taxonomy"
    """The seven ranks of each barcode, or its masked 6-mers (then no labels are read)."""
    mode: Literal["lora", "full"] = "lora"
    """Adapters on a frozen model, or all of its weights (kept in float32)."""
    epochs: int = 10
    """Passes over the training rows."""
    batch_size: int = 32
    """Barcodes of one optimizer step, over all devices."""
    learning_rate: float = 2e-4
    """After the warm-up; AdamW."""
    warmup_steps: int = 500
    """Linear from 0; a cosine down to 0 at the last step follows."""
    weight_decay: float = 0.01
    """Not on biases and norms."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    batch_tokens: int = 16384
    """Tokens per data device worked at once, padding included; a larger batch is accumulated in equal parts."""
    max_shapes: int = 4
    """Compiled widths at most."""
    remat: Literal["none", "layer"] = "none"
    """layer keeps only each layer's input for the backward pass: less memory, a third more work."""
    reverse_complement: float = 0.5
    """Share of the barcodes turned to the other strand, drawn anew each epoch."""
    subsequence: float = 0.5
    """Share of the barcodes cut to a random stretch, drawn anew each epoch; ends come in any phase."""
    shortest: int = 150
    """Bases of such a stretch at least."""
    balance: Literal["none", "kingdom", "phylum", "class", "order", "family", "genus", "species"] = "none"
    """Draw rows with replacement so that the taxa of this rank come equally often."""
    patience: int | None = None
    """Stop after this many epochs without a lower validation loss."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    seed: int = 0
    """Of the new parameters, the order of rows, augmentation, dropout and masking."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_shapes", "log_every", "patience", "shortest"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            _at_least(f"train.{name}", getattr(self, name), 0)
        if not 0.0 <= self.weight_decay < float("inf"):
            raise InputError(f"--train.weight_decay {self.weight_decay} must be at least 0")
        _at_least("train.batch_tokens", self.batch_tokens, 2)
        for name in ("learning_rate", "clip_norm"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"--train.{name} {getattr(self, name)} must be more than 0")
        for name in ("reverse_complement", "subsequence"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"--train.{name} {getattr(self, name)} is outside 0 to 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of training is saved; it always is at a SIGTERM and at the end."""

    interval_minutes: float = 30.0
    """Wall time between two checkpoints."""
    keep: int = 2
    """The newest ones kept; the best state is kept beside them."""

    def __post_init__(self) -> None:
        _at_least("checkpoint.keep", self.keep, 1)
        if not self.interval_minutes >= 0:
            raise InputError(f"--checkpoint.interval_minutes {self.interval_minutes} must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Weights & Biases; metrics.jsonl and curves.png are written in any case."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online where WANDB_API_KEY or a login is found, offline elsewhere."""
    project: str = "bioscan_jax"
    """Project of the dashboard."""
    name: str | None = None
    """Name of the run; Weights & Biases invents one if absent."""


SearchKind = Literal["auto", "exact", "index"]
AnswerFormat = Literal["parquet", "tsv", "sintax"]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The table of vectors that barcodes are compared with."""

    uri: str
    """Directory (or object-store URL) of the LanceDB database."""
    table: str = "sequences"
    """Name of the vector table."""


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """The barcodes to identify."""

    path: str
    """Parquet, FASTA or FASTQ (plain or gzipped): a file, a directory, a glob or an fsspec URL."""
    sequence_column: str = "dna_sequence"
    """Parquet column with the DNA."""
    id_column: str = "sequence_id"
    """Parquet column with unique ids; where there is no `sequence_id`, ids are FILE:ROW."""


@dataclass(frozen=True, kw_only=True)
class IdentifyConfig:
    """How queries are compared with the reference; a calibration is valid only for the same settings."""

    k: int = 50
    """Nearest neighbours per query: the candidates."""
    rerank: Literal["none", "alignment"] = "none"
    """alignment sorts the k candidates by the identity of a sequence alignment."""
    aligned: int = 32
    """Candidates that are aligned in full and vote: the best of the k by edit distance."""
    filter: str | None = None
    """SQL condition on the reference's columns, such as "marker_gene = 'COI'"; other rows are ignored."""
    search: SearchKind = "auto"
    """auto uses the table's vector index, if it has one and more than 50,000 rows."""
    nprobes: int | None = None
    """Partitions of the index to search; at least 50 if absent."""
    refine_factor: int | None = None
    """The index proposes refine_factor * k candidates by quantised vectors; exact vectors choose among them."""
    heads: str | None = None
    """Directory of an export with taxonomic heads trained on these vectors; they vote too."""
    processes: int = 2
    """Processes for the alignments."""

    def __post_init__(self) -> None:
        _at_least("k", self.k, 1)
        _at_least("aligned", self.aligned, 1)
        _at_least("nprobes", self.nprobes, 1)
        _at_least("refine_factor", self.refine_factor, 1)
        _at_least("processes", self.processes, 1)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """The precision required of answers."""

    precision: float = 0.95
    """Share of each rank's answers that must be correct, with confidence 1 - `risk`."""
    risk: float = 0.05
    """Probability, over the draw of the labelled barcodes, that a threshold misses its precision."""
    held_out: float = 0.5
    """Share of the labelled barcodes kept aside for the printed figures; nothing is fitted on them."""
    seed: int = 0
    """Seed of the split, which is by sequence: equal sequences stay together."""

    def __post_init__(self) -> None:
        for name in ("precision", "risk", "held_out"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise InputError(f"--{name} {getattr(self, name)} is outside 0 to 1")
