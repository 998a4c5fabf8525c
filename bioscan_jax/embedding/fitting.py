"""Finds a batch that fits, after the devices had too little memory for one."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import numpy as np

from bioscan_jax.data.batching import BatchShape, largest_rows
from bioscan_jax.devices.memory import NeededMemory, device_memory, is_out_of_memory, needed_memory
from bioscan_jax.devices.sharding import Layout

_USABLE = 0.95
"""Share of the free memory that is counted on; the rest is lost between allocations."""
NO_ROW_FITS = "pass --mesh.params fsdp or --mesh.model 2, which split the model over devices, or rows of fewer tokens"
_ATTEMPTS = 3
"""Most compilations per width in the search for a batch that fits, beside the first two."""


CompileStep = Callable[[BatchShape], jax.stages.Compiled]
"""Compiles a step for batches of a shape."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether a batch fits on each of the devices, in bytes per device."""

    needed: int | None
    """None where the compiler gives up."""
    available: int
    rows: int
    """Most rows per device that fit; 0 if not one does."""

    @property
    def fits(self) -> bool:
        """Whether the batch itself fits."""
        return self.needed is not None and self.needed <= self.available


def find_fit(
    compile_step: CompileStep, shape: BatchShape, devices: int, free: int, *, weights_placed: bool
) -> Fit | None:
    """Compiles a step for a batch and for smaller ones, and compares what the compiler says with the memory.

    Args:
        compile_step: Compiles the step.
        shape: Shape of the batch.
        devices: Devices that split it.
        free: Free bytes on each.
        weights_placed: The arguments of the step are on the devices, so that `free` leaves them out.

    Returns:
        None where the compiler does not say what one row needs.
    """
    least = _need(compile_step, BatchShape(devices, shape.tokens))
    if least is None:
        return None
    available, rows = int(_USABLE * (free + least.arguments * weights_placed)), shape.rows // devices
    beyond = 2 * max(available, least.total)

    def bytes_of(rows: int) -> int:
        need = _need(compile_step, BatchShape(rows * devices, shape.tokens))
        return beyond if need is None else need.total

    used = bytes_of(rows)
    fits = rows
    if used > available:
        fits, _ = largest_rows(bytes_of, rows, used, fixed=least.arguments, available=available, attempts=_ATTEMPTS)
    return Fit(needed=None if used == beyond else used, available=available, rows=fits)


def advise_batch_tokens(compile_step: CompileStep, shapes: Iterable[BatchShape], layout: Layout, flag: str) -> str:
    """Returns what to pass after a batch did not fit: the token budget that fits by what the compiler says of it.

    Args:
        compile_step: Compiles the step.
        shapes: The shape that failed, and others of the run.
        layout: The devices.
        flag: The flag of the budget.
    """
    devices, unknown = layout.data_devices, f"lower --{flag}"
    free = _free_memory(layout)
    if free is None:
        return unknown
    failed, budgets = "", []
    for shape in dict.fromkeys(shapes):
        found = find_fit(compile_step, shape, devices, free, weights_placed=True)
        if found is None:
            return unknown
        rows = found.rows
        if not failed:
            gib = "more" if found.needed is None else f"{found.needed / 2**30:.2f} GiB"
            failed = f"it needs {gib} on each device, and {found.available / 2**30:.2f} GiB can be had; "
            rows = min(rows, shape.rows // devices // 2)  # the compiler's figure leaves out what other programs take
            if found.fits and not rows:
                return f"{failed}end other programs that use the memory of the devices"
        budgets.append(rows * shape.tokens)
    if not min(budgets):
        return f"{failed}not one row fits: {NO_ROW_FITS}"
    return f"{failed}pass --{flag} {min(budgets)}"


def _free_memory(layout: Layout) -> int | None:
    """Returns the bytes free on the fullest device, once what the others still compute has ended."""
    devices = layout.mesh.devices.flatten()
    jax.block_until_ready([jax.device_put(np.zeros(1), device) + 1 for device in devices])
    found = [device_memory(device) for device in devices]
    return min((one.free for one in found if one is not None), default=None)


def _need(compile_step: Callable[[BatchShape], jax.stages.Compiled], shape: BatchShape) -> NeededMemory | None:
    """Returns the memory that a step needs; None where the compiler gives up, or does not say."""
    try:
        return needed_memory(compile_step(shape))
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
