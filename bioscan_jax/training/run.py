"""Fine-tuning: trains adapters and heads, or a whole model, on labelled barcodes."""

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.cache import cache_directory
from bioscan_jax.checkpoints.head_files import taxon_tree
from bioscan_jax.checkpoints.load import LoadedModel, load_weights
from bioscan_jax.data.batching import batch_shapes
from bioscan_jax.data.parquet import ParquetBlocks, open_source, scratch_place
from bioscan_jax.devices.hosts import gather_bytes, propagate_failure
from bioscan_jax.devices.interrupt import StopRequest, stop_on_signals
from bioscan_jax.devices.memory import memory_errors
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.devices.sharding import Layout, compute_dtype, make_layout, start_devices
from bioscan_jax.embedding.summary import peak_device_bytes, peak_host_bytes
from bioscan_jax.errors import InputError, logger
from bioscan_jax.model.classifier import Arrays, make_classifier, named_arrays
from bioscan_jax.model.lora import resolve_targets
from bioscan_jax.notebook import Shown, facts_html, picture_html, progress_bar
from bioscan_jax.table.lock import writer_lock
from bioscan_jax.table.storage import storage_errors
from bioscan_jax.training.batches import TrainingBatches, evaluation_batches
from bioscan_jax.training.curves import draw_curves
from bioscan_jax.training.examples import BASES, Examples, prepare_examples
from bioscan_jax.training.loop import Evaluate, Log, TrainingSetup, TrainState, run
from bioscan_jax.training.record import check_or_write_record, run_settings
from bioscan_jax.training.run_directory import CURVES, RUN_FILE, locate_run, open_run_directory
from bioscan_jax.training.splits import SPLITS
from bioscan_jax.training.state import Progress, open_checkpoints
from bioscan_jax.training.step import Evaluation, TrainableModel, init_optimizer, split_trainable
from bioscan_jax.training.tracking import open_tracking

_FLAG = "train.output_dir"
_SHOWN_CONFLICTS = 5


@dataclass(frozen=True, kw_only=True)
class TrainingSummary(Shown):
    """Outcome of a call of `finetune`; printed as a table.

    Example:
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.training.state import Progress
        >>> summary = bj.TrainingSummary(
        ...     directory="runs/coi",
        ...     progress=Progress(step=58, finished="all epochs done", seconds=67.0),
        ...     before=29,
        ...     rows={"train": 463},
        ...     taxa={"genus": 198, "species": 258},
        ...     conflicts=(),
        ...     trained_parameters=33_152,
        ...     all_parameters=428_224,
        ...     peak_host_bytes=1 << 30,
        ...     peak_device_bytes=None,
        ... )
        >>> print(summary)
               run  runs/coi
             steps  58 (29 of them before this run)
             ended  all epochs done, 67 s in training
              rows  463 train
              taxa  198 genus, 258 species
         conflicts  0
           trained  33,152 of 428,224 parameters (7.74%)
              best  none: there are no validation rows
            memory  host 1.00 GiB
    """

    directory: str
    progress: Progress
    before: int
    """Steps done before this call."""
    rows: dict[str, int]
    """Usable rows of each split that has any."""
    taxa: dict[str, int]
    """Taxa of the training rows at each rank."""
    conflicts: tuple[str, ...]
    """Taxa that rows place under different parents, with the parent chosen."""
    trained_parameters: int
    all_parameters: int
    peak_host_bytes: int
    peak_device_bytes: int | None

    def __str__(self) -> str:
        """Returns the table printed at the end of a run."""
        lines = {name: text.replace("\n", f"\n{'':>12}") for name, text in self._lines().items()}
        return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())

    def _repr_html_(self) -> str:
        return facts_html(self._lines()) + picture_html(f"{self.directory}/{CURVES}", "losses and accuracies by step")

    def _lines(self) -> dict[str, str]:
        progress, metrics = self.progress, self.progress.evaluation
        resumed = f" ({self.before:,} of them before this run)" if self.before else ""
        if self.before == progress.step:
            resumed = ", complete before this run: nothing was left to do"
        best = "none: there are no validation rows"
        if progress.best_step is not None:
            best = f"validation loss {progress.best_loss:.4f} after step {progress.best_step:,}"
        share = 100.0 * self.trained_parameters / self.all_parameters
        device = f", device {self.peak_device_bytes / 2**30:.2f} GiB" if self.peak_device_bytes is not None else ""
        lines = {
            "run": self.directory,
            "steps": f"{progress.step:,}{resumed}",
            "ended": f"{progress.finished}, {progress.seconds:,.0f} s in training",
            "rows": ", ".join(f"{count:,} {split}" for split, count in self.rows.items()),
        }
        if self.taxa:
            lines["taxa"] = ", ".join(f"{count:,} {rank}" for rank, count in self.taxa.items())
            lines["conflicts"] = f"{len(self.conflicts):,}" + "".join(
                f"\n{line}" for line in self.conflicts[:_SHOWN_CONFLICTS]
            )
        lines["trained"] = f"{self.trained_parameters:,} of {self.all_parameters:,} parameters ({share:.2f}%)"
        lines["best"] = best
        accuracies = [
            f"{rank} {metrics[name]:.3f} (majority {metrics[f'eval/{rank}_majority']:.3f})"
            for rank in RANKS
            if (name := f"eval/{rank}_accuracy") in metrics
        ]
        if accuracies:
            lines["accuracy"] = "last evaluation: " + ", ".join(accuracies)
        lines["memory"] = f"host {self.peak_host_bytes / 2**30:.2f} GiB{device}"
        return lines


@propagate_failure()
@memory_errors("training", "take a machine with more memory or fewer rows; bioscan doctor compares")
def finetune(
    model: config.ModelConfig,
    data: config.ExamplesConfig,
    lora: config.LoRAConfig | None = None,
    loss: config.LossConfig | None = None,
    train: config.TrainConfig | None = None,
    checkpoint: config.CheckpointConfig | None = None,
    tracking: config.TrackingConfig | None = None,
    mesh: config.MeshConfig | None = None,
    *,
    progress: bool = True,
    profile: str | None = None,
) -> TrainingSummary:
    """Trains adapters and heads on a frozen model, or the whole model.

    The same call with the same `train.output_dir` resumes a stopped run, with the result of an uninterrupted one.

    Args:
        model: Weights to start from.
        data: Barcodes, and how they are split into training, validation and test rows.
        lora: Adapters; not used if the whole model is trained.
        loss: Heads and loss function.
        train: Optimization, and the directory of the run.
        checkpoint: How often the state is saved.
        tracking: Weights & Biases.
        mesh: Devices.
        progress: Whether to show progress bars.
        profile: Directory for a trace of some steps, once the run is warm; none if absent.

    Raises:
        InputError: Input or settings that the user can fix; existing checkpoints are kept.
        Interrupted: Ctrl-C or SIGTERM; the same call resumes.

    Example:
        >>> import bioscan_jax as bj
        >>> from bioscan_jax.barcodes.simulate import write_simulated
        >>> _ = write_simulated("barcodes.parquet", species=8, per_species=4, length=60, seed=0)
        >>> summary = bj.finetune(
        ...     bj.ModelConfig(checkpoint="random:tiny-v2"),
        ...     bj.ExamplesConfig(path="barcodes.parquet", validation=0.25),
        ...     train=bj.TrainConfig(output_dir="runs/coi", epochs=1, max_shapes=1),
        ...     tracking=bj.TrackingConfig(mode="disabled"),
        ...     progress=False,
        ... )
        >>> summary.progress.step, summary.progress.finished
        (1, 'all epochs done')
    """
    lora, loss, train = lora or config.LoRAConfig(), loss or config.LossConfig(), train or config.TrainConfig()
    checkpoint, tracking = checkpoint or config.CheckpointConfig(), tracking or config.TrackingConfig()
    mesh = mesh or config.MeshConfig()
    _check(model, lora, loss, train)
    start_devices(mesh)
    place = locate_run(train.output_dir, flag=_FLAG, processes=jax.process_count())
    first, progress = jax.process_index() == 0, progress and jax.process_index() == 0
    with ExitStack() as held:
        profiler = held.enter_context(StepProfiler(profile, "train"))
        lock = writer_lock(train.output_dir, "training", kind="run", flag=f"--{_FLAG}")
        check = held.enter_context(lock) if first else None
        working = cache_directory() if data.scratch is None else scratch_place(data.scratch)
        copies = working / "runs" / str(jax.process_index())
        directory = held.enter_context(open_run_directory(place, copies, check=check))
        scratch = held.enter_context(_scratch(directory.local, data.scratch))
        source = open_source(_as_data(data), scratch=scratch, for_table=False)
        layout = make_layout(mesh)
        loaded = _load(model, train, layout, progress)
        examples = _prepare(source, data, loss, train, loaded, scratch, progress)
        settings = run_settings(source, data, loaded, lora, loss, train, examples.space)
        trainable = _make_trainable(loaded, lora, loss, train, examples.space)
        batches = TrainingBatches(examples, train, loaded.vocabulary, _max_tokens(data, loaded))
        if first:
            with storage_errors(directory.name, flag=f"--{_FLAG}"):
                check_or_write_record(directory, settings, model, loaded, examples.space)
        gather_bytes(b"")  # the other processes wait until process 0 has checked the directory
        checkpoints = held.enter_context(open_checkpoints(directory, keep=checkpoint.keep))
        before = checkpoints.latest()
        at = before or Progress(config=settings, rng=_rng(train), label_space=settings["label_space_sha256"])
        if at.finished is None:
            params = named_arrays(trainable.trained)
            state = TrainState(params, init_optimizer(trainable, len(batches), params))
            if before is not None:
                _check_rng(before, train)
                if first:
                    logger.info(f"{train.output_dir}: continues after step {at.step:,} of {len(batches):,}")
                state = TrainState(**checkpoints.restore(before.step, jax.tree.map(_abstract, vars(state))))
            log, run_id = _log(held, tracking, directory.local, settings, at)
            setup = TrainingSetup(
                model=trainable,
                batches=batches,
                examples=examples,
                checkpoint=checkpoint,
                checkpoints=checkpoints,
                log=log,
                evaluate=_evaluation(trainable, examples, batches, loaded),
                profiler=profiler,
            )
            stop = held.enter_context(stop_on_signals("step"))
            bar = progress_bar(total=len(batches), initial=at.step, unit="step", desc="train", disable=not progress)
            with bar:
                at = run(setup, state, dataclasses.replace(at, run_id=run_id), stop, bar)
            if first:
                with storage_errors(directory.name, flag=f"--{_FLAG}"):
                    draw_curves(directory.local)
                    directory.put_files()
    return _summary(at, before, examples, trainable)


def _check(
    model: config.ModelConfig, lora: config.LoRAConfig, loss: config.LossConfig, train: config.TrainConfig
) -> None:
    if model.adapter is not None:
        raise InputError("--model.adapter cannot be trained on; merge it first (bioscan export --format merged)")
    if train.mode == "lora":
        resolve_targets(lora.targets)
    if train.objective == "mlm":
        labelled = {
            "--loss.metadata": loss.with_metadata,
            "--loss.contrastive": loss.contrastive > 0,
            "--train.balance": train.balance != "none",
            "--train.sampler genera": train.sampler == "genera",
        }
        for flag, used in labelled.items():
            if used:
                raise InputError(f"{flag} needs labels; leave it out, or pass --train.objective taxonomy")


def _as_data(data: config.ExamplesConfig) -> config.DataConfig:
    same = ("path", "sequence_column", "id_column", "id", "scratch")
    return config.DataConfig(**{name: getattr(data, name) for name in same})


def _max_tokens(data: config.ExamplesConfig, loaded: LoadedModel) -> int:
    limit = loaded.config.max_tokens
    if data.max_tokens is not None and data.max_tokens > limit:
        raise InputError(f"--data.max_tokens {data.max_tokens} exceeds the {limit} positions of the model; lower it")
    return data.max_tokens or limit


@contextmanager
def _scratch(run: Path, place: str | None) -> Iterator[Path]:
    """Yields this process's directory for the bases, removed at the end.

    What a run that exists has converted from FASTA stays there until the run is finished.
    """
    name = f"examples-{jax.process_index()}"
    scratch = run / f".{name}"
    if place is not None:
        scratch = scratch_place(place) / f"{hashlib.sha256(str(run).encode()).hexdigest()[:16]}.{name}"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        flag = f"--{_FLAG} {str(run)!r}" if place is None else f"--data.scratch {place}"
        raise InputError(f"{flag}: {error.strerror}; pass a directory you may write") from error
    try:
        yield scratch
    except BaseException:
        if (run / RUN_FILE).exists() and place is None:
            (scratch / BASES).unlink(missing_ok=True)
        else:
            shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _load(model: config.ModelConfig, train: config.TrainConfig, layout: Layout, progress: bool) -> LoadedModel:
    """Loads the checkpoint; weights that are all trained are kept in float32, whatever dtype products are computed in."""
    wanted = dataclasses.replace(model, projection="none")  # training changes the vectors that one was fitted on
    if train.mode == "full":
        wanted = dataclasses.replace(wanted, dtype="float32")
    with progress_bar(unit="B", unit_scale=True, desc="load weights", disable=not progress, leave=False) as bar:
        loaded = load_weights(wanted, layout, lm_head=train.objective == "mlm", on_bytes=bar.update)
    if not loaded.config.num_hidden_layers:
        raise InputError(
            f"--model.checkpoint {model.checkpoint} has no layers to train, only embeddings; pass another model"
        )
    if train.mode == "full" and compute_dtype(model.dtype) != np.float32:
        loaded.model.float32_products = "default"
    return loaded


def _prepare(
    source: ParquetBlocks,
    data: config.ExamplesConfig,
    loss: config.LossConfig,
    train: config.TrainConfig,
    loaded: LoadedModel,
    scratch: Path,
    progress: bool,
) -> Examples:
    with progress_bar(total=source.rows, unit="row", desc="read rows", disable=not progress, leave=False) as bar:
        return prepare_examples(
            source,
            data,
            loaded.vocabulary,
            scratch,
            labelled=train.objective == "taxonomy",
            with_metadata=loss.with_metadata,
            on_rows=bar.update,
        )


def _make_trainable(
    loaded: LoadedModel,
    lora: config.LoRAConfig,
    loss: config.LossConfig,
    train: config.TrainConfig,
    space: LabelSpace | None,
) -> TrainableModel:
    tree = None if space is None else taxon_tree(space)
    adapters = lora if train.mode == "lora" else None
    classifier = make_classifier(loaded.model, loss, adapters, tree, loaded.layout, seed=train.seed)
    vocabulary = loaded.vocabulary
    special = (vocabulary.cls_id, vocabulary.pad_id, vocabulary.mask_id, vocabulary.unk_id)
    return split_trainable(classifier, loaded.layout, loss, train, tree=tree, special_ids=special)


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _rng(train: config.TrainConfig) -> list[int]:
    return np.asarray(jax.random.key_data(jax.random.key(train.seed))).tolist()


def _check_rng(before: Progress, train: config.TrainConfig) -> None:
    if before.rng != _rng(train):
        raise InputError(
            f"{train.output_dir}: this version of JAX draws other random numbers; continue with the version that started the run"
        )


def _log(
    held: ExitStack, tracking: config.TrackingConfig, directory: Path, settings: dict[str, Any], at: Progress
) -> tuple[Log, str | None]:
    """Returns the function that logs metrics (on process 0 only), and the dashboard's run id."""
    if jax.process_index() != 0:
        return lambda metrics, step: None, at.run_id
    opened = open_tracking(tracking, directory, settings=settings, resumed_at=at.step, run_id=at.run_id)
    tracker = held.enter_context(opened)
    return tracker.log, tracker.run_id


def _evaluation(
    trainable: TrainableModel, examples: Examples, batches: TrainingBatches, loaded: LoadedModel
) -> Evaluate | None:
    """Returns the function that evaluates the validation rows, or None if there are none."""
    rows = examples.rows("validation")
    if not len(rows):
        return None
    shapes = batch_shapes(
        batches.widths,
        devices=trainable.layout.data_devices,
        tokens_per_device=trainable.train.batch_tokens,
        most_rows=len(rows),
    )
    sizes = (0,) * len(RANKS) if examples.space is None else tuple(map(len, examples.space.names))
    evaluation = Evaluation(trainable, sizes)

    def evaluate(params: Arrays, stop: StopRequest) -> dict[str, float] | None:
        return evaluation(params, trainable.frozen, evaluation_batches(examples, rows, shapes, loaded.vocabulary), stop)

    return evaluate


def _summary(at: Progress, before: Progress | None, examples: Examples, trainable: TrainableModel) -> TrainingSummary:
    space, splits = examples.space, {split: len(examples.rows(split)) for split in SPLITS}
    conflicts = () if space is None else space.conflicts
    trained = sum(array.size for array in named_arrays(trainable.trained).values())
    return TrainingSummary(
        directory=trainable.train.output_dir,
        progress=at,
        before=before.step if before is not None else 0,
        rows={split: count for split, count in splits.items() if count},
        taxa={} if space is None else {rank: len(of) for rank, of in zip(RANKS, space.names, strict=True)},
        conflicts=tuple(
            f"{c.rank} {c.name} under {c.parent_rank} {' and '.join(f'{name} ({n})' for name, n in c.parents)}; "
            f"taken: {c.chosen}"
            for c in conflicts
        ),
        trained_parameters=trained,
        all_parameters=trained + sum(array.size for array in jax.tree.leaves(trainable.frozen)),
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_bytes(),
    )
