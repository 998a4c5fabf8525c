"""The training loop, from the first step or from a checkpoint to the end.

However often a run is stopped, the final parameters are those of an uninterrupted run: a batch, its augmentation and
its dropout depend on the step number alone, and a checkpoint holds everything else.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.data.batching import BatchShape
from bioscan_jax.devices.chips import peak_flops
from bioscan_jax.devices.hosts import any_process
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.devices.memory import is_out_of_memory, out_of_memory
from bioscan_jax.devices.profiling import StepProfiler
from bioscan_jax.embedding.fitting import advise_batch_tokens
from bioscan_jax.embedding.summary import bytes_in_use
from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.model.classifier import Arrays
from bioscan_jax.notebook import same_again
from bioscan_jax.training.batches import ExampleBatch, TrainingBatches, iterate
from bioscan_jax.training.examples import Examples
from bioscan_jax.training.metrics import EmbeddingMoments, dashboard_metrics
from bioscan_jax.training.state import Checkpoints, Progress
from bioscan_jax.training.step import (
    StepMetrics,
    TrainableModel,
    abstract_arguments,
    make_train_step,
    microbatch_shape,
    place,
)

_STEPS_AHEAD = 2
"""Steps queued on the devices while the host prepares the next batch."""
Log = Callable[[dict[str, float], int], None]
Evaluate = Callable[[Arrays, StopRequest], dict[str, float] | None]


@dataclass
class TrainState:
    """What a training step updates."""

    params: Arrays
    optimizer: optax.OptState


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingSetup:
    """What stays the same during a run."""

    model: TrainableModel
    batches: TrainingBatches
    examples: Examples
    checkpoint: config.CheckpointConfig
    checkpoints: Checkpoints
    log: Log
    evaluate: Evaluate | None
    """None if there are no validation rows."""
    profiler: StepProfiler

    @property
    def train(self) -> config.TrainConfig:
        """The training settings."""
        return self.model.train


def run(setup: TrainingSetup, state: TrainState, progress: Progress, stop: StopRequest, bar: tqdm) -> Progress:
    """Trains until the last epoch, or until `patience` epochs have not lowered the validation loss.

    Args:
        setup: Model, batches and where results go.
        state: The state after `progress.step` steps; updated in place.
        progress: The progress at that step.
        stop: Checked after every step.
        bar: Progress bar that counts steps.

    Raises:
        InputError: The loss was not finite, or memory ran out; existing checkpoints are kept.
        Interrupted: A stop was requested; the state has been saved.
    """
    train_step = make_train_step(setup.model, len(setup.batches))
    per_epoch, total = setup.batches.steps_per_epoch, len(setup.batches)
    window, started = _MetricsWindow(setup, progress), time.monotonic() - progress.seconds
    pending: deque[tuple[int, ExampleBatch, StepMetrics]] = deque()
    saved = time.monotonic()
    with _memory_errors(setup), closing(iterate(setup.batches, progress.grain)) as reader:
        while True:
            progress, over = _evaluate_after_epoch(setup, state, progress, stop)
            if progress.step >= total and (setup.evaluate is None or progress.evaluated == total):
                over = over or "all epochs done"
            stopping, due = any_process(
                bool(stop), time.monotonic() - saved >= 60.0 * setup.checkpoint.interval_minutes
            )
            if over or stopping or (due and progress.step):
                window.collect(pending, 0)
                progress = dataclasses.replace(
                    progress,
                    grain=reader.get_state(),
                    window=window.sums,
                    seconds=time.monotonic() - started,
                    finished=over or None,
                )
                setup.checkpoints.save(progress, vars(state), wait=bool(over or stopping))
                saved = time.monotonic()
            if over:
                return progress
            if stopping:
                raise Interrupted(
                    f"stopped after step {progress.step:,} of {total:,}, which is saved in a checkpoint; "
                    f"{same_again()} continues from there",
                    stop.signal_number,
                )
            batch = next(reader)
            placed = place(
                batch, setup.model.layout, setup.train.batch_tokens, pad=setup.model.transformer.pad_token_id
            )
            number = jnp.uint32(progress.step)
            state.params, state.optimizer, metrics = setup.profiler.run(
                placed.ids.shape, train_step, state.params, state.optimizer, setup.model.frozen, number, placed
            )
            progress = dataclasses.replace(progress, step=progress.step + 1)
            pending.append((progress.step, batch, metrics))
            bar.update()
            at_log = progress.step % setup.train.log_every == 0 or progress.step % per_epoch == 0
            window.collect(pending, 0 if at_log else _STEPS_AHEAD)
            if at_log:
                bar.set_postfix(loss=f"{window.log(progress.step):.4f}", refresh=False)


@contextmanager
def _memory_errors(setup: TrainingSetup) -> Iterator[None]:
    """Raises an error of the devices' memory in its block as an InputError that says which microbatch fits."""
    model, train, steps = setup.model, setup.train, len(setup.batches)

    def compile_step(shape: BatchShape) -> jax.stages.Compiled:
        parts = -(-train.batch_size // shape.rows)
        arguments = abstract_arguments(model, steps, parts, shape.rows, shape.tokens)
        return make_train_step(model, steps).lower(*arguments).compile()

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        width, layout = setup.batches.widths[-1], model.layout
        _, rows = microbatch_shape(train.batch_size, width, layout.data_devices, train.batch_tokens)
        advice = advise_batch_tokens(compile_step, [BatchShape(rows, width)], layout, "train.batch_tokens")
        if train.remat == "none":
            advice += ", or --train.remat layer, which recomputes the layers in the backward pass"
        raise out_of_memory(f"training on {rows:,} x {width} tokens at once", error, advice) from error


def _evaluate_after_epoch(
    setup: TrainingSetup, state: TrainState, progress: Progress, stop: StopRequest
) -> tuple[Progress, str | None]:
    """Evaluates if an epoch has just ended; the text is the reason to stop training early, if there is one."""
    step = progress.step
    if setup.evaluate is None or step % setup.batches.steps_per_epoch or step == progress.evaluated:
        return progress, None
    metrics = setup.evaluate(state.params, stop)
    if metrics is None:
        return progress, None
    setup.log(metrics, step)
    progress = dataclasses.replace(progress, evaluated=step, waited=progress.waited + 1, evaluation=metrics)
    loss = metrics["eval/loss"]
    if not np.isfinite(loss):
        raise InputError(
            f"the validation loss is {loss} after step {step}; lower --train.learning_rate and pass another "
            "--train.output_dir (the checkpoints here are kept)"
        )
    if progress.best_loss is None or loss < progress.best_loss:
        progress = dataclasses.replace(progress, best_step=step, best_loss=loss, waited=0)
        setup.checkpoints.save_best(step, state.params, {"numbers": metrics})
    patience = setup.train.patience
    if patience is not None and progress.waited >= patience:
        return progress, f"no lower validation loss for {progress.waited} epoch(s)"
    return progress, None


class _MetricsWindow:
    """Means over the steps since the last line of metrics.jsonl; refuses losses that are not finite."""

    def __init__(self, setup: TrainingSetup, progress: Progress):
        self._setup, self.sums = setup, dict(progress.window)
        self._started, self._rows, self._flops, self._rate = time.monotonic(), 0, 0, 0.0

    def collect(self, pending: deque[tuple[int, ExampleBatch, StepMetrics]], ahead: int) -> None:
        """Waits for all pending steps but the last `ahead`, and adds their metrics.

        Raises:
            InputError: A loss or a gradient was not finite.
        """
        while len(pending) > ahead:
            step, batch, metrics = pending.popleft()
            self._add(step, batch, jax.device_get(metrics))

    def _add(self, step: int, batch: ExampleBatch, metrics: StepMetrics) -> None:
        if not metrics.finite:
            raise InputError(self._not_finite(step, batch, metrics))
        found = {"steps": 1.0, "loss": float(metrics.loss), "gradient_norm": float(metrics.gradient_norm)}
        self._rate = float(metrics.learning_rate)
        for rank, value, known in zip(RANKS, metrics.rank_losses.tolist(), metrics.known_rows.tolist(), strict=True):
            if known and self._setup.model.train.objective == "taxonomy":
                found |= {f"loss/{rank}": value, f"steps/{rank}": 1.0}
        if self._setup.model.loss.contrastive:
            found |= {"loss/contrastive": float(metrics.contrastive), "steps/contrastive": 1.0}
        spread = dashboard_metrics(moments=EmbeddingMoments(*map(np.float64, metrics.moments)))
        for name, value in (found | spread).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        used = int((batch.rows >= 0).sum())
        self._rows += used
        lengths = (batch.ids[:used] != self._setup.model.transformer.pad_token_id).sum(axis=1)
        self._flops += training_flops(self._setup.model, lengths)

    def _not_finite(self, step: int, batch: ExampleBatch, metrics: StepMetrics) -> str:
        per_epoch = self._setup.batches.steps_per_epoch
        epoch, number = divmod(step - 1, per_epoch)
        rows = batch.rows[batch.rows >= 0]
        what = "loss" if not np.isfinite(metrics.loss) else "gradient's norm"
        value = metrics.loss if what == "loss" else metrics.gradient_norm
        return (
            f"the {what} is {float(value)} at step {step} (epoch {epoch + 1}, batch {number + 1} of {per_epoch}; its "
            f"first row is {self._setup.examples.locate(int(rows[0]))}); the checkpoints before it are kept; lower "
            "--train.learning_rate or look at the weights, and pass another --train.output_dir"
        )

    def log(self, step: int) -> float:
        """Writes a line of metrics, starts the next window and returns the mean loss."""
        setup, sums, seconds = self._setup, self.sums, max(time.monotonic() - self._started, 1e-9)
        steps = sums["steps"]
        metrics = {
            "train/loss": sums["loss"] / steps,
            "train/learning_rate": self._rate,
            "train/epoch": step / setup.batches.steps_per_epoch,
            "train/gradient_norm": sums["gradient_norm"] / steps,
        }
        for part in (*RANKS, "contrastive"):
            if f"loss/{part}" in sums:
                metrics[f"train/loss/{part}"] = sums[f"loss/{part}"] / sums[f"steps/{part}"]
        metrics |= {name: sums[name] / steps for name in sums if name.startswith("metrics/")}
        devices = setup.model.layout.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        metrics["hardware/memory_used_gb"] = bytes_in_use() / 1e9
        if self._rows:
            metrics["hardware/throughput_seqs_per_sec"] = self._rows / seconds
        if peak is not None:
            metrics["hardware/tpu_utilization"] = self._flops / seconds / (peak * devices.size)
        setup.log(metrics, step)
        self.sums, self._started, self._rows, self._flops = {}, time.monotonic(), 0, 0
        return metrics["train/loss"]


def training_flops(model: TrainableModel, lengths: np.ndarray) -> int:
    """Returns the matrix-product FLOPs of a step over rows of these lengths, without padding and recomputation.

    The backward pass costs one forward pass for the activations, and another for the weights if all are trained
    (Kaplan et al. 2020, arXiv:2001.08361); adapters and heads are not counted.
    """
    times = 2 if model.train.mode == "lora" else 3
    widths, counts = np.unique(lengths, return_counts=True)
    flops = model.transformer.forward_flops
    return times * sum(int(count) * flops(int(n), int(n)) for n, count in zip(widths, counts, strict=True))
