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
    """Everything that determines the rows of a table and their values."""

    facts: dict[str, Any]
    """Input files, weights, pooling and so on, as nested JSON values."""

    @property
    def canonical(self) -> str:
        """The facts as JSON with sorted keys and no spaces."""
        return json.dumps(self.facts, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.canonical.encode()).hexdigest()


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields the dotted name of each leaf of a JSON value, and the leaf as JSON."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and value:
        for position, item in enumerate(value):
            yield from _leaves(item, f"{name}[{position}]")
    else:
        yield name, json.dumps(value)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Lists, on one line, the dotted names that differ between two plans' facts with both values; "" if none do."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    changed = [name for name in sorted(before | after) if before.get(name) != after.get(name)]

    def short(value: str) -> str:
        return value if len(value) <= 60 else f"{value[:40]}...{value[-15:]}"

    shown = [f"{k} {short(before.get(k, 'absent'))} -> {short(after.get(k, 'absent'))}" for k in changed[:5]]
    return ", ".join(shown) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def check_origin(path: str, found: pa.Schema, wanted: pa.Schema, fix: str) -> None:
    """Checks that an existing table was made by the same plan, with the same columns, as a run would make now.

    Args:
        path: Path of the table, for the message.
        found: Its schema.
        wanted: The schema this run would write, with `plan`, `plan_facts`, `rows` and `block_rows` in its metadata.
        fix: What the user can do about a difference.

    Raises:
        InputError: The table was made by other software, by another plan or with other columns.
    """
    old, new = ({k.decode(): v.decode() for k, v in (s.metadata or {}).items()} for s in (found, wanted))
    if not {"plan", "plan_facts", "rows", "block_rows"} <= old.keys():
        raise InputError(f"{path} was not made by bioscan_jax (it has no plan); {fix}")
    if any(old[key] != new[key] for key in ("plan", "rows", "block_rows")):
        facts = [
            {**json.loads(m["plan_facts"]), "table": {key: int(m[key]) for key in ("rows", "block_rows")}}
            for m in (old, new)
        ]
        raise InputError(f"{path} was made by another plan: {differences(facts[0], facts[1])}; {fix}")
    made = [field for field in found if b"annotated" not in (field.metadata or {})]
    types = [{field.name: str(field.type) for field in fields} for fields in (made, wanted)]
    if list(types[0].items()) != list(types[1].items()):
        changed = differences(types[0], types[1]) or "their order"
        raise InputError(f"{path} was made with other columns: {changed}; {fix}")
