"""The state of training on disk: written beside the work by orbax, whole or not at all, read back on any devices."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from bioscan_jax.errors import InputError

VERSION = 1
"""Of what is kept beside the arrays."""
LAST, BEST = "checkpoints", "best"
"""Directories below a run's own."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """All of the state that is not an array, as JSON holds it."""

    step: int = 0
    """Optimizer steps done."""
    grain: dict[str, Any] | None = None
    """State of the data iterator."""
    rng: list[int] = field(default_factory=list)
    """Data of the key that all randomness on the devices comes from."""
    label_space: str | None = None
    """Its sha256."""
    config: dict[str, Any] = field(default_factory=dict)
    """What decides the run."""
    evaluated: int = 0
    """Step after which validation rows were last looked at."""
    best_step: int | None = None
    best_loss: float | None = None
    """Lowest validation loss so far."""
    waited: int = 0
    """Evaluations since."""
    evaluation: dict[str, float] = field(default_factory=dict)
    """StepMetrics of the last one."""
    window: dict[str, float] = field(default_factory=dict)
    """Sums over the steps since the last line of metrics."""
    seconds: float = 0.0
    """Wall time in training, over all runs."""
    run_id: str | None = None
    """Of the dashboard."""
    finished: str | None = None
    """Why training ended, once it did."""


class Checkpoints:
    """The newest states and the best one; from `open_checkpoints`."""

    def __init__(self, directory: Path, last: Any, best: Any):
        self._directory, self._last, self._best = directory, last, best
        self._pending: Any = None

    def latest(self) -> Progress | None:
        """What the newest whole checkpoint says, or None if there is none.

        Raises:
            InputError: It cannot be read, or another version made it.
        """
        found = self._last.latest
        if found is None:
            return None
        record = dict(self._last.metadata(found.step).custom_metadata or {})
        if record.pop("version", None) != VERSION:
            raise InputError(
                f"{self._directory / LAST}: made by another version of bioscan_jax; pass another --train.output_dir"
            )
        return Progress(**record)

    def restore(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The named trees of a step, each array where its abstract counterpart says.

        Raises:
            InputError: They cannot be read.
        """
        return _loaded(self._last, step, abstract, self._directory / LAST)

    def save(self, progress: Progress, trees: dict[str, Any], *, wait: bool) -> None:
        """Begins to write a checkpoint, after waiting for the one before it; only `wait` stays until it is whole.

        Raises:
            InputError: This one or the one before cannot be written.
        """
        self.wait()
        with _storage(self._directory / LAST):
            record = {"version": VERSION} | dataclasses.asdict(progress)
            self._pending = self._last.save_checkpointables_async(
                progress.step, trees, custom_metadata=record, force=True, overwrite=True
            )
        if wait:
            self.wait()

    def wait(self) -> None:
        """Stays until what was begun is whole."""
        if self._pending is not None:
            with _storage(self._directory / LAST):
                self._pending.result()
            self._pending = None

    def save_best(self, step: int, params: Any, record: dict[str, Any]) -> None:
        """Writes the trained parameters that did best on the validation rows, in place of those before."""
        with _storage(self._directory / BEST):
            self._best.save_checkpointables(
                step, {"params": params}, custom_metadata={"version": VERSION, "step": step} | record, overwrite=True
            )


@contextmanager
def open_checkpoints(directory: Path, *, keep: int) -> Iterator[Checkpoints]:
    """Opens a run's checkpoints, having removed what a kill left half-written."""
    from orbax.checkpoint import v1 as ocp

    def opened(name: str, number: int) -> Any:
        newest: Any = ocp.training.preservation_policies.LatestN(number)
        path = str((directory / name).absolute())
        return ocp.training.Checkpointer(path, cleanup_tmp_directories=True, preservation_policy=newest)

    with _storage(directory):
        last, best = opened(LAST, keep), opened(BEST, 1)
    checkpoints = Checkpoints(directory, last, best)
    try:
        yield checkpoints
        checkpoints.wait()
    finally:
        last.close()
        best.close()


def restore_params(directory: Path, which: str, abstract: dict[str, Any]) -> tuple[int, dict[str, jax.Array]]:
    """The trained parameters of a run.

    Args:
        directory: The run's.
        which: `best`, or `last` for the newest checkpoint.
        abstract: Shapes, dtypes and shardings by dotted path.

    Returns:
        The step they are of, and the parameters.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    from orbax.checkpoint import v1 as ocp

    path = directory / {"best": BEST, "last": LAST}[which]
    if not path.is_dir():
        raise InputError(f"{path}: not found; pass the --train.output_dir of scripts/finetune.py")
    with ocp.training.Checkpointer(str(path.absolute())) as checkpointer:
        if checkpointer.latest is None:
            raise InputError(f"{path}: no checkpoint yet; let the run reach one, or pass --which last")
        step = checkpointer.latest.step
        return step, _loaded(checkpointer, step, {"params": abstract}, path)["params"]


def _loaded(checkpointer: Any, step: int, abstract: dict[str, Any], path: Path) -> dict[str, Any]:
    with _storage(path):
        return checkpointer.load_checkpointables(step, abstract)


@contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(
            f"{path}: a checkpoint cannot be written or read ({line}); free space or mend the path, then run again"
        ) from error
