"""The report as one HTML page that loads nothing from the network; every text from the data is escaped here."""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.reports import charts
from bioscan_jax.reports.charts import percent
from bioscan_jax.reports.contents import Rows, TableContents, Taxa
from bioscan_jax.reports.identifications import Identifications, RankMetrics
from bioscan_jax.reports.projection import Projection
from bioscan_jax.reports.queries import Queries, fitting_cigars

_XY_LEVELS = 65535
"""Steps of a coordinate on the map of the vectors."""
_MAX_BASES = 20_000_000
"""Most bases of DNA in a page, which can be searched there; about 30,000 COI barcodes."""
_SCRIPTS = ("data.js", "map.js", "details.js", "search.js", "selection.js", "page.js")
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
"""Entries of the run record that are shown first, and their labels."""


def render(
    contents: TableContents,
    projection: Projection,
    identifications: Identifications | None,
    queries: Queries | None,
    metrics: Sequence[RankMetrics],
    made: str,
) -> str:
    """Returns the page as HTML.

    Args:
        contents: The table.
        projection: A point for each of its rows, then one for each query.
        identifications: Results of `identify`, if there are any.
        queries: The queries on the map, if their vectors are known.
        metrics: Metrics of these results, one for each rank.
        made: When and by what the report was made.
    """
    data = _map_data(contents, projection, identifications, queries)
    sections = {
        "embedding": ("Map of the embedding", _embedding(contents, projection, identifications, data)),
        "places": ("Where samples were taken", _places(contents)),
        "answers": ("Identification", _identification(identifications, metrics)),
        "taxa": ("Counts by taxon", _taxa(contents)),
        "run": ("The run that made the table", _run(contents)),
        "origin": ("What made the table", _origin(contents)),
    }
    body = "".join(f"<section id={key}><h2>{title}</h2>{inside}</section>" for key, (title, inside) in sections.items())
    foot = f"{escape(made)} Coastline: Natural Earth, public domain. This file loads nothing from the network."
    body = f"{_header(contents)}<main>{body}</main><footer>{foot}</footer>"
    return _document(body, contents, data)


def render_map(
    contents: TableContents,
    projection: Projection,
    identifications: Identifications | None,
    queries: Queries | None,
) -> str:
    """Returns a page of the map of the vectors alone; arguments as those of `render`."""
    data = _map_data(contents, projection, identifications, queries)
    inside = _embedding(contents, projection, identifications, data)
    return _document(f"<main><section id=embedding>{_summary(contents)}{inside}</section></main>", contents, data)


def _document(body: str, contents: TableContents, data: dict[str, Any]) -> str:
    """A whole page: its policy, style, body, data and script."""
    assets = resources.files("bioscan_jax.reports")
    style = assets.joinpath("page.css").read_text("utf-8")
    for name, dark in (("light", False), ("dark", True)):
        style = style.replace(f"/* taxa {name} */", charts.palette_css(dark=dark))
    script = "\n".join(assets.joinpath(name).read_text("utf-8") for name in _SCRIPTS)
    # Only this script and this style may run, in case others get into the page through the data
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(f"{contents.table}: report")}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{_json(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """Returns JSON that cannot end the script element around it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()


def _header(contents: TableContents) -> str:
    """Title, licence, main counts and links."""
    model, license_ = contents.made_by.get("model", ""), contents.made_by.get("license")
    if model.startswith("random:"):
        notice = "Random, untrained weights: these vectors only show that the software runs."
    elif license_:
        notice = f"Licence of the weights that made these vectors: {license_} ({model or '?'})."
    else:
        notice = f"The licence of the weights that made these vectors is not recorded ({model or 'no model'})."
    rows = contents.rows
    whole = len(rows) == contents.total
    tiles = {
        "vectors": contents.total,
        "rejected sequences": contents.rejects,
        "vector dimensions": rows.vectors.shape[1],
        "genera named": len(contents.taxa[RANKS.index("genus")].names),
        "species named": len(contents.taxa[RANKS.index("species")].names),
        "rows with a place" if whole else "shown rows with a place": int(np.isfinite(rows.latitude).sum()),
    }
    links = {
        "embedding": "Embedding", "places": "Places", "answers": "Identification", "taxa": "Taxa", "run": "Run",
        "origin": "Origin",
    }  # fmt: skip
    return (
        f"<header><h1>{escape(contents.table)}</h1>"
        f"{_summary(contents)}"
        f"<p class=licence id=licence>{escape(notice)}</p><dl class=tiles>"
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles.items())
        + '</dl><nav aria-label="Parts of the report">'
        + "".join(f"<a href=#{key}>{name}</a>" for key, name in links.items())
        + "</nav></header>"
    )


def _summary(contents: TableContents) -> str:
    """Where the table is and how many of its rows are shown."""
    more = len(contents.rows) - contents.sampled
    shown = "all" if contents.sampled == contents.total else f"a random sample of {contents.sampled:,}"
    shown += f" and {more:,} nearest reference{'s' * (more > 1)} of the queries" * (more > 0)
    return f"<p class=soft>{escape(contents.uri)}: {contents.total:,} rows, {shown} on the map.</p>"


def _embedding(
    contents: TableContents,
    projection: Projection,
    identifications: Identifications | None,
    data: dict[str, Any],
) -> str:
    """The map of the vectors, with what can be searched, selected and compared on it."""
    queries, rows = data["queries"], len(contents.rows)
    text = (
        f"Each point is a sequence; points close together have similar vectors. Made by {projection.method}. Distances "
        "between far groups and the sizes of groups mean little on such a map."
    )
    if queries:
        shown, total = len(queries["nearest_id"]), queries["total"]
        some = f"all {total:,}" if shown == total else f"a random sample of {shown:,} of the {total:,}"
        text += f" Diamonds are queries ({some} with a vector), placed by their own vectors together with the table's."
    held = [(data["dna_rows"], rows, "rows"), (data["dna_queries"], len(data["ids"]) - rows, "queries")]
    if some := [f"{'all' if n == of else f'{n:,} of the'} {of:,} {what}" for n, of, what in held if n]:
        text += f" The page holds the DNA of {' and '.join(some)} on the map, to search in."
    parts = ("taxa", "depth", "queries", "dna", "alignments")
    notes = "".join(_note(contents.notes[part]) for part in parts if part in contents.notes)
    return f"<p>{escape(text)}</p>{notes}{_explorer(_map('Map of the embedding', contents, identifications, selectable=True), bool(queries))}"


def _explorer(point_map: str, with_queries: bool) -> str:
    """A map with its tools: a list of results, the selection, and the details of one point."""
    more = "<button type=button class=by-novelty>List the queries, most novel first</button>" * with_queries
    alignment = "; a query also shows its alignment" * with_queries
    return f"""<div class=work><div>{point_map}</div>
<div class=side>
<section class=hint><h3>What to do here</h3><ul>
<li>Type a name, an id or some DNA into the search field.</li>
<li>Click a point, or a result, for what is known of it{alignment}.</li>
<li>Draw around points to count them and to save their ids.</li></ul>{more}</section>
<section class=results aria-label="Search results" hidden></section>
<section class=card aria-label="Chosen point" aria-live=polite hidden></section>
<section class=picked aria-label="Selection" hidden></section>
</div>
<figure class=alignment aria-label="Alignment" hidden></figure></div>"""


def _places(contents: TableContents) -> str:
    """The map of the sampling places, or why there is none."""
    placed = int(np.isfinite(contents.rows.latitude).sum())
    if not placed:
        return _note(contents.notes["places"])
    text = f"{placed:,} of {len(contents.rows):,} rows have a latitude and a longitude. Larger points hold more rows; "
    text += "a point has the colour of its most frequent name."
    return f"<p>{text}</p>{_map('Map of the places', contents, None)}"


_SELECTING = (
    '<span class=group role=group aria-label="Select points">'
    "<button type=button class=lasso aria-pressed=false>Lasso</button>"
    "<button type=button class=box aria-pressed=false>Rectangle</button>"
    "<button type=button class=view>Select view</button></span>"
)
"""Ways to select points; the last one, which takes what is in view, needs no pointer."""
_KEYS = ", Enter for the point in the middle, S to select what is in view"


def _map(
    label: str, contents: TableContents, identifications: Identifications | None, *, selectable: bool = False
) -> str:
    """An interactive map with its controls; map.js draws it."""
    rows = contents.rows
    fields = [rank for rank, taxa in zip(RANKS, contents.taxa, strict=True) if taxa.names]
    if any(marker is not None for marker in rows.markers):
        fields.append("marker_gene")
    if np.isfinite(rows.depth).any():
        fields.append("depth")
    if identifications is not None:
        fields += ["novelty"] * bool(identifications.scored.any())
    find = "name, id or DNA" if selectable else "name or id"
    chosen = RANKS[contents.main_rank]
    options = "".join(
        f"<option{' selected' * (field == chosen)} value={field}>{field.replace('_', ' ')}</option>"
        for field in fields or ["kingdom"]
    )
    return (
        f"<div class=controls><label>Colour by <select>{options}</select></label>"
        f'<label>Find <input type=search placeholder="{find}" spellcheck=false></label>'
        '<button type=button class=in aria-label="Zoom in">+</button>'
        '<button type=button class=out aria-label="Zoom out">−</button><button type=button class=all>All</button>'
        f'{_SELECTING * selectable}<span class="found soft" role=status></span></div>'
        "<div class=stage><canvas class=back aria-hidden=true></canvas>"
        f'<canvas class=front tabindex=0 role=application aria-label="{escape(label)}"></canvas>'
        "<div class=tip role=status hidden></div></div><ul class=legend></ul>"
        "<p class=soft>Drag to move; click the map, then scroll to zoom; pinch on a touch screen; with the keyboard: "
        f"arrows, +, − and 0{_KEYS * selectable}. Click a name in the legend to show its points alone.</p>"
    )


def _identification(identifications: Identifications | None, metrics: Sequence[RankMetrics]) -> str:
    """How accurate the identifications are, as far as that is known."""
    if identifications is None:
        return _note("no identifications were given (--identified)")
    parts = [f"<p>{len(identifications.ids):,} queries.</p>"]
    if not identifications.calibrated:
        parts.append(_note("answers and novelty flags, since these identifications were made without a calibration"))
    if not any(m.labelled for m in metrics):
        parts.append(_note("accuracy and calibration curves: no true names were given (--truth)"))
    heads = ["rank", "right", "right of answered", "answered", "named", "with truth", "truth in table"]
    lines = []
    for m in metrics:
        fractions = map(percent, (m.accuracy, m.precision, m.answered, m.named))
        lines.append((m.rank, *fractions, f"{m.labelled:,}", percent(m.in_table)))
    parts.append(_table("Best guesses; a query without one counts as wrong", heads, lines))
    if curves := [_calibration(m) for m in metrics if m.bins]:
        text = "The fraction of right answers by confidence, with 95 % intervals; the diagonal is perfect calibration."
        parts.append(f"<h3>Calibration</h3><p>{text}</p><div class=charts>{''.join(curves)}</div>")
    if not identifications.scored.any():
        return "".join([*parts, _note("novelty: no query has a score")])
    label = f"Histogram of the novelty scores of {identifications.scored.sum():,} queries"
    svg = charts.as_svg(charts.draw_novelty, identifications, label=label, width=400, height=230)
    parts.append(f"<h3>Novelty</h3><figure class=wide>{svg}</figure>")
    if separations := [f"{m.rank} {m.separation:.3f}" for m in metrics if m.separation is not None]:
        parts.append(
            "<p>AUROC of the score for queries whose true name is missing from the table (0.5 is chance, 1 is "
            f"perfect): {', '.join(separations)}.</p>"
        )
    return "".join(parts)


def _calibration(metrics: RankMetrics) -> str:
    error = "–" if metrics.error is None else f"{metrics.error:.3f}"
    text = f"{sum(b.count for b in metrics.bins):,} answers, calibration error {error}"
    label = f"{metrics.rank}: fraction right by confidence; {text}"
    svg = charts.as_svg(charts.draw_calibration, metrics, label=label, width=200, height=200)
    return f"<figure>{svg}<figcaption>{text}</figcaption></figure>"


def _taxa(contents: TableContents) -> str:
    """The most frequent names of each rank."""
    if "taxa" in contents.notes:
        return _note(contents.notes["taxa"])
    parts = [f"<p>Over all {contents.total:,} rows of the table.</p>"]
    for index, (rank, taxa) in enumerate(zip(RANKS, contents.taxa, strict=True)):
        names, named = len(taxa.names), percent(taxa.known / contents.total)
        head = f"{rank}: {names:,} name{'s' * (names != 1)}, {named} of the rows named"
        chosen = index == contents.main_rank
        inside = (_taxa_chart(rank, taxa) if chosen and names else "") + _taxa_table(taxa, contents.total)
        parts.append(f"<details{' open' * chosen}><summary>{escape(head)}</summary>{inside}</details>")
    return "".join(parts)


def _taxa_chart(rank: str, taxa: Taxa) -> str:
    height = 70 + 16 * min(len(taxa.names), charts.SHOWN_TAXA)
    label = f"Rows by {rank}; the table below has the numbers"
    svg = charts.as_svg(charts.draw_taxa, rank, taxa, label=label, width=400, height=height)
    return f"<figure class=wide>{svg}</figure>"


def _taxa_table(taxa: Taxa, total: int) -> str:
    shown = list(zip(taxa.names, taxa.counts, strict=True))[: charts.SHOWN_TAXA]
    lines = [(name, f"{count:,}", percent(count / total)) for name, count in shown]
    rest = taxa.known - sum(count for _, count in shown)
    more = f"<p class=soft>{len(taxa.names) - len(shown):,} more names with {rest:,} rows</p>" * (rest > 0)
    return _table("", ["name", "rows", "of all rows"], lines) + more


def _run(contents: TableContents) -> str:
    """Figures of the run that made the table."""
    if contents.run is None:
        return _note(contents.notes["run"])
    every = _flat(contents.run)
    values = dict(every)
    main = [(label, values[name]) for name, label in _MAIN_FIGURES.items() if name in values]
    return f"{_facts(main)}{_more('All figures', every)}"


def _origin(contents: TableContents) -> str:
    """What made the table, from its own metadata."""
    main: list[tuple[str, object]] = []
    nested: list[tuple[str, object]] = []
    for key, value in sorted(contents.made_by.items()):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict):
            nested += _flat(parsed, key)
        else:
            main.append((key.replace("_", " "), int(value) if value.isdecimal() and len(value) < 12 else value))
    body = _facts(main) if main else _note("the table does not record what made it")
    return f"{body}{_more('All settings', nested)}"


def _flat(value: Any, name: str = "") -> list[tuple[str, object]]:
    """Flattens nested values, each under its full name; a list of plain values becomes one line."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in _flat(inner, f"{name} · {key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for index, item in enumerate(value) for leaf in _flat(item, f"{name} {index + 1}")]
    if isinstance(value, list):
        value = ", ".join("x".join(map(str, item)) if isinstance(item, list) else str(item) for item in value) or "none"
    return [(name.replace("_", " "), value)]


def _note(message: str) -> str:
    return f"<p class=note>Left out: {escape(message)}.</p>"


def _more(title: str, pairs: Sequence[tuple[str, object]]) -> str:
    return f"<details><summary>{escape(title)}</summary>{_facts(pairs)}</details>" if pairs else ""


def _facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(_text(value))}</td></tr>" for name, value in pairs
    )
    return f"<div class=scroll><table class=facts><tbody>{rows}</tbody></table></div>"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are numbers, except the first."""
    kinds = ["", *(" class=number" for _ in heads[1:])]
    top = "".join(f"<th scope=col{kind}>{escape(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<div class=scroll><table>{title}<thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"


def _text(value: object) -> str:
    """Formats a value for reading: digits grouped, a dash for None."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def _map_data(
    contents: TableContents,
    projection: Projection,
    identifications: Identifications | None,
    queries: Queries | None,
) -> dict[str, Any]:
    """What the maps' script reads, as JSON can hold it: arrays are little-endian in base64, -1 is unknown.

    The first `rows` points are rows of the table, the others queries.
    """
    rows = contents.rows
    low, high = projection.points.min(axis=0), projection.points.max(axis=0)
    scaled = np.round((projection.points - low) / max(float((high - low).max()), 1e-9) * _XY_LEVELS)
    labels = [dict(zip(taxa.names, range(len(taxa.names)), strict=True)) for taxa in contents.taxa]
    markers = sorted({marker for marker in rows.markers if marker is not None})
    place = {marker: index for index, marker in enumerate(markers)}
    marker = [-1 if marker is None else place[marker] for marker in rows.markers]
    numbers = {"depth": rows.depth, "latitude": rows.latitude, "longitude": rows.longitude}
    ids, every, found = list(rows.ids), rows.names, [""] * len(rows)
    if identifications is not None:
        query = {key: index for index, key in enumerate(identifications.ids)}
        shown = [query.get(key, -1) for key in ids]
        if queries is not None:
            chosen = queries.index.tolist()
            named = [
                [-1 if (name := names[i]) is None else of.setdefault(name, len(of)) for i in chosen]
                for names, of in zip(identifications.names, labels, strict=True)
            ]
            every = np.concatenate([every, np.array(named, np.int32).reshape(len(RANKS), -1).T])
            shown += chosen
            ids += [identifications.ids[i] for i in chosen]
            unknown = np.full(len(chosen), np.nan)
            numbers = {name: np.concatenate([values, unknown]) for name, values in numbers.items()}
            marker += [-1] * len(chosen)
        numbers["novelty"] = np.array([np.nan if i < 0 else identifications.novelty[i] for i in shown])
        found = ["" if i < 0 else _best_name(identifications, i) for i in shown]
    lineages, lineage = np.unique(every, axis=0, return_inverse=True)
    names, codes = [], np.full(lineages.shape, -1, np.int32)
    for rank, label in enumerate(labels):
        used, inverse = np.unique(lineages[:, rank], return_inverse=True)
        codes[:, rank] = (np.arange(len(used)) - int(used[0] == -1))[inverse.reshape(-1)]
        listed = list(label)
        names.append([listed[index] for index in used.tolist() if index >= 0])
    dna, dna_of = _dna(rows, lineage.reshape(-1), queries)
    return {
        "top": charts.TOP,
        "ranks": list(RANKS),
        "rows": len(rows),
        "main_rank": RANKS[contents.main_rank],
        "ids": ids,
        "xy": _base64(scaled, "<u2"),
        "lineages": _base64(codes, "<i4"),
        "lineage": _base64(lineage.reshape(-1), "<u4"),
        "names": names,
        "numbers": {k: _base64(v, "<f4") for k, v in numbers.items() if np.isfinite(v).any()},
        "markers": markers,
        "marker": _base64(np.array(marker), "<i4"),
        "found": found if any(found) else {},
        "queries": None if identifications is None or queries is None else _query_data(rows, identifications, queries),
        "dna": dna,
        "dna_of": _base64(np.array(dna_of), "<i4"),
        "dna_rows": sum(point < len(rows) for point in dna_of),
        "dna_queries": sum(point >= len(rows) for point in dna_of),
        "coast": charts.coastline() if np.isfinite(rows.latitude).any() else [],
    }


def _query_data(rows: Rows, identifications: Identifications, queries: Queries) -> dict[str, Any]:
    """What the page tells of the queries."""
    row_of = {key: row for row, key in enumerate(rows.ids)}
    nearest = [-1 if key is None else row_of.get(key, -1) for key in queries.nearest]
    dna = {key: rows.sequences[row] for key, row in zip(queries.nearest, nearest, strict=True) if key and row >= 0}
    chosen = queries.index
    return {
        "total": queries.total,
        "nearest": _base64(np.array(nearest), "<i4"),
        "nearest_id": list(queries.nearest),
        "numbers": {name: _base64(values, "<f4") for name, values in queries.evidence.items()},
        "confidence": _base64(identifications.confidence[chosen], "<f4"),
        "answered": _base64(identifications.answered[chosen], "<u1"),
        "calibrated": identifications.calibrated,
        "novel": _base64(identifications.novel[chosen], "<u1"),
        "strand": list(queries.strands),
        "unnamed": list(queries.unnamed),
        "start": _base64(np.array([start or 0 for start in queries.starts]), "<i4"),
        "cigar": fitting_cigars(queries, dna),
    }


def _dna(rows: Rows, lineage: np.ndarray, queries: Queries | None) -> tuple[str, list[int]]:
    """Returns lines of DNA, compressed, in base64, and the point of each line, up to _MAX_BASES bases.

    The queries and their nearest references go first, then a random sample; in the order of lineages, since gzip
    makes less of similar lines that are neighbours.
    """
    texts = [*rows.sequences, *(() if queries is None else queries.sequences)]
    wanted = set() if queries is None else set(queries.nearest)
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    order.sort(key=lambda row: rows.ids[row] not in wanted)
    order = [*range(len(rows), len(texts)), *order]
    lengths = np.cumsum([len(texts[point]) for point in order])
    chosen = [point for point, end in zip(order, lengths.tolist(), strict=True) if texts[point] and end <= _MAX_BASES]
    chosen.sort(key=lambda point: (lineage[point], point))
    packed = gzip.compress("\n".join(texts[point] for point in chosen).encode(), 6, mtime=0)
    return base64.b64encode(packed).decode(), chosen


def _base64(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def _best_name(identifications: Identifications, index: int) -> str:
    """The name at the finest answered rank, or else at the finest named rank, with its confidence."""
    answered = np.flatnonzero(identifications.answered[index])
    named = [rank for rank in range(len(RANKS)) if identifications.names[rank][index] is not None]
    if not named:
        return ""
    rank = int(answered[-1]) if len(answered) else named[-1]
    confidence = identifications.confidence[index, rank]
    sure = "" if np.isnan(confidence) else f", confidence {confidence:.3f}"
    kind = RANKS[rank] if len(answered) else f"{RANKS[rank]}, best guess"
    return f"{identifications.names[rank][index]} ({kind}{sure})"
