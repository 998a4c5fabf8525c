"""A Ray cluster on this machine whose workers, nodes and driver are killed at random, and what the table is then."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.embed_runs import environment, rows_there
from support.places import SCRIPTS

_STORE_BYTES = 80 << 20
_PATIENCE = {"RAY_raylet_start_wait_time_s": "300"}
"""Busy machines start a node slowly."""
_SECONDS = 600.0
"""Without a new row in the table for so long, a campaign has failed."""


@dataclass
class Nodes:
    """A head without workers, and nodes with room for one worker each."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.cluster.address

    def join(self) -> str:
        """Adds a node."""
        node = self.cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES, include_dashboard=False, wait=False)
        self.nodes.append(node)
        return f"a node joins ({len(self.nodes)} nodes)"

    def leave(self, chance: random.Random) -> str:
        """Removes a node in order."""
        node = self.nodes.pop(chance.randrange(len(self.nodes)))
        with suppress(Exception):
            self.cluster.remove_node(node)
        return f"a node leaves ({len(self.nodes)} nodes)"

    def kill_raylet(self, chance: random.Random) -> str:
        node = self.nodes.pop(chance.randrange(len(self.nodes)))
        pid = _raylet(node)
        os.kill(pid, signal.SIGKILL)
        with suppress(Exception):
            self.cluster.remove_node(node, allow_graceful=False)  # what is left of it
        return f"SIGKILL of raylet {pid} ({len(self.nodes)} nodes)"

    def kill_worker(self, chance: random.Random) -> str | None:
        """Kills one of the processes that embed; None if there is none."""
        pids = self.workers()
        if not pids:
            return None
        pid = chance.choice(pids)
        os.kill(pid, signal.SIGKILL)
        return f"SIGKILL of worker {pid}"

    def workers(self) -> list[int]:
        found = []
        for node in self.nodes:
            with suppress(psutil.Error):
                for child in psutil.Process(_raylet(node)).children(recursive=True):
                    with suppress(psutil.Error):
                        if child.cmdline()[0].startswith("ray::Worker"):
                            found.append(child.pid)
        return found


def _raylet(node: Any) -> int:
    return node.all_processes["raylet"][0].process.pid


@contextmanager
def ray_cluster(nodes: int, cache: Path) -> Iterator[Nodes]:
    """Starts a cluster whose processes have one CPU device, and notices soon when one is gone."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", **_PATIENCE)
    from ray.cluster_utils import Cluster

    system = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    with warnings.catch_warnings(), _restored_environment(fleet_environment(cache)):
        # Ray starts its processes by fork and exec; nothing of Lance runs in between.
        warnings.filterwarnings("ignore", "lance is not fork-safe", UserWarning)
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "object_store_memory": _STORE_BYTES,
                "include_dashboard": False,
                "_system_config": system,
            },
        )
        made = Nodes(cluster)
        for _ in range(nodes):
            made.join()
        try:
            yield made
        finally:
            cluster.shutdown()


@contextmanager
def _restored_environment(wanted: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def fleet_environment(cache: Path) -> dict[str, str]:
    """Returns the environment of the driver and the nodes; programs are compiled once for all."""
    return environment() | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **_PATIENCE,
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")]),
    }


def start_driver(arguments: list[str], cache: Path, stderr: Path) -> subprocess.Popen:
    """Starts a command whose stderr goes to the end of a file."""
    with stderr.open("ab") as end:
        return subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=end, env=fleet_environment(cache)
        )


def fleet_campaign(
    command: list[str],
    uri: Path,
    rows: int,
    *,
    nodes: int,
    kills: int,
    driver_kills: int,
    seed: int,
    say: Callable[[str], object] = print,
) -> tuple[bool, str]:
    """Runs a command on a cluster, of which processes are killed as the table grows, until it ends by itself.

    Args:
        command: An embed command, without the flags of the fleet.
        uri: Its database.
        rows: Rows of its input.
        nodes: Nodes of the cluster at the start.
        kills: SIGKILLs of workers and raylets; a node joins for each that is lost, and some leave in order.
        driver_kills: SIGKILLs of the driver, after which the same command is started again.
        seed: Of the moments and the victims.
        say: Takes the log, line by line.

    Returns:
        Whether the last driver ended with code 0 after all kills, and the end of its output.
    """
    chance, begun = random.Random(seed), time.monotonic()
    events = ["worker", "raylet"] * kills
    chance.shuffle(events)
    events = events[:kills] + ["driver"] * driver_kills + ["leave"] * (kills // 6)
    chance.shuffle(events)
    with tempfile.TemporaryDirectory(prefix="fleet-") as directory:
        cache, log = Path(directory, "compiled"), Path(directory, "stderr")
        with ray_cluster(nodes, cache) as cluster:
            arguments = [*command, f"--fleet.address={cluster.address}", f"--fleet.workers={nodes}"]
            driver = start_driver(arguments, cache, log)
            try:
                number, seen, moved = 0, 0, time.monotonic()
                while driver.poll() is None:
                    time.sleep(0.1)
                    now = rows_there(uri)
                    moved = time.monotonic() if now != seen else moved
                    seen = now
                    if time.monotonic() - moved > _SECONDS:
                        break
                    due = number < len(events) and now >= rows * 0.9 * (number + 0.5) / len(events)
                    if not due or (now == 0 and number):
                        continue
                    what = events[number]
                    if what == "driver":
                        driver.kill()
                        driver.communicate()
                        said = f"SIGKILL of the driver {driver.pid}; the same command again"
                        driver = start_driver(arguments, cache, log)
                    elif what == "worker":
                        said = cluster.kill_worker(chance)
                        if said is None:
                            continue
                    else:
                        said = cluster.kill_raylet(chance) if what == "raylet" else cluster.leave(chance)
                        said += f"; {cluster.join()}"
                    number += 1
                    say(f"{time.monotonic() - begun:6.1f} s  {now:6,} rows  {number:2d}/{len(events)} {said}")
                if driver.poll() is None:
                    driver.kill()
                output = driver.communicate()[0].decode()
            finally:
                if driver.poll() is None:
                    driver.kill()
                    driver.communicate()
        text = log.read_text(errors="replace").replace("\r", "\n")
        told = [line for line in text.splitlines() if line.strip() and not line.startswith("embed:")]
    say(f"{time.monotonic() - begun:6.1f} s  the driver ended with code {driver.returncode}")
    if driver.returncode:
        return False, "\n".join(told[-20:])
    if number < len(events):
        return False, f"only {number} of {len(events)} events came before the end"
    return True, output


def script_command(data: Path, uri: Path, **flags: object) -> list[str]:
    """Returns a command that embeds with the tiny model."""
    every = {"model.checkpoint": "random:tiny-v2", "data.path": data, "sink.uri": uri} | {
        name.replace("__", "."): value for name, value in flags.items()
    }
    return [sys.executable, str(SCRIPTS / "embed.py"), *(f"--{name}={value}" for name, value in every.items())]
