"""Decides which worker of a fleet gets which block, and which finished blocks can be committed."""

from collections.abc import Hashable

from bioscan_jax.errors import InputError

BLOCK_SECONDS = 60.0
"""Time that a block should take on one worker; its rows follow from the worker's speed."""
BLOCKS_AHEAD = 16
"""Blocks beyond the first uncommitted one that may be handed out, for each worker."""
COPIES = 1
"""These three are the policy that `bioscan fleet simulate` was used to choose; see guide/fleet.md."""


class Schedule:
    """Hands out blocks in order, repeats those of lost workers, and releases results in order for the commit.

    A state machine of facts that the caller reports: it starts nothing, waits for nothing and reads no clock. A worker
    is any hashable identifier; one that comes back after it was lost takes another.

    Example:
        >>> schedule = Schedule(range(3), blocks_ahead=2, copies=0)
        >>> schedule.next_for("a"), schedule.next_for("b"), schedule.next_for("b")
        (0, 1, None)
        >>> schedule.lost("a")
        [0]
        >>> schedule.done("b", 1), schedule.commit_ready()
        (True, range(0, 0))
        >>> schedule.next_for("b"), schedule.done("b", 0), schedule.commit_ready()
        (0, True, range(0, 2))
        >>> schedule.committed(0), schedule.committed(1), schedule.next_for("b"), schedule.finished
        (None, None, 2, False)
    """

    def __init__(self, blocks: range, *, blocks_ahead: int, attempts: int = 3, copies: int = COPIES) -> None:
        """Starts with every block still to be handed out.

        Args:
            blocks: Numbers of the blocks to do, in steps of one; the first is the next that the table takes.
            blocks_ahead: Only blocks below the first uncommitted one plus this number are handed out.
            attempts: Failures of one block, none of them the loss of a worker, after which the run must end.
            copies: Workers that may compute a block in work once more, when they would otherwise be idle.

        Raises:
            ValueError: A number is out of range.
        """
        if blocks.step != 1 or blocks_ahead < 1 or attempts < 1 or copies < 0:
            raise ValueError(f"{blocks}, blocks_ahead={blocks_ahead}, attempts={attempts}, copies={copies}")
        self._stop, self._attempts, self._copies = blocks.stop, attempts, copies
        self.blocks_ahead = blocks_ahead
        """May be changed at any time, as workers come; blocks that are handed out stay so."""
        self._frontier = self._new = blocks.start
        self._returned: set[int] = set()  # handed out before, and nobody works on them now
        self._done: set[int] = set()  # finished, not committed
        self._holders: dict[int, set[Hashable]] = {}  # of each block that is handed out and not finished
        self._copyable: dict[int, None] = {}  # of these, those that may be copied; longest in work first
        self._held: dict[Hashable, set[int]] = {}  # finished by another worker or not
        self._failures: dict[int, list[Hashable]] = {}

    @property
    def frontier(self) -> int:
        """The first block that is not committed."""
        return self._frontier

    @property
    def ahead(self) -> int:
        """Number of blocks from the frontier on that were handed out: in work, or finished and not committed."""
        return self._new - self._frontier

    @property
    def finished(self) -> bool:
        """Whether every block is committed."""
        return self._frontier == self._stop

    def holding(self, worker: Hashable) -> frozenset[int]:
        """Returns the blocks that a worker was given and has not reported on."""
        return frozenset(self._held.get(worker, ()))

    def next_for(self, worker: Hashable) -> int | None:
        """Gives a worker its next block, which counts as its own until it is reported done, failed or lost.

        Returned blocks come first, then new ones, each lowest first; then, for a worker that holds none, a copy of the
        block that has been in work the longest. A block that failed on a worker goes to others while any is known. Workers are known from
        their first call until lost.

        Args:
            worker: Who asks; it may hold other blocks.

        Returns:
            A block's number; None if there is nothing to do for this worker until something is reported or committed.
        """
        self._held.setdefault(worker, set())
        block = self._pop_returned(worker)
        if block is None and self._new < min(self._stop, self._frontier + self.blocks_ahead):
            block, self._new = self._new, self._new + 1
        if block is None:
            block = self._block_to_copy(worker)
        if block is not None:
            self._holders.setdefault(block, set()).add(worker)
            self._held[worker].add(block)
            self._update_copyable(block)
        return block

    def _pop_returned(self, worker: Hashable) -> int | None:
        suitable = [block for block in self._returned if self._suits(worker, block)]
        if not suitable:
            return None
        block = min(suitable)
        self._returned.remove(block)
        return block

    def _suits(self, worker: Hashable, block: int) -> bool:
        """Whether the block has not failed on this worker, or has failed on every known worker."""
        failed = self._failures.get(block, ())
        return worker not in failed or self._held.keys() <= set(failed)

    def _block_to_copy(self, worker: Hashable) -> int | None:
        if self._held[worker]:
            return None
        return next((block for block in self._copyable if self._suits(worker, block)), None)

    def _update_copyable(self, block: int) -> None:
        if 0 < len(self._holders.get(block, ())) <= self._copies:
            self._copyable.setdefault(block)
        else:
            self._copyable.pop(block, None)

    def done(self, worker: Hashable, block: int) -> bool:
        """Takes note of a result, also of one that arrives after its worker counted as lost.

        Returns:
            Whether it is the block's first; any other must be thrown away.

        Raises:
            ValueError: The block was never handed out.
        """
        if block >= self._new:
            raise ValueError(f"block {block} was never handed out")
        self._release(worker, block)
        if block < self._frontier or block in self._done:
            return False
        self._failures.pop(block, None)
        if self._holders.pop(block, None) is None:
            self._returned.remove(block)
        self._update_copyable(block)
        self._done.add(block)
        return True

    def failed(self, worker: Hashable, block: int, reason: str) -> None:
        """Takes note that a block failed on a worker that is still there; the block is given out again.

        Args:
            worker: Who reports.
            block: A block that it holds.
            reason: One line for the error message.

        Raises:
            InputError: It was the last of the attempts.
            ValueError: The worker does not hold the block.
        """
        if block not in self._held.get(worker, ()):
            raise ValueError(f"worker {worker} does not hold block {block}")
        if self._release(worker, block):
            failures = self._failures.setdefault(block, [])
            failures.append(worker)
            if len(failures) >= self._attempts:
                places = ", ".join(dict.fromkeys(map(str, failures)))
                raise InputError(
                    f"block {block} failed {len(failures)} times, on {places}: {reason}; what was committed is safe: "
                    "fix the cause, then run the same command again"
                )
            self._return(block)

    def lost(self, worker: Hashable) -> list[int]:
        """Takes note that a worker has gone, and gives its blocks to others.

        Returns:
            The blocks that now have to be done again, lowest first.
        """
        held = sorted(self._held.get(worker, ()))
        again = [block for block in held if self._release(worker, block) and self._return(block)]
        self._held.pop(worker, None)
        return again

    def _release(self, worker: Hashable, block: int) -> bool:
        """Takes a block from a worker; returns whether it is a block still in work that this worker held."""
        self._held.get(worker, set()).discard(block)
        holders = self._holders.get(block, set())
        held = worker in holders
        holders.discard(worker)
        self._update_copyable(block)
        return held

    def _return(self, block: int) -> bool:
        """Makes a block available again unless another worker holds it; returns whether it did."""
        if self._holders[block]:
            return False
        del self._holders[block]
        self._returned.add(block)
        return True

    def commit_ready(self) -> range:
        """Returns the consecutive blocks from the frontier on whose results are there."""
        stop = self._frontier
        while stop in self._done:
            stop += 1
        return range(self._frontier, stop)

    def committed(self, block: int) -> None:
        """Takes note that a block's result is in the table.

        Raises:
            ValueError: The block is not at the frontier, or its result is not there.
        """
        if block != self._frontier or block not in self._done:
            raise ValueError(f"block {block} cannot be committed: block {self._frontier} comes next")
        self._done.remove(block)
        self._frontier += 1
