"""Training with its state in a bucket, killed, its local disk deleted: it ends as an uninterrupted run does."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from support.finetuned import check_same_run
from support.places import SCRIPTS

from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.location import local_copy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SERVERS = {
    "s3": ("moto.server", "-H", "127.0.0.1", "-p"),
    "gs": ("gcp_storage_emulator", "start", "-M", "-q", "-H", "localhost", "--default-bucket", "bucket", "--port"),
}
"""Servers on loopback that speak the protocols of S3 and of Google's buckets."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(params=SERVERS)
def store(request, monkeypatch) -> Iterator[str]:
    """A bucket on loopback, which outlives the processes that use it."""
    module, *words = SERVERS[request.param]
    pytest.importorskip(module.split(".")[0])
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[request.param])
    port = str(free_port())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://localhost:{port}")
    server = subprocess.Popen(
        [sys.executable, "-m", module, *words, port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("localhost", int(port)), 1).close()
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.2)
        if request.param == "s3":
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        yield f"{request.param}://bucket/runs/coi"
    finally:
        server.terminate()
        server.wait()


def test_killed_and_its_disk_deleted_it_continues_to_the_same_result(store, tmp_path, monkeypatch):
    write_simulated(str(tmp_path / "barcodes.parquet"), species=20, per_species=10, length=150, seed=0)

    def start(directory: object, disk: Path) -> subprocess.Popen:
        flags = {
            "model.checkpoint": "random:tiny-v2",
            "data.path": tmp_path / "barcodes.parquet",
            "train.output_dir": directory,
            "train.batch_size": 9,
            "train.epochs": 15,  # long enough to be killed long before its end
            "train.max_shapes": 1,
            "train.log_every": 1,
            "train.learning_rate": 0.01,
            "train.warmup_steps": 5,
            "checkpoint.interval_minutes": 0.02,
            "tracking.mode": "disabled",
            "mesh.data": 1,
        }
        command = [
            sys.executable,
            str(SCRIPTS / "finetune.py"),
            *(f"--{name}={value}" for name, value in flags.items()),
        ]
        environment = os.environ | {"XDG_CACHE_HOME": str(disk)}
        with (tmp_path / "said").open("w") as said:  # a pipe that nobody reads would fill up and stop it
            return subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)

    def finish(run: subprocess.Popen) -> str:
        assert run.wait(timeout=400) == 0, (tmp_path / "said").read_text()
        return (tmp_path / "said").read_text()

    filesystem, root = fsspec.core.url_to_fs(store, skip_instance_cache=True)
    sent = {"s3": signal.SIGKILL, "gs": signal.SIGTERM}[store.split(":")[0]]
    end = time.monotonic() + 400
    with start(store, tmp_path / "disk") as run:  # which waits for its end, whatever happens here
        while run.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            filesystem.invalidate_cache()
            if len(filesystem.glob(f"{root}/checkpoints/*")) > 1:  # the first is complete, the second perhaps not
                break
        run.send_signal(sent)
    ended, killed = run.returncode, time.monotonic()
    assert ended == (-9 if sent == signal.SIGKILL else 128 + sent), (tmp_path / "said").read_text()
    shutil.rmtree(tmp_path / "disk")
    finish(start(tmp_path / "whole", tmp_path / "other"))
    if sent == signal.SIGKILL:
        time.sleep(max(0.0, 95 - (time.monotonic() - killed)))  # until the lease of the killed process lapses
    assert "continues after step" in finish(start(store, tmp_path / "disk"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "read"))
    fsspec.filesystem(store.split(":")[0]).clear_instance_cache()
    check_same_run(local_copy(store, "run"), tmp_path / "whole")
