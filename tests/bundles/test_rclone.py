"""Bundles through the real rclone program, on a local remote and over WebDAV; it comes from the distribution."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from support.tables import make_table, read, same_bits
from sync_campaign import campaign

from bioscan_jax.bundles.bundle import bundle as export_bundle
from bioscan_jax.bundles.manifest import JOURNAL, MANIFEST, BundleCheck, verify_bundle
from bioscan_jax.bundles.merge import import_bundle
from bioscan_jax.bundles.sync import sync
from bioscan_jax.errors import InputError
from bioscan_jax.location import locate

PARTS = 20_000


@pytest.fixture
def configured(tmp_path, monkeypatch) -> Path:
    """A remote called stick, an alias of a directory; nothing of the user's configuration is read."""
    assert shutil.which("rclone"), "these tests need the rclone program: apt-get install rclone"
    (tmp_path / "remote").mkdir()
    (tmp_path / "rclone.conf").write_text(f"[stick]\ntype = alias\nremote = {tmp_path}/remote\n")
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    return tmp_path / "remote"


@pytest.mark.rclone
def test_a_round_trip_through_a_remote(configured, tmp_path):
    made = make_table(tmp_path / "db")
    export_bundle(str(tmp_path / "db"), str(tmp_path / "local"), part_bytes=PARTS, progress=False)
    place = "rclone:stick:deep/bundle"
    done = export_bundle(str(tmp_path / "db"), place, part_bytes=PARTS, progress=False)
    bundle = configured / "deep" / "bundle"
    sent = {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()}
    local = tmp_path / "local"
    assert sent == {p.relative_to(local).as_posix(): p.read_bytes() for p in local.rglob("*") if p.is_file()}
    assert verify_bundle(place) == BundleCheck(done.files, ())
    for inserted in (429, 0):
        assert import_bundle(place, str(tmp_path / "new")).inserted == inserted
        assert same_bits(read(tmp_path / "new"), made)
    (bundle / "vectors" / "part-000001.parquet").write_bytes(b"x" * len(sent["vectors/part-000001.parquet"]))
    (bundle / "run.json").unlink()
    assert list(verify_bundle(place).faults) == [
        "run.json: missing",
        "vectors/part-000001.parquet: damaged, its sha256 is wrong",
    ]
    (bundle / MANIFEST).rename(bundle / JOURNAL)  # as a kill before the last step leaves it
    with pytest.raises(InputError, match="unfinished export"):
        verify_bundle(place)
    again = export_bundle(str(tmp_path / "db"), place, part_bytes=PARTS, progress=False)
    assert again.kept == done.files - 2
    assert {p.relative_to(bundle).as_posix(): p.read_bytes() for p in bundle.rglob("*") if p.is_file()} == sent


@pytest.mark.rclone
def test_a_round_trip_over_webdav(configured, tmp_path, monkeypatch):
    made = make_table(tmp_path / "db", 200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["rclone", "serve", "webdav", str(configured), "--addr", f"127.0.0.1:{port}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        (tmp_path / "rclone.conf").write_text(f"[dav]\ntype = webdav\nurl = http://127.0.0.1:{port}\nvendor = other\n")
        done = export_bundle(str(tmp_path / "db"), "rclone:dav:bundle", part_bytes=PARTS, progress=False)
        assert verify_bundle("rclone:dav:bundle") == BundleCheck(done.files, ())
        import_bundle("rclone:dav:bundle", str(tmp_path / "new"))
        assert same_bits(read(tmp_path / "new"), made)
    finally:
        server.terminate()
        server.wait(30)
    with pytest.raises(InputError, match="rclone lsjson failed .*fix it and run the same command again"):
        verify_bundle("rclone:dav:bundle")


@pytest.mark.rclone
def test_a_sync_both_ways_through_a_remote(configured, tmp_path):
    made = make_table(tmp_path / "db")
    place = "rclone:stick:deep/outputs"
    first = sync(str(tmp_path / "db"), place, part_bytes=PARTS, progress=False)
    (tmp_path / "db" / "report.html").write_text("<p>")
    again = sync(str(tmp_path / "db"), place, part_bytes=PARTS, progress=False)
    assert (again.changed, again.sent, again.spared_bytes) == (("report.html",), 1, first.sent_bytes)
    assert sync(place, str(tmp_path / "new"), progress=False).sent == first.sent + 1
    assert same_bits(read(tmp_path / "new"), made)
    assert sync(str(tmp_path / "new"), place, progress=False).sent == 0
    vectors = next((configured / "deep" / "outputs").rglob("vector-*"))
    vectors.write_bytes(b"x" * vectors.stat().st_size)
    with pytest.raises(InputError, match="vector-.* is damaged; remove it, then sync the copy from its source again"):
        sync(place, str(tmp_path / "third"), progress=False)
    vectors.unlink()
    assert sync(str(tmp_path / "db"), place, part_bytes=PARTS, progress=False).sent == 1
    sync(place, str(tmp_path / "third"), progress=False)
    assert same_bits(read(tmp_path / "third"), made)
    with pytest.raises(InputError, match="a folder of tables is a directory or a URL"):
        sync(place, "rclone:stick:elsewhere", progress=False)
    with pytest.raises(InputError, match="no synced copy is there; check the path, or swap"):
        sync("rclone:stick:nowhere", str(tmp_path / "db"), progress=False)


@pytest.mark.rclone
def test_a_sync_over_webdav_with_kills_and_failing_requests(tmp_path):
    assert campaign("webdav", tmp_path, 2, 1000, 0.05, 0, lambda line: None) == []


@pytest.mark.rclone
def test_rclone_errors_are_one_line(configured):
    with pytest.raises(InputError, match="it is no bundle; check the path"):
        verify_bundle("rclone:stick:nowhere")
    with pytest.raises(InputError, match="rclone lsjson failed .*didn't find section in config file") as error:
        verify_bundle("rclone:nonesuch:nowhere")
    assert "\n" not in str(error.value)


def test_a_missing_rclone_is_reported(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="rclone is not installed; get it from your distribution or rclone.org"):
        locate("rclone:stick:bundle", "target")


@pytest.mark.parametrize("place", ["rclone:", "rclone:bundle", "rclone:--config=x:y"])
def test_invalid_remotes_are_not_passed_to_rclone(place, monkeypatch, tmp_path):
    (tmp_path / "rclone").write_text('#!/bin/sh\ntouch "$(dirname "$0")/called"\n')
    os.chmod(tmp_path / "rclone", 0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="pass rclone:REMOTE:PATH"):
        locate(place, "target")
    assert not (tmp_path / "called").exists()
