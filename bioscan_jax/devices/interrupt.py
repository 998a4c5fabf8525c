"""Ctrl-C and preemption: turns signals into requests to stop once the current work is saved."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StopRequest:
    """A flag, true once SIGINT or SIGTERM has arrived.

    Example:
        >>> stop = StopRequest()
        >>> stop.set()
        >>> bool(stop)
        True
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_number: int = signal.SIGTERM

    def __bool__(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def set(self, signal_number: int = signal.SIGTERM) -> None:
        """Requests a stop."""
        self.signal_number = signal_number
        self._event.set()


@contextmanager
def stop_on_signals(unit: str = "block") -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request to stop; the previous handler takes a second SIGINT.

    Outside the main thread, where Python cannot handle signals, the request is never set.

    Args:
        unit: What the run finishes before it stops, for the notice on stderr.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        handler = previous[signal.Signals(number)]
        if stop and number == signal.SIGINT and callable(handler):
            handler(number, frame)
        stop.set(number)
        if sys.stderr is not None:
            with suppress(OSError):  # not sys.stderr, which is not reentrant
                os.write(2, f"\nstopping after the current {unit}\n".encode())

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
