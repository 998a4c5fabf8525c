"""What the script of the page reads: the rows as packed arrays, each name once."""

import base64
import json
from importlib import resources
from typing import Any

import numpy as np

from bioscan_jax.barcodes.lineage import RANKS
from bioscan_jax.reports import palette
from bioscan_jax.reports.contents import Gathered
from bioscan_jax.reports.identifications import Identified
from bioscan_jax.reports.projection import Projection

_LEVELS = 65535
"""Steps of a coordinate on the map."""


def coastline() -> list[list[int]]:
    """Rings of longitude, latitude, longitude, ... in tenths of a degree.

    Natural Earth's land at 1:110 million (public domain), as the npm package world-atlas 2.0.2 has it, rounded.
    """
    return json.loads(resources.files("bioscan_jax.reports").joinpath("coastline.json").read_text())


def payload(gathered: Gathered, projection: Projection, identified: Identified | None) -> dict[str, Any]:
    """Everything the maps need, as JSON can hold it; arrays are little-endian in base64, -1 is unknown."""
    rows = gathered.rows
    low, high = projection.points.min(axis=0), projection.points.max(axis=0)
    scaled = np.round((projection.points - low) / max(float((high - low).max()), 1e-9) * _LEVELS)
    lineages, lineage = np.unique(rows.names, axis=0, return_inverse=True)
    names, codes = [], np.full(lineages.shape, -1, np.int32)
    for rank, taxa in enumerate(gathered.taxa):
        used, inverse = np.unique(lineages[:, rank], return_inverse=True)
        codes[:, rank] = (np.arange(len(used)) - int(used[0] == -1))[inverse.reshape(-1)]
        names.append([taxa.names[index] for index in used.tolist() if index >= 0])
    markers = sorted({marker for marker in rows.markers if marker is not None})
    place = {marker: index for index, marker in enumerate(markers)}
    numbers = {"depth": rows.depth, "latitude": rows.latitude, "longitude": rows.longitude}
    found: dict[str, str] | list[str] = {}
    if identified is not None:
        at = {key: index for index, key in enumerate(identified.ids)}
        here = [at.get(key, -1) for key in rows.ids]
        if any(index >= 0 for index in here):
            numbers["novelty"] = np.array([np.nan if i < 0 else identified.novelty[i] for i in here])
            found = ["" if i < 0 else _best(identified, i) for i in here]
    return {
        "top": palette.TOP,
        "ranks": list(RANKS),
        "ids": list(rows.ids),
        "xy": _bytes(scaled, "<u2"),
        "lineages": _bytes(codes, "<i4"),
        "lineage": _bytes(lineage.reshape(-1), "<u4"),
        "names": names,
        "numbers": {k: _bytes(v, "<f4") for k, v in numbers.items() if np.isfinite(v).any()},
        "markers": markers,
        "marker": _bytes(np.array([-1 if marker is None else place[marker] for marker in rows.markers]), "<i4"),
        "found": found,
        "coast": coastline() if np.isfinite(rows.latitude).any() else [],
    }


def _bytes(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=kind).tobytes()).decode()


def _best(identified: Identified, index: int) -> str:
    """The finest rank that is answered, or else the finest name, with its confidence."""
    answered = np.flatnonzero(identified.answered[index])
    named = [rank for rank in range(len(RANKS)) if identified.names[rank][index] is not None]
    if not named:
        return ""
    rank = int(answered[-1]) if len(answered) else named[-1]
    confidence = identified.confidence[index, rank]
    sure = "" if np.isnan(confidence) else f", confidence {confidence:.3f}"
    kind = RANKS[rank] if len(answered) else f"{RANKS[rank]}, best guess"
    return f"{identified.names[rank][index]} ({kind}{sure})"
