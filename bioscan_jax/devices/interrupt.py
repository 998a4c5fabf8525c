"""Ctrl-C and preemption: finish what is being written, then stop and say how to go on."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class StopRequest:
    """Set by the first SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.signal_number: int = signal.SIGTERM

    def __bool__(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def set(self, signal_number: int = signal.SIGTERM) -> None:
        """Asks everyone who looks to stop."""
        self.signal_number = signal_number
        self._event.set()


@contextmanager
def stop_on_signals(what: str = "block") -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request to stop; a second SIGINT is handled as it was before.

    Python's own way with SIGINT is KeyboardInterrupt; the scripts leave at once. Outside the main thread, where Python cannot take signals, the request is never set.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        before = previous[signal.Signals(number)]
        if stop and number == signal.SIGINT and callable(before):
            before(number, frame)
        stop.set(number)
        if sys.stderr is not None:
            with suppress(OSError):  # sys.stderr itself may be in the middle of a write, and cannot be entered twice
                os.write(2, f"\nstopping after the {what} in hand\n".encode())

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
