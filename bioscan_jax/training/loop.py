"""Training from the first step, or from where the last run stopped, to the end.

Whatever happens on the way, the parameters at the end are those of a run that was never stopped: a batch, its
augmentation and its dropout come from its number, and a checkpoint holds all else.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from bioscan_jax import config
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.devices.chips import peak_flops
from bioscan_jax.devices.hosts import agree
from bioscan_jax.devices.interrupt import StopRequest
from bioscan_jax.embedding.summary import device_bytes_in_use, resident_bytes
from bioscan_jax.errors import InputError, Interrupted
from bioscan_jax.model.classifier import Arrays
from bioscan_jax.training.batches import ExampleBatch, TrainingBatches
from bioscan_jax.training.examples import Examples
from bioscan_jax.training.metrics import EmbeddingMoments, report
from bioscan_jax.training.state import Checkpoints, Progress
from bioscan_jax.training.step import Learner, Numbers, make_train_step, place

STEPS_AHEAD = 2
"""Steps on the devices while the host makes the next one ready."""
READERS = 2
Log = Callable[[dict[str, float], int], None]
Evaluate = Callable[[Arrays, StopRequest], dict[str, float] | None]


@dataclass
class State:
    """What a step changes."""

    params: Arrays
    optimizer: optax.OptState


@dataclass(frozen=True, kw_only=True, eq=False)
class Course:
    """Everything that is settled before the first step."""

    learner: Learner
    batches: TrainingBatches
    examples: Examples
    checkpoint: config.CheckpointConfig
    checkpoints: Checkpoints
    log: Log
    evaluate: Evaluate | None
    """None without validation rows."""

    @property
    def train(self) -> config.TrainConfig:
        """How training goes."""
        return self.learner.train


def run(course: Course, state: State, progress: Progress, stop: StopRequest, bar: tqdm) -> Progress:
    """Trains until the last epoch, or until validation has not improved for long enough.

    Args:
        course: What is trained on what.
        state: After `progress.step` steps; changed in place.
        progress: Where it stands.
        stop: Looked at after every step.
        bar: Counts steps.

    Raises:
        InputError: The loss was not finite; checkpoints stay as they were.
        Interrupted: A stop was asked for; the state is saved.
    """
    step_of = make_train_step(course.learner, len(course.batches))
    per_epoch, total = course.batches.steps_per_epoch, len(course.batches)
    window, clock = Window(course, progress), _Clock(progress.seconds)
    pending: deque[tuple[int, ExampleBatch, Numbers]] = deque()
    saved = time.monotonic()
    with closing(_reader(course, progress)) as reader:
        while True:
            progress, over = _end_of_epoch(course, state, progress, stop)
            if progress.step >= total and (course.evaluate is None or progress.evaluated == total):
                over = over or "all epochs done"
            asked, due = agree(bool(stop), time.monotonic() - saved >= 60.0 * course.checkpoint.interval_minutes)
            if over or asked or (due and progress.step):
                window.settle(pending, 0)
                progress = dataclasses.replace(
                    progress,
                    grain=reader.get_state(),
                    window=window.sums,
                    seconds=clock.seconds,
                    finished=over or None,
                )
                course.checkpoints.save(progress, vars(state), wait=bool(over or asked))
                saved = time.monotonic()
            if over:
                return progress
            if asked:
                raise Interrupted(
                    f"stopped after step {progress.step:,} of {total:,}, which is safe in a checkpoint; "
                    "the same command goes on from there",
                    stop.signal_number,
                )
            batch = next(reader)
            placed = place(
                batch, course.learner.layout, course.train.batch_tokens, pad=course.learner.transformer.pad_token_id
            )
            state.params, state.optimizer, numbers = step_of(
                state.params, state.optimizer, course.learner.frozen, jnp.uint32(progress.step), placed
            )
            progress = dataclasses.replace(progress, step=progress.step + 1)
            pending.append((progress.step, batch, numbers))
            bar.update()
            at_log = progress.step % course.train.log_every == 0 or progress.step % per_epoch == 0
            window.settle(pending, 0 if at_log else STEPS_AHEAD)
            if at_log:
                bar.set_postfix(loss=f"{window.log(progress.step):.4f}", refresh=False)


def _reader(course: Course, progress: Progress) -> grain.DatasetIterator:
    """Batches from the next one on, made ready in threads."""
    dataset = grain.MapDataset.source(course.batches)  # pyright: ignore[reportArgumentType]
    reader = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=READERS, prefetch_buffer_size=2 * READERS)))
    if progress.grain is not None:
        reader.set_state(progress.grain)
    return reader


def _end_of_epoch(course: Course, state: State, progress: Progress, stop: StopRequest) -> tuple[Progress, str | None]:
    """Evaluates where an epoch has just ended; says why training is over if it is."""
    step = progress.step
    if course.evaluate is None or step % course.batches.steps_per_epoch or step == progress.evaluated:
        return progress, None
    numbers = course.evaluate(state.params, stop)
    if numbers is None:
        return progress, None
    course.log(numbers, step)
    progress = dataclasses.replace(progress, evaluated=step, waited=progress.waited + 1, evaluation=numbers)
    loss = numbers["eval/loss"]
    if not np.isfinite(loss):
        raise InputError(
            f"the validation loss is {loss} after step {step}; lower --train.learning_rate and pass another "
            "--train.output_dir (the checkpoints here are kept)"
        )
    if progress.best_loss is None or loss < progress.best_loss:
        progress = dataclasses.replace(progress, best_step=step, best_loss=loss, waited=0)
        course.checkpoints.save_best(step, state.params, {"numbers": numbers})
    patience = course.train.patience
    if patience is not None and progress.waited >= patience:
        return progress, f"no lower validation loss for {progress.waited} epoch(s)"
    return progress, None


class _Clock:
    """Wall time in training, over all runs."""

    def __init__(self, before: float):
        self._before, self._begun = before, time.monotonic()

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._begun


class Window:
    """Means over the steps since the last line of metrics, checked for what is not finite."""

    def __init__(self, course: Course, progress: Progress):
        self._course, self.sums = course, dict(progress.window)
        self._begun, self._rows, self._flops, self._rate = time.monotonic(), 0, 0, 0.0

    def settle(self, pending: deque[tuple[int, ExampleBatch, Numbers]], ahead: int) -> None:
        """Waits for all steps but the last few, and adds their numbers.

        Raises:
            InputError: A loss or a gradient was not finite.
        """
        while len(pending) > ahead:
            step, batch, numbers = pending.popleft()
            self._add(step, batch, jax.device_get(numbers))

    def _add(self, step: int, batch: ExampleBatch, numbers: Numbers) -> None:
        if not numbers.good:
            raise InputError(self._bad(step, batch, numbers))
        found = {"steps": 1.0, "loss": float(numbers.loss), "gradient_norm": float(numbers.gradient_norm)}
        self._rate = float(numbers.learning_rate)
        for rank, value, known in zip(RANKS, numbers.ranks.tolist(), numbers.known.tolist(), strict=True):
            if known and self._course.learner.train.objective == "taxonomy":
                found |= {f"loss/{rank}": value, f"steps/{rank}": 1.0}
        spread = report(moments=EmbeddingMoments(*map(np.float64, numbers.moments)))
        for name, value in (found | spread).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        used = int((batch.rows >= 0).sum())
        self._rows += used
        lengths = (batch.ids[:used] != self._course.learner.transformer.pad_token_id).sum(axis=1)
        self._flops += training_flops(self._course.learner, lengths)

    def _bad(self, step: int, batch: ExampleBatch, numbers: Numbers) -> str:
        per_epoch = self._course.batches.steps_per_epoch
        epoch, number = divmod(step - 1, per_epoch)
        rows = batch.rows[batch.rows >= 0]
        what = "loss" if not np.isfinite(numbers.loss) else "gradient's norm"
        value = numbers.loss if what == "loss" else numbers.gradient_norm
        return (
            f"the {what} is {float(value)} at step {step} (epoch {epoch + 1}, batch {number + 1} of {per_epoch}; its "
            f"first row is {self._course.examples.locate(int(rows[0]))}); the checkpoints before it are kept; lower "
            "--train.learning_rate or look at the weights, and pass another --train.output_dir"
        )

    def log(self, step: int) -> float:
        """Writes a line of metrics, begins the next window, and gives the mean loss."""
        course, sums, seconds = self._course, self.sums, max(time.monotonic() - self._begun, 1e-9)
        steps = sums["steps"]
        numbers = {
            "train/loss": sums["loss"] / steps,
            "train/learning_rate": self._rate,
            "train/epoch": step / course.batches.steps_per_epoch,
            "train/gradient_norm": sums["gradient_norm"] / steps,
        }
        for rank in RANKS:
            if f"loss/{rank}" in sums:
                numbers[f"train/loss/{rank}"] = sums[f"loss/{rank}"] / sums[f"steps/{rank}"]
        numbers |= {name: sums[name] / steps for name in sums if name.startswith("metrics/")}
        devices = course.learner.layout.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind)
        used = device_bytes_in_use()
        numbers["hardware/memory_used_gb"] = (used if used is not None else resident_bytes()) / 1e9
        if self._rows:
            numbers["hardware/throughput_seqs_per_sec"] = self._rows / seconds
        if peak is not None:
            numbers["hardware/tpu_utilization"] = self._flops / seconds / (peak * devices.size)
        course.log(numbers, step)
        self.sums, self._begun, self._rows, self._flops = {}, time.monotonic(), 0, 0
        return numbers["train/loss"]


def training_flops(learner: Learner, lengths: np.ndarray) -> int:
    """Matrix-product FLOPs that a step over rows of these lengths needs, padding and recomputation left out.

    The backward pass costs the forward one again for the activations, and once more for the weights if all are
    trained (Kaplan et al. 2020, arXiv:2001.08361); adapters and heads are left out.
    """
    times = 2 if learner.train.mode == "lora" else 3
    widths, counts = np.unique(lengths, return_counts=True)
    flops = learner.transformer.forward_flops
    return times * sum(int(count) * flops(int(n), int(n)) for n, count in zip(widths, counts, strict=True))
