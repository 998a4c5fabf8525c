"""Memory that runs out: errors of real allocations, and what fits by the compiler's account of the step that failed."""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.commands import call
from support.embed_runs import Table, files, lines

from bioscan_jax.cli import _command
from bioscan_jax.devices.memory import host_memory, is_out_of_memory, memory_errors
from bioscan_jax.embedding.step import CompiledSteps
from bioscan_jax.errors import InputError

TOO_MUCH = 1 << 60


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Lets this process allocate no more than so many bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    ("allocate", "words"),
    [
        (lambda: jax.block_until_ready(jnp.zeros(TOO_MUCH // 4)), "RESOURCE_EXHAUSTED"),
        (lambda: np.ones(TOO_MUCH // 8), "Unable to allocate"),
        (lambda: pa.allocate_buffer(TOO_MUCH), "malloc"),
        (lambda: bytearray(TOO_MUCH), "MemoryError"),
    ],
    ids=["XLA", "NumPy", "Arrow", "Python"],
)
def test_memory_that_runs_out_is_one_line_with_exit_code_2(allocate, words, capsys):
    with (
        pytest.raises(InputError, match="out of memory while sorting .*; pass fewer rows$") as error,
        memory_errors("sorting", lambda: "pass fewer rows"),
    ):
        allocate()
    assert words in str(error.value)
    assert _command.exit_code_of(lambda given: allocate(), []) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory")
    assert "bioscan doctor" in line


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), jax.errors.JaxRuntimeError("INVALID_ARGUMENT: x")])
def test_other_errors_pass(error):
    with pytest.raises(type(error), match=f"^{error}$"), memory_errors("sorting", "pass fewer rows"):
        raise error


def test_the_error_of_cuda_itself_is_one_of_memory():
    assert is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"))


def test_the_limit_of_a_process_counts():
    with limited(1 << 28):
        found = host_memory()
    assert found.free <= 1 << 28
    assert host_memory().free > found.free


def write_long(path, rows: int) -> str:
    """Writes sequences of 1,000 tokens: attention needs 16 MB a row."""
    random = np.random.default_rng(0)
    sequences = ["".join(random.choice(list("ACGT"), 5994)) for _ in range(rows)]
    ids = [f"s{row}" for row in range(rows)]
    lineages = [f"Animalia;Chordata;Actinopteri;Gadiformes;Gadidae;Gadus;Gadus {'ab'[row % 2]}" for row in range(rows)]
    pq.write_table(pa.table({"sequence_id": ids, "dna_sequence": sequences, "taxonomy": lineages}), path)
    return str(path)


MESH = ("--mesh.data", "2", "--mesh.compilation_cache", "null")


@pytest.mark.slow
def test_embed_says_what_fits_and_that_fits(tmp_path):
    """The budget in the message works under the limit under which another one failed."""
    data = write_long(tmp_path / "long.parquet", 128)
    flags = ["--model.checkpoint=random:tiny-v2", f"--data.path={data}", f"--sink.uri={tmp_path / 'db'}", *MESH]
    with limited(3 << 30):
        failed = call("embed", *flags, "--embed.batch_tokens=64000")
        assert failed.returncode == 2, failed.stderr
        [line] = lines(failed.stderr)
        found = re.fullmatch(
            r"error: out of memory while embedding a batch of 64 x 1024 tokens \(.*RESOURCE_EXHAUSTED.*\); it needs "
            r"(\S+) GiB on each device, and (\S+) GiB can be had; pass --embed.batch_tokens (\d+)",
            line,
        )
        assert found is not None, line
        assert float(found[1]) > float(found[2])
        assert files(tmp_path / "db") <= {str(tmp_path / "db" / ".sequences.lock")}
        worked = call("embed", *flags, f"--embed.batch_tokens={found[3]}")
    assert worked.returncode == 0, worked.stderr
    assert Table.read(tmp_path / "db").vectors.num_rows == 128


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_finetune_says_what_fits_and_the_same_run_goes_on_with_that(tmp_path):
    data, run = write_long(tmp_path / "long.parquet", 64), tmp_path / "run"
    settings = {"epochs": 1, "batch_size": 64, "max_shapes": 1, "subsequence": 0.0, "output_dir": run}
    flags = [
        "--model.checkpoint=random:tiny-v2",
        f"--data.path={data}",
        "--tracking.mode=disabled",
        "--data.validation=0",
        *MESH,
    ]
    flags += [f"--train.{name}={value}" for name, value in settings.items()]
    with limited(3 << 30):
        failed = call("finetune", *flags, "--train.batch_tokens=64000")
        assert failed.returncode == 2, failed.stderr
        [line] = [one for one in lines(failed.stderr) if one.startswith("error")]
        found = re.fullmatch(
            r"error: out of memory while training on 64 x 1000 tokens at once \(.*RESOURCE_EXHAUSTED.*\); it needs "
            r"(\S+) GiB on each device, and (\S+) GiB can be had; pass --train.batch_tokens (\d+), or --train.remat "
            r"layer, which recomputes the layers in the backward pass",
            line,
        )
        assert found is not None, line
        worked = call("finetune", *flags, f"--train.batch_tokens={found[3]}")
    assert worked.returncode == 0, worked.stderr
    assert "all epochs done" in worked.stdout


@pytest.mark.slow
def test_identify_names_its_own_flag(tmp_path, monkeypatch):
    lineage = "Animalia;Chordata;Actinopteri;Gadiformes;Gadidae;Gadus;Gadus morhua"
    sequences = ["".join(np.random.default_rng(row).choice(list("ACGT"), 120)) for row in range(8)]
    columns = {"sequence_id": list("abcdefgh"), "dna_sequence": sequences, "taxonomy": [lineage] * 8}
    pq.write_table(pa.table(columns), tmp_path / "in.parquet")
    flags = ["--model.checkpoint=random:tiny-v2", f"--data.path={tmp_path / 'in.parquet'}", f"--sink.uri={tmp_path}"]
    assert call("embed", *flags, *MESH, "--embed.max_shapes=1").returncode == 0
    monkeypatch.setattr(CompiledSteps, "__call__", lambda steps, ids: jax.block_until_ready(jnp.zeros(1 << 58)))
    queries = [f"--reference.uri={tmp_path}", f"--query.path={tmp_path / 'in.parquet'}", *MESH]
    done = call("identify", *queries, f"--output={tmp_path / 'names.tsv'}", "--batch_tokens=4096")
    assert done.returncode == 2
    assert re.search(r"out of memory while embedding a batch of .*; pass --batch_tokens \d+$", done.stderr.strip())
    assert not (tmp_path / "names.tsv").exists()
