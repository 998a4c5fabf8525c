"""Charts of a report. One function draws each, for the PNG file and for the SVG inside the page alike.

The two maps are also drawn in the browser (map.js), where they can be zoomed and coloured by other fields.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Int

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.output import whole_file
from bioscan_jax.reports.contents import TableContents, Taxa
from bioscan_jax.reports.identifications import Identifications, RankMetrics
from bioscan_jax.reports.projection import Projection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOP = 8
"""Names of a rank, or classes of a number, with a colour of their own; all others share one."""

# Chosen so that any two differ by 19 (light) and 24 (dark) in CIELAB, to full colour vision and with protanopia,
# deuteranopia and tritanopia as Machado, Oliveira and Fernandes simulate them (2009, doi:10.1109/TVCG.2009.113)
LIGHT = ("#ff5500", "#9900ff", "#005577", "#00bbff", "#995533", "#ff9977", "#000055", "#550000")
LIGHT_OTHER, LIGHT_UNKNOWN = "#9a9a9a", "#cfcfcf"
DARK = ("#dd9900", "#dd99ff", "#339955", "#ffff99", "#bb0000", "#99ffdd", "#7700ff", "#9933bb")
DARK_OTHER, DARK_UNKNOWN = "#7d8288", "#42474d"

# Viridis without its ends, dark to light on paper and light to dark on a screen, so that high values stand out
_LIGHT_SCALE = ("#9fda3a", "#5ec962", "#35b779", "#1f9e89", "#26828e", "#31688e", "#3e4989", "#482878")
_DARK_SCALE = ("#46327e", "#3f4f8c", "#34688e", "#28848e", "#1f9e89", "#44bf70", "#9bd93c", "#fde725")

_TEXT, _MAIN, _SECOND = "#59626d", "#0b5fae", "#b98700"
_PAGE_COLOURS = {_TEXT: "var(--soft)", _MAIN: "var(--accent)", _SECOND: "var(--warn-line)"}
"""Colours of the SVG charts, and the custom properties of page.css that stand for them in light and dark."""
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _TEXT),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a name starts no formula
    "svg.fonttype": "none",
}
_TITLE = "title: "
"""Begins the ids of shapes that show the rest of the id when the mouse is over them."""
SHOWN_TAXA = 15
"""Names of a rank that the chart and the table of counts show."""


def palette_css(*, dark: bool) -> str:
    """Returns the colours of the maps as custom properties of CSS."""
    taxa, scale = (DARK, _DARK_SCALE) if dark else (LIGHT, _LIGHT_SCALE)
    other, unknown = (DARK_OTHER, DARK_UNKNOWN) if dark else (LIGHT_OTHER, LIGHT_UNKNOWN)
    named = [f"--taxon-{k}: {colour}" for k, colour in enumerate(taxa)]
    named += [f"--scale-{k}: {colour}" for k, colour in enumerate(scale)]
    return "; ".join([*named, f"--other: {other}", f"--unknown: {unknown}"]) + ";"


def coastline() -> list[list[int]]:
    """Reads the coastline: rings of longitude, latitude, longitude, ... in tenths of a degree.

    Natural Earth's land at 1:110 million (public domain) from the npm package world-atlas 2.0.2, rounded.
    """
    return json.loads(resources.files("bioscan_jax.reports").joinpath("coastline.json").read_text())


def percent(fraction: float | None) -> str:
    """Formats a fraction as a percentage; a dash for None."""
    if fraction is None:
        return "–"
    text = f"{100 * fraction:.1f} %"
    if fraction > 0 and text == "0.0 %":
        return "< 0.1 %"
    return "> 99.9 %" if fraction < 1 and text == "100.0 %" else text


def draw_calibration(axes: "Axes", metrics: RankMetrics) -> None:
    """Draws the fraction correct by confidence with 95% intervals; the diagonal is perfect calibration."""
    bins = metrics.bins
    x, y = [b.confidence for b in bins], [b.correct for b in bins]
    spread = [[max(0.0, b.correct - b.low) for b in bins], [max(0.0, b.high - b.correct) for b in bins]]
    axes.plot([0, 1], [0, 1], color=_TEXT, linestyle="--", linewidth=1)
    axes.errorbar(x, y, yerr=spread, color=_MAIN)
    for b in bins:
        title = f"{_TITLE}confidence {b.confidence:.3f}, {percent(b.correct)} of {b.count:,} right"
        axes.plot(b.confidence, b.correct, "o", color=_MAIN, gid=title)
    accuracy = "" if metrics.accuracy is None else f", {percent(metrics.accuracy)} right"
    axes.set(title=f"{metrics.rank}{accuracy}", xlabel="confidence", ylabel="fraction right", aspect="equal")
    axes.set(xlim=(0, 1.04), ylim=(0, 1.04), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))


def draw_novelty(axes: "Axes", identifications: Identifications) -> None:
    """Draws a histogram of the novelty scores, the queries flagged as novel stacked on the others."""
    scores = identifications.novelty[identifications.scored]
    novel = identifications.novel[identifications.scored]
    edges = np.linspace(min(0.0, scores.min()), max(1.0, scores.max()), 41)
    below = np.zeros(40, int)
    for kind, label, colour in ((~novel, "not flagged", _MAIN), (novel, "flagged as novel", _SECOND)):
        counts = np.histogram(scores[kind], edges)[0]
        there = np.flatnonzero(counts)
        if len(there):
            bars = axes.bar(
                edges[there], counts[there], 0.92 * np.diff(edges)[there], below[there],
                align="edge", color=colour, label=label,
            )  # fmt: skip
            for bar, k in zip(bars, there.tolist(), strict=True):
                bar.set_gid(f"{_TITLE}{edges[k]:.3g} to {edges[k + 1]:.3g}: {counts[k]:,} {label}")
        below += counts
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="y", integer=True)
    axes.set(title="Queries by novelty score", xlabel="novelty", ylabel="queries", xlim=(edges[0], edges[-1]))
    axes.legend()


def draw_taxa(axes: "Axes", rank: str, taxa: Taxa) -> None:
    """Draws the number of rows of the most frequent names of a rank."""
    names = [_short(name) for name in taxa.names[:SHOWN_TAXA]]
    bars = axes.barh(range(len(names)), taxa.counts[:SHOWN_TAXA], color=_MAIN)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params(axis="x", integer=True, nbins=5)
    some = "" if len(names) == len(taxa.names) else f", {len(names)} of {len(taxa.names):,} names"
    axes.set_title(f"Rows by {rank}{some}")


def draw_embedding(axes: "Axes", contents: TableContents, projection: Projection) -> None:
    """Draws the projected vectors in the colours of the main rank."""
    order = np.random.default_rng(0).permutation(len(contents.rows))  # so that no taxon is always on top
    codes = _classes(contents.rows.names[order, contents.main_rank])
    sizes = np.full(len(order), np.clip(60_000 / len(order), 2, 20))
    _scatter(axes, contents, projection.points[order], codes, sizes, codes)
    if len(queries := projection.points[len(order) :]):
        style = {"marker": "D", "facecolors": "none", "edgecolors": _TEXT, "linewidths": 0.8}
        axes.scatter(*queries.T, s=sizes[0] + 6, label=f"queries ({len(queries):,})", **style)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[], xlabel=projection.method)
    axes.spines[["left", "bottom"]].set_visible(False)


def draw_places(axes: "Axes", contents: TableContents) -> None:
    """Draws a world map of the sampling places, each in the colour of its most frequent name."""
    rows = contents.rows
    placed = np.flatnonzero(np.isfinite(rows.latitude))
    degrees = np.round(np.stack([rows.longitude, rows.latitude], axis=1)[placed], 3)
    points, place, counts = np.unique(degrees, axis=0, return_inverse=True, return_counts=True)
    votes = np.zeros((len(points), TOP + 2), np.int64)
    of_rows = _classes(rows.names[placed, contents.main_rank])
    np.add.at(votes, (place.reshape(-1), of_rows), 1)
    known = votes[:, : TOP + 1]
    codes = np.where(known.any(axis=1), known.argmax(axis=1), TOP + 1)
    order = np.argsort(-counts, kind="stable")  # small points over large ones
    sizes = 8 + 40 * np.log(counts) / np.log(counts.max() + 1)
    _scatter(axes, contents, points[order], codes[order], sizes[order], of_rows)
    for ring in coastline():
        xy = np.array(ring).reshape(-1, 2) / 10
        axes.fill(xy[:, 0], xy[:, 1], facecolor="#e6e8e2", edgecolor="#8a8f88", linewidth=0.4, zorder=0)
    axes.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal")
    x, y = range(-180, 181, 60), range(-90, 91, 30)
    axes.set_xticks(x, [f"{abs(v)}°{'W' * (-180 < v < 0)}{'E' * (0 < v < 180)}" for v in x])
    axes.set_yticks(y, [f"{abs(v)}°{'S' * (v < 0)}{'N' * (v > 0)}" for v in y])
    axes.grid(alpha=0.25)
    axes.set_xlabel("one point per place, larger with more rows, in the colour of its most frequent name")


def _scatter(
    axes: "Axes",
    contents: TableContents,
    points: Float[np.ndarray, "points 2"],
    codes: Int[np.ndarray, " points"],
    sizes: Float[np.ndarray, " points"],
    of_rows: Int[np.ndarray, " rows"],
) -> None:
    """Draws points by class, those without a colour of their own below the others; the legend counts rows."""
    names = contents.taxa[contents.main_rank].names
    others = len(names) - TOP
    labels = dict(enumerate(_short(name) for name in names[:TOP]))
    labels |= {TOP: f"{others:,} other name{'s' * (others != 1)}", TOP + 1: "unknown"}
    colours = np.array([*LIGHT, LIGHT_OTHER, LIGHT_UNKNOWN])
    for code, label in labels.items():
        if count := int((of_rows == code).sum()):
            axes.scatter([], [], s=40, color=colours[code], label=f"{label} ({count:,})")
    for mask in (codes > TOP, codes == TOP, codes < TOP):
        axes.scatter(*points[mask].T, s=sizes[mask], c=colours[codes[mask]], linewidths=0)
    axes.set_title(f"{contents.table}, by {RANKS[contents.main_rank]}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _classes(codes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Maps names to colours: one of their own, the one of all other names, or the one of unknown names."""
    return np.where(codes < 0, TOP + 1, np.minimum(codes, TOP))


def _short(name: str) -> str:
    """Shortens a name for a chart and replaces control characters, which XML does not allow."""
    name = "".join(c if c.isprintable() else "\ufffd" for c in name)
    return name if len(name) <= 32 else f"{name[:31]}…"


def as_svg(draw: "Callable[..., None]", *data: Any, label: str, width: int, height: int) -> str:
    """Draws a chart as an SVG element whose colours follow the page, light or dark.

    Args:
        draw: One of the functions above that draw a chart.
        data: Its arguments after the axes.
        label: Description for those who cannot see the chart.
        width: Width in points of 10-point text; the element is as wide as the page allows.
        height: Height in the same unit.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # The salt makes ids the same on each run and different between the charts of a page
    with rc_context(_STYLE), rc_context({"svg.hashsalt": label}), warnings.catch_warnings(), StringIO() as file:
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts for it
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        draw(figure.add_subplot(), *data)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        root = ElementTree.fromstring(file.getvalue())
    for child in [child for child in root if child.find("{*}style") is not None]:
        root.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    root.attrib |= {"stroke-linejoin": "round", "stroke-linecap": "butt"}
    for element in root.iter():
        _embed(element)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)


def _embed(element: ElementTree.Element) -> None:
    """Adapts an element to HTML and to a page whose policy forbids style attributes."""
    kind = element.tag = element.tag.rpartition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for declaration in filter(None, attributes.pop("style", "").split(";")):
        name, value = declaration.strip().split(": ", 1)
        if name == "font":  # size and family; the family is the page's
            name, value = "font-size", f"{value.partition('px')[0].rpartition(' ')[2]}px"
        attributes[name] = _PAGE_COLOURS.get(value, value)
    element.attrib = attributes
    if kind not in ("text", "title"):
        element.text = None
    element.tail = None
    if kind == "g" and (name := attributes.pop("id", "")).startswith(_TITLE):
        title = ElementTree.Element("title")
        title.text = name.removeprefix(_TITLE)
        element.insert(0, title)


def write_pictures(
    directory: Path,
    contents: TableContents,
    projection: Projection,
    identifications: Identifications | None,
    metrics: Sequence[RankMetrics],
) -> list[str]:
    """Writes embedding.png and, where there is something to show, places, taxa, calibration and novelty.

    Returns:
        The names of the files.

    Raises:
        OSError: A file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    def alone(draw: Callable[..., None], *data: Any) -> Callable[[Figure], object]:
        return lambda figure: draw(figure.add_subplot(), *data)

    pictures = {"embedding": ((10, 6.5), alone(draw_embedding, contents, projection))}
    if np.isfinite(contents.rows.latitude).any():
        pictures["places"] = ((10, 4.6), alone(draw_places, contents))
    rank = contents.main_rank
    if contents.taxa[rank].names:
        pictures["taxa"] = ((10, 6.5), alone(draw_taxa, RANKS[rank], contents.taxa[rank]))
    if charted := [m for m in metrics if m.bins]:
        pictures["calibration"] = (
            (10, 5.6),
            lambda figure: [draw_calibration(figure.add_subplot(2, 4, k), m) for k, m in enumerate(charted, start=1)],
        )
    if identifications is not None and identifications.scored.any():
        pictures["novelty"] = ((10, 6.5), alone(draw_novelty, identifications))
    for name, (size, draw) in pictures.items():
        with rc_context(_STYLE):
            figure = Figure(figsize=size, dpi=150, layout="constrained")
            draw(figure)
            with whole_file(directory / f"{name}.png") as partial:
                figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15)
    return [f"{name}.png" for name in pictures]
