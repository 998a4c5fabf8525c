"""Compiled programs are kept, and take bounded room."""

import jax
import pytest

from bioscan_jax.config import MeshConfig
from bioscan_jax.devices.compile_cache import MOST_BYTES
from bioscan_jax.devices.sharding import start_devices

DIRECTORY, SIZE = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch):
    """JAX opened the cache of the tests long ago: only its settings change, and change back."""
    names = (DIRECTORY, SIZE, "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update(SIZE, -1)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_the_cache_is_bounded_and_programs_kept_before_there_was_a_bound_may_leave_it(tmp_path):
    (tmp_path / "old-cache").write_bytes(b"program")
    (tmp_path / "killed-cache").write_bytes(b"program")
    (tmp_path / "killed-atime").touch()
    start_devices(MeshConfig(compilation_cache=str(tmp_path)))
    assert (getattr(jax.config, DIRECTORY), getattr(jax.config, SIZE)) == (str(tmp_path), MOST_BYTES)
    assert [len((tmp_path / f"{name}-atime").read_bytes()) for name in ("old", "killed")] == [8, 8]


def test_the_variable_of_jax_decides(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")
    start_devices(MeshConfig(compilation_cache=str(tmp_path)))
    assert getattr(jax.config, SIZE) == -1  # as it was at the start of this process


def test_a_directory_that_cannot_be_locked_is_not_bounded(tmp_path):
    (tmp_path / ".lockfile").mkdir()
    start_devices(MeshConfig(compilation_cache=str(tmp_path)))
    assert (getattr(jax.config, DIRECTORY), getattr(jax.config, SIZE)) == (str(tmp_path), -1)
