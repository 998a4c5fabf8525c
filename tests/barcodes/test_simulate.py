import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bioscan_jax.barcodes import simulate as simulate_module
from bioscan_jax.barcodes.cleaning import CleaningCounts, clean
from bioscan_jax.barcodes.lineage import RANKS, read_lineages
from bioscan_jax.barcodes.simulate import simulate, write_simulated
from bioscan_jax.errors import InputError


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return simulate(species=300, per_species=6, seed=1)


def test_columns(table: pa.Table):
    assert table.column_names == [
        "sequence_id",
        "dna_sequence",
        "marker_gene",
        "taxonomy",
        *RANKS,
        "depth",
        "latitude",
        "longitude",
    ]
    assert table.num_rows == 1800
    assert len(table["sequence_id"].unique()) == 1800
    assert table["marker_gene"].unique().to_pylist() == ["COI"]
    read = [column.to_pylist() for column in read_lineages(table.select(["taxonomy"]))]
    assert read == [table[rank].to_pylist() for rank in RANKS]


def test_taxa_form_a_tree_that_widens_towards_the_species(table: pa.Table):
    numbers = [len(table[rank].unique()) for rank in RANKS]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1
    assert numbers[-1] == 300
    for parent, child in zip(RANKS[:-1], RANKS[1:], strict=True):
        assert table.group_by([parent, child]).aggregate([]).num_rows == len(table[child].unique())


def test_names_are_plainly_artificial(table: pa.Table):
    for rank in RANKS:
        assert pc.all(pc.starts_with(table[rank], "Sim")).as_py()
    assert pc.all(pc.starts_with(table["sequence_id"], "SIM")).as_py()
    assert pc.all(pc.match_substring_regex(table["species"], r"^Sim[a-z]+ [a-z]+$")).as_py()
    genus_of_binomial = pc.replace_substring_regex(table["species"], " .*", "")
    assert genus_of_binomial.equals(table["genus"])


def test_sequences_are_clean_vary_in_length_and_have_some_n(table: pa.Table):
    cleaned = clean(table["dna_sequence"])
    assert cleaned.changes == CleaningCounts()
    assert cleaned.reasons.null_count == table.num_rows
    lengths = pc.binary_length(table["dna_sequence"]).to_numpy()
    assert lengths.max() == 658
    assert 600 <= lengths.min() < 620
    with_n = pc.match_substring(table["dna_sequence"], "N").to_numpy().mean()
    assert 0.02 < with_n < 0.08
    letters = "".join(table["dna_sequence"].to_pylist())
    for base, fraction in (("A", 0.30), ("T", 0.38), ("C", 0.17), ("G", 0.15)):
        assert letters.count(base) / len(letters) == pytest.approx(fraction, abs=0.04)


def test_identity_falls_with_the_lowest_common_rank(table: pa.Table):
    """Over untrimmed rows, which line up site by site."""
    full = table.filter(pc.equal(pc.binary_length(table["dna_sequence"]), 658))
    letters = np.array([list(text.encode()) for text in full["dna_sequence"].to_pylist()], np.uint8)
    taxa = np.stack([full[rank].to_numpy() for rank in RANKS])
    rng = np.random.default_rng(0)
    near = np.arange(len(letters) - 1)
    one = np.concatenate([near, rng.integers(len(letters), size=20_000)])
    other = np.concatenate([near + 1, rng.integers(len(letters), size=20_000)])
    one, other = one[one != other], other[one != other]
    same = letters[one] == letters[other]
    identity = same.mean(axis=1)
    common = (taxa[:, one] == taxa[:, other]).sum(axis=0) - 1
    means = [identity[common == rank].mean() for rank in range(len(RANKS))]
    assert means == sorted(means)
    for rank, expected, tolerance in (("species", 0.99, 0.003), ("genus", 0.92, 0.01), ("family", 0.85, 0.015)):
        assert means[RANKS.index(rank)] == pytest.approx(expected, abs=tolerance)

    differences = [(~same[:, position::3]).sum() for position in range(3)]
    assert differences[2] > 2 * (differences[0] + differences[1])
    assert differences[0] > differences[1] > 0


def test_depth_and_position(table: pa.Table):
    depth = table["depth"]
    assert 0.1 < depth.null_count / len(depth) < 0.3
    assert pc.min(depth).as_py() >= 0
    for column, limit in (("latitude", 90), ("longitude", 180)):
        assert table[column].null_count == 0
        assert pc.max(pc.abs(table[column])).as_py() <= limit
        assert len(table[column].unique()) > 1000


def test_the_same_seed_gives_the_same_table_and_another_seed_another():
    first = simulate(species=9, per_species=3, seed=5)
    assert simulate(species=9, per_species=3, seed=5).equals(first)
    assert not simulate(species=9, per_species=3, seed=6)["dna_sequence"].equals(first["dna_sequence"])


@pytest.mark.parametrize(("species", "per_species", "length"), [(1, 1, 60), (2, 1, 61), (1, 5, 700)])
def test_smallest_numbers(species: int, per_species: int, length: int):
    table = simulate(species=species, per_species=per_species, length=length)
    assert table.num_rows == species * per_species
    assert pc.max(pc.binary_length(table["dna_sequence"])).as_py() <= length
    assert len(table["species"].unique()) == species


@pytest.mark.parametrize("wrong", [{"species": 0}, {"per_species": 0}, {"length": 59}, {"seed": -1}])
def test_too_small_numbers_are_refused(wrong: dict[str, int]):
    (name, value), *_ = wrong.items()
    with pytest.raises(InputError, match=f"^{name}={value} is too small; pass at least {value + 1}$"):
        simulate(**{"species": 2, "per_species": 2, **wrong})


PARAMETERS = {"species": 4, "per_species": 2, "length": 120, "seed": 3}


def test_written_file_is_the_table_with_its_parameters(tmp_path: Path):
    path = write_simulated(tmp_path / "new" / "barcodes.parquet", **PARAMETERS)
    assert [entry.name for entry in path.parent.iterdir()] == ["barcodes.parquet"]
    table = pq.read_table(path)
    assert table.equals(simulate(**PARAMETERS))
    metadata = json.loads(table.schema.metadata[b"bioscan_jax.simulated"])
    assert {name: metadata[name] for name in PARAMETERS} == PARAMETERS


def test_a_file_of_the_same_parameters_is_kept(tmp_path: Path):
    path = write_simulated(tmp_path / "barcodes.parquet", **PARAMETERS)
    before = path.stat()
    assert write_simulated(str(path), **PARAMETERS) == path
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_another_file_is_not_overwritten(tmp_path: Path):
    simulated = write_simulated(tmp_path / "barcodes.parquet", **PARAMETERS)
    foreign = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"dna_sequence": ["ACGT"]}), foreign)
    text = tmp_path / "mine.txt"
    text.write_text("notes")
    for path, other, message in (
        (simulated, {"seed": 4}, f"{simulated} was simulated with "),
        (foreign, {}, f"{foreign} exists and was not simulated by this library; pass another path"),
        (text, {}, f"{text} exists and is not a simulated Parquet file; pass another path"),
        (tmp_path, {}, f"{tmp_path} exists and is not a simulated Parquet file; pass another path"),
    ):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(InputError, match="^" + re.escape(message)):
            write_simulated(path, **{**PARAMETERS, **other})
        assert (path.read_bytes() if path.is_file() else None) == before


def test_nothing_is_left_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(table: pa.Table, where: Path, **options: str) -> None:
        Path(where).write_bytes(b"PAR1")
        raise OSError("no space left on device")

    monkeypatch.setattr(simulate_module.pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_simulated(tmp_path / "barcodes.parquet", **PARAMETERS)
    assert list(tmp_path.iterdir()) == []
