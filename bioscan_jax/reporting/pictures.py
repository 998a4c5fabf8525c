"""The main pictures of a report as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from bioscan_jax.reporting import palette
from bioscan_jax.reporting.answers import Identified
from bioscan_jax.reporting.gather import Gathered, first_field
from bioscan_jax.reporting.measure import RankFigures
from bioscan_jax.reporting.payload import coastline
from bioscan_jax.reporting.project import Projection
from bioscan_jax.reporting.sections import SHOWN_TAXA
from bioscan_jax.taxonomy import RANKS

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
    partial = path.with_name(f".{path.name}.part")
    figure.savefig(partial, format="png")
    partial.replace(path)


def _points(figure: "Figure", gathered: Gathered, points: Float[np.ndarray, "rows 2"], equal: bool) -> None:
    rank = RANKS.index(first_field(gathered))
    codes, taxa = gathered.rows.names[:, rank], gathered.taxa[rank]
    axes = figure.add_subplot()
    order = np.random.default_rng(0).permutation(len(points))
    size = float(np.clip(60_000 / len(points), 2, 20))
    groups = [("unknown", codes < 0, palette.LIGHT_UNKNOWN), ("others", codes >= palette.TOP, palette.LIGHT_OTHER)]
    colours = np.array(palette.LIGHT)
    for label, mask, colour in groups:
        if mask.any():
            axes.scatter(*points[mask].T, s=size, c=colour, linewidths=0, label=f"{label} ({mask.sum():,})")
    top = order[(codes[order] >= 0) & (codes[order] < palette.TOP)]
    axes.scatter(*points[top].T, s=size, c=colours[codes[top]], linewidths=0)
    for code in range(min(palette.TOP, len(taxa.names))):
        if count := int((codes == code).sum()):
            axes.scatter([], [], s=20, c=palette.LIGHT[code], label=f"{_plain(taxa.names[code])} ({count:,})")
    if equal:
        axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"{_plain(gathered.table)}, by {RANKS[rank]}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, markerscale=1.5)
    axes.set_xticks([])
    axes.set_yticks([])


def _plain(name: str) -> str:
    """A name in which no dollar sign starts a formula, and short enough for a legend."""
    return (name if len(name) <= 40 else f"{name[:39]}…").replace("$", r"\$")


def _embedding(figure: "Figure", gathered: Gathered, projection: Projection) -> None:
    _points(figure, gathered, projection.points, True)
    figure.axes[0].set_xlabel(projection.method, fontsize=8)


def _places(figure: "Figure", gathered: Gathered) -> None:
    rows = gathered.rows
    _points(figure, gathered, np.stack([rows.longitude, rows.latitude], axis=1), False)
    axes = figure.axes[0]
    for ring in coastline():
        xy = np.array(ring).reshape(-1, 2) / 10
        axes.fill(xy[:, 0], xy[:, 1], facecolor="#e6e8e2", edgecolor="#8a8f88", linewidth=0.4, zorder=0)
    axes.set(xlim=(-180, 180), ylim=(-90, 90), aspect="equal")
    axes.set_xticks(range(-180, 181, 60))
    axes.set_yticks(range(-90, 91, 30))
    axes.grid(alpha=0.25)


def _taxa(figure: "Figure", gathered: Gathered) -> None:
    rank = RANKS.index(first_field(gathered))
    taxa, axes = gathered.taxa[rank], figure.add_subplot()
    names = [_plain(name) for name in taxa.names[:SHOWN_TAXA]][::-1]
    bars = axes.barh(range(len(names)), taxa.counts[:SHOWN_TAXA][::-1], color=palette.LIGHT[2])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"{_plain(gathered.table)}: rows by {rank_title(RANKS[rank], len(names), len(taxa.names))}")
    axes.spines[["top", "right"]].set_visible(False)


def rank_title(rank: str, shown: int, names: int) -> str:
    """What a chart of the most frequent names shows."""
    return rank if shown == names else f"{rank}, {shown} of {names:,} names"


def _calibration(figure: "Figure", figures: Sequence[RankFigures]) -> None:
    shown = [f for f in figures if f.bins]
    grid = figure.subplots(2, 4, squeeze=False).ravel()
    for axes, found in zip(grid, shown, strict=False):
        x, y = [b.confidence for b in found.bins], [b.correct for b in found.bins]
        low = [max(0.0, b.correct - b.low) for b in found.bins]
        high = [max(0.0, b.high - b.correct) for b in found.bins]
        axes.plot([0, 1], [0, 1], color="#8a8f88", linestyle="--", linewidth=1)
        axes.errorbar(x, y, yerr=[low, high], marker="o", color=palette.LIGHT[2], capsize=2)
        right = "" if found.accuracy is None else f", {100 * found.accuracy:.1f} % right"
        axes.set(title=f"{found.rank}{right}", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
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
    axes.set(title="Queries by novelty score", xlabel="novelty", ylabel="queries")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
