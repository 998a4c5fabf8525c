"""Checkpoints of training: written atomically in the background by orbax, and restored on any devices.

The state of the data iterator is one number, kept with the JSON metadata: grain's own checkpoint handler writes a file
per process, which another number of processes could not restore.
"""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax

from bioscan_jax.errors import InputError, one_line
from bioscan_jax.training.run_directory import BEST, LAST, RunDirectory

VERSION = 1
"""Version of the metadata kept beside the arrays."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The part of the state that is not an array, stored as JSON."""

    step: int = 0
    """Optimizer steps done."""
    grain: dict[str, Any] | None = None
    """State of the data iterator."""
    rng: list[int] = field(default_factory=list)
    """Data of the JAX key from which all randomness on the devices is derived."""
    label_space: str | None = None
    """SHA-256 of the label space."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings that determine the run; see `run_settings`."""
    evaluated: int = 0
    """Step of the last evaluation."""
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss so far."""
    waited: int = 0
    """Evaluations since the best one."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums over the steps since the last line of metrics.jsonl."""
    seconds: float = 0.0
    """Wall time of training, over all calls."""
    run_id: str | None = None
    """Run id on the dashboard."""
    finished: str | None = None
    """Reason why training ended; None before."""


class Checkpoints:
    """The newest checkpoints and the best one; created by `open_checkpoints`."""

    def __init__(self, directory: RunDirectory, keep: int, last: Any, best: Any, pool: ThreadPoolExecutor):
        self._directory, self._keep, self._last, self._best, self._pool = directory, keep, last, best, pool
        self._pending: Future[None] | None = None

    def latest(self) -> Progress | None:
        """Returns the progress in the newest complete checkpoint, or None if there is none.

        Raises:
            InputError: The checkpoint was made by another version.
        """
        found = self._last.latest
        if found is None:
            return None
        record = dict(self._last.metadata(found.step).custom_metadata or {})
        if record.pop("version", None) != VERSION:
            raise InputError(
                f"{self._directory.name}/{LAST}: made by another version of bioscan_jax; pass another --train.output_dir"
            )
        return Progress(**record)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """Restores the trees of a step, with the shardings of their abstract arrays.

        Raises:
            InputError: The checkpoint cannot be read.
        """
        return _loaded(self._last, step, abstract, f"{self._directory.name}/{LAST}")

    def save(self, progress: Progress, trees: dict[str, Any], *, wait: bool) -> None:
        """Starts to write a checkpoint after the previous one has finished; `wait` also waits for this one.

        Raises:
            InputError: This checkpoint or the previous one cannot be written.
        """
        self.wait()
        self._directory.check()
        self._directory.put_files()  # with the metrics up to this step, which a run that continues here does not repeat
        with self._storage(LAST):
            record = {"version": VERSION} | dataclasses.asdict(progress)
            writing = self._last.save_checkpointables_async(
                progress.step, trees, custom_metadata=record, force=True, overwrite=True
            )

        def finish() -> None:
            writing.result()
            self._directory.put_checkpoint(LAST, progress.step, keep=self._keep)

        self._pending = self._pool.submit(finish)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until the pending save has finished."""
        if self._pending is not None:
            with self._storage(LAST):
                self._pending.result()
            self._pending = None

    def _storage(self, name: str) -> AbstractContextManager[None]:
        return _storage(f"{self._directory.name}/{name}")

    def save_best(self, step: int, params: Any, record: dict[str, Any]) -> None:
        """Writes the parameters with the lowest validation loss, in place of the previous best ones."""
        self._directory.check()
        with self._storage(BEST):
            self._best.save_checkpointables(
                step, {"params": params}, custom_metadata={"version": VERSION, "step": step} | record, overwrite=True
            )
            self._directory.put_checkpoint(BEST, step, keep=1)


@contextmanager
def open_checkpoints(directory: RunDirectory, *, keep: int) -> Iterator[Checkpoints]:
    """Opens a run's checkpoints after removing incomplete ones left by a kill."""
    from orbax.checkpoint import v1 as ocp

    def opened(name: str, number: int) -> Any:
        newest: Any = ocp.training.preservation_policies.LatestN(number)
        return ocp.training.Checkpointer(
            directory.checkpoints(name), cleanup_tmp_directories=True, preservation_policy=newest
        )

    with _storage(directory.name):
        directory.fetch_newest(LAST)
        last, best = opened(LAST, keep), opened(BEST, 1)
    try:
        with ThreadPoolExecutor(1, "checkpoint") as pool:
            checkpoints = Checkpoints(directory, keep, last, best, pool)
            yield checkpoints
            checkpoints.wait()
    finally:
        last.close()
        best.close()


def restore_params(directory: RunDirectory, which: str, abstract: dict[str, Any]) -> tuple[int, dict[str, jax.Array]]:
    """Restores the trained parameters of a run.

    Args:
        directory: Directory of the run.
        which: `best`, or `last` for the newest checkpoint.
        abstract: Shapes, dtypes and shardings by dotted path.

    Returns:
        The step of the checkpoint, and the parameters.

    Raises:
        InputError: There is no checkpoint, or it cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    name = {"best": BEST, "last": LAST}[which]
    path = f"{directory.name}/{name}"
    if not directory.has(name):
        raise InputError(f"{path}: not found; pass the --train.output_dir of bioscan finetune")
    directory.fetch_newest(name)
    with _storage(path), ocp.training.Checkpointer(directory.checkpoints(name)) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{path}: no checkpoint yet; let the run reach one, or pass --which last")
        step = checkpointer.latest.step
        return step, _loaded(checkpointer, step, {"params": abstract}, path)["params"]


def _loaded(checkpointer: Any, step: int, abstract: dict[str, Any], path: str) -> dict[str, Any]:
    with _storage(path):
        return checkpointer.load_checkpointables(step, abstract)


@contextmanager
def _storage(path: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: a checkpoint cannot be written or read ({one_line(error)}); free space or fix the path, then run again"
        ) from error
