"""The report as one HTML file that asks nothing of the network."""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from bioscan_jax.reports import palette, sections
from bioscan_jax.reports.contents import Gathered
from bioscan_jax.reports.identifications import Identified
from bioscan_jax.reports.measure import RankFigures
from bioscan_jax.reports.payload import payload
from bioscan_jax.reports.projection import Projection


def render(
    gathered: Gathered,
    projection: Projection,
    identified: Identified | None,
    figures: Sequence[RankFigures],
    made: str,
) -> str:
    """The whole page.

    Args:
        gathered: The table.
        projection: A point for each of its rows.
        identified: Answers of `identify`, if there are any.
        figures: Of these answers, one for each rank.
        made: When and by what the report was made.
    """
    assets = resources.files("bioscan_jax.reports")
    style = assets.joinpath("page.css").read_text("utf-8")
    style = style.replace("/* taxa light */", palette.as_css(False)).replace("/* taxa dark */", palette.as_css(True))
    script = "\n".join(assets.joinpath(name).read_text("utf-8") for name in ("map.js", "page.js"))
    given = payload(gathered, projection, identified)
    # A hash for each of ours, so that nothing else is run or loaded, were it to get into the page
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    title = escape(f"{gathered.table}: report")
    parts = [
        sections.embedding(gathered, projection, identified),
        sections.places(gathered),
        sections.answers(gathered, identified, figures),
        sections.taxa_counts(gathered),
        sections.run(gathered),
        sections.origin(gathered),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{sections.header(gathered)}
<main>
{"".join(parts)}
</main>
<footer>{escape(made)} Coastline: Natural Earth, public domain. This file loads nothing from anywhere.</footer>
<script type="application/json" id="data">{_json(given)}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: Any) -> str:
    """JSON in which nothing can end the element that holds it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode()
