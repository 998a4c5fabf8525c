"""The main pictures of a report as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.output import whole_file
from bioscan_jax.reports import palette
from bioscan_jax.reports.contents import Gathered, first_field
from bioscan_jax.reports.identifications import Identified
from bioscan_jax.reports.measure import RankFigures
from bioscan_jax.reports.payload import coastline
from bioscan_jax.reports.projection import Projection
from bioscan_jax.reports.sections import SHOWN_TAXA

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(
    directory: Path,
    gathered: Gathered,
    projection: Projection,
    identified: Identified | None,
    figures: Sequence[RankFigures],
) -> list[str]:
    """Writes embedding.png and, where there is something to show, places, taxa, calibration and novelty.

    Returns:
        Names of the files.

    Raises:
        OSError: A file cannot be written.
    """
    pictures: dict[str, Callable[[Figure], None]] = {
        "embedding": lambda figure: _embedding(figure, gathered, projection)
    }
    if np.isfinite(gathered.rows.latitude).any():
        pictures["places"] = lambda figure: _places(figure, gathered)
    if any(taxa.names for taxa in gathered.taxa):
        pictures["taxa"] = lambda figure: _taxa(figure, gathered)
    if any(f.bins for f in figures):
        pictures["calibration"] = lambda figure: _calibration(figure, figures)
    if identified is not None and np.isfinite(identified.novelty).any():
        pictures["novelty"] = lambda figure: _novelty(figure, identified)
    for name, picture in pictures.items():
        _save(directory / f"{name}.png", picture)
    return [f"{name}.png" for name in pictures]


def _save(path: Path, picture: "Callable[[Figure], None]") -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=150, layout="constrained")
    picture(figure)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15)


def _coloured(
    figure: "Figure",
    gathered: Gathered,
    points: Float[np.ndarray, "points 2"],
    codes: Int[np.ndarray, " points"],
    sizes: Float[np.ndarray, " points"],
    of_rows: Int[np.ndarray, " rows"],
) -> None:
    """Points by the name of a rank, those without a colour of their own below the others; the legend counts rows."""
    rank = RANKS.index(first_field(gathered))
    taxa = gathered.taxa[rank]
    others = len(taxa.names) - palette.TOP
    groups = [
        (_plain(name), k, colour) for k, (name, colour) in enumerate(zip(taxa.names, palette.LIGHT, strict=False))
    ]
    groups += [(f"{others:,} other name{'s' * (others != 1)}", palette.TOP, palette.LIGHT_OTHER)]
    groups += [("unknown", palette.TOP + 1, palette.LIGHT_UNKNOWN)]
    axes = figure.add_subplot()
    for label, k, colour in groups:
        if count := int((of_rows == k).sum()):
            axes.scatter([], [], s=40, color=colour, label=f"{label} ({count:,})")
    colours = np.array([*palette.LIGHT, palette.LIGHT_OTHER, palette.LIGHT_UNKNOWN])
    for mask in (codes > palette.TOP, codes == palette.TOP, codes < palette.TOP):
        axes.scatter(*points[mask].T, s=sizes[mask], c=colours[codes[mask]], linewidths=0)
    axes.set_title(f"{_plain(gathered.table)}, by {RANKS[rank]}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def _classes(codes: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """The colour of each name: its own, that of all other names, or that of none."""
    return np.where(codes < 0, palette.TOP + 1, np.minimum(codes, palette.TOP))


def _plain(name: str) -> str:
    """A name in which no dollar sign starts a formula, and short enough for a legend."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")


def _embedding(figure: "Figure", gathered: Gathered, projection: Projection) -> None:
    order = np.random.default_rng(0).permutation(len(projection.points))  # no taxon always lies on top
    codes = _classes(gathered.rows.names[order, RANKS.index(first_field(gathered))])
    sizes = np.full(len(order), np.clip(60_000 / len(order), 2, 20))
    _coloured(figure, gathered, projection.points[order], codes, sizes, codes)
    axes = figure.axes[0]
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(projection.method, fontsize=8)


def _places(figure: "Figure", gathered: Gathered) -> None:
    figure.set_size_inches(10, 4.6)
    rows = gathered.rows
    placed = np.flatnonzero(np.isfinite(rows.latitude))
    degrees = np.round(np.stack([rows.longitude, rows.latitude], axis=1)[placed], 3)
    points, place, counts = np.unique(degrees, axis=0, return_inverse=True, return_counts=True)
    votes = np.zeros((len(points), palette.TOP + 2), np.int64)
    of_rows = _classes(rows.names[placed, RANKS.index(first_field(gathered))])
    np.add.at(votes, (place.reshape(-1), of_rows), 1)
    known = votes[:, : palette.TOP + 1]
    codes = np.where(known.any(axis=1), known.argmax(axis=1), palette.TOP + 1)
    order = np.argsort(-counts, kind="stable")  # no large point hides a small one
    sizes = 8 + 40 * np.log(counts) / np.log(counts.max() + 1)
    _coloured(figure, gathered, points[order], codes[order], sizes[order], of_rows)
    axes = figure.axes[0]
    for ring in coastline():
        xy = np.array(ring).reshape(-1, 2) / 10
        axes.fill(xy[:, 0], xy[:, 1], facecolor="#e6e8e2", edgecolor="#8a8f88", linewidth=0.4, zorder=0)
    axes.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal")
    axes.set_xticks(
        range(-180, 181, 60), [f"{abs(x)}°{'W' * (-180 < x < 0)}{'E' * (0 < x < 180)}" for x in range(-180, 181, 60)]
    )
    axes.set_yticks(range(-90, 91, 30), [f"{abs(y)}°{'S' * (y < 0)}{'N' * (y > 0)}" for y in range(-90, 91, 30)])
    axes.grid(alpha=0.25)
    axes.set_xlabel("a point is a place, larger with more rows, in the colour of its most frequent name", fontsize=8)


def _taxa(figure: "Figure", gathered: Gathered) -> None:
    rank = RANKS.index(first_field(gathered))
    taxa, axes = gathered.taxa[rank], figure.add_subplot()
    names = [_plain(name) for name in taxa.names[:SHOWN_TAXA]][::-1]
    bars = axes.barh(range(len(names)), taxa.counts[:SHOWN_TAXA][::-1], color=palette.LIGHT[2])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"{_plain(gathered.table)}: rows by {rank_title(RANKS[rank], len(names), len(taxa.names))}")
    axes.spines[["top", "right"]].set_visible(False)


def rank_title(rank: str, shown: int, names: int) -> str:
    """What a chart of the most frequent names shows."""
    return rank if shown == names else f"{rank}, {shown} of {names:,} names"


def _calibration(figure: "Figure", figures: Sequence[RankFigures]) -> None:
    shown = [f for f in figures if f.bins]
    figure.set_size_inches(10, 5.6)
    grid = figure.subplots(2, 4, squeeze=False).ravel()
    for axes, found in zip(grid, shown, strict=False):
        x, y = [b.confidence for b in found.bins], [b.correct for b in found.bins]
        low = [max(0.0, b.correct - b.low) for b in found.bins]
        high = [max(0.0, b.high - b.correct) for b in found.bins]
        axes.plot([0, 1], [0, 1], color="#8a8f88", linestyle="--", linewidth=1)
        axes.errorbar(x, y, yerr=[low, high], marker="o", color=palette.LIGHT[2], capsize=2)
        right = "" if found.accuracy is None else f", {100 * found.accuracy:.1f} % right"
        axes.set(title=f"{found.rank}{right}", xlim=(0, 1.05), ylim=(0, 1.05), aspect="equal")
        axes.title.set_fontsize(10)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel("confidence")
    figure.supylabel("share right")


def _novelty(figure: "Figure", identified: Identified) -> None:
    axes, known = figure.add_subplot(), np.isfinite(identified.novelty)
    kinds = [identified.novelty[known & ~identified.novel], identified.novelty[known & identified.novel]]
    axes.hist(
        kinds,
        bins=40,
        stacked=True,
        color=[palette.LIGHT[2], palette.LIGHT[0]],
        label=["not flagged", "flagged as novel"],
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(title="Queries by novelty score", xlabel="novelty", ylabel="queries")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
