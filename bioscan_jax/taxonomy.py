"""The seven ranks and lineage strings."""

from collections.abc import Sequence

from bioscan_jax.errors import InputError

RANKS = ("kingdom", "phylum", "class", "order", "family", "genus", "species")
"""From the root down; also the names of the input's rank columns."""


def parse_lineage(lineage: str) -> tuple[str | None, ...]:
    """Splits "K;P;C;O;F;G;S" into one name for each of `RANKS`.

    A blank field is an unknown rank and becomes None in its place; white space around a name is dropped.

    Raises:
        InputError: There are not exactly seven fields.
    """
    fields = lineage.split(";")
    if len(fields) != len(RANKS):
        raise InputError(
            f"the lineage {lineage!r} has {len(fields)} fields; write seven, {';'.join(RANKS)}, blank where unknown"
        )
    return tuple(field.strip() or None for field in fields)


def format_lineage(names: Sequence[str | None]) -> str:
    """Joins one name for each of `RANKS` to "K;P;C;O;F;G;S"; None and blank names leave their field blank.

    Raises:
        InputError: There are not exactly seven names, or one has a semicolon in it.
    """
    if isinstance(names, str) or len(names) != len(RANKS):
        raise InputError(f"a lineage has seven names, got {names!r}; give one for each of {', '.join(RANKS)}")
    for name in names:
        if name is not None and ";" in name:
            raise InputError(f"the name {name!r} has a semicolon, which separates ranks in a lineage; remove it")
    return ";".join((name or "").strip() for name in names)
