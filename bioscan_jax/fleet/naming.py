"""Tells which sequences of a block earlier blocks have, by reading the input ahead of the fleet."""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from bioscan_jax.data.encode import EncodedBlock, Encoding
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.embedding.block import tokenise
from bioscan_jax.embedding.repeats import Window, first_rows
from bioscan_jax.fleet.orders import Order

_READERS = 2


class Naming:
    """Makes the orders for the blocks, in turn, in a thread of its own; a context manager.

    Which sequences are copied, and from where, depends on the input alone: it is what a single process would copy. So
    every block has the same batches whichever worker computes it.
    """

    def __init__(self, source: ParquetBlocks, encoding: Encoding, window: int, safe_rows: int, ahead: int) -> None:
        """Prepares to read the input.

        Args:
            source: The input.
            encoding: How its sequences become tokens.
            window: How many earlier blocks are searched for a repeat; if 0, nothing is read.
            safe_rows: Rows of the input that the table has.
            ahead: How many blocks from the first uncommitted one are read.
        """
        self._source, self._encoding, self._window, self._ahead = source, encoding, window, ahead
        self._first, self._offset = divmod(safe_rows, source.block_rows)
        self._frontier = self._first
        self._changed = threading.Condition()
        self._orders: dict[int, Order] = {}
        self._error: BaseException | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="naming", daemon=True)

    def __enter__(self) -> "Naming":
        if self._window:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._window:
            self._thread.join()

    def order(self, block: int) -> Order | None:
        """Returns the order for a block, None if the block is not read yet.

        Raises:
            InputError: The input cannot be read.
        """
        if not self._window:
            return Order(index=block, row=self._row(block), repeats=None, rows=np.empty(0, np.uint64))
        with self._changed:
            if block not in self._orders and self._error is not None:
                raise self._error
            return self._orders.get(block)

    def advance(self, frontier: int, ahead: int) -> None:
        """Forgets the blocks before the first uncommitted one, and lets the reading go on to `ahead` blocks from it."""
        with self._changed:
            self._ahead = ahead
            for block in range(self._frontier, frontier):
                self._orders.pop(block, None)
            self._frontier = frontier
            self._changed.notify_all()

    def _row(self, block: int) -> int:
        return self._offset if block == self._first else 0

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            with self._changed:
                self._error = error

    def _read(self) -> None:
        window, starts = Window(self._window), {}
        waiting: deque[Future[tuple[EncodedBlock, list[bytes]]]] = deque()
        following = max(0, self._first - self._window)
        with ThreadPoolExecutor(_READERS, "naming") as pool, suppress(_Ended):
            while waiting or following < len(self._source):
                while following < len(self._source) and len(waiting) <= _READERS:
                    self._wait_for(following)
                    waiting.append(pool.submit(self._names, following))
                    following += 1
                encoded, names = waiting.popleft().result()
                number, found = encoded.block.index, window.look_up(encoded.block.index, names)
                starts[number] = first_rows(encoded)
                starts.pop(number - self._window - 1, None)
                places = zip(found.blocks.tolist(), found.places.tolist(), strict=True)
                rows = np.array([starts[block][place] for block, place in places], np.uint64)
                if number >= self._first:
                    with self._changed:
                        self._orders[number] = Order(index=number, row=self._row(number), repeats=found, rows=rows)

    def _names(self, block: int) -> tuple[EncodedBlock, list[bytes]]:
        encoded, names = tokenise(self._source, self._encoding, self._source[block], named=True)
        return encoded, list(names)

    def _wait_for(self, block: int) -> None:
        """Waits until a block is near enough; raises `_Ended` at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or block < self._frontier + self._ahead)
            if self._ended:
                raise _Ended


class _Ended(Exception):
    """Nobody needs the orders any more."""
