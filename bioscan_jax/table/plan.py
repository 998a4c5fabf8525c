"""The plan that decides a table's rows and values, and the check that an existing table was made by the same one."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bioscan_jax.errors import InputError


@dataclass(frozen=True)
class Plan:
    """All that decides the rows of a table and their values."""

    facts: dict[str, Any]
    """What JSON can hold: input files, weights, pooling and so on, nested as you like."""

    @property
    def canonical(self) -> str:
        """The facts as JSON, keys sorted, no spaces."""
        return json.dumps(self.facts, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """Digest of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of what a JSON value holds, each with its own JSON."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from _leaves(item, f"{name}[{position}]")
    else:
        yield name, json.dumps(value)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The dotted names of what differs between two plans' facts, with both values, as one line; "" if nothing."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]

    def short(value: str) -> str:
        return value if len(value) <= 60 else f"{value[:40]}...{value[-15:]}"

    shown = [f"{k} {short(before.get(k, 'absent'))} -> {short(after.get(k, 'absent'))}" for k in changed[:5]]
    return ", ".join(shown) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def check_origin(path: str, found: pa.Schema, wanted: pa.Schema, mend: str) -> None:
    """Compares a table that exists with the one that would be made now.

    Args:
        path: Where the table is.
        found: Its schema.
        wanted: The schema it would be made with; both have `plan`, `plan_facts`, `rows` and `block_rows`.
        mend: What the user can do about a difference.

    Raises:
        InputError: the table was made by something else, by another plan or with other columns.
    """
    old, new = ({k.decode(): v.decode() for k, v in (s.metadata or {}).items()} for s in (found, wanted))
    if not {"plan", "plan_facts", "rows", "block_rows"} <= old.keys():
        raise InputError(f"{path} was not made by bioscan_jax (it has no plan); {mend}")
    if any(old[key] != new[key] for key in ("plan", "rows", "block_rows")):
        facts = [
            {**json.loads(m["plan_facts"]), "table": {key: int(m[key]) for key in ("rows", "block_rows")}}
            for m in (old, new)
        ]
        raise InputError(f"{path} was made by another plan: {differences(facts[0], facts[1])}; {mend}")
    made = [field for field in found if b"annotated" not in (field.metadata or {})]
    types = [{field.name: str(field.type) for field in fields} for fields in (made, wanted)]
    if list(types[0].items()) != list(types[1].items()):
        changed = differences(types[0], types[1]) or "their order"
        raise InputError(f"{path} was made with other columns: {changed}; {mend}")
