"""What is known of TPUs: the slices people rent, and what one JAX device of each can do at most."""

import math
from dataclasses import dataclass

from bioscan_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One generation of TPU; figures are those of a JAX device, which is a core up to v3 and a chip from v4 on."""

    device_kind: str
    """As `jax.Device.device_kind` says it."""
    hbm_gib: float
    """What the compiler lets a program use; a little less than is built in."""
    bf16_tflops: float
    """Peak of bfloat16 matrix products."""
    hbm_gb_per_second: float
    """Peak of the memory, in 1e9 bytes a second."""
    cores_per_chip: int
    """By which slices are named up to v5p; v5e and v6e name chips, which have one core."""
    devices_per_chip: int
    host_shape: tuple[int, ...]
    """Chips of one host of a slice that has several."""
    slices: dict[int, tuple[int, ...]]
    """Chips along each axis, by the number in the slice's name."""
    two_cores_a_device: bool = False
    """v4 has to be told."""


_2D = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_3D = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 512: (4, 8, 8)}

# Peaks and slices: cloud.google.com/tpu/docs, the page of each generation (v3 and v4 state a chip, v3 has two devices).
# hbm_gib: what the compiler of libtpu 0.0.42 states when a program has too many temporaries.
CHIPS = {
    "v3": Chip(
        device_kind="TPU v3",
        hbm_gib=15.48,
        bf16_tflops=61.5,
        hbm_gb_per_second=450.0,
        cores_per_chip=2,
        devices_per_chip=2,
        host_shape=(2, 2),
        slices={8: (2, 2), 32: (4, 4), 64: (4, 8), 128: (8, 8), 256: (8, 16), 512: (16, 16)},
    ),
    "v4": Chip(
        device_kind="TPU v4",
        hbm_gib=30.75,
        bf16_tflops=275.0,
        hbm_gb_per_second=1200.0,
        cores_per_chip=2,
        devices_per_chip=1,
        host_shape=(2, 2, 1),
        slices=_3D,
        two_cores_a_device=True,
    ),
    "v5p": Chip(
        device_kind="TPU v5",
        hbm_gib=95.74,
        bf16_tflops=459.0,
        hbm_gb_per_second=2765.0,
        cores_per_chip=2,
        devices_per_chip=1,
        host_shape=(2, 2, 1),
        slices=_3D,
    ),
    "v5e": Chip(
        device_kind="TPU v5 lite",
        hbm_gib=15.75,
        bf16_tflops=197.0,
        hbm_gb_per_second=819.0,
        cores_per_chip=1,
        devices_per_chip=1,
        host_shape=(2, 2),
        slices={1: (1, 1)} | _2D,
    ),
    "v6e": Chip(
        device_kind="TPU v6 lite",
        hbm_gib=31.25,
        bf16_tflops=918.0,
        hbm_gb_per_second=1640.0,
        cores_per_chip=1,
        devices_per_chip=1,
        host_shape=(2, 2),
        slices={1: (1, 1)} | _2D,
    ),
}


@dataclass(frozen=True)
class Slice:
    """Some chips of one generation, connected: what is rented by one name."""

    generation: str
    shape: tuple[int, ...]
    """Chips along each axis."""

    @property
    def chip(self) -> Chip:
        """Its chips."""
        return CHIPS[self.generation]

    @property
    def devices(self) -> int:
        """JAX devices of the whole slice."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def host(self) -> "Slice":
        """The part of it that one host has: eight chips of v5e and v6e by themselves, four of a larger slice."""
        whole = math.prod(self.shape) <= (8 if len(self.shape) == 2 and self.chip.cores_per_chip == 1 else 4)
        return self if whole else Slice(self.generation, self.chip.host_shape)

    @property
    def hosts(self) -> int:
        """Hosts, each with one process."""
        return self.devices // self.host.devices

    @property
    def topology(self) -> tuple[str, dict[str, list[int] | str]]:
        """`topology_name` and the other arguments of `jax.experimental.topologies.get_topology_desc`."""
        bounds = [*self.host.shape, 1, 1][:3]
        options: dict[str, list[int] | str] = {"chips_per_host_bounds": bounds}
        if self.chip.two_cores_a_device:
            options["chip_config_name"] = "megacore"
        return f"{self.generation}:{'x'.join(map(str, self.shape))}", options


def find_slice(name: str) -> Slice:
    """The slice of a name such as v3-8 (eight cores) or v5e-256 (256 chips).

    Raises:
        InputError: It is not known.
    """
    generation, _, size = name.partition("-")
    known = CHIPS[generation].slices if generation in CHIPS else {}
    if size not in map(str, known):
        one = ", ".join(f"{generation}-{number}" for number in known)
        every = ", ".join(f"{key}-{min(chip.slices)} to {key}-{max(chip.slices)}" for key, chip in CHIPS.items())
        raise InputError(f"--topology {name!r} is not a known slice; known are {one or every}")
    return Slice(generation, known[int(size)])


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device; None where it is not known, as on CPU and GPU.

    Args:
        device_kind: `jax.Device.device_kind`.
    """
    return next((chip.bf16_tflops * 1e12 for chip in CHIPS.values() if chip.device_kind == device_kind), None)
