"""What public databases call the columns that have a meaning here: one table, read by every command."""

import re
from collections.abc import Iterable, Mapping, Sequence

RANK_ROLES = ("kingdom", "phylum", "class", "order", "family", "genus", "species")

ALIASES: dict[str, dict[str, tuple[str, ...]]] = {
    "bioscan_jax": {
        "sequence": ("dna_sequence",),
        "id": ("sequence_id",),
        "lineage": ("taxonomy",),
        **{rank: (rank,) for rank in RANK_ROLES},
        "latitude": ("latitude",),
        "longitude": ("longitude",),
        "depth": ("depth",),
        "marker": ("marker_gene",),
        "split": ("split",),
    },
    "BOLD (BCDM and earlier)": {
        "sequence": ("nuc", "nucleotides", "nucraw"),
        "id": ("processid", "process_id"),
        **{rank: (f"{rank}_name",) for rank in RANK_ROLES},
        "latitude": ("lat",),
        "longitude": ("lon",),
        "coordinates": ("coord",),
        "marker": ("marker_code", "markercode"),
        "date": ("collection_date_start", "collectiondate_start", "collectiondate"),
    },
    "BIOSCAN-5M": {
        "sequence": ("dna_barcode", "barcode"),
        "latitude": ("coord-lat",),
        "longitude": ("coord-lon",),
    },
    "Darwin Core (GBIF, OBIS)": {
        "sequence": ("DNA_sequence", "dnaSequence"),
        "id": ("occurrenceID", "gbifID"),
        "species": ("specificEpithet",),
        "lineage": ("higherClassification",),
        "latitude": ("decimalLatitude",),
        "longitude": ("decimalLongitude",),
        "depth": ("minimumDepthInMeters", "maximumDepthInMeters"),
        "marker": ("target_gene", "pcr_primer_target_gene"),
        "date": ("eventDate",),
    },
    "GenBank": {
        "sequence": ("sequence", "seq", "dna"),
        "id": ("accession.version", "accession_version", "accession"),
        "coordinates": ("lat_lon",),
        "marker": ("gene",),
        "date": ("collection_date",),
    },
    "UNITE": {"id": ("SH", "sh_code"), "sequence": ("its_sequence",)},
    "SILVA, GTDB, QIIME": {
        "id": ("Feature ID", "primaryAccession"),
        "lineage": ("gtdb_taxonomy", "silva_taxonomy", "taxonomy_string", "tax_slv", "lineage", "taxon_path", "Taxon"),
    },
    "PR2": {
        "id": ("pr2_accession", "pr2_main_id"),
        "kingdom": ("domain",),
        "phylum": ("subdivision", "division"),
        "lineage": ("pr2_taxonomy",),
    },
    "MIDORI2, MitoFish": {
        "id": ("accession_number", "accession_no", "mitofish_id"),
        "lineage": ("midori_taxonomy", "classification"),
        "kingdom": ("superkingdom",),
    },
}
"""Database, role, names: the earlier name is taken where a file has several of a role. Case, '_', '-', '.' and blanks
do not matter. A role that no database names otherwise is called as in 'bioscan_jax'; `coordinates` join latitude and
longitude in one text, which `bioscan_jax.barcodes.metadata` splits."""

KINGDOM_OF_PHYLUM = {
    **dict.fromkeys(
        [
            "Acanthocephala",
            "Annelida",
            "Arthropoda",
            "Brachiopoda",
            "Bryozoa",
            "Cephalorhyncha",
            "Chaetognatha",
            "Chordata",
            "Cnidaria",
            "Ctenophora",
            "Cycliophora",
            "Dicyemida",
            "Echinodermata",
            "Echiura",
            "Entoprocta",
            "Gastrotricha",
            "Gnathostomulida",
            "Hemichordata",
            "Kinorhyncha",
            "Loricifera",
            "Micrognathozoa",
            "Mollusca",
            "Myxozoa",
            "Nematoda",
            "Nematomorpha",
            "Nemertea",
            "Onychophora",
            "Orthonectida",
            "Phoronida",
            "Placozoa",
            "Platyhelminthes",
            "Porifera",
            "Priapulida",
            "Rotifera",
            "Sipuncula",
            "Tardigrada",
            "Xenacoelomorpha",
        ],
        "Animalia",
    ),
    **dict.fromkeys(
        [
            "Anthocerotophyta",
            "Bryophyta",
            "Charophyta",
            "Chlorophyta",
            "Glaucophyta",
            "Lycopodiophyta",
            "Magnoliophyta",
            "Marchantiophyta",
            "Pinophyta",
            "Pteridophyta",
            "Rhodophyta",
            "Streptophyta",
            "Tracheophyta",
        ],
        "Plantae",
    ),
    **dict.fromkeys(
        [
            "Ascomycota",
            "Basidiomycota",
            "Blastocladiomycota",
            "Chytridiomycota",
            "Cryptomycota",
            "Entomophthoromycota",
            "Glomeromycota",
            "Mortierellomycota",
            "Mucoromycota",
            "Neocallimastigomycota",
            "Zygomycota",
        ],
        "Fungi",
    ),
    **dict.fromkeys(
        [
            "Bigyra",
            "Cercozoa",
            "Ciliophora",
            "Cryptophyta",
            "Dinoflagellata",
            "Foraminifera",
            "Haptophyta",
            "Myzozoa",
            "Ochrophyta",
            "Oomycota",
            "Bacillariophyta",
            "Radiozoa",
        ],
        "Chromista",
    ),
    **dict.fromkeys(["Amoebozoa", "Choanozoa", "Euglenozoa", "Metamonada", "Mycetozoa", "Percolozoa"], "Protozoa"),
}
"""Kingdom of a phylum (GBIF's backbone and BOLD agree on these), for tables without a column for the kingdom."""


def _key(name: str) -> str:
    return re.sub(r"[\s_.\-]+", "", name).casefold()


def names_of(role: str) -> tuple[str, ...]:
    """Returns every name of a role, in the order in which they are looked for."""
    return tuple(name for roles in ALIASES.values() for name in roles.get(role, ()))


def find_column(role: str, columns: Iterable[str]) -> str | None:
    """Returns the column that has a role, under its own name; None if there is none.

    A name that is spelt exactly as here goes before one that differs in case or '_'.

    Example:
        >>> find_column("latitude", ["processid", "coord-lat"]), find_column("id", ["ProcessID", "nuc"])
        ('coord-lat', 'ProcessID')
    """
    columns = list(columns)
    names = names_of(role)
    for name in names:
        if name in columns:
            return name
    by_key: dict[str, str] = {}
    for column in columns:
        by_key.setdefault(_key(column), column)
    return next((by_key[_key(name)] for name in names if _key(name) in by_key), None)


def find_roles(columns: Sequence[str]) -> dict[str, str]:
    """Returns the column of each role that has one, without using a column twice.

    Example:
        >>> find_roles(["processid", "nuc", "decimalLatitude", "remarks"])
        {'sequence': 'nuc', 'id': 'processid', 'latitude': 'decimalLatitude'}
    """
    roles = dict.fromkeys(role for names in ALIASES.values() for role in names)
    found: dict[str, str] = {}
    for role in roles:
        column = find_column(role, [name for name in columns if name not in found.values()])
        if column is not None:
            found[role] = column
    if len(found.keys() & set(RANK_ROLES)) >= 3 and found.get("lineage") != "taxonomy":
        found.pop("lineage", None)  # the rank columns are read; BIOSCAN-5M's `taxon` is a single name
    return found


def describe_roles(found: Mapping[str, str]) -> str:
    """Returns the roles whose column is not called as in this library, as `role = column` in one line; "" if none."""
    return ", ".join(
        f"{role} = {column}" for role, column in found.items() if column not in ALIASES["bioscan_jax"].get(role, ())
    )
