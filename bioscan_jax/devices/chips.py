"""Specifications of TPUs (slices offered for rent, memory and peak rates of one JAX device), and peak rates of GPUs."""

import math
from dataclasses import dataclass

from bioscan_jax.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One TPU generation; figures are per JAX device, which is a core up to v3 and a chip from v4 on."""

    device_kind: str
    """Value of `jax.Device.device_kind`."""
    hbm_gib: float
    """Memory that the compiler lets a program use, in GiB; slightly less than is built in."""
    bf16_tflops: float
    """Peak rate of bfloat16 matrix products."""
    hbm_gb_per_second: float
    """Peak memory bandwidth, in 1e9 bytes per second."""
    cores_per_chip: int
    """Slice names count cores up to v5p; v5e and v6e count chips, which have one core."""
    devices_per_chip: int
    host_shape: tuple[int, ...]
    """Chips along each axis of one host, in a slice of several hosts."""
    slices: dict[int, tuple[int, ...]]
    """Chips along each axis, by the number in the slice name."""
    megacore: bool = False
    """Whether the topology must state that a device has two cores (v4)."""


_2D = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_3D = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4), 256: (4, 4, 8), 512: (4, 8, 8)}

# Peaks and slices: cloud.google.com/tpu/docs/v3, v4, v5e, v5p and v6e, per chip; half of that for v3, with two devices per chip.
# hbm_gib: the limit in the error of libtpu 0.0.42 for a program with too many temporaries.
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
        megacore=True,
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
class Gpu:
    """One kind of GPU."""

    bf16_tflops: float
    """Peak rate of bfloat16 products of dense matrices, summed in float32."""
    gb_per_second: float
    """Peak memory bandwidth, in 1e9 bytes per second."""


GPUS = {
    "NVIDIA H200": Gpu(989.5, 4800.0),
    "NVIDIA H100 80GB HBM3": Gpu(989.5, 3350.0),
    "NVIDIA H100 PCIe": Gpu(756.5, 2000.0),
    "NVIDIA A100-SXM4-80GB": Gpu(312.0, 2039.0),
    "NVIDIA A100-SXM4-40GB": Gpu(312.0, 1555.0),
    "NVIDIA A100 80GB PCIe": Gpu(312.0, 1935.0),
    "NVIDIA A100-PCIE-40GB": Gpu(312.0, 1555.0),
    "NVIDIA L40S": Gpu(362.0, 864.0),
    "NVIDIA L4": Gpu(121.0, 300.0),
    "NVIDIA A10": Gpu(125.0, 600.0),
}
"""By `jax.Device.device_kind`, from NVIDIA's data sheet of each product (nvidia.com/en-us/data-center).

Where it states the rate for sparse matrices (H100, H200, L4), half of that.
"""


@dataclass(frozen=True)
class Slice:
    """Connected chips of one generation, rented under one name."""

    generation: str
    shape: tuple[int, ...]
    """Chips along each axis."""

    @property
    def chip(self) -> Chip:
        """Specification of its chips."""
        return CHIPS[self.generation]

    @property
    def devices(self) -> int:
        """JAX devices of the whole slice."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def host(self) -> "Slice":
        """The chips of one host: up to eight of a single-host v5e or v6e slice, four of a larger slice."""
        whole = math.prod(self.shape) <= (8 if len(self.shape) == 2 and self.chip.cores_per_chip == 1 else 4)
        return self if whole else Slice(self.generation, self.chip.host_shape)

    @property
    def hosts(self) -> int:
        """Hosts, each running one process."""
        return self.devices // self.host.devices

    @property
    def topology(self) -> tuple[str, dict[str, list[int] | str]]:
        """Topology name and further arguments for `jax.experimental.topologies.get_topology_desc`."""
        bounds = [*self.host.shape, 1, 1][:3]
        options: dict[str, list[int] | str] = {"chips_per_host_bounds": bounds}
        if self.chip.megacore:
            options["chip_config_name"] = "megacore"
        return f"{self.generation}:{'x'.join(map(str, self.shape))}", options


def find_slice(name: str, flag: str = "topology") -> Slice:
    """Returns the slice called `name`, such as v3-8 (eight cores) or v5e-256 (256 chips); `flag` is for the error.

    Raises:
        InputError: No slice has that name.

    Example:
        >>> find_slice("v5e-16").hosts
        4
    """
    generation, _, size = name.partition("-")
    known = CHIPS[generation].slices if generation in CHIPS else {}
    if size not in map(str, known):
        one = ", ".join(f"{generation}-{number}" for number in known)
        every = ", ".join(f"{key}-{min(chip.slices)} to {key}-{max(chip.slices)}" for key, chip in CHIPS.items())
        raise InputError(f"--{flag} {name!r} is not a known slice; use one of {one or every}")
    return Slice(generation, known[int(size)])


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak bfloat16 FLOP/s of one JAX device, or None if unknown, as for a CPU.

    Args:
        device_kind: `jax.Device.device_kind`.
    """
    peaks = {chip.device_kind: chip.bf16_tflops for chip in CHIPS.values()}
    peaks |= {kind: gpu.bf16_tflops for kind, gpu in GPUS.items()}
    return peaks[device_kind] * 1e12 if device_kind in peaks else None
