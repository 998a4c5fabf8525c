"""The ways in which public databases write a lineage as one text: one table, a rule for each."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

_RANK_OF = {"k": 0, "p": 1, "c": 2, "o": 3, "f": 4, "g": 5, "s": 6}
_DOMAINS = ("d", "sk")
_IGNORED = ("r", "t", "sh", "ss", "sc", "io", "sf", "tr", "sg")
"""Root, strain, species hypothesis and the ranks between the seven: read past."""

_PREFIX = re.compile(r"^\s*([A-Za-z]{1,2})(__|:)\s*")
_CONFIDENCE = re.compile(r"\(\s*[0-9.]+\s*\)$")
_TAXID = re.compile(r"_\d+$")
_ROOT = re.compile(r"^\s*[Rr]oot(_1)?\s*;")
_ORGANELLE = re.compile(r":[a-z]+$")
_FILLED_RANK = re.compile(r"^(kingdom|phylum|class|order|family|genus|species)_", re.IGNORECASE)

_SPECIES_HYPOTHESIS = re.compile(r"SH[0-9]+\.[0-9]+FU")
_MARKED = re.compile(r"(^|;|,)\s*['\"]?[A-Za-z]{0,2}(__|:)")
_WORDS = re.compile(
    r"unassigned|unclassified|unknown|unidentified|no (blast )?hit|na|n/a|nan|none|null|root|-|\?", re.IGNORECASE
)
_REMEMBERED = 1 << 16
"""Lineages whose reading is kept, as they repeat from block to block."""

NEEDS_DIALECT = (
    r"""(?:^|[;,|'"]|tax=)\s*(?:[A-Za-z]{1,2}(?:__|:)|D_[0-9]+__)|_[0-9]+\s*(?:;|$)|^\s*[Rr]oot(?:_1)?\s*;"""
)
"""Regular expression (RE2) of lineages that have marks of a database, even where they have seven fields."""

Names = tuple[str | None, ...]
"""One name per rank, kingdom to species; None where the lineage has none."""


@dataclass(frozen=True)
class Dialect:
    """One way to write a lineage."""

    name: str
    example: str
    rule: str
    read: Callable[[str], Names | None]
    """Returns the seven names, or None for a lineage in another dialect."""


def _placed(fields: dict[int, str], domain: str | None = None) -> Names:
    """Puts names at their ranks; the domain stands for a kingdom that is not there."""
    if not fields.get(0) and domain:
        fields = fields | {0: domain}
    names = [(fields.get(rank) or "").strip() or None for rank in range(7)]
    names = _without_taxids(tuple(names))
    species = names[6]
    if species is not None and " " not in species:
        names = (*names[:6], species.replace("_", " ").strip() or None)
    return names


def _without_taxids(names: Names) -> Names:
    """Takes `_5006` off each name, where all of at least two names end so; then `order_Insecta` is no name."""
    given = [name for name in names if name]
    if len(given) < 2 or not all(_TAXID.search(name) for name in given):
        return names
    bare = [_TAXID.sub("", name) if name else None for name in names]
    return tuple(None if name is None or _FILLED_RANK.match(name) else name for name in bare)


def _fields(lineage: str) -> list[str]:
    """Splits at ';', without a leading root and one trailing ';' (which seven fields keep: a blank species)."""
    fields = _ROOT.sub("", lineage, count=1).split(";")
    return fields[:-1] if len(fields) != 7 and len(fields) > 1 and not fields[-1].strip() else fields


def _read_prefixed(lineage: str, separator: str) -> Names | None:
    found: dict[int, str] = {}
    domain = None
    for field in lineage.split(separator):
        name = field.strip().strip("'\"").strip()
        if not name.strip("_") or _SPECIES_HYPOTHESIS.fullmatch(name):
            continue
        mark = _PREFIX.match(name)
        if mark is None:
            return None
        letters = mark[1].lower()
        while inner := _PREFIX.match(name):  # k:k__Animalia
            name = name[inner.end() :]
        name = _CONFIDENCE.sub("", name.strip()).strip().strip("'\"").strip()
        if letters in _DOMAINS:
            domain = domain or name
        elif letters in _RANK_OF:
            if _RANK_OF[letters] in found:
                return None
            found[_RANK_OF[letters]] = name
        elif letters not in _IGNORED:
            return None
    return _placed(found, domain) if found or domain else None


def _read_sintax(lineage: str) -> Names | None:
    text = lineage.split("tax=", 1)[-1].strip().strip(";")
    if ":" not in text or not _PREFIX.match(text.lstrip("'\"")) or ";" in text:
        return None
    return _read_prefixed(text, ",")


def _read_marked(lineage: str) -> Names | None:
    if not _MARKED.search(lineage):
        return None
    text = _ROOT.sub("", lineage, count=1)
    return _read_prefixed(text, ";" if ";" in text or "," not in text else ",")


def _read_barred(lineage: str) -> Names | None:
    marked = "|" in lineage and all(re.match(r"\s*[A-Za-z]{1,2}__", part) for part in lineage.split("|"))
    return _read_prefixed(lineage, "|") if marked else None


def _read_unite(lineage: str) -> Names | None:
    parts = lineage.split("|")
    marked = [part for part in parts if re.match(r"\s*[kd]__", part)]
    return _read_marked(marked[0]) if len(parts) > 1 and len(marked) == 1 else None


def _read_numbered(lineage: str) -> Names | None:
    found: dict[int, str] = {}
    for field in lineage.split(";"):
        if not field.strip():
            continue
        mark = re.match(r"\s*D_(\d+)__(.*)$", field)
        if mark is None or int(mark[1]) in found:
            return None
        found[int(mark[1])] = mark[2]
    return _placed(found) if found else None


def _read_taxids(lineage: str) -> Names | None:
    fields = [field.strip() for field in _fields(lineage)]
    given = [field for field in fields if field]
    if len(fields) != 7 or len(given) < 2 or not all(_TAXID.search(field) for field in given):
        return None
    return _placed(dict(enumerate(fields)))


def _read_pr2(lineage: str) -> Names | None:
    fields = [_ORGANELLE.sub("", field.strip()) for field in _fields(lineage)]
    if len(fields) not in (8, 9) or fields[0] not in ("Eukaryota", "Bacteria", "Archaea"):
        return None
    domain, _, phylum, *rest = fields
    if len(fields) == 9:
        subdivision, *rest = rest
        phylum = phylum if not subdivision or re.search(r"_X+$", subdivision) else subdivision
    return _placed(dict(enumerate([domain, phylum, *rest])))


def _read_plain(lineage: str) -> Names | None:
    fields = _fields(lineage)
    return tuple(field.strip() or None for field in fields) if len(fields) == 7 else None


def _read_unknown(lineage: str) -> Names | None:
    return (None,) * 7 if _WORDS.fullmatch(lineage.strip().strip(";").strip()) else None


DIALECTS = (
    Dialect("unknown", "Unassigned", "one word that names no taxon: all ranks are unknown", _read_unknown),
    Dialect(
        "MetaPhlAn",
        "k__Animalia|p__Chordata|c__Actinopterygii|o__Perciformes|f__Scombridae|g__Sarda|s__Sarda_sarda",
        "marked ranks between bars; t__ is read past",
        _read_barred,
    ),
    Dialect(
        "UNITE",
        "Fungi_sp|AB1|SH1.08FU|refs|k__Fungi;p__Ascomycota;...;s__Epichloe_typhina",
        "the field of the header that begins with k__ is read as marked ranks; SH numbers are read past",
        _read_unite,
    ),
    Dialect(
        "SILVA D_0__",
        "D_0__Bacteria;D_1__Firmicutes;...;D_6__Bacillus subtilis",
        "D_0 is the domain, in the kingdom's place, D_1 the phylum, D_6 the species; deeper levels are read past",
        _read_numbered,
    ),
    Dialect(
        "SINTAX",
        "tax=k:Animalia,p:Chordata,...,s:Sarda_sarda;",
        "k: p: c: o: f: g: s: between commas, in any order; d: stands for a missing k:; confidences (0.97) come off",
        _read_sintax,
    ),
    Dialect(
        "marked ranks",
        "k__Animalia; p__Chordata; c__Actinopterygii; o__; f__; g__Sarda; s__sarda",
        "QIIME, Greengenes, GTDB, SILVA, UNITE: k__ to s__ in any order, missing or empty is unknown; d__ or sk__ "
        "stands for a missing k__; ranks between the seven are read past; a species without a blank has '_' for it",
        _read_marked,
    ),
    Dialect(
        "MIDORI2",
        "root_1;Eukaryota_2759;Chordata_7711;...;Sarda_8238;Sarda sarda_8239",
        "seven fields that all end in _ and an NCBI number, which comes off; root_1 is read past; order_Insecta, a "
        "rank and its parent, is unknown",
        _read_taxids,
    ),
    Dialect(
        "PR2",
        "Eukaryota;TSAR;Alveolata;Dinoflagellata;Dinophyceae;Peridiniales;...;Unruhdinium_kevei",
        "eight fields (version 4) or nine (version 5) from Eukaryota, Bacteria or Archaea down: the domain in the "
        "kingdom's place, the division as phylum (of nine the subdivision, unless that is a placeholder in _X), class "
        "to species; the supergroup is read past",
        _read_pr2,
    ),
    Dialect(
        "seven fields",
        "Animalia;Chordata;Actinopterygii;Perciformes;Scombridae;Sarda;Sarda sarda",
        "kingdom to species, blank where unknown (SILVA without marks too); one ';' more at the end is allowed",
        _read_plain,
    ),
)
"""Tried in this order; the first that can read a lineage does."""


@lru_cache(_REMEMBERED)
def read_dialect(lineage: str) -> tuple[Names, Dialect] | None:
    """Reads a lineage in whichever dialect it is in.

    Returns:
        The seven names, kingdom to species, and the dialect; None if no dialect reads it.

    Example:
        >>> names, dialect = read_dialect("k__Animalia; p__Arthropoda; g__Adelpha; s__Adelpha_tracta")
        >>> names[0], names[2], names[6], dialect.name
        ('Animalia', None, 'Adelpha tracta', 'marked ranks')
    """
    for dialect in DIALECTS:
        if (names := dialect.read(lineage)) is not None:
            return names, dialect
    return None


def strip_marks(names: Names) -> Names:
    """Takes the marks of a database off the names of one row's rank columns: `g__Sarda`, `g:Sarda`, `Sarda_5005`."""
    bare = []
    for rank, name in enumerate(names):
        mark = _PREFIX.match(name) if name else None
        letters = {rank: letter for letter, rank in _RANK_OF.items()}
        own = mark is not None and (mark[1].lower() == letters[rank] or (rank == 0 and mark[1].lower() in _DOMAINS))
        bare.append(name[mark.end() :].strip() if name and mark and own else name)
    marked = any(name != given for name, given in zip(bare, names, strict=True))
    found = _without_taxids(tuple(name or None for name in bare))
    return _placed(dict(enumerate(n or "" for n in found))) if marked or found != tuple(bare) else names
