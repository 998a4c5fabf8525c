"""Writes identifications as a Darwin Core archive: occurrences with the DNA-derived data extension, for GBIF and OBIS.

The fields follow GBIF's guide "Publishing DNA-derived data through biodiversity data platforms"
(doi:10.35035/doc-vf1a-nr22); the terms are those of GBIF's occurrence core of 2025-07-10 and DNA-derived data extension
of 2024-07-11. Of the queries' own columns:

- The columns that `bioscan_jax.barcodes.aliases` knows become decimalLatitude, decimalLongitude, minimum- and
  maximumDepthInMeters, eventDate and target_gene. One that joins latitude and longitude is verbatimCoordinates, too.
- A column called like a term of the core or the extension is that term, and goes before what is said here or below.
- All others, and those that would state an identification, are in dynamicProperties, a JSON object, under their names.
"""

import hashlib
import json
import math
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree as ET

import numpy as np
import pyarrow as pa

# pyarrow.compute defines most of its functions on import, where pyright does not see them.
# pyright: reportAttributeAccessIssue=false
import pyarrow.compute as pc
from jaxtyping import Bool, Int

from bioscan_jax.barcodes.aliases import find_roles
from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.barcodes.metadata import find_metadata, split_coordinates
from bioscan_jax.config import ArchiveConfig, SideTableConfig
from bioscan_jax.data.parquet import ParquetBlocks
from bioscan_jax.errors import InputError, printable, shown
from bioscan_jax.table.columns import check_values
from bioscan_jax.table.side_tables import NULL_WORDS, read_side_table

_CORE, _CORE_ROWS = "occurrence.txt", "http://rs.tdwg.org/dwc/terms/Occurrence"
_DNA_FILE, _DNA_ROWS = "dna_derived_data.txt", "http://rs.gbif.org/terms/1.0/DNADerivedData"
_DWC = "http://rs.tdwg.org/dwc/terms/"
_CORE_TERMS = """
feedbackURL institutionID collectionID datasetID institutionCode collectionCode datasetName ownerInstitutionCode
basisOfRecord informationWithheld dataGeneralizations catalogNumber recordNumber recordedBy recordedByID individualCount
organismQuantity organismQuantityType sex lifeStage reproductiveCondition caste behavior vitality establishmentMeans
degreeOfEstablishment pathway georeferenceVerificationStatus occurrenceStatus associatedMedia associatedOccurrences
associatedReferences associatedTaxa otherCatalogNumbers occurrenceRemarks organismID organismName organismScope
associatedOrganisms previousIdentifications organismRemarks causeOfDeath materialEntityID digitalSpecimenID
materialEntityType preparations disposition verbatimLabel associatedSequences materialEntityRemarks materialSampleID
eventID parentEventID eventType projectTitle projectID fundingAttributionID fieldNumber eventDate eventTime
startDayOfYear endDayOfYear year month day verbatimEventDate habitat samplingProtocol sampleSizeValue sampleSizeUnit
samplingEffort fieldNotes eventRemarks locationID higherGeographyID higherGeography continent waterBody islandGroup
island country countryCode stateProvince county municipality locality verbatimLocality minimumElevationInMeters
maximumElevationInMeters verbatimElevation verticalDatum minimumDepthInMeters maximumDepthInMeters verbatimDepth
minimumDistanceAboveSurfaceInMeters maximumDistanceAboveSurfaceInMeters locationAccordingTo locationRemarks
decimalLatitude decimalLongitude geodeticDatum coordinateUncertaintyInMeters coordinatePrecision pointRadiusSpatialFit
verbatimCoordinates verbatimLatitude verbatimLongitude verbatimCoordinateSystem verbatimSRS footprintWKT footprintSRS
footprintSpatialFit georeferencedBy georeferencedDate georeferenceProtocol georeferenceSources georeferenceRemarks
verbatimIdentification
"""
_OWN_CORE = tuple(_CORE_TERMS.split())
"""Terms of the occurrence core that columns of the queries may state: all but those of the identification, of geology, of
Dublin Core, and `discipline` and `dynamicProperties`."""

_DNA_TERMS = """
samp_name 0001107 project_name 0000092 experimental_factor 0000008 samp_taxon_id 0001320 neg_cont_type 0001321
pos_cont_type 0001322 env_broad_scale 0000012 env_local_scale 0000013 env_medium 0000014 subspecf_gen_lin 0000020
ploidy 0000021 num_replicons 0000022 extrachrom_elements 0000023 estimated_size 0000024 ref_biomaterial 0000025
source_mat_id 0000026 pathogenicity 0000027 biotic_relationship 0000028 specific_host 0000029 host_spec_range 0000030
host_disease_stat 0000031 trophic_level 0000032 propagation 0000033 encoded_traits 0000034 rel_to_oxygen 0000015
isol_growth_condt 0000003 samp_collec_device 0000002 samp_collec_method 0001225 samp_mat_process 0000016
size_frac 0000017 samp_size 0000001 samp_vol_we_dna_ext 0000111 source_uvig 0000035 virus_enrich_appr 0000036
nucl_acid_ext 0000037 nucl_acid_amp 0000038 lib_size 0000039 lib_reads_seqd 0000040 lib_layout 0000041
lib_vector 0000042 lib_screen 0000043 target_gene 0000044 target_subfragment 0000045 pcr_primers 0000046 mid 0000047
adapters 0000048 pcr_cond 0000049 seq_meth 0000050 seq_quality_check 0000051 chimera_check 0000052 tax_ident 0000053
assembly_qual 0000056 assembly_name 0000057 assembly_software 0000058 annot 0000059 number_contig 0000060
feat_pred 0000061 ref_db 0000062 sim_search_meth 0000063 tax_class 0000064 compl_score 0000069 compl_software 0000070
compl_appr 0000071 contam_score 0000072 contam_screen_input 0000005 contam_screen_param 0000073 decontam_software 0000074
sort_tech 0000075 single_cell_lysis_appr 0000076 single_cell_lysis_prot 0000054 wga_amp_appr 0000055 wga_amp_kit 0000006
bin_param 0000077 bin_software 0000078 reassembly_bin 0000079 otu_class_appr 0000085 otu_seq_comp_appr 0000086
otu_db 0000087 sop 0000090
"""
_DNA = {name: f"https://w3id.org/mixs/{n}" for name, n in zip(*[iter(_DNA_TERMS.split())] * 2, strict=True)} | {
    "DNA_sequence": "http://rs.gbif.org/terms/dna_sequence",
    **{
        f"pcr_primer_{what}": f"http://rs.gbif.org/terms/pcr_primer_{what}"
        for what in ("forward", "reverse", "name_forward", "name_reverse", "reference")
    },
    **{
        name: f"http://data.ggbn.org/schemas/ggbn/terms/{name}"
        for name in ("concentration", "concentrationUnit", "methodDeterminationConcentrationAndRatios")
    },
    **{
        name: f"http://rs.gbif.org/terms/miqe/{name}"
        for name in ("annealingTemp", "annealingTempUnit", "ampliconSize", "contaminationAssessment")
    },
}
"""Terms of the DNA-derived data extension, without those of viruses and of quantitative PCR."""

_DATE = "eventDate"
"""Required by GBIF (https://www.gbif.org/data-quality-requirements-occurrences), as are occurrenceID, basisOfRecord and
scientificName, which each row has."""
_UNNAMED, _UNNAMED_ID = "incertae sedis", "urn:lsid:marinespecies.org:taxname:12"
"""How OBIS wants sequences without a name (its manual, "Unknown sequences"): WoRMS' Biota incertae sedis."""
_READS = "DNA sequence reads"
_EVIDENCE = ("identity", "overlap", "coverage", "similarity")
_BREAKS = r"[\x00-\x1f\x{85}\x{2028}\x{2029}]+"
_NAMED = 3

_NAME_COLUMNS = ("scientificName", "verbatimScientificName", "scientific_name", "canonicalName", "name", "taxon")
_APHIA, _GBIF = "urn:lsid:marinespecies.org:taxname:", "https://www.gbif.org/species/"
_ID_COLUMNS = {
    **dict.fromkeys(["scientificNameID", "lsid"], ("scientificNameID", "")),
    **dict.fromkeys(["AphiaID", "worms_id", "worms", "aphia"], ("scientificNameID", _APHIA)),
    **dict.fromkeys(["taxonID", "taxon_id", "id"], ("taxonID", "")),
    **dict.fromkeys(["usageKey", "taxonKey", "gbif_id", "gbifID", "gbif", "key"], ("taxonID", _GBIF)),
}
"""Columns with ids in a table of taxon ids: the term, and what a bare number gets in front."""
_NAMING_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_null,
)

_LICENSES = {
    "CC0-1.0": ("publicdomain/zero/1.0", "Public Domain (CC0 1.0)"),
    "CC-BY-4.0": ("licenses/by/4.0", "Creative Commons Attribution (CC-BY) 4.0 License"),
    "CC-BY-NC-4.0": ("licenses/by-nc/4.0", "Creative Commons Attribution Non Commercial (CC-BY-NC) 4.0 License"),
}
_EML = "eml://ecoinformatics.org/eml-2.1.1"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How the barcodes were identified, in the words of the archive."""

    software: str
    """Program and version."""
    model: str
    reference: str
    """The database: where it is, its version, its size."""
    how: str
    """Search and vote."""
    calibrated: bool
    """Whether a confidence is a probability, and ranks are abstained from."""


TaxonIds = Mapping[str, Mapping[str, str]]
"""For each of taxonID and scientificNameID, ids by scientific name."""


def read_taxon_ids(given: SideTableConfig | str) -> TaxonIds:
    """Reads a table with a column of scientific names and one or more of their ids.

    The names are in the first column that there is of scientificName, verbatimScientificName, scientific_name,
    canonicalName, name and taxon. Ids of WoRMS (scientificNameID, lsid, AphiaID, worms_id) become scientificNameID,
    those of others (taxonID, id) and of GBIF (usageKey, taxonKey, gbif_id, key) taxonID, from the first column there
    is; LSIDs of WoRMS are scientificNameID in any column.

    Args:
        given: CSV, TSV or Parquet file; see `table.side_tables`.

    Raises:
        InputError: It cannot be read, has no names or no ids, or has two ids for a name.
    """
    given = SideTableConfig(path=given) if isinstance(given, str) else given
    side = read_side_table(given, "--taxon_ids")
    check_values(side.table, side.locate)
    there = {name.casefold(): name for name in reversed(side.table.column_names)}
    named = next((there[name.casefold()] for name in _NAME_COLUMNS if name.casefold() in there), None)
    coded: dict[str, tuple[str, str]] = {}
    for key, (term, prefix) in _ID_COLUMNS.items():
        if key.casefold() in there and term not in coded:
            coded[term] = (there[key.casefold()], prefix)
    if named is None or not coded:
        what = f"names ({', '.join(_NAME_COLUMNS)})" if named is None else f"ids ({', '.join(_ID_COLUMNS)})"
        listed = ", ".join(map(shown, side.table.column_names[:10]))
        raise InputError(f"--taxon_ids {given.path} has no column of {what}; the columns are {listed}")
    for column in (named, *(name for name, _ in coded.values())):
        if side.table.column_names.count(column) > 1:
            raise InputError(f"--taxon_ids {given.path} has the column {shown(column)} twice; rename one")
        if not any(is_kind(side.table[column].type) for is_kind in _NAMING_TYPES):
            kind = side.table[column].type
            raise InputError(
                f"--taxon_ids {given.path}: column {shown(column)} is {kind}; make it text or whole numbers"
            )
    found: dict[str, dict[str, str]] = {"taxonID": {}, "scientificNameID": {}}
    names = _as_text(side.table[named], len(side.table)).to_pylist()
    for term, (column, prefix) in coded.items():
        for row, (name, code) in enumerate(
            zip(names, _as_text(side.table[column], len(side.table)).to_pylist(), strict=True)
        ):
            if name and code and code not in NULL_WORDS:
                text = prefix + code if code.isdigit() else code
                known = found["scientificNameID" if text.startswith(_APHIA) else term]
                if known.setdefault(name, text) != text:
                    raise InputError(
                        f"{side.locate(row)}: {shown(name)} has the ids {shown(known[name])} and {shown(text)}; keep one"
                    )
    return found


def accepted_ranks(answers: pa.Table) -> Bool[np.ndarray, "rows 7"]:
    """Returns which names of `identify`'s answers are accepted: those above `abstained_at`."""
    stops = answers["abstained_at"].to_pylist()
    depth = np.array([len(RANKS) if stop is None else RANKS.index(stop) for stop in stops], int)
    named = np.stack([answers[rank].is_valid().to_numpy() for rank in RANKS], axis=1)
    return named & (np.arange(len(RANKS)) < depth[:, None])


def write_archive(
    path: Path,
    answers: pa.Table,
    queries: ParquetBlocks,
    rejects: Mapping[int, str],
    method: Method,
    described: ArchiveConfig,
    ids: TaxonIds | None = None,
) -> tuple[str, ...]:
    """Writes identifications as a zipped Darwin Core archive.

    Each query is an occurrence: one without an accepted name is `incertae sedis`, with the reason in
    identificationRemarks. The ranks, scientificName and taxonRank are those down to the lowest accepted name. Control
    characters, line breaks and tabs in texts become one space. Equal input gives equal bytes.

    Args:
        path: The file.
        answers: As `matching.answers.ANSWERS`, a row per query, perhaps with more columns.
        queries: The queries in the same order, with all of their columns.
        rejects: Why a query has no vector, by its number.
        method: How they were identified.
        described: Title, creator and the like.
        ids: From `read_taxon_ids`.

    Returns:
        Lines about what the archive lacks.

    Raises:
        InputError: The queries cannot be read.
    """
    columns = _Columns.of(queries)
    terms: dict[str, list[str]] = {}
    digest, undated, unnamed, missing = hashlib.sha256(), 0, 0, set()
    with zipfile.ZipFile(path, "w") as archive:
        with _entry(archive, _CORE) as file:
            for first, table in _tables(queries):
                why = [rejects.get(row) for row in range(first, first + len(table))]
                core = _occurrences(table, answers.slice(first, len(table)), why, columns, method, ids)
                undated += core[_DATE].to_pylist().count("")
                unnamed += core["scientificName"].to_pylist().count(_UNNAMED)
                if ids is not None:
                    coded = pc.or_(pc.not_equal(core["taxonID"], ""), pc.not_equal(core["scientificNameID"], ""))
                    missing |= set(core["scientificName"].filter(pc.invert(coded)).to_pylist())
                text = _lines(core, header=_CORE not in terms)
                terms[_CORE] = list(core)
                digest.update(text)
                file.write(text)
        with _entry(archive, _DNA_FILE) as file:
            for _, table in _tables(queries):
                dna = _sequences(table, columns, method)
                file.write(_lines(dna, header=_DNA_FILE not in terms))
                terms[_DNA_FILE] = list(dna)
        with _entry(archive, "meta.xml") as file:
            file.write(_meta(terms))
        with _entry(archive, "eml.xml") as file:
            file.write(_eml(described, method, uuid.uuid5(uuid.NAMESPACE_OID, digest.hexdigest())))
    notes = []
    if unnamed:
        notes.append(f"{unnamed:,} of {len(answers):,} occurrences have no name: {_UNNAMED}, the reason in the remarks")
    if undated:
        notes.append(f"{undated:,} of {len(answers):,} occurrences have no {_DATE}, which GBIF requires")
    if ids is not None:
        few = sorted(missing)[:_NAMED]
        more = f" and {len(missing) - len(few):,} more" if len(missing) > len(few) else ""
        notes.append(f"{len(missing):,} names without a taxon id{': ' if few else ''}{', '.join(few)}{more}")
    if not method.calibrated:
        notes.append("without a calibration the best guess at every rank is stated as the name; run bioscan calibrate")
    stated = {"title": described.title, "email": described.email, "license": described.license}
    stated["creator or --organization"] = described.creator or described.organization
    if unstated := [f"--{flag}" for flag, value in stated.items() if value is None]:
        notes.append(f"eml.xml still needs {', '.join(unstated)}, and an abstract, before it is published")
    else:
        notes.append("eml.xml still needs an abstract before it is published")
    if columns.left_out:
        notes.append(f"not in the archive: {', '.join(columns.left_out)} (binary)")
    return tuple(notes)


@contextmanager
def _entry(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    """Opens a file of the archive, always with the same date."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(entry, "w", force_zip64=True) as file:
        yield file


def _tables(queries: ParquetBlocks) -> Iterator[tuple[int, pa.Table]]:
    """Yields the first row and the rows of each block."""
    for index in range(len(queries)):
        block = queries[index]
        yield block.first_row, block.table


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Which column of the queries is which term."""

    sequence: str
    core: dict[str, str]
    dna: dict[str, str]
    coordinates: str | None
    """Column that joins latitude and longitude."""
    size: str | None
    """Column with the number of reads."""
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    @staticmethod
    def of(queries: ParquetBlocks) -> "_Columns":
        own = ("sequence_id", queries.sequence_column, queries.id_column)
        free = {field.name: field.type for field in queries.schema if field.name not in own}
        core, dna = ({term: name for term in terms if (name := _named(term, free))} for terms in (_OWN_CORE, _DNA))
        names = [name for name in free if name not in (*core.values(), *dna.values())]
        found, places = find_roles(names), find_metadata(names)
        joined = places.get("latitude") if places.get("latitude") == places.get("longitude") else None
        roles = {_DATE: found.get("date"), "verbatimCoordinates": joined}
        if joined is None:
            roles |= {"decimalLatitude": places.get("latitude"), "decimalLongitude": places.get("longitude")}
        if not core.keys() & {"minimumDepthInMeters", "maximumDepthInMeters"}:
            roles |= dict.fromkeys(("minimumDepthInMeters", "maximumDepthInMeters"), places.get("depth"))
        core = {term: name for term, name in roles.items() if name is not None} | core
        if "marker" in found:
            dna.setdefault("target_gene", found["marker"])
        size = "size" if pa.types.is_integer(free.get("size", pa.null())) and "organismQuantity" not in core else None
        used = {*core.values(), *dna.values(), size}
        binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
        left_out = [name for name, kind in free.items() if any(is_kind(kind) for is_kind in binary)]
        return _Columns(
            sequence=queries.sequence_column,
            core={term: name for term, name in core.items() if name not in left_out},
            dna={term: name for term, name in dna.items() if name not in left_out},
            coordinates=joined,
            size=size,
            others=tuple(name for name in free if name not in used and name not in left_out),
            left_out=tuple(left_out),
        )


def _named(term: str, names: Mapping[str, object]) -> str | None:
    """Returns the column called like a term, in any case; the exact one if there are several."""
    return term if term in names else next((name for name in names if name.casefold() == term.casefold()), None)


def _lowest(accepted: Bool[np.ndarray, "rows 7"]) -> Int[np.ndarray, " rows"]:
    """Returns the lowest accepted rank of each row, -1 where there is none."""
    return np.where(accepted.any(axis=1), len(RANKS) - 1 - np.argmax(accepted[:, ::-1], axis=1), -1)


def _occurrences(
    table: pa.Table,
    answers: pa.Table,
    why: Sequence[str | None],
    columns: _Columns,
    method: Method,
    ids: TaxonIds | None,
) -> dict[str, pa.Array]:
    """Makes the terms of some rows of the core, as text."""
    rows, accepted = answers.to_pylist(), accepted_ranks(answers)
    lowest = _lowest(accepted).tolist()
    names = [_UNNAMED if rank < 0 else row[RANKS[rank]] for row, rank in zip(rows, lowest, strict=True)]
    core: dict[str, Any] = {"occurrenceID": table["sequence_id"], "basisOfRecord": "MaterialSample"}
    core |= {"occurrenceStatus": "present", _DATE: ""}
    if columns.size is not None:
        empty = pc.fill_null(pc.equal(table[columns.size], 0), False)
        core["occurrenceStatus"] = pc.if_else(empty, "absent", "present")
        core["organismQuantity"] = table[columns.size]
        core["organismQuantityType"] = pc.if_else(table[columns.size].is_valid(), _READS, "")
    if columns.coordinates is not None:
        pairs = zip(("decimalLatitude", "decimalLongitude"), split_coordinates(table[columns.coordinates]), strict=True)
        core |= {term: pa.array(degrees) for term, degrees in pairs}
    core |= {term: table[name] for term, name in columns.core.items()}
    core |= {"scientificName": names, "taxonRank": ["" if rank < 0 else RANKS[rank] for rank in lowest]}
    core |= {
        rank: [row[rank] if kept else "" for row, kept in zip(rows, accepted[:, index], strict=True)]
        for index, rank in enumerate(RANKS[:-1])
    }
    core["specificEpithet"] = [
        _epithet(row["species"], row["genus"]) if kept else "" for row, kept in zip(rows, accepted[:, -1], strict=True)
    ]
    core["taxonID"] = [(ids or {}).get("taxonID", {}).get(name, "") for name in names]
    codes = {**(ids or {}).get("scientificNameID", {}), _UNNAMED: _UNNAMED_ID}
    core["scientificNameID"] = [codes.get(name, "") for name in names]
    facts = zip(rows, accepted, lowest, why, strict=True)
    core["identificationRemarks"] = [_remarks(row, kept, rank, reason, method) for row, kept, rank, reason in facts]
    core["identificationReferences"] = f"{method.software} | {method.model}"
    given = table.select(columns.others).to_pylist() if columns.others else [{}] * len(table)
    core["dynamicProperties"] = [_as_json(row) for row in given]
    return {term: _as_text(values, len(table)) for term, values in core.items()}


def _epithet(species: str, genus: str | None) -> str:
    first, _, rest = species.partition(" ")
    return rest if first == genus and " " not in rest else ""


def _remarks(row: dict[str, Any], accepted: np.ndarray, lowest: int, why: str | None, method: Method) -> str:
    """Tells in one text how sure a name is, what it rests on, and which names were not accepted."""
    if why is not None:
        return f"no name: the sequence was not compared with the reference: {why}"
    kind = "a calibrated probability" if method.calibrated else "a share of the vote, not calibrated"
    said = ["no name: none of the ranks is accepted"]
    if row.get("unnamed") is not None:
        said = [f"no name: the {row['unnamed']} with the nearest reference is below its floor"]
    if lowest >= 0:
        said = [f"{method.software} confidence (at {RANKS[lowest]}): {_number(row, lowest)}, {kind}"]
    said.append(f"against reference database: {method.reference}")
    if row["nearest_id"] is not None:
        known = {name: row[name] for name in _EVIDENCE if row.get(name) is not None}
        near = [f"{name} {value if isinstance(value, int) else f'{value:.4f}'}" for name, value in known.items()]
        near += ["on the reverse strand"] if row.get("strand") == "-" else []
        said.append(", ".join([f"nearest reference {row['nearest_id']}", *near]))
    below = [index for index in range(lowest + 1, len(RANKS)) if row[RANKS[index]] is not None and not accepted[index]]
    if below:
        guesses = [f"{RANKS[index]} {row[RANKS[index]]} ({_number(row, index)})" for index in below]
        said.append(f"not accepted: {', '.join(guesses)}")
    if row["novel"]:
        said.append(f"probably a species that the reference lacks (novelty {row['novelty']:.4f})")
    return "; ".join(said)


def _number(row: dict[str, Any], rank: int) -> str:
    value = row[f"{RANKS[rank]}_confidence"]
    return "unknown" if value is None else f"{value:.4f}"


def _sequences(table: pa.Table, columns: _Columns, method: Method) -> dict[str, pa.Array]:
    """Makes the terms of some rows of the extension, as text."""
    dna: dict[str, Any] = {"occurrenceID": table["sequence_id"], "DNA_sequence": table[columns.sequence]}
    dna |= {"otu_seq_comp_appr": f"{method.software}; {method.how}", "otu_db": method.reference}
    dna |= {term: table[name] for term, name in columns.dna.items()}
    return {term: _as_text(values, len(table)) for term, values in dna.items()}


def _as_text(values: Any, rows: int) -> pa.Array:
    """Returns a column, or one value for all rows, as text without tabs and line breaks; "" where there is none."""
    if isinstance(values, str):
        values = [values] * rows
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else pa.array(values)
    if pa.types.is_nested(column.type):
        column = pa.array([None if value is None else _json(value) for value in column.to_pylist()], pa.string())
    elif pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    text = column.cast(pa.string())
    if pa.types.is_timestamp(column.type):
        text = pc.replace_substring(text, " ", "T")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.fill_null(text, ""), _BREAKS, " "))


def _as_json(row: Mapping[str, object]) -> str:
    """Returns the known values of a row as a JSON object; "" if there are none."""
    known = {
        name: value
        for name, value in row.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }
    return _json(known) if known else ""


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _lines(columns: Mapping[str, pa.Array], *, header: bool) -> bytes:
    lines = pc.binary_join_element_wise(*columns.values(), "\t").to_pylist()
    return "".join(line + "\n" for line in ["\t".join(columns)] * header + lines).encode()


def _meta(terms: Mapping[str, Sequence[str]]) -> bytes:
    """Returns meta.xml, which says what the columns of the two files are."""
    root = ET.Element("archive", {"xmlns": "http://rs.tdwg.org/dwc/text/", "metadata": "eml.xml"})
    how = {"encoding": "UTF-8", "fieldsTerminatedBy": "\\t", "linesTerminatedBy": "\\n", "fieldsEnclosedBy": ""}
    kinds = ((_CORE, "core", "id", _CORE_ROWS), (_DNA_FILE, "extension", "coreid", _DNA_ROWS))
    for file, kind, key, rows in kinds:
        part = ET.SubElement(root, kind, {**how, "ignoreHeaderLines": "1", "rowType": rows})
        ET.SubElement(ET.SubElement(part, "files"), "location").text = file
        ET.SubElement(part, key, {"index": "0"})
        for index, term in enumerate(terms[file]):
            if kind == "core" or index:
                uri = _DNA[term] if kind == "extension" else _DWC + term
                ET.SubElement(part, "field", {"index": str(index), "term": uri})
    return _as_xml(root)


def _eml(described: ArchiveConfig, method: Method, package: uuid.UUID) -> bytes:
    """Returns eml.xml: the least of EML 2.1.1 that is valid, with what is known."""
    root = ET.Element(
        "eml:eml",
        {
            "xmlns:eml": _EML,
            "xmlns:xsi": "http://www.w3.org/2001/XMLSchema-instance",
            "xsi:schemaLocation": f"{_EML} http://rs.gbif.org/schema/eml-gbif-profile/1.1/eml.xsd",
            "packageId": str(package),
            "system": "http://gbif.org",
            "scope": "system",
            "xml:lang": "en",
        },
    )
    dataset = _add(root, "dataset")
    _add(dataset, "title", described.title or f"DNA-derived occurrences, identified by {method.software}")
    for role in ("creator", "metadataProvider"):
        _add_party(dataset, role, described)
    if described.license is not None:
        path, name = _LICENSES[described.license]
        paragraph = _add(_add(dataset, "intellectualRights"), "para", "This work is licensed under a ")
        link = _add(paragraph, "ulink")
        link.set("url", f"http://creativecommons.org/{path}/legalcode")
        _add(link, "citetitle", name)
    _add_party(dataset, "contact", described)
    done = (
        f"Sequences were identified with {method.software} and the model {method.model}, against the reference database"
    )
    step = _add(_add(dataset, "methods"), "methodStep")
    _add(_add(step, "description"), "para", f"{done} {method.reference}: {method.how}.")
    return _as_xml(root)


def _add(parent: ET.Element, tag: str, text: str | None = None) -> ET.Element:
    element = ET.SubElement(parent, tag)
    element.text = None if text is None else printable(text)
    return element


def _add_party(parent: ET.Element, role: str, described: ArchiveConfig) -> None:
    party = _add(parent, role)
    if described.creator is not None:
        given, _, surname = described.creator.strip().rpartition(" ")
        person = _add(party, "individualName")
        if given:
            _add(person, "givenName", given)
        _add(person, "surName", surname)
    if described.organization is not None or described.creator is None:
        _add(party, "organizationName", described.organization or "not stated")
    if described.email is not None:
        _add(party, "electronicMailAddress", described.email)


def _as_xml(root: ET.Element) -> bytes:
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"
