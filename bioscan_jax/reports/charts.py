"""Charts as SVG text and facts as HTML tables; every text that comes from data is escaped here."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

import numpy as np
from jaxtyping import Bool, Float64

from bioscan_jax.reports.measure import Bin

_SIDE, _PAD = 210, 38


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(text(value))}</td></tr>" for name, value in pairs)
    return f"<div class=scroll><table class=facts><tbody>{rows}</tbody></table></div>"


def text(value: object) -> str:
    """A value for the eyes: numbers grouped, what is None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    return str(value)


def percent(share: float | None) -> str:
    """A share as a percentage, a dash where there is none."""
    if share is None:
        return "–"
    told = f"{100 * share:.1f} %"
    if share > 0 and told == "0.0 %":
        return "< 0.1 %"
    return "> 99.9 %" if share < 1 and told == "100.0 %" else told


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are numbers but for the first one."""
    kinds = ["", *(" class=number" for _ in heads[1:])]
    top = "".join(f"<th scope=col{kind}>{escape(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    lines = "".join(
        "<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    body = f"<caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{lines}</tbody>"
    return f"<div class=scroll><table>{body}</table></div>"


def bars(counts: Sequence[tuple[str, int]], total: int) -> str:
    """Names with their counts, and a bar as long as the count."""
    most = max((count for _, count in counts), default=1)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td class=number>{count:,}</td><td class=number>{percent(count / total)}</td>"
        "<td><svg class=bar aria-hidden=true>"
        f'<rect width="{100 * count / most:.2f}%" height="100%"></rect></svg></td></tr>'
        for name, count in counts
    )
    return f"<div class=scroll><table class=counts><tbody>{rows}</tbody></table></div>"


def calibration(rank: str, bins: Sequence[Bin], error: float | None) -> str:
    """Share right by confidence, with its interval of 95%; the diagonal is what is hoped for."""

    def at(x: float | int, y: float | int) -> tuple[str, str]:
        return f"{_PAD + x * (_SIDE - _PAD - 8):.1f}", f"{8 + (1 - y) * (_SIDE - _PAD - 8):.1f}"

    parts = [_axes(at), '<path class=ideal d="M{} {}L{} {}"></path>'.format(*at(0, 0), *at(1, 1))]
    for b in bins:
        x, low = at(b.confidence, b.low)
        parts.append(f'<path class=interval d="M{x} {low}V{at(0, b.high)[1]}"></path>')
    points = [at(b.confidence, b.correct) for b in bins]
    parts.append(f'<path class=curve d="M{"L".join(" ".join(point) for point in points)}"></path>')
    for b, (x, y) in zip(bins, points, strict=True):
        told = f"confidence {b.confidence:.3f}, right {percent(b.correct)} of {b.count:,}"
        parts.append(f'<circle class=point cx="{x}" cy="{y}" r=4><title>{told}</title></circle>')
    missed = "–" if error is None else f"{error:.3f}"
    told = f"{sum(b.count for b in bins):,} answers, calibration error {missed}"
    chart = _svg(f"{rank}: share right by confidence; {told}", _SIDE, _SIDE, parts)
    return f"<figure><h3>{escape(rank)}</h3>{chart}<figcaption>{escape(told)}</figcaption></figure>"


def _axes(at: Callable[[float | int, float | int], tuple[str, str]]) -> str:
    (left, bottom), (right, top) = at(0, 0), at(1, 1)
    ticks = "".join(
        f'<text x="{at(v, 0)[0]}" y="{float(bottom) + 15:.1f}" text-anchor=middle>{v:g}</text>'
        f'<text x="{float(left) - 5:.1f}" y="{float(at(0, v)[1]) + 4:.1f}" text-anchor=end>{v:g}</text>'
        for v in (0, 0.5, 1)
    )
    x, y = f"{(float(left) + float(right)) / 2:.1f}", f"{(float(top) + float(bottom)) / 2:.1f}"
    names = f'<text x="{x}" y="{_SIDE - 3}" text-anchor=middle>confidence</text>'
    names += f'<text x=10 y="{y}" text-anchor=middle transform="rotate(-90 10 {y})">share right</text>'
    return f'<path class=axis d="M{left} {top}V{bottom}H{right}"></path>{ticks}{names}'


def histogram(
    values: Float64[np.ndarray, " rows"], second: Bool[np.ndarray, " rows"], names: tuple[str, str], label: str
) -> str:
    """How often each value occurs, those of the second kind stacked on top of the others."""
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    edges = np.linspace(low, high, 41)
    under, over = np.histogram(values[~second], edges)[0], np.histogram(values[second], edges)[0]
    width, height, most = 640, 220, max(int((under + over).max()), 1)
    step, base, scale = (width - 60) / 40, height - 28, (height - 48) / most
    parts = [f'<path class=axis d="M50 20V{base}H{width - 10}"></path>']
    for k, (a, b) in enumerate(zip(under.tolist(), over.tolist(), strict=True)):
        told = (
            f"<title>{edges[k]:.3g} to {edges[k + 1]:.3g}: {a:,} {escape(names[0])}, {b:,} {escape(names[1])}</title>"
        )
        for count, below, kind in ((a, 0, "known"), (b, a, "new")):
            if count:
                y = base - (below + count) * scale
                box = f'x="{50 + k * step:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{count * scale:.1f}"'
                parts.append(f"<rect class={kind} {box}>{told}</rect>")
    for value in np.linspace(low, high, 5).tolist():
        x = 50 + (value - low) / (high - low) * (width - 60)
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor=middle>{value:.3g}</text>')
    parts.append(f"<text x=46 y=24 text-anchor=end>{most:,}</text>")
    kinds = [
        (name, kind) for name, kind in zip(names, ("known", "new"), strict=True) if kind == "known" or second.any()
    ]
    for k, (name, kind) in enumerate(kinds):
        parts.append(f'<rect class={kind} x="{60 + k * 200}" y=2 width=11 height=11></rect>')
        parts.append(f'<text x="{76 + k * 200}" y=12>{escape(name)}</text>')
    return f"<figure class=wide>{_svg(label, width, height, parts)}<figcaption>{escape(label)}</figcaption></figure>"


def _svg(label: str, width: int, height: int, parts: Iterable[str]) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{escape(label)}">{inside}</svg>'
