"""`bioscan plan --config FILE --topology v3-8`: the memory and cost of a step on TPUs you do not have yet.

It takes the config file and the flags of the run itself, and --step embed|finetune and --json [FILE].
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bioscan_jax.cli import embed, finetune
from bioscan_jax.cli._command import UsageError, from_flags, optional_flags

RUNS = {"embed": embed.main, "finetune": finetune.main}
"""The runs whose flags and config files it takes."""
_OF_THE_PLAN = ("topology", "batch", "tokens", "params", "species", "largest")


def command(words: Sequence[str]) -> None:
    """Plans the step that --step names, and prints the plan as a table, or with --json as JSON."""
    from bioscan_jax.planning.plan import plan, write_json

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--step", default="embed")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    wanted, flags = parser.parse_known_args(words)
    if wanted.step not in RUNS:
        raise UsageError(f"--step {wanted.step!r} is unknown; pass one of {', '.join(RUNS)}")
    signature = inspect.signature(plan)

    def show(**settings: Any) -> None:
        data = settings["data"]
        absent = settings.get("simulate") is not None and not Path(data.path).exists()
        if absent:
            settings["data"] = dataclasses.replace(data, path="")
        known = {name: value for name, value in settings.items() if name in signature.parameters}
        found = plan(step=wanted.step, **known)
        if absent:
            print(f"{data.path} is not simulated yet: planned without the lengths of its barcodes", file=sys.stderr)
        if wanted.json not in (None, "-"):
            write_json(found, wanted.json)
        print(found.to_json() if wanted.json == "-" else found)

    first, _, rest = (plan.__doc__ or "").partition("\n")
    show.__doc__ = f"{first} --json prints the plan as JSON, --json FILE writes it there too.\n{rest}"
    own = [signature.parameters[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in _OF_THE_PLAN]
    show.__signature__ = inspect.Signature([*own, *optional_flags(RUNS[wanted.step], required=["model"])])
    from_flags(show, "plan")(flags)
