"""Finds a batch that fits, after the devices had too little memory for one."""

from collections.abc import Callable, Iterable

import jax
import numpy as np

from bioscan_jax.data.batching import BatchShape, largest_rows
from bioscan_jax.devices.memory import NeededMemory, device_memory, is_out_of_memory, needed_memory
from bioscan_jax.devices.sharding import Layout

_USABLE = 0.95
"""Share of the free memory that is counted on; the rest is lost between allocations."""
_ATTEMPTS = 3
"""Most compilations per width in the search for a batch that fits, beside the first two."""


def advise_batch_tokens(
    compile_step: Callable[[BatchShape], jax.stages.Compiled],
    shapes: Iterable[BatchShape],
    layout: Layout,
    flag: str,
) -> str:
    """Returns what to pass after a batch did not fit: the token budget that fits by what the compiler says of it.

    Args:
        compile_step: Compiles the step for a shape.
        shapes: The shape that failed, and others of the run.
        layout: The devices.
        flag: The flag of the budget.
    """
    devices, unknown = layout.data_devices, f"lower --{flag}"
    memory = _free_memory(layout)
    if memory is None:
        return unknown
    failed, budgets = "", []
    for shape in dict.fromkeys(shapes):
        least = _need(compile_step, BatchShape(devices, shape.tokens))
        if least is None:
            return unknown
        available = int(_USABLE * (memory + least.arguments))

        def bytes_of(rows: int, tokens: int = shape.tokens, beyond: int = 2 * available) -> int:
            need = _need(compile_step, BatchShape(rows * devices, tokens))
            return beyond if need is None else need.total

        rows = shape.rows // devices
        used = bytes_of(rows)
        fits, _ = largest_rows(bytes_of, rows, used, fixed=least.arguments, available=available, attempts=_ATTEMPTS)
        if not failed:
            gib = f"{used / 2**30:.2f} GiB" if used != 2 * available else "more"
            failed = f"it needs {gib} on each device, and {available / 2**30:.2f} GiB can be had; "
            fits = min(fits, rows // 2)  # the compiler's figure leaves out what other programs take
        budgets.append(fits * shape.tokens)
    if not min(budgets):
        return (
            f"{failed}not one row fits: pass --mesh.params fsdp or --mesh.model 2, which split the model over devices, "
            "or rows of fewer tokens"
        )
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
