import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bioscan_jax.errors import InputError
from bioscan_jax.fleet.schedule import Schedule

WORKERS = st.integers(0, 3)


class Events(RuleBasedStateMachine):
    """Any order of requests, results, failures, losses and commits; what the schedule says is held against a list."""

    @initialize(first=st.integers(0, 3), blocks=st.integers(0, 12), ahead=st.integers(1, 5), copies=st.integers(0, 2))
    def start(self, first, blocks, ahead, copies):
        self.schedule = Schedule(range(first, first + blocks), blocks_ahead=ahead, copies=copies)
        self.first, self.stop, self.ahead, self.copies = first, first + blocks, ahead, copies
        self.committed, self.results = [], {}
        self.names = list("abcd")  # changed at each loss
        self.work, self.gone = [], []  # (worker, block): still computing; of lost workers
        self.failures = dict.fromkeys(range(first, first + blocks), 0)

    @rule(worker=WORKERS)
    def ask(self, worker):
        worker = self.names[worker]
        block = self.schedule.next_for(worker)
        if block is None:
            return
        assert len(self.committed) + self.first <= block < len(self.committed) + self.first + self.ahead
        assert block not in self.results
        in_work = [other for other, computed in self.work if computed == block]
        assert not in_work or worker not in {other for other, _ in self.work}  # a copy is for the idle
        assert len(in_work) <= self.copies
        self.work.append((worker, block))

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def finish(self, data):
        worker, block = self.work.pop(data.draw(st.integers(0, len(self.work) - 1)))
        self._result(worker, block)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def late(self, data):
        self._result(*self.gone.pop(data.draw(st.integers(0, len(self.gone) - 1))))

    def _result(self, worker, block):
        assert self.schedule.done(worker, block) == (block not in self.results)
        self.results.setdefault(block, worker)

    @precondition(lambda self: self.work)
    @rule(data=st.data())
    def fail(self, data):
        worker, block = self.work.pop(data.draw(st.integers(0, len(self.work) - 1)))
        if block not in self.results:
            self.failures[block] += 1
        if block not in self.results and self.failures[block] == 3:
            with pytest.raises(InputError, match=f"block {block} failed 3 times, on .*: disk full"):
                self.schedule.failed(worker, block, "disk full")
            self.start(self.first, self.stop - self.first, self.ahead, self.copies)
        else:
            self.schedule.failed(worker, block, "disk full")

    @rule(worker=WORKERS)
    def lose(self, worker):
        self.names[worker], worker = self.names[worker] + "'", self.names[worker]
        held = {block for other, block in self.work if other == worker}
        assert self.schedule.holding(worker) == held
        self.work = [(other, block) for other, block in self.work if other != worker]
        again = {block for block in held if block not in self.results and block not in {b for _, b in self.work}}
        assert self.schedule.lost(worker) == sorted(again)
        self.gone += [(worker, block) for block in held]

    @rule(most=st.integers(1, 4))
    def commit(self, most):
        for block in self.schedule.commit_ready()[:most]:
            assert block == self.first + len(self.committed)
            assert block in self.results
            self.schedule.committed(block)
            self.committed.append(block)

    @rule(more=st.integers(0, 3))
    def workers_come(self, more):
        self.ahead += more
        self.schedule.blocks_ahead = self.ahead

    @invariant()
    def bound(self):
        assert self.schedule.ahead <= self.ahead
        assert self.schedule.frontier == self.first + len(self.committed)
        assert self.schedule.finished == (self.schedule.frontier == self.stop)

    def teardown(self):
        """One worker that lives ends the run: the others are lost, it computes whatever it is given."""
        if not hasattr(self, "schedule"):
            return
        for worker in range(4):
            self.lose(worker)
        self.gone = []
        while not self.schedule.finished:
            before = len(self.committed), len(self.results)
            self.ask(0)
            while self.work:
                self._result(*self.work.pop())
            self.commit(4)
            assert (len(self.committed), len(self.results)) > before
        assert self.committed == list(range(self.first, self.stop))
        assert self.schedule.next_for(self.names[0]) is None


TestEvents = Events.TestCase
TestEvents.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)


def test_a_block_that_failed_on_a_worker_goes_to_another_one_first():
    schedule = Schedule(range(4), blocks_ahead=4, attempts=3)
    assert (schedule.next_for("bad"), schedule.next_for("good")) == (0, 1)
    schedule.failed("bad", 0, "no space left")
    assert schedule.next_for("bad") == 2
    assert schedule.next_for("good") == 0
    schedule.failed("good", 0, "no space left")
    assert schedule.next_for("bad") == 0  # it failed on every worker that is known
    with pytest.raises(InputError, match=r"block 0 failed 3 times, on bad, good: no space left.*same command"):
        schedule.failed("bad", 0, "no space left")


def test_losses_are_not_failures():
    schedule = Schedule(range(1), blocks_ahead=1, attempts=1)
    for _ in range(5):
        assert schedule.next_for("a") == 0
        assert schedule.lost("a") == [0]


def test_an_idle_worker_copies_the_block_that_holds_up_the_commit():
    schedule = Schedule(range(9), blocks_ahead=3)
    assert [schedule.next_for(worker) for worker in "abc"] == [0, 1, 2]
    assert schedule.done("b", 1)
    assert schedule.next_for("b") == 0
    assert schedule.done("b", 0)
    assert schedule.commit_ready() == range(2)
    assert schedule.holding("a") == {0}
    assert not schedule.done("a", 0)
    assert schedule.holding("a") == frozenset()


def test_reports_that_do_not_fit_are_refused():
    schedule = Schedule(range(3), blocks_ahead=3)
    with pytest.raises(ValueError, match="block 0 was never handed out"):
        schedule.done("a", 0)
    with pytest.raises(ValueError, match="worker a does not hold block 0"):
        schedule.failed("a", 0, "")
    with pytest.raises(ValueError, match="block 0 comes next"):
        schedule.committed(0)
