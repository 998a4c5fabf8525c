"""Traces of some steps, and what is said where there is none."""

import logging

import jax.numpy as jnp
import pytest
from support.traces import traced_steps

from bioscan_jax import config
from bioscan_jax.barcodes.simulate import write_simulated
from bioscan_jax.devices.profiling import TRACED_STEPS, WARM_UP, StepProfiler
from bioscan_jax.embedding.run import embed
from bioscan_jax.errors import InputError


def test_steps_are_traced_once_nothing_is_left_to_compile(tmp_path, caplog):
    caplog.set_level(logging.INFO, "bioscan_jax")
    shapes = [1, 1, 2, 1, 2] + [1] * 40
    with StepProfiler(str(tmp_path / "a" / "b"), "walk") as profiler:
        assert [profiler.run(size, jnp.ones, size).size for size in shapes] == shapes
    first = 3 + WARM_UP + 1
    assert traced_steps(tmp_path, "walk") == list(range(first, first + TRACED_STEPS))
    assert f"trace of steps {first} to {first + TRACED_STEPS - 1} in {tmp_path}" in caplog.text


@pytest.mark.parametrize("fails", [True, False])
def test_a_run_that_ends_within_the_trace_still_writes_it(tmp_path, fails):
    try:
        with StepProfiler(str(tmp_path), "walk") as profiler:
            for _ in range(6):
                profiler.run(1, jnp.ones, 1)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert traced_steps(tmp_path, "walk") == [5, 6]


def test_a_short_run_says_that_it_has_no_trace(tmp_path, caplog):
    with StepProfiler(str(tmp_path), "walk") as profiler:
        profiler.run(1, jnp.ones, 1)
    assert "no trace, since only 1 step(s) were run" in caplog.text
    assert not list(tmp_path.rglob("*.pb"))


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--profile .*Not a directory; pass a directory"):
        StepProfiler(str(tmp_path / "file" / "x"), "walk")
    with pytest.raises(InputError, match=r"--profile 'gs://b/x' is a URL"):
        StepProfiler("gs://b/x", "walk")


def test_batches_are_traced(tmp_path):
    barcodes = write_simulated(str(tmp_path / "barcodes.parquet"), species=9, per_species=4, length=60, seed=0)
    embed(
        config.ModelConfig(checkpoint="random:tiny-v2"),
        config.DataConfig(path=str(barcodes)),
        config.SinkConfig(uri=str(tmp_path / "vectors")),
        config.EmbedConfig(batch_tokens=16, max_shapes=1),
        config.MeshConfig(data=1),
        progress=False,
        profile=str(tmp_path / "embed"),
    )
    assert len(traced_steps(tmp_path / "embed", "embed")) == TRACED_STEPS
