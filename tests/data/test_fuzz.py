"""Damaged files: whatever bytes change, a reader reads, or refuses in one line that a terminal can show."""

import bz2
import gzip
import io
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bioscan_jax.config import DataConfig
from bioscan_jax.errors import InputError
from bioscan_jax.planning.describe import describe

FASTA = b"".join(b">s%d;size=%d; k__Animalia;p__Chordata\n%s\n" % (i, i, b"ACGTTGCA" * (i + 1)) for i in range(9))
FASTQ = b"".join(b"@r%d 1:N:0\n%s\n+\n%s\n" % (i, b"ACGT" * i, b"IIII" * i) for i in range(9))


def parquet() -> bytes:
    rows = {"processid": [f"P{i}" for i in range(9)], "nuc": ["ACGT" * (i + 1) for i in range(9)]}
    rows |= {"phylum": ["Arthropoda"] * 9, "genus": ["Aedes"] * 9, "species": ["aegypti"] * 9, "depth": [1.0] * 9}
    buffer = io.BytesIO()
    pq.write_table(pa.table(rows), buffer)
    return buffer.getvalue()


FILES = {
    "x.fasta": FASTA,
    "x.fastq": FASTQ,
    "x": FASTA,
    "x.fasta.gz": gzip.compress(FASTA, mtime=0),
    "x.fastq.bz2": bz2.compress(FASTQ),
    "x.fasta.xz": lzma.compress(FASTA),
    "x.parquet": parquet(),
}


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    kind, at = random.integers(6), int(random.integers(len(data)))
    some = random.bytes(int(random.integers(1, 9)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + some + data[at:]
    if kind == 2:
        return data[:at] + data[at + len(some) :]
    if kind == 3:
        return data[:at] + data[at : at + 40][::-1] + data[at + 40 :]
    return data[:at] + some + data[at + len(some) :]


def try_mutations(path: Path, data: bytes, count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    for number in range(count):
        path.write_bytes(mutated(data, random))
        try:
            printed = str(describe(DataConfig(path=str(path))))
            assert printed.replace("\n", "").isprintable(), (number, printed)
        except InputError as error:
            message = str(error)
            assert message.isprintable(), (number, message)
            assert len(message) < 400 + len(str(path)) * 2, (number, message)


@pytest.mark.parametrize("name", FILES)
def test_a_few_mutations(tmp_path, name):
    try_mutations(tmp_path / name, FILES[name], 40, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", FILES)
def test_many_mutations(tmp_path, name):
    try_mutations(tmp_path / name, FILES[name], 1500, 1)
