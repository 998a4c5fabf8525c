"""The label space: all taxa of the training rows, their tree, and the encoding of rows as paths in it."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int32, Int64

from bioscan_jax.barcodes.lineage import RANKS, read_lineages
from bioscan_jax.errors import InputError
from bioscan_jax.output import whole_file

_VERSION = 1
"""Version of the file format and of the rules that build a label space."""

_PENDING_LINEAGES = 65_536


@dataclass(frozen=True)
class Conflict:
    """A taxon that rows place under different parents."""

    rank: str
    name: str
    parent_rank: str
    parents: tuple[tuple[str, int], ...]
    """Each parent with its number of rows, most frequent first, then by name."""
    chosen: str
    """The parent that is used: the first of them."""


@dataclass(frozen=True, eq=False)
class LabelSpace:
    """The taxa of each rank and the path from the root to each of them.

    A taxon is a name at a rank. Its parent is at the finest rank above it that any of its rows knows: the parent that
    most rows state, or the first by name if several are equally frequent. Rows that state another parent are reported
    as a `Conflict`; a taxon that loses all its rows in this way is left out. Ranks between a taxon and its parent that
    no row knows are gaps.

    Example:
        >>> rows = pa.table({"taxonomy": ["Animalia;;;;;Aedes;aegypti", "Animalia;;;;;Culex;pipiens"]})
        >>> space = LabelSpace.build([rows])
        >>> space.names[-1]
        ('Aedes aegypti', 'Culex pipiens')
        >>> space.encode(read_lineages(rows)).tolist()
        [[0, -1, -1, -1, -1, 0, 0], [0, -1, -1, -1, -1, 1, 1]]
    """

    names: tuple[tuple[str, ...], ...]
    """Names of the taxa of each of `RANKS`, sorted; the position of a name is the taxon's index."""
    paths: tuple[Int32[np.ndarray, "_ 7"], ...]
    """For each rank, the path of each taxon: the indices of its ancestors and itself, -1 below it and at gaps."""
    counts: tuple[Int64[np.ndarray, " _"], ...]
    """For each rank, the number of training rows that `encode` assigns to each taxon; at least 1."""
    conflicts: tuple[Conflict, ...]
    version: int
    sha256: str
    """Hash of names and paths, equal for spaces whose indices have the same meaning."""

    @classmethod
    def build(cls, tables: Iterable[pa.Table | pa.RecordBatch]) -> "LabelSpace":
        """Builds the space in one pass; memory grows with distinct lineages, not with rows, whose order does not matter.

        Raises:
            InputError: As for `read_lineages`; or there are no rows, no known names, or only one path.
        """
        lineages, rows = _count_lineages(tables)
        if not len(rows):
            raise InputError("there are no labelled rows; pass --data.path with labelled rows")
        names = [column.unique().drop_null().sort() for column in lineages]
        if not any(map(len, names)):
            raise InputError(
                f"none of the {int(rows.sum())} rows has a known name at any rank; write names into 'taxonomy' or the "
                "rank columns (bioscan_jax.barcodes.lineage.FILLERS lists what counts as unknown)"
            )
        stated = _lookup(lineages, names)
        paths, conflicts = _resolve(stated, rows, names)
        encoded = _follow(stated, paths)
        counts = [_count(encoded[:, r], rows, len(names[r])) for r in range(len(RANKS))]
        names, paths, counts = _without_empty(names, paths, counts)
        if max(map(len, names)) < 2:
            only = ";".join(rank[0] if rank else "" for rank in names)
            raise InputError(f"all labelled rows are {only}, so there is nothing to classify; add rows of other taxa")
        return cls(names, paths, counts, conflicts, _VERSION, _digest({"names": names, "paths": _lists(paths)}))

    @property
    def parents(self) -> tuple[Int32[np.ndarray, " _"], ...]:
        """For each rank, the index of each taxon's ancestor one rank above; -1 at a gap and for kingdoms."""
        above = [np.full(len(self.names[0]), -1, np.int32)]
        return (*above, *(self.paths[r][:, r - 1] for r in range(1, len(RANKS))))

    def encode(self, lineages: Sequence[pa.Array]) -> Int32[np.ndarray, "rows 7"]:
        """Converts the result of `read_lineages` to taxon indices, -1 where unknown.

        The finest name of a row that is in the space determines its path: the ranks above come from the tree, even if
        the row leaves them blank or differs, and the ranks below are -1. A row without a name in the space is all -1.
        """
        return _follow(_lookup(lineages, [pa.array(names, pa.string()) for names in self.names]), self.paths)

    def leaf_paths(self) -> Int32[np.ndarray, "leaves 7"]:
        """Returns the paths of all taxa without children, kingdoms first; every taxon is on at least one."""
        leaves = []
        for rank, paths in enumerate(self.paths):
            inner = [finer[finer[:, rank] >= 0, rank] for finer in self.paths[rank + 1 :]]
            leaves.append(np.delete(paths, np.concatenate([np.empty(0, np.int32), *inner]), axis=0))
        return np.concatenate(leaves)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the space to a JSON file, whole or not at all.

        Raises:
            InputError: The file cannot be written.
        """
        path = Path(path)
        content = {
            "version": self.version,
            "sha256": self.sha256,
            "names": self.names,
            "paths": _lists(self.paths),
            "counts": _lists(self.counts),
            "conflicts": [asdict(conflict) for conflict in self.conflicts],
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                partial.write_bytes(_canonical(content | {"checksum": _digest(content)}))
        except OSError as error:
            raise InputError(f"the label space {path} cannot be written: {error.strerror}; check the path") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LabelSpace":
        """Reads a file written by `save`.

        Raises:
            InputError: The file is missing, damaged or of another version.
        """
        try:
            content = json.loads(Path(path).read_bytes())
            version, checksum = content["version"], content.pop("checksum")
            intact = checksum == _digest(content)
        except OSError as error:
            raise InputError(f"the label space {path} cannot be read: {error.strerror}; check the path") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{path} is not a label space or is damaged; build or copy it again") from error
        if not intact:
            raise InputError(f"{path} does not match its checksum; it is damaged or was edited: build or copy it again")
        if version != _VERSION:
            raise InputError(f"{path} has version {version!r}, this library reads {_VERSION}; build the space again")
        return cls(
            names=tuple(map(tuple, content["names"])),
            paths=tuple(np.array(rank, np.int32).reshape(-1, len(RANKS)) for rank in content["paths"]),
            counts=tuple(np.array(rank, np.int64) for rank in content["counts"]),
            conflicts=tuple(
                Conflict(**entry | {"parents": tuple(map(tuple, entry["parents"]))}) for entry in content["conflicts"]
            ),
            version=version,
            sha256=content["sha256"],
        )


def _count_lineages(tables: Iterable[pa.Table | pa.RecordBatch]) -> tuple[list[pa.Array], Int64[np.ndarray, " _"]]:
    """Returns the distinct lineages, as one array per rank, and the number of rows of each."""
    schema = pa.schema([*((rank, pa.string()) for rank in RANKS), ("rows", pa.int64())])
    counted, pending = schema.empty_table(), []
    for table in tables:
        ones = pa.repeat(pa.scalar(1, pa.int64()), table.num_rows)
        pending.append(_summed(pa.table([*read_lineages(table), ones], schema=schema)))
        if sum(map(len, pending)) > len(counted) + _PENDING_LINEAGES:
            counted, pending = _summed(pa.concat_tables([counted, *pending])), []
    counted = _summed(pa.concat_tables([counted, *pending])).combine_chunks()
    columns = [pa.concat_arrays(counted[rank].chunks or [pa.array([], pa.string())]) for rank in RANKS]
    return columns, counted["rows"].to_numpy()


def _summed(lineages: pa.Table) -> pa.Table:
    sums = lineages.group_by(list(RANKS)).aggregate([("rows", "sum")])
    return sums.rename_columns([*RANKS, "rows"]).select(lineages.column_names)


def _lookup(lineages: Sequence[pa.Array], names: Sequence[pa.Array]) -> Int32[np.ndarray, "rows 7"]:
    """Returns the index of each name in `names`, -1 if it is null or not among them."""
    return np.stack([name_codes(*pair) for pair in zip(lineages, names, strict=True)], axis=1)


def name_codes(column: pa.Array, names: pa.Array) -> Int32[np.ndarray, " rows"]:
    """Returns the index of each value in `names`; -1 where it is null or absent."""
    found = pc.call_function("index_in", [column], pc.SetLookupOptions(names, skip_nulls=True))
    return found.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)


def _follow(stated: Int32[np.ndarray, "rows 7"], paths: Sequence[np.ndarray]) -> Int32[np.ndarray, "rows 7"]:
    """Returns the path of each row's finest taxon."""
    encoded = np.full_like(stated, -1)
    finest = _finest(stated)
    for rank, of_rank in enumerate(paths):
        rows = np.flatnonzero(finest == rank)
        encoded[rows] = of_rank[stated[rows, rank]]
    return encoded


def _finest(codes: Int32[np.ndarray, "rows ranks"]) -> Int64[np.ndarray, " rows"]:
    """Returns the last rank of each row that is not -1, or -1 if there is none."""
    ranks = np.where(codes >= 0, np.arange(codes.shape[1]), -1)
    return ranks.max(axis=1, initial=-1)


def _resolve(
    stated: Int32[np.ndarray, "lineages 7"], rows: Int64[np.ndarray, " lineages"], names: Sequence[pa.Array]
) -> tuple[tuple[Int32[np.ndarray, "_ 7"], ...], tuple[Conflict, ...]]:
    """Chooses each taxon's parent, from the root down, and lists the conflicts between rows."""
    paths, conflicts = [], []
    for rank in range(len(RANKS)):
        of_rank = np.full((len(names[rank]), len(RANKS)), -1, np.int32)
        known = stated[stated[:, rank] >= 0]
        weight, taxon = rows[stated[:, rank] >= 0], known[:, rank]
        finest = _finest(known[:, :rank])
        parent_rank = np.full(len(names[rank]), -1, np.int64)
        np.maximum.at(parent_rank, taxon, finest)
        for above in range(rank):
            votes = (finest == above) & (parent_rank[taxon] == above)
            pairs, which = np.unique(np.stack([taxon[votes], known[votes, above]]), axis=1, return_inverse=True)
            totals = np.bincount(which.ravel(), weight[votes], pairs.shape[1]).astype(np.int64)
            order = np.lexsort([pairs[1], -totals, pairs[0]])
            children, parents, totals = pairs[0, order], pairs[1, order], totals[order]
            chosen, first, candidates = np.unique(children, return_index=True, return_counts=True)
            of_rank[chosen] = paths[above][parents[first]]
            for i in np.flatnonzero(candidates > 1).tolist():
                group = slice(first[i], first[i] + candidates[i])
                names_of_parents = names[above].take(pa.array(parents[group])).to_pylist()
                conflicts.append(
                    Conflict(
                        rank=RANKS[rank],
                        name=names[rank][chosen[i]].as_py(),
                        parent_rank=RANKS[above],
                        parents=tuple(zip(names_of_parents, totals[group].tolist(), strict=True)),
                        chosen=names_of_parents[0],
                    )
                )
        of_rank[:, rank] = np.arange(len(names[rank]))
        paths.append(of_rank)
    return tuple(paths), tuple(sorted(conflicts, key=lambda conflict: (RANKS.index(conflict.rank), conflict.name)))


def _count(codes: Int32[np.ndarray, " rows"], rows: Int64[np.ndarray, " rows"], taxa: int) -> Int64[np.ndarray, " _"]:
    counts = np.zeros(taxa, np.int64)
    np.add.at(counts, codes[codes >= 0], rows[codes >= 0])
    return counts


def _without_empty(
    names: Sequence[pa.Array], paths: Sequence[np.ndarray], counts: Sequence[np.ndarray]
) -> tuple[tuple[tuple[str, ...], ...], tuple[Int32[np.ndarray, "_ 7"], ...], tuple[Int64[np.ndarray, " _"], ...]]:
    """Drops taxa without rows and renumbers the rest; ancestors of a taxon with rows have rows too, so they stay."""
    kept = [np.flatnonzero(of_rank) for of_rank in counts]
    # One entry more, so that index -1 gives -1.
    number = [np.append(np.cumsum(of_rank > 0) - 1, -1).astype(np.int32) for of_rank in counts]
    renumbered = [
        np.stack([number[above][of_rank[rows, above]] for above in range(len(RANKS))], axis=1)
        for of_rank, rows in zip(paths, kept, strict=True)
    ]
    left = [tuple(of_rank.take(pa.array(rows)).to_pylist()) for of_rank, rows in zip(names, kept, strict=True)]
    return tuple(left), tuple(renumbered), tuple(c[rows] for c, rows in zip(counts, kept, strict=True))


def _lists(arrays: Iterable[np.ndarray]) -> list[list[Any]]:
    return [array.tolist() for array in arrays]


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _digest(content: Any) -> str:
    return hashlib.sha256(_canonical(content)).hexdigest()
