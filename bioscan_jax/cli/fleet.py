"""`bioscan fleet plan|simulate`: what embedding with many machines takes, before you rent them.

plan: hours, machines and price for rows, a model and a kind of device. simulate: machines that are taken away and come
back, with the scheduler that `bioscan embed --fleet.address` uses. Each has its own help: bioscan fleet plan --help
"""

import functools
import itertools
from collections.abc import Sequence

from bioscan_jax.cli._command import UsageError, from_flags
from bioscan_jax.fleet.simulate import Fleet


def simulate(
    fleet: Fleet,
    block_seconds: tuple[float, ...] = (30.0, 60.0, 120.0, 300.0),
    blocks_ahead: tuple[float, ...] = (4.0, 8.0, 16.0),
    copies: tuple[int, ...] = (0, 1),
) -> None:
    """Simulate a fleet whose machines are taken away and come back, for each block_seconds, blocks_ahead and copies.

    Args:
        fleet: The machines.
        block_seconds: Mean seconds of a block on one worker.
        blocks_ahead: Blocks that may be handed out beyond the first uncommitted one, for each worker.
        copies: Idle workers that may compute a block in work once more.
    """
    from bioscan_jax.errors import InputError
    from bioscan_jax.fleet.simulate import Policy, describe
    from bioscan_jax.fleet.simulate import simulate as run

    policies = [Policy(*one) for one in itertools.product(block_seconds, blocks_ahead, copies)]
    if not policies:
        raise InputError("nothing to simulate: --block_seconds, --blocks_ahead and --copies need a value each")
    widths: list[int] = []
    for policy in policies:
        row = run(fleet, policy).row()
        if not widths:
            print(describe(fleet))
            widths = [max(len(name), len(value) + 2) for name, value in row.items()]
            print("  ".join(f"{name:>{width}}" for name, width in zip(row, widths, strict=True)))
        print("  ".join(f"{value:>{width}}" for value, width in zip(row.values(), widths, strict=True)), flush=True)


def command(words: Sequence[str]) -> None:
    """Runs `bioscan fleet`."""
    mode, *flags = words or [""]
    if mode in ("-h", "--help"):
        print((__doc__ or "").strip())
    elif mode == "plan":
        from bioscan_jax.planning.fleet import plan_fleet

        show = functools.wraps(plan_fleet)(lambda **settings: print(plan_fleet(**settings)))
        from_flags(show, "fleet plan")(flags)
    elif mode == "simulate":
        from_flags(simulate, "fleet simulate", unprefixed=["fleet"])(flags)
    else:
        raise UsageError(f"no mode {mode!r}; pass one of plan, simulate first")
