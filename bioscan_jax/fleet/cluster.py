"""The workers of a fleet on a Ray cluster: started where there is room, checked, watched and ended."""

import dataclasses
import itertools
import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from bioscan_jax import config
from bioscan_jax.errors import InputError, logger, one_line
from bioscan_jax.fleet.orders import Facts, Order, Refusal, Settings, WorkerRecord, Written
from bioscan_jax.fleet.worker import Worker
from bioscan_jax.table.plan import Plan, differences

CALLS = 16
"""Calls that a worker answers at a time."""
_CONNECT_SECONDS = 10.0
_FETCH_SECONDS = 30.0
_LOOK_SECONDS = 1.0
"""How often the cluster is asked for its resources while there is no worker."""
_REFUSED_SECONDS = 10.0
"""How long to wait for a suitable worker once one was refused."""
_FAILED_LOADS = 3
"""Workers that may die while they load, with no other left, before the run ends."""
PROBE_TOLERANCE = 0.05
"""Largest relative difference of a probe's vector where kinds of devices are mixed: bfloat16 rounds to 1 in 256."""


@contextmanager
def connected(fleet: config.FleetConfig) -> Iterator[Any]:
    """Connects this process to a Ray cluster, and yields the module `ray`; uses a connection that there is already.

    Raises:
        InputError: Ray is not installed, the address is wrong, or the cluster has other versions of Ray or Python.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_rpc_server_connect_timeout_s", "10")
    try:
        ray: Any = import_module("ray")
        import_module("ray.exceptions")
    except ImportError as error:
        raise InputError(
            f"--fleet.address {fleet.address} needs Ray, which is not installed; pip install 'bioscan_jax[fleet]'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    _check_reachable(fleet.address)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        own: dict[str, Any] = {"include_dashboard": False} if fleet.address == "local" else {}
        with warnings.catch_warnings(), _silent_stderr():
            warnings.simplefilter("ignore")  # what matters of them is in the error
            ray.init(address=fleet.address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises this class itself where a node does not start in time
        raise _connection_error(fleet.address, error) from error
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what the C++ part of Ray writes to stderr: a line for each of its tries to connect."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _check_reachable(address: str) -> None:
    if address in ("local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError(f"--fleet.address {address!r} has no port; pass local, auto, HOST:6379 or ray://HOST:10001")
    grpc: Any = import_module("grpc")  # comes with Ray

    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
    except (OSError, grpc.FutureTimeoutError) as error:
        why = one_line(error) if isinstance(error, OSError) else "what listens is not Ray"
        raise InputError(
            f"--fleet.address {address}: no Ray answers there ({why}); pass the address that `ray start --head` printed"
        ) from error


def _connection_error(address: str, error: BaseException) -> InputError:
    text, told, cause = one_line(error), "", error
    while cause is not None:
        told, cause = f"{told} {cause}", cause.__cause__ or cause.__context__
    if "AuthToken" in told:
        return InputError(
            f"--fleet.address {address}: that cluster asks for a token, which this process does not give; set "
            "RAY_AUTH_MODE=token here, and copy the head's ~/.ray/auth_token to every machine"
        )
    if "ersion mismatch" in text or "ersions" in text and "Python" in text:
        return InputError(
            f"--fleet.address {address}: that cluster has another version of Ray or Python than this machine ({text}); "
            "install the same on all machines"
        )
    if address == "local":
        return InputError(
            f"--fleet.address local: Ray cannot start on this machine ({text}); it may be too busy, or short of memory or "
            "space in /tmp: run the same command again, or leave --fleet.address out"
        )
    if address == "auto":
        return InputError(
            f"--fleet.address auto: this machine is in no Ray cluster ({text}); `ray start --head` starts one, "
            "`ray start --address HOST:6379` joins one"
        )
    return InputError(
        f"--fleet.address {address}: Ray cannot connect ({text}); HOST:6379 is for machines of the cluster, "
        "ray://HOST:10001 for others, and a cluster with tokens needs RAY_AUTH_MODE=token here, too"
    )


@dataclass(eq=False)
class Member:
    """One worker, and what it is doing."""

    record: WorkerRecord
    actor: Any
    state: str = "asked"
    """asked, loading, ready or refused."""
    began: float = 0.0

    @property
    def name(self) -> str:
        """Names it in messages."""
        return self.record.name


@dataclass(frozen=True)
class Answer:
    """The end of a call to a worker."""

    member: Member
    call: str
    """The method that was called: compute or write."""
    block: int
    written: Written | None
    failure: str | None
    """What the call raised; the worker is still there."""


class Cluster:
    """The workers there are. All methods are called by one thread."""

    def __init__(self, ray: Any, fleet: config.FleetConfig, settings: Settings) -> None:
        self._ray, self._fleet, self._settings = ray, fleet, settings
        self._members: list[Member] = []
        self._calls: dict[Any, tuple[Member, str, int]] = {}
        self._numbers = itertools.count(1)
        self._alone_since = time.monotonic()
        self._failed_loads: list[str] = []
        self._actor = ray.remote(Worker)
        self.facts: Facts | None = None
        """Of the first worker that was accepted; the others must agree."""
        self.records: list[WorkerRecord] = []
        self.refused: list[str] = []
        self.lost = 0
        self.load_seconds = 0.0

    @property
    def ready(self) -> list[Member]:
        """The workers that take blocks."""
        return [member for member in self._members if member.state == "ready"]

    def grow(self, most: int) -> None:
        """Asks Ray for more workers: all that are wanted, or where no number was given one at a time.

        Args:
            most: Workers for which there is something to do.
        """
        states = [member.state for member in self._members]
        wanted, refused = self._fleet.workers, states.count("refused")
        room = (1 if states.count("asked") == 0 else 0) if wanted is None else wanted - len(states)
        for _ in range(min(room, most - (len(states) - refused))):
            record = WorkerRecord(name=f"worker {next(self._numbers)}")
            actor = self._actor.options(**_options(self._fleet.resources)).remote(self._settings)
            member = Member(record, actor)
            self._members.append(member)
            self._calls[actor.greet.remote()] = member, "greet", -1

    def compute(self, member: Member, order: Order) -> None:
        """Starts to embed a block."""
        self._calls[member.actor.compute.remote(order)] = member, "compute", order.index

    def write(self, member: Member, block: int, earlier: dict) -> None:
        """Starts to write a block that was computed."""
        self._calls[member.actor.write.remote(block, earlier)] = member, "write", block

    def forget(self, member: Member, block: int) -> None:
        """Lets a worker drop a block that it has computed."""
        member.actor.forget.remote(block)

    def poll(self, seconds: float, on_lost: Callable[[Member], object]) -> list[Answer]:
        """Waits for the end of some call, and returns those about blocks.

        Args:
            seconds: The longest time to wait.
            on_lost: Called with each worker that has gone.

        Raises:
            InputError: There is no worker, and none can be expected.
        """
        self._check_hope()
        if not self._calls:
            time.sleep(min(seconds, 0.05))
            return []
        ended, rest = self._ray.wait(list(self._calls), num_returns=1, timeout=seconds)
        if ended and rest:
            ended += self._ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        answers = []
        for reference in ended:
            if reference in self._calls and (answer := self._take(reference, on_lost)) is not None:
                answers.append(answer)
        return answers

    def _take(self, reference: Any, on_lost: Callable[[Member], object]) -> Answer | None:
        member, call, block = self._calls.pop(reference)
        errors = self._ray.exceptions
        try:
            value = self._ray.get(reference, timeout=_FETCH_SECONDS)
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else error
            reason = str(cause) if isinstance(cause, InputError) else one_line(cause)
            if call in ("compute", "write"):
                return Answer(member, call, block, None, reason)
            self._refuse(member, reason)
        except errors.RayError as error:
            self._lose(member, one_line(error), on_lost)
        else:
            if call in ("compute", "write"):
                return Answer(member, call, block, value, None)
            self._introduce(member, call, value)
        return None

    def _introduce(self, member: Member, call: str, value: Any) -> None:
        """Takes the next step with a worker that greeted or has loaded."""
        if call == "greet":
            member.record.name = f"{member.name} on {value.host}"
            mine = Worker(self._settings).greet().versions
            if other := differences(value.versions, mine):
                self._refuse(member, f"it has other versions than the driver ({other}); install the same")
                return
            member.state = "loading"
            self._calls[member.actor.load.remote()] = member, "load", -1
        elif call == "load":
            if isinstance(value, Refusal):
                self._refuse(member, value.reason)
            elif self.facts is not None and (reason := mismatch(self.facts, value, mixed=self._fleet.mixed)):
                self._refuse(member, reason)
            else:
                self.facts = self.facts or value
                self.load_seconds = max(self.load_seconds, value.load_seconds)
                self._failed_loads.clear()
                member.state, member.began, member.record.devices = "ready", time.perf_counter(), value.devices
                self.records.append(member.record)

    def _refuse(self, member: Member, reason: str) -> None:
        """Leaves a worker idle: it keeps its place, so that no other one is started there to be refused again."""
        member.state = "refused"
        self.refused.append(f"{member.name}: {reason}")
        logger.warning(f"{self.refused[-1]} (refused)")
        self._calls[member.actor.park.remote()] = member, "park", -1

    def _lose(self, member: Member, reason: str, on_lost: Callable[[Member], object]) -> None:
        with suppress(Exception):
            self._ray.kill(member.actor)
        self._members.remove(member)
        self._calls = {ref: call for ref, call in self._calls.items() if call[0] is not member}
        if member.state == "ready":
            self.lost += 1
            logger.debug(f"{member.name} is lost: {reason}")
            on_lost(member)
        elif member.state != "refused":
            self._failed_loads.append(f"{member.name}: {reason}")
        if not self.ready:
            self._alone_since = time.monotonic()

    def _check_hope(self) -> None:
        """Raises InputError if no worker ever was accepted and none can be expected."""
        states = {member.state for member in self._members}
        if self.facts is not None or "loading" in states:
            self._alone_since = time.monotonic()
            return
        if len(self._failed_loads) >= _FAILED_LOADS:
            raise InputError(f"{len(self._failed_loads)} workers ended while they started; {self._failed_loads[-1]}")
        waited = time.monotonic() - self._alone_since
        if self.refused and (states == {"refused"} or waited > _REFUSED_SECONDS):
            raise InputError(self.refused[0])
        if waited > self._fleet.start_seconds:
            raise InputError(self._no_room())

    def _no_room(self) -> str:
        wanted = self._fleet.resources
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        fits = [node for node in nodes if all(node.get(name, 0) >= amount for name, amount in wanted.items())]
        shown = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        if fits:
            return (
                f"{len(fits)} machine(s) of the cluster have {shown}, but others use them, or no worker can start there "
                f"within {self._fleet.start_seconds:g} s; wait for them, or pass other --fleet.resources"
            )
        kinds = {name for node in nodes for name in node if ":" not in name and "memory" not in name}
        best = {name: max(node.get(name, 0) for node in nodes) for name in sorted(kinds)}
        return (
            f"no machine of the cluster has {shown} (the most that one has: "
            f"{', '.join(f'{amount:g} {name}' for name, amount in best.items()) or 'nothing'}); pass other "
            "--fleet.resources, or a longer --fleet.start_seconds where an autoscaler is starting machines"
        )

    def end(self) -> None:
        """Ends all workers at once."""
        for member in self._members:
            with suppress(Exception):
                self._ray.kill(member.actor)
        self._members.clear()
        self._calls.clear()


def mismatch(first: Facts, found: Facts, *, mixed: bool) -> str | None:
    """Returns why a worker would not compute what the first one computes; None if it would.

    Args:
        first: What the first worker tells.
        found: What another one tells.
        mixed: Whether kinds of devices may differ, and with them vectors by rounding.
    """
    if Plan(found.plan).sha256 != Plan(first.plan).sha256:
        return f"its plan is another one: {differences(first.plan, found.plan)}"
    if (found.devices, found.shapes) != (first.devices, first.shapes) and not mixed:
        return (
            f"it has {found.devices}, the first worker {first.devices}: their vectors differ by rounding; take one "
            "kind, or allow that with --fleet.mixed true"
        )
    if found.probe.shape == first.probe.shape and np.array_equal(found.probe, first.probe):
        return None
    if not mixed:
        return (
            "its vectors of the probe have other bits than those of the first worker, though the devices have the same "
            "name; take one kind of processor, or allow that with --fleet.mixed true"
        )
    scale = np.linalg.norm(first.probe, axis=1).max(initial=1e-30)
    error = np.linalg.norm(found.probe - first.probe, axis=1).max(initial=0.0) / scale
    if error <= PROBE_TOLERANCE:
        return None
    return (
        f"its vectors of the probe differ by {error:.2g} of their length from those of the first worker, more than the "
        f"{PROBE_TOLERANCE} that rounding explains"
    )


def _options(resources: dict[str, int | float]) -> dict[str, Any]:
    """Returns what one worker takes, as Ray's options; Ray restarts none, since the driver gives its blocks to others."""
    others = dict(resources)
    found: dict[str, Any] = {"num_cpus": others.pop("CPU", 0), "num_gpus": others.pop("GPU", 0)}
    if "memory" in others:
        found["memory"] = others.pop("memory")
    whole = {name: int(amount) if math.isclose(amount, round(amount)) else amount for name, amount in others.items()}
    return found | {"resources": whole, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": CALLS}


def summed(records: list[WorkerRecord]) -> list[dict[str, Any]]:
    """Returns the records of workers as JSON values, each with its rate."""
    return [dataclasses.asdict(one) | {"rows_per_second": one.rows_per_second} for one in records]
