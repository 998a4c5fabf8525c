"""The parts of the page as HTML, one function for each; every text that comes from data is escaped."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.reports import charts
from bioscan_jax.reports.contents import Gathered, first_field
from bioscan_jax.reports.identifications import Identified
from bioscan_jax.reports.measure import RankFigures
from bioscan_jax.reports.projection import Projection

SHOWN_TAXA = 15
_MAIN_FIGURES = {
    "vectors": "vectors",
    "rejects": "rejected sequences",
    "counts · distinct": "distinct sequences",
    "tokens real": "tokens",
    "seconds · total": "seconds",
    "rows per second": "rows per second",
    "devices": "devices",
    "processes": "processes",
    "peak host bytes": "peak memory of the host in bytes",
    "provenance · model": "model",
    "provenance · license": "licence of the weights",
}
"""Those of the run's record that are shown at once, and what they are called."""


def header(gathered: Gathered) -> str:
    """Name, licence, main counts and links."""
    made_by = gathered.made_by
    if made_by.get("model", "").startswith("random:"):
        told = "Random weights, not trained: these vectors only show that the machinery runs."
    elif made_by.get("license"):
        told = f"Licence of the weights that made these vectors: {made_by['license']} ({made_by.get('model', '?')})."
    else:
        told = (
            f"The licence of the weights that made these vectors is not recorded ({made_by.get('model', 'no model')})."
        )
    rows = gathered.rows
    shown = "all" if len(rows) == gathered.total else f"a sample of {len(rows):,}, drawn at random,"
    place = "rows with a place" if len(rows) == gathered.total else "shown rows with a place"
    tiles = {
        "vectors": gathered.total,
        "rejected sequences": gathered.rejects,
        "numbers a vector": rows.vectors.shape[1],
        "genera named": len(gathered.taxa[RANKS.index("genus")].names),
        "species named": len(gathered.taxa[RANKS.index("species")].names),
        place: int(np.isfinite(rows.latitude).sum()),
    }
    links = {
        "embedding": "Embedding", "places": "Places", "answers": "Identification", "taxa": "Taxa", "run": "Run",
        "origin": "Origin",
    }  # fmt: skip
    anchors = "".join(f"<a href=#{key}>{name}</a>" for key, name in links.items())
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{charts.text(v)}</dd></div>" for k, v in tiles.items())
    return (
        f"<header><h1>{escape(gathered.table)}</h1>"
        f"<p class=soft>{escape(gathered.uri)}: {gathered.total:,} rows, {shown} on the maps.</p>"
        f"<p class=licence id=licence>{escape(told)}</p><dl class=tiles>{cells}</dl>"
        f'<nav aria-label="Parts of the report">{anchors}</nav></header>'
    )


def _note(message: str) -> str:
    return f"<p class=note>Left out: {escape(message)}.</p>"


def _map(label: str, fields: Sequence[str], chosen: str) -> str:
    options = "".join(f"<option{' selected' * (f == chosen)} value={f}>{f.replace('_', ' ')}</option>" for f in fields)
    return (
        f"<div class=controls><label>Colour by <select>{options}</select></label>"
        '<label>Find <input type=search placeholder="id or taxon" spellcheck=false></label>'
        '<button type=button class=in aria-label="Zoom in">+</button>'
        '<button type=button class=out aria-label="Zoom out">−</button><button type=button class=all>All</button>'
        '<span class="found soft" role=status></span></div>'
        "<div class=stage><canvas class=back aria-hidden=true></canvas>"
        f'<canvas class=front tabindex=0 role=application aria-label="{escape(label)}"></canvas>'
        "<div class=tip role=status hidden></div></div><ul class=legend></ul>"
        "<p class=soft>Drag to move; click the map, then scroll to zoom; pinch on a touch screen; with the keyboard: "
        "arrows, +, − and 0. A name in the legend shows its rows alone.</p>"
    )


def _fields(gathered: Gathered, identified: Identified | None) -> list[str]:
    fields = [rank for rank, taxa in zip(RANKS, gathered.taxa, strict=True) if taxa.names]
    if any(marker is not None for marker in gathered.rows.markers):
        fields.append("marker_gene")
    if np.isfinite(gathered.rows.depth).any():
        fields.append("depth")
    here = set(gathered.rows.ids)
    if identified is not None and any(
        key in here and known for key, known in zip(identified.ids, np.isfinite(identified.novelty), strict=True)
    ):
        fields.append("novelty")
    return fields or ["kingdom"]


def embedding(gathered: Gathered, projection: Projection, identified: Identified | None) -> str:
    """The map of the vectors."""
    told = (
        f"Each point is a sequence; near points have vectors of a small angle. Made by {projection.method}. Distances "
        "between far groups, and the size of a group, mean little on such a map."
    )
    notes = "".join(_note(gathered.notes[part]) for part in ("taxa", "depth") if part in gathered.notes)
    body = _map("Map of the embedding", _fields(gathered, identified), first_field(gathered))
    return f"<section id=embedding><h2>Map of the embedding</h2><p>{escape(told)}</p>{notes}{body}</section>"


def places(gathered: Gathered) -> str:
    """The map of the places, or why there is none."""
    title = "<h2>Where samples were taken</h2>"
    placed = int(np.isfinite(gathered.rows.latitude).sum())
    if not placed:
        return f"<section id=places class=places>{title}{_note(gathered.notes['places'])}</section>"
    told = f"{placed:,} of {len(gathered.rows):,} rows have a latitude and a longitude. Large points hold more rows; a "
    told += "point has the colour of its most frequent name."
    body = _map("Map of the places", _fields(gathered, None), first_field(gathered))
    return f"<section id=places class=places>{title}<p>{told}</p>{body}</section>"


def answers(gathered: Gathered, identified: Identified | None, figures: Sequence[RankFigures]) -> str:
    """How right the identifications are, as far as that can be told."""
    title = "<h2>Identification</h2>"
    if identified is None:
        return f"<section id=answers>{title}{_note('no identifications were given (--identified)')}</section>"
    parts = [f"<p>{len(identified.ids):,} queries.</p>"]
    if not identified.calibrated:
        parts.append(_note("answers and novelty flags, since these identifications were made without a calibration"))
    labelled = any(f.labelled for f in figures)
    if not labelled:
        parts.append(_note("accuracy and calibration curves: no true names were given (--truth)"))
    heads = ["rank", "right", "right of answered", "answered", "named", "with truth", "truth in table"]
    rows = []
    for f in figures:
        shares = map(charts.percent, (f.accuracy, f.precision, f.answered, f.named))
        rows.append((f.rank, *shares, f"{f.labelled:,}", charts.percent(f.in_table)))
    parts.append(charts.table("Best guesses; a query without one counts as wrong", heads, rows))
    if curves := [charts.calibration(f.rank, f.bins, f.error) for f in figures if f.bins]:
        told = (
            "Of the answers of a confidence, so many are right; bars are intervals of 95 %, the diagonal is the ideal."
        )
        parts.append(f"<h3>Calibration</h3><p>{told}</p><div class=charts>{''.join(curves)}</div>")
    known = np.isfinite(identified.novelty)
    if known.any():
        names, label = ("not flagged", "flagged as novel"), "Queries by novelty score"
        parts.append(
            "<h3>Novelty</h3>" + charts.histogram(identified.novelty[known], identified.novel[known], names, label)
        )
        apart = [f"{f.rank} {f.separation:.3f}" for f in figures if f.separation is not None]
        if apart:
            parts.append(
                "<p>AUROC of the score for queries whose true name the table lacks (0.5 is chance, 1 perfect): "
                f"{escape(', '.join(apart))}.</p>"
            )
    else:
        parts.append(_note("novelty: no query has a score"))
    return f"<section id=answers>{title}{''.join(parts)}</section>"


def taxa_counts(gathered: Gathered) -> str:
    """The most frequent names of each rank."""
    title = "<h2>Counts by taxon</h2>"
    if "taxa" in gathered.notes:
        return f"<section id=taxa>{title}{_note(gathered.notes['taxa'])}</section>"
    parts = [f"<p>Over all {gathered.total:,} rows of the table.</p>"]
    for rank, taxa in zip(RANKS, gathered.taxa, strict=True):
        names, named = len(taxa.names), charts.percent(taxa.known / gathered.total)
        head = f"{rank}: {names:,} name{'s' * (names != 1)}, {named} of the rows named"
        shown = list(zip(taxa.names, taxa.counts, strict=True))[:SHOWN_TAXA]
        rest = taxa.known - sum(count for _, count in shown)
        more = f"<p class=soft>{len(taxa.names) - len(shown):,} more names with {rest:,} rows</p>" * (rest > 0)
        is_open = " open" if rank == first_field(gathered) else ""
        parts.append(
            f"<details{is_open}><summary>{escape(head)}</summary>{charts.bars(shown, gathered.total)}{more}</details>"
        )
    return f"<section id=taxa>{title}{''.join(parts)}</section>"


def run(gathered: Gathered) -> str:
    """Figures of the run that made the table."""
    title = "<h2>The run that made the table</h2>"
    if gathered.run is None:
        return f"<section id=run>{title}{_note(gathered.notes['run'])}</section>"
    every = _flat(gathered.run)
    found = dict(every)
    main = [(label, found[name]) for name, label in _MAIN_FIGURES.items() if name in found]
    return f"<section id=run>{title}{charts.facts(main)}{_more('All figures', every)}</section>"


def _more(title: str, pairs: Sequence[tuple[str, object]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{charts.facts(pairs)}</details>" if pairs else ""


def _flat(value: Any, name: str = "") -> list[tuple[str, object]]:
    """Nested facts, each under its whole name; lists of plain values on one line."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _flat(inner, f"{name} · {key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{name} {index + 1}")]
    if isinstance(value, list):
        value = ", ".join("x".join(map(str, item)) if isinstance(item, list) else str(item) for item in value) or "none"
    return [(name.replace("_", " "), value)]


def origin(gathered: Gathered) -> str:
    """What made the table, by its own metadata."""
    main: list[tuple[str, object]] = []
    nested: list[tuple[str, object]] = []
    for key, value in sorted(gathered.made_by.items()):
        try:
            facts = json.loads(value)
        except ValueError:
            facts = None
        if isinstance(facts, dict):
            nested += _flat(facts, key)
        else:
            main.append((key.replace("_", " "), int(value) if value.isdecimal() and len(value) < 12 else value))
    body = charts.facts(main) if main else _note("the table does not say what made it")
    return f"<section id=origin><h2>What made the table</h2>{body}{_more('All that decided it', nested)}</section>"
