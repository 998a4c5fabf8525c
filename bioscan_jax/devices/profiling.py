"""Traces what the devices do during a few steps of a run, with JAX's profiler."""

from collections.abc import Callable, Hashable
from types import TracebackType
from typing import TypeVar

import jax

from bioscan_jax.errors import InputError, logger
from bioscan_jax.location import local_directory

WARM_UP = 3
"""Steps in a row with nothing new to compile before a trace starts."""
TRACED_STEPS = 20
"""Steps in a trace; its size grows with them."""
Result = TypeVar("Result")


class StepProfiler:
    """Traces `TRACED_STEPS` steps of a run once it is warm, and names them in the trace; a context manager.

    The trace is below `DIRECTORY/plugins/profile`, one set of files a host, for `xprof` or TensorBoard's profile plugin.
    A run that ends before it is warm writes none, and says so.

    Example:
        >>> import jax.numpy as jnp
        >>> with StepProfiler("trace", "embed") as profiler:
        ...     for number in range(5):
        ...         _ = profiler.run((4, 4), jnp.ones, (4, 4))
        >>> len(list(Path("trace").rglob("*.xplane.pb")))
        1
    """

    def __init__(self, directory: str | None, name: str):
        """Creates the directory.

        Args:
            directory: Where the trace is written; None for no trace.
            name: Name of the steps in the trace.

        Raises:
            InputError: The directory is a URL, or cannot be created.
        """
        self._name, self._directory = name, None if directory is None else local_directory(directory, flag="profile")
        self._compiled: set[Hashable] = set()
        self._steps = self._warm = self._traced = 0
        self._tracing = False
        self._last: object = None
        if directory is not None and self._directory is None:
            raise InputError(f"--profile {directory!r} is a URL; pass a local directory")
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(
                    f"--profile {directory!r}: {error.strerror}; pass a directory you may write"
                ) from error

    def __enter__(self) -> "StepProfiler":
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends a trace that is under way; warns if there was none."""
        if self._tracing:
            self._stop(wait=error is None)
        elif self._directory is not None and not self._traced and error is None:
            logger.warning(
                f"--profile {self._directory}: no trace, since only {self._steps} step(s) were run; one starts after "
                f"{WARM_UP} steps with nothing to compile"
            )

    def run(self, shape: Hashable, function: Callable[..., Result], *arguments: object) -> Result:
        """Calls the function that starts a step on the devices, and returns what it returns.

        Args:
            shape: Equal for steps that use the same compiled program; the first one of each compiles it.
            function: Starts the step.
            arguments: Of the function.
        """
        if self._directory is None or (self._traced and not self._tracing):
            return function(*arguments)
        if not self._tracing:
            self._warm = self._warm + 1 if shape in self._compiled else 0
            self._compiled.add(shape)
            if self._warm > WARM_UP:
                jax.block_until_ready(self._last)
                jax.profiler.start_trace(self._directory)
                self._tracing = True
        self._steps += 1
        with jax.profiler.StepTraceAnnotation(self._name, step_num=self._steps):
            self._last = result = function(*arguments)
        if self._tracing:
            self._traced += 1
            if self._traced == TRACED_STEPS:
                self._stop(wait=True)
        return result

    def _stop(self, *, wait: bool) -> None:
        """Waits for the traced steps, unless the run has failed, and writes the trace."""
        self._tracing = False
        if wait:
            jax.block_until_ready(self._last)
        self._last = None
        try:
            jax.profiler.stop_trace()
        except OSError as error:
            logger.warning(f"--profile {self._directory}: the trace cannot be written ({error.strerror})")
            return
        first = self._steps - self._traced + 1
        logger.info(
            f"trace of steps {first} to {self._steps} in {self._directory}; open it with `xprof {self._directory}`"
        )
