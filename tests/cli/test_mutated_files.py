"""Damaged files of every kind that is read: each is read or refused in one short line, never a traceback."""

import gzip
import json
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from support.golden import golden_config
from support.golden_models import BASE, EVERY, ONE, adapt, golden_model, label_space, random_heads

from bioscan_jax import config
from bioscan_jax.barcodes.labels import LabelSpace
from bioscan_jax.bundles.manifest import Entry, Manifest
from bioscan_jax.checkpoints import peft
from bioscan_jax.checkpoints.head_files import read_heads
from bioscan_jax.checkpoints.model_card import read_facts
from bioscan_jax.checkpoints.readers import list_tensors, read_rows
from bioscan_jax.data.parquet import open_source
from bioscan_jax.devices.sharding import make_layout
from bioscan_jax.errors import InputError
from bioscan_jax.matching import calibration
from bioscan_jax.table.side_tables import read_side_table

pytestmark = pytest.mark.slow
ROUNDS = 2500
"""Mutations of each kind of file."""
LONGEST = 400
"""Characters of a message without its path."""
MANIFEST = import_module("bioscan_jax.bundles.manifest")
ROWS = {
    "sequence_id": [f"s{i}" for i in range(30)],
    "dna_sequence": ["ACGTTGCA" * 4] * 30,
    "site": ["Old mill", 'a "b"', None] * 10,
    "depth": [1.5, None, 3.0] * 10,
}


def barcodes(path: Path) -> None:
    source = open_source(config.DataConfig(path=str(path), block_rows=8), scratch=path.parent / "scratch")
    for number in range(len(source)):
        source[number]


def side_table(path: Path) -> None:
    read_side_table(config.SideTableConfig(path=str(path)), "--metadata")


def tensors(path: Path) -> None:
    for tensor in list_tensors(path.parent).values():
        read_rows(tensor)


def adapter(path: Path) -> None:
    parsed = peft._read_config(path.parent)
    read_facts(path.parent)
    file = peft._weights_file(path.parent)
    for tensor in peft._tensors_by_target(file, parsed, golden_config("v2"), "an adapter:", "mine/v").values():
        read_rows(tensor)


def heads(path: Path) -> None:
    read_heads(path.parent, make_layout(ONE))


def csv_of(rows: dict, delimiter: str) -> bytes:
    lines = [delimiter.join(rows)]
    lines += [delimiter.join("" if cell is None else str(cell) for cell in row) for row in zip(*rows.values())]  # noqa: B905
    return ("\r\n".join(lines) + "\r\n").encode()


def fasta() -> bytes:
    return "".join(f">s{i} Bombus terrestris\nACGTTGCAAC\nGGTT\n" for i in range(20)).encode()


def fastq() -> bytes:
    return "".join(f"@s{i}\nACGTTGCAAC\n+\nIIIIIIIIII\n" for i in range(20)).encode()


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table(ROWS), path, row_group_size=10)


def write_pickle(path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({f"layer.{i}.weight": torch.ones(3, 4) for i in range(4)}, path)


def write_adapter(path: Path) -> None:
    model = adapt(golden_model("v2"))
    peft.write_adapter(path.parent / "made", model, EVERY, provenance=BASE, heads=random_heads("marginal"))
    for file in (path.parent / "made").iterdir():
        file.rename(path.parent / file.name)


def write_calibration(path: Path) -> None:
    path.write_text(calibration.to_json([]))


def write_manifest(path: Path) -> None:
    head = dict.fromkeys(("table", "chosen", "schema", "index"), "x")
    head |= dict.fromkeys(("rows", "seed", "estimate", "part_rows", "rejects"), 1)
    head |= dict.fromkeys(("filter", "rejects_schema", "run", "calibration")) | {"candidates": []}
    head |= {"metadata": {}, "rejects_metadata": {}}
    entry = Entry(path="data/part-0.lance", bytes=5, sha256="a" * 64, kind="vectors", rows=3)
    path.write_text(Manifest(head, (entry,)).to_json())


def bytes_of(make: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(make())


KINDS: dict[str, tuple[str, Callable[[Path], object], Callable[[Path], object]]] = {
    "FASTA": ("a.fasta", bytes_of(fasta), barcodes),
    "FASTA.gz": ("a.fasta.gz", bytes_of(lambda: gzip.compress(fasta(), mtime=0)), barcodes),
    "FASTQ": ("a.fastq", bytes_of(fastq), barcodes),
    "Parquet": ("a.parquet", write_parquet, barcodes),
    "CSV": ("m.csv", bytes_of(lambda: csv_of(ROWS, ",").replace(b'a "b"', b'"a ""b"""')), side_table),
    "TSV": ("m.tsv", bytes_of(lambda: csv_of(ROWS, "\t")), side_table),
    "CSV.gz": ("m.csv.gz", bytes_of(lambda: gzip.compress(csv_of(ROWS, ";"), mtime=0)), side_table),
    "Parquet metadata": ("m.parquet", write_parquet, side_table),
    "safetensors": (
        "model.safetensors",
        lambda path: save_file({f"layer.{i}.weight": np.ones((3, 4), np.float32) for i in range(4)}, path),
        tensors,
    ),
    "PyTorch": ("pytorch_model.bin", write_pickle, tensors),
    "adapter's config": (peft.CONFIG_FILE, write_adapter, adapter),
    "adapter's weights": (peft.WEIGHTS_FILES[0], write_adapter, adapter),
    "adapter's facts": ("bioscan_jax_export.json", write_adapter, adapter),
    "heads": ("heads.safetensors", write_adapter, heads),
    "label space": (
        "label_space.json",
        lambda path: label_space().save(path),
        LabelSpace.load,
    ),
    "calibration": (
        "sequences.calibration.json",
        write_calibration,
        lambda path: calibration.from_json(path.read_bytes(), str(path)),
    ),
    "manifest": (
        "manifest.json",
        write_manifest,
        lambda path: Manifest.from_json(path.read_bytes(), str(path)),
    ),
    "manifest with a new digest": (
        "manifest.json",
        write_manifest,
        lambda path: Manifest.from_json(resealed(path.read_bytes()), str(path)),
    ),
}
SPLICES = (
    b"\x00",
    b"\xff\xfe",
    b"\x1b[31m",
    b'"',
    b"\n",
    b"\r",
    b"\t" * 9,
    b"\xc3",
    b"[" * 300,
    b"9" * 400,
    b"\xe2\x80\xae",
)


def resealed(data: bytes) -> bytes:
    """A manifest whose digest is right again, as of one who means harm."""
    try:
        body = json.loads(data)
        body.pop("sha256")
        return json.dumps(body | {"sha256": MANIFEST._digest(body)}).encode()
    except (ValueError, AttributeError, KeyError, RecursionError):
        return data


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Changes one to three places of a file."""
    for _ in range(rng.randint(1, 3)):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        match rng.randrange(6):
            case 0:
                data = (
                    data[:at] + bytes(rng.randrange(256) for _ in range(min(size, len(data) - at))) + data[at + size :]
                )
            case 1:
                data = data[:at] + data[at + size :]
            case 2:
                data = data[:at] + rng.choice(SPLICES) + data[at:]
            case 3:
                data = data[:at]
            case 4:
                data = data[:at] + data[at : at + size] * 2 + data[at + size :]
            case 5 if data[:1] == b"{":
                data = changed_json(data, rng)
    return data


def changed_json(data: bytes, rng: random.Random) -> bytes:
    """Puts a value of another kind, or a long one, somewhere into a JSON document."""
    odd = [
        None,
        True,
        -1,
        1e300,
        "",
        "x" * 5000,
        "\x1b[31m\n",
        [],
        [[[]]],
        {},
        {"a\nb": 1},
        10**40,
        "../x",
        "(((",
        ["("],
    ]
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return data
    places, stack = [], [body]
    while stack:
        here = stack.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        places += [(here, key) for key in keys]
        stack += [here[key] for key in keys]
    if not places:
        return data
    here, key = rng.choice(places)
    if isinstance(here, dict) and rng.random() < 0.2:
        here[rng.choice(["x" * 600, "\x07\x1b", "é\n"])] = here.pop(key)
    else:
        here[key] = rng.choice(odd)
    return json.dumps(body).encode()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(600)
def test_mutated_files_are_read_or_refused_in_one_short_line(kind, tmp_path):
    name, make, read = KINDS[kind]
    path = tmp_path / name
    make(path)
    whole, failures, refused = path.read_bytes(), [], 0
    read(path)
    rng = random.Random(f"1 {kind}")
    for number in range(ROUNDS if kind != "heads" else ROUNDS // 10):
        data = mutated(whole, rng)
        path.write_bytes(data)
        try:
            read(path)
        except InputError as error:
            refused += 1
            message = str(error).replace(str(tmp_path), "")
            if not message.isprintable() or len(message) > LONGEST:
                failures.append((number, len(message), message[:500]))
        except Exception as error:
            failures.append((number, type(error).__name__, str(error)[:200]))
    assert not failures, (len(failures), failures[:5])
    assert refused > 10
