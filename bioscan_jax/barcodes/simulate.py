"""SIMULATED barcodes for demonstrations and tests: random strings evolved along a random tree, not biology.

They contain no real organism or gene, and results on them do not predict results on real barcodes. Names
("Simulidae-03", "Simbabe dabensis") and sequence ids (SIM...) are recognisably artificial.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int64, UInt8

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.location import local_directory
from bioscan_jax.output import whole_file

_METADATA_KEY = b"bioscan_jax.simulated"
_GENERATOR = 1  # Increase it whenever the same parameters no longer make the same table.

_BASES = np.frombuffer(b"ATCG", np.uint8)
_COMPOSITION = np.array([0.30, 0.38, 0.17, 0.15])
"""Frequencies of _BASES; AT-rich like insect COI."""
_CODON_RATES = 3 * np.array([0.15, 0.05, 0.80])
"""Relative substitution rate at the three codon positions; mean 1."""
_IDENTITY = {
    "kingdom": 0.72,
    "phylum": 0.75,
    "class": 0.78,
    "order": 0.81,
    "family": 0.85,
    "genus": 0.92,
    "species": 0.99,
}
"""Expected identity of two sequences whose lowest common rank is the key."""
_CHILDREN = {"genus": 3, "family": 4, "order": 3, "class": 3, "phylum": 2}
"""Mean number of taxa at the rank below."""
_NAMES = {
    "kingdom": "Simulata",
    "phylum": "Simulozoa",
    "class": "Simulecta",
    "order": "Simuloptera",
    "family": "Simulidae",
}


def simulate(*, species: int, per_species: int, length: int = 658, seed: int = 0) -> pa.Table:
    """Evolves barcodes along a random seven-rank tree; the data are SIMULATED, see the module.

    A random ancestor mutates along each branch by the F81 model (Felsenstein 1981, doi:10.1007/BF01734359) with one
    rate per codon position, so that the expected identity of two sequences is 99 % within a species, 92 % within a
    genus, 85 % within a family and so on. Half of the rows lose up to 4.4 % of their bases at each end; 5 % of the rows
    contain some N. Rows are ordered by species. Depth and position scatter around a centre per family.

    Args:
        species: Number of species, which determines the numbers of higher taxa.
        per_species: Rows per species.
        length: Bases of the longest barcode.
        seed: The same arguments and seed always make the same table.

    Returns:
        sequence_id, dna_sequence, marker_gene, taxonomy, the seven ranks, depth (metres, null in a fifth of the
        rows), latitude and longitude (degrees).

    Raises:
        InputError: A number is too small.

    Example:
        >>> simulate(species=2, per_species=1)["species"].to_pylist()
        ['Simbaba babansis', 'Simbaba bebansis']
    """
    for flag, value, least in (
        ("species", species, 1),
        ("per_species", per_species, 1),
        ("length", length, 60),
        ("seed", seed, 0),
    ):
        if value < least:
            raise InputError(f"{flag}={value} is too small; pass at least {least}")
    rng = np.random.default_rng(seed)
    rows = species * per_species
    taxa = _random_tree(species, rng)
    row_taxa = {rank: np.repeat(members, per_species) for rank, members in taxa.items()}

    codes = _evolve(taxa, per_species, length, rng)
    columns = {rank: _taxon_names(rank, taxa).take(pa.array(row_taxa[rank])) for rank in RANKS}
    families = int(taxa["family"].max()) + 1
    family = row_taxa["family"]
    depth = rng.exponential(200.0, families)[family] * rng.uniform(0.5, 1.5, rows)
    latitude = np.clip(rng.uniform(-60.0, 60.0, families)[family] + rng.normal(0.0, 5.0, rows), -90.0, 90.0)
    longitude = rng.uniform(-180.0, 180.0, families)[family] + rng.normal(0.0, 5.0, rows)
    return pa.table(
        {
            "sequence_id": [f"SIM{seed}-{row:08d}" for row in range(rows)],
            "dna_sequence": _sequence(codes, rng),
            "marker_gene": pa.repeat("COI", rows),
            "taxonomy": pc.call_function("binary_join_element_wise", [*columns.values(), pa.scalar(";")]),
            **columns,
            "depth": pa.array(depth.round(1), mask=rng.random(rows) < 0.2),
            "latitude": latitude.round(4),
            "longitude": ((longitude + 180.0) % 360.0 - 180.0).round(4),
        }
    )


def write_simulated(path: str | os.PathLike[str], *, species: int, per_species: int, length: int, seed: int) -> Path:
    """Writes the table of `simulate` to a Parquet file, whole or not at all.

    An existing file made with the same parameters is kept.

    Raises:
        InputError: `path` is another file, or a number is too small.
    """
    local = local_directory(os.fspath(path), flag="simulate.path")
    if local is None:
        raise InputError(f"--simulate.path {path}: barcodes are simulated to a file on this machine; pass a path")
    path = local
    parameters = {
        "generator": _GENERATOR,
        "species": species,
        "per_species": per_species,
        "length": length,
        "seed": seed,
    }
    if path.exists():
        _check_same(path, parameters)
        return path
    table = simulate(species=species, per_species=per_species, length=length, seed=seed)
    table = table.replace_schema_metadata({_METADATA_KEY: json.dumps(parameters).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        pq.write_table(table, partial, compression="zstd")
    return path


def _check_same(path: Path, parameters: Mapping[str, int]) -> None:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} exists and is not a simulated Parquet file; pass another path") from error
    if _METADATA_KEY not in metadata:
        raise InputError(f"{path} exists and was not simulated by this library; pass another path")
    found = json.loads(metadata[_METADATA_KEY])
    if found != parameters:
        raise InputError(
            f"{path} was simulated with {json.dumps(found)}, not {json.dumps(parameters)}; "
            "pass another path or delete the file"
        )


def _random_tree(species: int, rng: np.random.Generator) -> dict[str, Int64[np.ndarray, " species"]]:
    """Returns the taxon of each species at each rank; siblings have consecutive numbers."""
    counts = {"species": species}
    for child, parent in zip(RANKS[:1:-1], RANKS[-2:0:-1], strict=True):
        counts[parent] = -(-counts[child] // _CHILDREN[parent])
    counts["kingdom"] = 1
    taxa = {"species": np.arange(species)}
    for child, parent in zip(RANKS[:0:-1], RANKS[-2::-1], strict=True):
        # Each parent has at least one child; the others are assigned at random.
        spare = rng.integers(counts[parent], size=counts[child] - counts[parent])
        parents = np.sort(np.concatenate([np.arange(counts[parent]), spare]))
        taxa[parent] = parents[taxa[child]]
    return {rank: taxa[rank] for rank in RANKS}


def _branch_lengths() -> dict[str, float]:
    """Returns the length of the branch to a taxon of each rank and to a row (key "row"), in F81 events per site."""
    times = np.linspace(0.0, 10.0, 100_001)
    saturation = 1.0 - np.sum(_COMPOSITION**2)
    identities = 1.0 - saturation * np.mean(1.0 - np.exp(-np.outer(times, _CODON_RATES)), axis=1)
    height = {rank: float(np.interp(-identity, -identities, times)) / 2 for rank, identity in _IDENTITY.items()}
    below = dict(zip(RANKS, (*RANKS[1:], "row"), strict=True))
    return {below[rank]: height[rank] - height.get(below[rank], 0.0) for rank in RANKS}


def _mutate(
    codes: UInt8[np.ndarray, "taxa sites"], branch_length: float, rng: np.random.Generator
) -> UInt8[np.ndarray, "taxa sites"]:
    """Draws a new base, possibly the same one, at each site with a mutation event."""
    rates = np.resize(_CODON_RATES, codes.shape[1])
    hit = rng.random(codes.shape, np.float32) < 1.0 - np.exp(-rates * branch_length)
    mutated = codes.copy()
    mutated[hit] = rng.choice(4, np.count_nonzero(hit), p=_COMPOSITION)
    return mutated


def _evolve(
    taxa: Mapping[str, Int64[np.ndarray, " species"]], per_species: int, length: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "rows sites"]:
    branches = _branch_lengths()
    codes = rng.choice(4, (1, length), p=_COMPOSITION).astype(np.uint8)
    for parent, child in zip(RANKS[:-1], RANKS[1:], strict=True):
        _, first_species = np.unique(taxa[child], return_index=True)
        codes = _mutate(codes[taxa[parent][first_species]], branches[child], rng)
    return _mutate(np.repeat(codes, per_species, axis=0), branches["row"], rng)


def _sequence(codes: UInt8[np.ndarray, "rows sites"], rng: np.random.Generator) -> pa.LargeStringArray:
    """Returns the rows as letters, some trimmed at the ends or with N, like sequenced amplicons."""
    rows, length = codes.shape
    letters = _BASES[codes]
    noisy = np.flatnonzero(rng.random(rows) < 0.05)
    letters[noisy] = np.where(rng.random((len(noisy), length)) < 0.005, np.uint8(ord("N")), letters[noisy])
    trimmed = rng.integers(0, 29 * length // 658 + 1, (2, rows)) * (rng.random(rows) < 0.5)
    site = np.arange(length)
    keep = (site >= trimmed[0][:, None]) & (site < length - trimmed[1][:, None])
    offsets = np.concatenate([[0], np.cumsum(length - trimmed.sum(axis=0))])
    return pa.LargeStringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(letters[keep]))


def _syllables(number: int) -> str:
    """Returns a pronounceable word of two or more syllables, a different one for each number."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    word = ""
    while number or len(word) < 4:
        number, syllable = divmod(number, len(consonants) * len(vowels))
        word += consonants[syllable // len(vowels)] + vowels[syllable % len(vowels)]
    return word


def _taxon_names(rank: str, taxa: Mapping[str, Int64[np.ndarray, " species"]]) -> pa.Array:
    count = int(taxa[rank].max()) + 1
    if rank == "kingdom":
        return pa.array([_NAMES[rank]])
    if rank in _NAMES:
        width = len(str(count))
        return pa.array([f"{_NAMES[rank]}-{taxon:0{max(2, width)}d}" for taxon in range(1, count + 1)])
    genera = [f"Sim{_syllables(genus)}" for genus in range(int(taxa["genus"].max()) + 1)]
    if rank == "genus":
        return pa.array(genera)
    return pa.array([f"{genera[genus]} {_syllables(taxon)}nsis" for taxon, genus in enumerate(taxa["genus"])])
