"""Simulates a fleet whose machines come and go, event by event, with the scheduler that a real one uses."""

import dataclasses
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from bioscan_jax.errors import InputError
from bioscan_jax.fleet.schedule import BLOCK_SECONDS, BLOCKS_AHEAD, COPIES, Schedule

_HOUR = 3600.0
_MOST_BLOCKS = 5_000_000
_MOST_MACHINES = 100_000
"""Most machines at the start; with ten for each block, as many taken away show that a run has no end."""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The machines, the rows and the table of a simulation; every figure is an assumption that can be changed.

    Example:
        >>> round(Fleet(workers=100).available, 3)
        0.923
    """

    rows: int = 100_000_000
    """Rows of the input."""
    workers: int = 1_000
    """Machines, each with one worker; a preempted one comes back."""
    rows_per_second: float = 10.0
    """Rows that one worker computes in a second."""
    preempted_hours: float = 2.0
    """Mean time until a machine is taken away, exponentially distributed; 0 for never."""
    away_minutes: float = 10.0
    """Mean time until it is back, exponentially distributed."""
    startup_seconds: float = 120.0
    """Time that a machine which is there needs until it computes: loading the weights, compiling."""
    noticed_seconds: float = 15.0
    """Time until the loss of a worker is noticed, and its blocks are given to others."""
    spread: float = 0.3
    """Spread of the seconds per block: standard deviation of their logarithm."""
    slow_share: float = 0.01
    """Share of the machines that are slow each time they come."""
    slow_factor: float = 4.0
    """How many times as long a block takes on a slow one."""
    held: int = 3
    """Blocks that a worker holds: the one that it computes, and those that wait for it."""
    commit_seconds: float = 0.005
    """Time of a commit to an empty table; measured on a local disk."""
    fragment_microseconds: float = 9.0
    """What each fragment of the table adds to the time of a commit; measured on a local disk, up to 10,000 of them."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        for name, least in {"rows": 1, "workers": 1, "held": 1, "slow_factor": 1.0}.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)} is too small; pass at least {least}")
        if self.workers > _MOST_MACHINES:
            raise InputError(f"{self.workers:,} machines are too many to simulate; pass at most {_MOST_MACHINES:,}")
        for one in dataclasses.fields(self):
            if not 0 <= getattr(self, one.name) < float("inf"):
                raise InputError(f"--{one.name} {getattr(self, one.name)} is out of range; pass 0 or more")
        if not self.rows_per_second or self.slow_share > 1:
            raise InputError("--rows_per_second must be above 0, --slow_share at most 1")

    @property
    def available(self) -> float:
        """Share of the time in which a machine is there, on average."""
        there = self.preempted_hours * _HOUR
        return there / (there + self.away_minutes * 60) if there else 1.0


@dataclass(frozen=True)
class Policy:
    """How a fleet's work is cut and bounded."""

    block_seconds: float = BLOCK_SECONDS
    """Mean seconds of a block on one worker, which decide its rows."""
    blocks_ahead: float = BLOCKS_AHEAD
    """Blocks that may be handed out beyond the first uncommitted one, for each worker."""
    copies: int = COPIES
    """Idle workers that may compute a block in work once more."""

    def __post_init__(self) -> None:
        if not (0 < self.block_seconds < float("inf") and 0 < self.blocks_ahead < float("inf") and self.copies >= 0):
            raise InputError(
                f"--block_seconds {self.block_seconds:g}, --blocks_ahead {self.blocks_ahead:g}, --copies {self.copies}: "
                "the first two must be above 0, the last one 0 or more"
            )


@dataclass(kw_only=True)
class Outcome:
    """What a simulated run took; hours are of simulated time, worker-hours are summed over the machines."""

    policy: Policy
    workers: int
    block_rows: int
    blocks: int
    ideal_hours: float
    """All machines computing in all of the time in which they are there, at their mean speed."""
    hours: float = 0.0
    preempted: int = 0
    """Machines taken away."""
    repeated: int = 0
    """Blocks given out again because their worker was lost."""
    thrown_away: int = 0
    """Results that another worker's came before."""
    commits: int = 0
    most_ahead: int = 0
    """Most blocks from the first uncommitted one to the last one handed out."""
    worker_hours: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("kept", "copied", "lost", "starting", "idle"), 0.0)
    )
    """Of results that were kept, of copies thrown away, of blocks cut off by a preemption, of starts, and waiting."""
    uncommitted: float = 0.0
    """Blocks finished and not committed, on average: what is computed again if the driver is lost."""

    @property
    def driver_minutes(self) -> float:
        """Minutes of the whole fleet's work that are lost with the driver, on average."""
        return self.uncommitted * self.policy.block_seconds / self.workers / 60

    def share(self, what: str) -> float:
        """Returns the share of all worker-hours that went into one part of `worker_hours`."""
        return self.worker_hours[what] / sum(self.worker_hours.values())

    def row(self) -> dict[str, str]:
        """Returns the figures as text, by the headings of a table."""
        policy = self.policy
        return {
            "s/block": f"{policy.block_seconds:g}",
            "rows/block": f"{self.block_rows:,}",
            "ahead": f"{policy.blocks_ahead:g} x workers",
            "copies": f"{policy.copies}",
            "hours": f"{self.hours:.2f}",
            "of ideal": f"{self.hours / self.ideal_hours:.3f}",
            "preempted": f"{self.preempted:,}",
            "repeated": f"{self.repeated:,}",
            "twice": f"{self.thrown_away:,}",
            "commits": f"{self.commits:,}",
            "most ahead": f"{self.most_ahead:,}",
            **{what: f"{100 * self.share(what):.1f}%" for what in ("starting", "lost", "copied", "idle")},
            "driver": f"{self.driver_minutes:.1f} min",
        }


@dataclass
class _Worker:
    """One stay of one machine."""

    name: int
    factor: float
    """Seconds that its blocks take, as a multiple of the mean."""
    queue: deque[int] = field(default_factory=deque)
    """The block that it computes, then those that wait."""
    since: float = 0.0
    """When it began to do what it does: starting, waiting, computing."""
    ready: bool = False
    there: bool = True


class _Run:
    """The state of a simulation: the clock, the events to come, the workers and the real schedule."""

    def __init__(self, fleet: Fleet, policy: Policy) -> None:
        block_rows = max(1, round(policy.block_seconds * fleet.rows_per_second))
        blocks = -(-fleet.rows // block_rows)
        if blocks > _MOST_BLOCKS:
            raise InputError(f"{blocks:,} blocks are too many to simulate; pass a larger --block_seconds")
        self.fleet, self.policy, self.random = fleet, policy, random.Random(fleet.seed)
        self.now, self.order, self.events = 0.0, itertools.count(), []
        ahead = max(1, round(policy.blocks_ahead * fleet.workers))
        self.schedule = Schedule(range(blocks), blocks_ahead=ahead, copies=policy.copies)
        rate = (
            fleet.workers
            * fleet.available
            * fleet.rows_per_second
            * (1 - fleet.slow_share * (1 - 1 / fleet.slow_factor))
        )
        self.outcome = Outcome(
            policy=policy,
            workers=fleet.workers,
            block_rows=block_rows,
            blocks=blocks,
            ideal_hours=fleet.rows / rate / _HOUR,
        )
        self.seconds = block_rows / fleet.rows_per_second
        self.idle: dict[int, _Worker] = {}  # waiting for a block
        self.short: dict[int, _Worker] = {}  # computing, with fewer blocks than they may hold
        self.committing, self.finished = False, 0
        self.workers: dict[int, _Worker] = {}

    def later(self, seconds: float, happens: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), happens))

    def run(self) -> Outcome:
        for _ in range(self.fleet.workers):
            self.arrive()
        while not self.schedule.finished:
            then, _, happens = heapq.heappop(self.events)
            self.outcome.uncommitted += (self.finished - self.schedule.frontier) * (then - self.now)
            self.now = then
            happens()
        for worker in self.workers.values():
            self.account(
                worker, "idle" if worker.ready and not worker.queue else "copied" if worker.queue else "starting"
            )
        self.outcome.uncommitted /= self.now
        self.outcome.hours = self.now / _HOUR
        return self.outcome

    def account(self, worker: _Worker, what: str) -> None:
        """Adds the time since the worker's last change to a part of the worker-hours."""
        self.outcome.worker_hours[what] += (self.now - worker.since) / _HOUR
        worker.since = self.now

    def arrive(self) -> None:
        slow = self.random.random() < self.fleet.slow_share
        worker = _Worker(next(self.order), self.fleet.slow_factor if slow else 1.0, since=self.now)
        self.workers[worker.name] = worker
        self.later(self.fleet.startup_seconds, partial(self.start, worker))
        if self.fleet.preempted_hours:
            there = self.random.expovariate(1 / (self.fleet.preempted_hours * _HOUR))
            self.later(there, partial(self.leave, worker))

    def start(self, worker: _Worker) -> None:
        if worker.there:
            self.account(worker, "starting")
            worker.ready = True
            self.fill(worker)

    def leave(self, worker: _Worker) -> None:
        self.account(worker, "lost" if worker.queue else "idle" if worker.ready else "starting")
        self.outcome.preempted += 1
        if self.outcome.preempted > _MOST_MACHINES + 10 * self.outcome.blocks:
            raise InputError(
                f"{self.outcome.preempted:,} machines were taken away before the end: a machine that is there for "
                f"{self.fleet.preempted_hours:g} h hardly finishes a block; lower --block_seconds or --startup_seconds"
            )
        worker.there = False
        del self.workers[worker.name]
        self.idle.pop(worker.name, None)
        self.short.pop(worker.name, None)
        self.later(self.fleet.noticed_seconds, partial(self.notice, worker))
        away = self.random.expovariate(1 / (self.fleet.away_minutes * 60)) if self.fleet.away_minutes else 0.0
        self.later(away, self.arrive)

    def notice(self, worker: _Worker) -> None:
        self.outcome.repeated += len(self.schedule.lost(worker.name))
        self.wake()

    def fill(self, worker: _Worker) -> bool:
        """Gives a worker as many blocks as it may hold; returns whether it got one."""
        got = False
        while len(worker.queue) < self.fleet.held:
            block = self.schedule.next_for(worker.name)
            if block is None:
                break
            got = True
            worker.queue.append(block)
            if len(worker.queue) == 1:
                self.account(worker, "idle")
                self.compute(worker)
        self.outcome.most_ahead = max(self.outcome.most_ahead, self.schedule.ahead)
        self.idle.pop(worker.name, None)
        self.short.pop(worker.name, None)
        if len(worker.queue) < self.fleet.held:
            (self.short if worker.queue else self.idle)[worker.name] = worker
        return got

    def wake(self) -> None:
        """Offers work to those that wait for it, the idle first, until one gets none."""
        for waiting in (self.idle, self.short):
            for worker in list(waiting.values()):
                if not self.fill(worker):
                    break

    def compute(self, worker: _Worker) -> None:
        sigma = self.fleet.spread
        spread = self.random.lognormvariate(-sigma * sigma / 2, sigma)  # of mean 1
        self.later(self.seconds * worker.factor * spread, partial(self.finish, worker))

    def finish(self, worker: _Worker) -> None:
        if not worker.there:
            return
        first = self.schedule.done(worker.name, worker.queue.popleft())
        self.account(worker, "kept" if first else "copied")
        self.outcome.thrown_away += not first
        self.finished += first
        if worker.queue:
            self.compute(worker)
        self.fill(worker)
        self.commit()

    def commit(self) -> None:
        """Begins to commit all that is ready, unless a commit is under way."""
        ready = self.schedule.commit_ready()
        if ready and not self.committing:
            self.committing = True
            seconds = self.fleet.commit_seconds + self.fleet.fragment_microseconds * 1e-6 * ready.stop
            self.later(seconds, partial(self.end_commit, ready))

    def end_commit(self, ready: range) -> None:
        for block in ready:
            self.schedule.committed(block)
        self.outcome.commits += 1
        self.committing = False
        self.commit()
        self.wake()


def simulate(fleet: Fleet, policy: Policy) -> Outcome:
    """Simulates one run of a fleet.

    Raises:
        InputError: There are too many blocks, or the run has no end.

    Example:
        >>> fleet = Fleet(rows=100_000, workers=10, preempted_hours=0.5)
        >>> found = simulate(fleet, Policy())
        >>> found.blocks, found.block_rows, found.hours > found.ideal_hours
        (167, 600, True)
    """
    return _Run(fleet, policy).run()


def describe(fleet: Fleet) -> str:
    """Returns the assumptions of a simulation as lines of text."""
    lines = {
        "SIMULATED": "no machine was used: every figure follows from these assumptions",
        "fleet": f"{fleet.workers:,} workers of {fleet.rows_per_second:g} rows/s for {fleet.rows:,} rows; seed {fleet.seed}",
        "preempted": f"every {fleet.preempted_hours:g} h on average, back after {fleet.away_minutes:g} min, noticed after "
        f"{fleet.noticed_seconds:g} s, computing {fleet.startup_seconds:g} s after the start"
        if fleet.preempted_hours
        else "never",
        "spread": f"{fleet.spread:g} (lognormal) of the seconds of a block; {100 * fleet.slow_share:g}% of the machines "
        f"take {fleet.slow_factor:g} times as long",
        "commits": f"one at a time, {fleet.commit_seconds:g} s and {fleet.fragment_microseconds:g} us for each fragment",
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in lines.items())
