"""Syncs a folder through a server that fails a share of the requests, killed with SIGKILL again and again.

    python tests/sync_campaign.py --store webdav --kills 10 --rows 20000 --failures 0.05 --seed 0

The store is `webdav`, which `rclone serve` offers of a directory and which the rclone program writes to, or `s3`, a
server in memory (moto) through fsspec. A first version is sent, then one with more rows, another column and another
report, then a second folder is made of the copy; each is killed at random requests. After every kill the copy is read
past the proxy: it has to be the version before or the one after, whole. At the end both folders have to be equal.
"""

import argparse
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from support.failing_proxy import FailingProxy, failing_proxy
from support.object_store import BUCKET, served_store
from support.tables import make_table, read, same_bits

from bioscan_jax.bundles.sync import sync
from bioscan_jax.errors import InputError

HIDDEN = 128
PART_BYTES = 100_000
MOST_REQUESTS = {"webdav": 40, "s3": 10}
"""Up to this many requests a run does before it is killed."""


def campaign(
    store: str, directory: Path, kills: int, rows: int, failures: float, seed: int, say: Callable[[str], object]
) -> list[str]:
    """Runs the campaign; returns what was wrong."""
    chosen, wrong = random.Random(seed), []
    folder, laptop = directory / "outputs", directory / "laptop"
    _make(folder, rows)
    serve = {"webdav": _webdav, "s3": _s3}[store]
    with serve(directory, failures, seed) as (proxy, copy, direct, environment):
        versions = [None]
        for change in (None, _change):
            if change is not None:
                change(folder, directory)
            versions.append(_contents(folder))
            check = partial(_check_copy, direct, directory, versions)
            wrong += _killed((folder, copy), proxy, environment, kills, MOST_REQUESTS[store], chosen, say, check)
        wrong += _killed((copy, laptop), proxy, environment, kills, MOST_REQUESTS[store], chosen, say, lambda: [])
        if not _same(_contents(laptop), versions[-1]):
            wrong.append("the second folder differs from the first")
    return wrong


def _killed(
    places: tuple[object, object],
    proxy: FailingProxy,
    environment: dict[str, str],
    kills: int,
    most_requests: int,
    chosen: random.Random,
    say: Callable[[str], object],
    check: Callable[[], list[str]],
) -> list[str]:
    """Runs one sync until it is through, killed at random requests; returns what was wrong."""
    flags = ["--source", str(places[0]), "--target", str(places[1]), "--part_bytes", str(PART_BYTES)]
    command = [sys.executable, "-m", "bioscan_jax", "sync", *flags, "--progress", "false"]
    counts = proxy.requests, proxy.failed, proxy.bytes_in, proxy.bytes_out
    killed, wrong, began = 0, [], time.monotonic()
    while True:
        reached = threading.Event()
        proxy.stop_at = (proxy.requests + chosen.randint(2, most_requests), reached) if killed < kills else None
        run = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        while run.poll() is None and not reached.wait(0.02):
            pass
        if run.poll() is None and killed < kills and reached.is_set():
            os.killpg(run.pid, signal.SIGKILL)  # with the programs that it started
            killed += 1
        out, err = run.communicate(timeout=600)
        if run.returncode == -signal.SIGKILL:
            wrong += check()
            continue
        if run.returncode == 0:
            break
        say(f"ended by {err.strip().splitlines()[-1]}")
        wrong += [f"a traceback: {err[-500:]}"] if "Traceback" in err else []
        if time.monotonic() - began > 1800:
            return [*wrong, "not through after half an hour"]
    requests, failed, sent, received = (
        now - before
        for now, before in zip((proxy.requests, proxy.failed, proxy.bytes_in, proxy.bytes_out), counts, strict=True)
    )
    say(
        f"{killed} kills, {requests:,} requests, {failed:,} failed, {sent:,} bytes to the store, {received:,} from it, "
        f"{time.monotonic() - began:.0f} s; the last run: {out.strip().splitlines()[0].partition(': ')[2]}"
    )
    return [*wrong, *check(), *([] if killed == kills else [f"only {killed} kills"])]


def _make(folder: Path, rows: int) -> None:
    make_table(folder, rows, hidden=HIDDEN)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(np.random.default_rng(0).bytes(300_000))
    (folder / "report.html").write_text("<p>first</p>" * 1000)


def _change(folder: Path, directory: Path) -> None:
    found = read(folder)
    new = found.slice(0, len(found) // 3)
    ids = pa.array([f"new{row}" for row in range(len(new))])
    lance.write_dataset(new.set_column(0, found.schema.field(0), ids), folder / "sequences.lance", mode="append")
    lance.dataset(folder / "sequences.lance").add_columns({"ship": "concat('ship ', cast(station as string))"})
    (folder / "report.html").write_text("<p>second</p>" * 1000)


def _contents(folder: Path) -> dict[str, pa.Table | bytes]:
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".lance" not in str(path) and "/." not in str(path)
    }
    return files | {path.name: read(folder, path.stem) for path in folder.glob("*.lance")}


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        same_bits(one[name], other[name]) if isinstance(one[name], pa.Table) else one[name] == other[name]
        for name in one
    )


def _check_copy(direct: str, directory: Path, versions: list) -> list[str]:
    """Returns what is wrong unless the copy is one of the last two versions."""
    with tempfile.TemporaryDirectory(dir=directory) as fresh:
        try:
            sync(direct, f"{fresh}/folder", progress=False)
        except InputError as error:
            return [] if versions[-2] is None and "first sync is unfinished" in str(error) else [str(error)]
        found = _contents(Path(fresh) / "folder")
    whole = [_same(found, version or {}) for version in versions[-2:]]
    return [] if any(whole) else [f"the copy is no whole version, it has {sorted(found)}"]


@contextmanager
def _webdav(directory: Path, failures: float, seed: int) -> Iterator[tuple[FailingProxy, str, str, dict[str, str]]]:
    remote = directory / "remote"
    remote.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        ["rclone", "serve", "webdav", str(remote), "--addr", f"127.0.0.1:{port}", "--dir-cache-time", "0s"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with failing_proxy(port, failures, seed) as (proxy, url):
            (directory / "rclone.conf").write_text(f"[dav]\ntype = webdav\nurl = {url}\nvendor = other\n")
            environment = os.environ | {"RCLONE_CONFIG": str(directory / "rclone.conf")}
            yield proxy, "rclone:dav:outputs", str(remote / "outputs"), environment
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def _s3(directory: Path, failures: float, seed: int) -> Iterator[tuple[FailingProxy, str, str, dict[str, str]]]:
    with served_store():
        port = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])
        with failing_proxy(port, failures, seed) as (proxy, url):
            copy = f"{BUCKET}/outputs"
            yield proxy, copy, copy, os.environ | {"AWS_ENDPOINT_URL": url}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["webdav", "s3"], default="webdav")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--failures", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    given, say = parser.parse_args(), partial(print, flush=True)
    with tempfile.TemporaryDirectory(prefix="sync-campaign-") as directory:
        arguments = given.store, Path(directory), given.kills, given.rows, given.failures, given.seed, say
        wrong = campaign(*arguments)
    say(f"{given.store}: {'; '.join(wrong) or 'every version was whole and both folders are equal'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
