"""The largest batch whose program fits, found with few compilations."""

from collections.abc import Callable

from bioscan_jax.data.batching import WIDTH_STEP

ATTEMPTS = 7
"""Compilations at most."""
_GROWTH = 16


def step_down(rows: int) -> int:
    """The next smaller number of rows a device that batches have: up to a TPU's eight sublanes any, then multiples."""
    return rows if rows <= WIDTH_STEP else rows - rows % WIDTH_STEP


def step_up(rows: int) -> int:
    """The number of rows a device that follows."""
    return rows + 1 if rows < WIDTH_STEP else rows + WIDTH_STEP


def largest_rows(
    bytes_of: Callable[[int], int], rows: int, used: int, *, fixed: int, available: int
) -> tuple[int, int | None]:
    """Finds how many rows a device can take; their memory grows about linearly.

    Args:
        bytes_of: Compiles the program for some rows a device: bytes it needs.
        rows: For which that is known.
        used: Bytes needed for them.
        fixed: Bytes needed whatever the rows: a first guess.
        available: Bytes there are.

    Returns:
        Rows that fit, 0 if none do, and the least number tried that does not. If there is none, or if it is not the
        one that follows, `ATTEMPTS` programs were not enough to know better.
    """
    known = [(0, fixed), (rows, used)]
    fits, over = (rows, None) if used <= available else (0, rows)
    for _ in range(ATTEMPTS):
        if over is not None and step_up(fits) >= over:
            break
        (x, a), (y, b) = known[-2:]
        slope = max((b - a) / (y - x), 1.0)
        guess = step_down(int(y + (available - b) / slope))
        guess = max(guess, step_up(fits))
        guess = min(guess, step_down(over - 1) if over is not None else fits * _GROWTH)
        need = bytes_of(guess)
        known.append((guess, need))
        if need <= available:
            fits = guess
        else:
            over = guess
    return fits, over
