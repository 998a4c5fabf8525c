"""The lease of a table in an object store."""

import json
import os
import time
from collections.abc import Iterator

import fsspec
import pytest

from bioscan_jax.errors import InputError
from bioscan_jax.table import lease
from bioscan_jax.table.lock import writer_lock

URI = "memory://bucket/db"
DIRECTORY = "/bucket/db/.t.lease"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lease, "STALE_SECONDS", 60.0)
    fsspec.filesystem("memory").store.clear()
    yield
    fsspec.filesystem("memory").store.clear()


def leave(number: int, age: float) -> str:
    """Writes the lease of a process that is gone."""
    path = f"{DIRECTORY}/{number:08d}.json"
    holder = {"pid": 7, "host": "ship", "command": "embed", "started": "2026", "token": "x", "beat": time.time() - age}
    fsspec.filesystem("memory").pipe_file(path, json.dumps(holder).encode())
    return path


def leases() -> list[str]:
    return fsspec.filesystem("memory").find(DIRECTORY)


def test_a_second_writer_gets_owner_age_and_the_way_to_take_over() -> None:
    with writer_lock(URI, "t"), pytest.raises(InputError) as refused:
        with writer_lock(f"{URI}/", "t"):
            pass
    said = str(refused.value)
    assert said.startswith(f"{URI}/: table t is being written by process {os.getpid()} on ")
    assert "last seen 0 s ago; wait for it or stop it" in said
    assert "run the same command again in 60 s, which then takes over" in said
    assert leases() == []
    with writer_lock(URI, "t"), writer_lock(URI, "other"):
        pass


def test_a_stale_lease_is_taken_over_and_a_recent_one_is_not() -> None:
    leave(4, age=30)
    with pytest.raises(InputError, match=r"written by process 7 on ship since 2026 \(embed\), last seen 30 s ago"):
        with writer_lock(URI, "t"):
            pass
    leave(4, age=61)
    with writer_lock(URI, "t") as check:
        assert leases() == [f"{DIRECTORY}/00000005.json"]
        time.sleep(0.1)
        check()
    assert leases() == []


def test_an_owner_with_a_wrong_clock_keeps_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    leave(1, age=3600)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: leave(1, age=3599))
    with pytest.raises(InputError, match="is being written by process 7 on ship"):
        with writer_lock(URI, "t"):
            pass


def test_a_former_owner_is_told_before_it_commits() -> None:
    with writer_lock(URI, "t") as check:
        leave(2, age=0)
        time.sleep(0.2)
        with pytest.raises(InputError, match=r"process 7 on ship since 2026 \(embed\) took over; what was committed"):
            check()
    assert leases() == [f"{DIRECTORY}/00000002.json"]


def test_an_owner_that_slept_too_long_or_whose_lease_was_removed_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 30.0)
    for leap, said in ((100, "could not renew its lease for 100 s"), (70, "its lease was removed")):
        with writer_lock(URI, "t") as check, monkeypatch.context() as later:
            if leap == 70:
                fsspec.filesystem("memory").store.clear()
            real = time.time
            later.setattr(lease.time, "time", lambda real=real, leap=leap: real() + leap)
            with pytest.raises(InputError, match=said):
                check()


@pytest.mark.parametrize("number", [1, 2])
def test_of_two_that_begin_at_once_one_writes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The other's lease appears between the listing and the creation; 2 is created by one that saw a lease before."""
    memory = fsspec.filesystem("memory")
    original = memory.pipe_file

    def pipe_file(path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            leave(number, age=0)
        original(path, value, mode=mode)

    monkeypatch.setattr(memory, "pipe_file", pipe_file)
    with pytest.raises(InputError, match="is being written by process 7 on ship"):
        with writer_lock(URI, "t"):
            pass
    assert leases() == [f"{DIRECTORY}/{number:08d}.json"]


def test_a_process_that_ends_at_once_gives_its_lease_back() -> None:
    with writer_lock(URI, "t"):
        assert len(leases()) == 1
        lease.release_all(10.0)
        assert leases() == []
        with writer_lock(URI, "t"):
            pass
    leave(1, age=3)
    with pytest.raises(InputError, match="by process 7 on ship"), writer_lock(URI, "t"):
        pass
    lease.release_all(10.0)
    assert len(leases()) == 1


def test_a_url_without_a_driver_is_refused() -> None:
    with pytest.raises(InputError, match="nosuch://bucket/.t.lease: .* install that driver or pass another URL"):
        with writer_lock("nosuch://bucket", "t"):
            pass
