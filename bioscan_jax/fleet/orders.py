"""What the driver of a fleet and its workers tell each other: numbers, names and the metadata of files, never vectors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, UInt64

from bioscan_jax import config
from bioscan_jax.data.encode import Encoding
from bioscan_jax.embedding.block import Part, Tally
from bioscan_jax.embedding.repeats import Repeats


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a worker needs to know of the run; local paths are absolute."""

    model: config.ModelConfig
    data: config.DataConfig
    sink: config.SinkConfig
    embed: config.EmbedConfig
    mesh: config.MeshConfig
    marker: str
    """Name of a file in the database directory that the driver wrote."""
    token: bytes
    """Its content."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """Where a worker runs."""

    host: str
    pid: int
    versions: dict[str, str]
    """Of Python and of the packages that make the vectors."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a worker would compute; those of a run must agree."""

    plan: dict[str, Any]
    provenance: dict[str, str]
    model: dict[str, str | None]
    """The provenance of the weights alone."""
    schema: pa.Schema
    """Columns of the vector table."""
    encoding: Encoding
    devices: str
    """Such as `4 x TPU v3`."""
    shapes: list[tuple[int, int]]
    """The batch shapes for the input, which decide the bits of a vector."""
    probe: Float32[np.ndarray, "probes d"]
    """Vectors of the same simulated sequences on every worker."""
    load_seconds: float


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a worker cannot take part."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Order:
    """A block to embed."""

    index: int
    row: int
    """Rows of it that the table has already."""
    repeats: Repeats | None
    """Which of its sequences earlier blocks have; None where repeats are not looked for across blocks."""
    rows: UInt64[np.ndarray, " copied"]
    """The input row of each copied sequence in its earlier block."""

    @property
    def needs(self) -> list[int]:
        """The earlier blocks that vectors are copied from."""
        return [] if self.repeats is None else np.unique(self.repeats.blocks).tolist()


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """Where the vectors of a finished block are."""

    fragments: list[str]
    not_finite: UInt64[np.ndarray, " rows"]
    """Its input rows that have none, since their vectors are not finite."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished block, and the state of its worker."""

    part: Part
    tally: Tally
    compile_seconds: float
    """Spent compiling so far, like what follows."""
    shapes: list[tuple[int, int]]
    device_busy: float
    peak_device_bytes: int | None


@dataclass
class WorkerRecord:
    """What one worker did for the run."""

    name: str
    devices: str = ""
    blocks: int = 0
    rows: int = 0
    seconds: float = 0.0
    """From the end of its loading to its last block."""

    @property
    def rows_per_second(self) -> float:
        """Rows of the input by second."""
        return self.rows / self.seconds if self.seconds else 0.0
