"""Draws the curves of a training run from its metrics.jsonl."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file
from bioscan_jax.training.run_directory import CURVES, METRICS
from bioscan_jax.training.tracking import STEP, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SMOOTHED = 25
"""Most lines averaged in the drawn mean of the training loss, half of them on each side; an odd number."""


def draw_curves(directory: Path) -> Path | None:
    """Draws the losses and the accuracies per rank in metrics.jsonl over the optimizer steps, to curves.png.

    A panel without values is left out. Values that were not finite are gaps in the curves.

    Returns:
        Path of the picture, or None if there is nothing to draw.

    Raises:
        InputError: metrics.jsonl is missing or damaged.
    """
    path = directory / METRICS
    if not path.exists():
        raise InputError(f"{path} is missing; pass the output directory of a training run")
    records = [record for _, record in read_metrics(path)]
    panels = [draw for draw, names in _PANELS if any(r.get(name) is not None for r in records for name in names)]
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(panels) + 0.4), dpi=150, layout="constrained")
    figure.suptitle(directory.absolute().name)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for draw, axis in zip(panels, axes, strict=True):
        draw(axis, records)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer steps")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    with whole_file(directory / CURVES) as partial:
        figure.savefig(partial, format="png")
    return directory / CURVES


def _series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of a metric; null becomes NaN."""
    rows = [(record[STEP], record[name]) for record in records if name in record]
    return [step for step, _ in rows], [math.nan if value is None else value for _, value in rows]


def _draw_losses(axis: "Axes", records: list[dict[str, Any]]) -> None:
    steps, train = _series(records, "train/loss")
    if steps:
        width = min(_SMOOTHED, len(train) // 10) | 1
        reach = width // 2
        axis.plot(steps, train, color="tab:blue", linewidth=0.8, alpha=0.35 if width > 1 else 1.0, label="training")
        if width > 1:
            means = [_mean(train[max(0, at - reach) : at + reach + 1]) for at in range(len(train))]
            axis.plot(steps, means, color="tab:blue", linewidth=1.8, label=f"training, mean of {width} lines")
    steps, held_out = _series(records, "eval/loss")
    if steps:
        axis.plot(steps, held_out, color="tab:orange", marker="o", markersize=4, label="validation")
        finite = [(value, step) for step, value in zip(steps, held_out, strict=True) if not math.isnan(value)]
        if finite:
            value, step = min(finite)
            lowest = f"lowest, {value:.4g} at step {step:,}"
            axis.plot(step, value, "o", color="none", markeredgecolor="black", markersize=9, label=lowest)
    axis.set_ylabel("loss (nats)")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _draw_accuracies(axis: "Axes", records: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    colors = colormaps["viridis"]([index / len(RANKS) for index in range(len(RANKS))])
    for rank, color in zip(RANKS, colors, strict=True):
        steps, shares = _series(records, f"eval/{rank}_accuracy")
        if not steps:
            continue
        percent = [100 * share for share in shares]
        label = f"{rank}, {percent[-1]:.1f} %"
        _, majority = _series(records, f"eval/{rank}_majority")
        if majority:
            label += f" ({100 * majority[-1]:.1f} %)"
            axis.axhline(100 * majority[-1], color=color, linewidth=1.2, linestyle=":")
        axis.plot(steps, percent, color=color, marker="o", markersize=4, label=label)
    axis.set_ylim(-2, 102)
    axis.set_ylabel("validation rows right (%)")
    axis.legend(
        frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="at the end\n(commonest taxon, dotted)"
    )


_PANELS = (
    (_draw_losses, ("train/loss", "eval/loss")),
    (_draw_accuracies, tuple(f"eval/{rank}_accuracy" for rank in RANKS)),
)
