"""`bioscan plan --config FILE --topology v3-8`: what a step needs and costs on TPUs that are not here.

It takes the config file and the flags of the run itself, and --step embed|finetune and --json [FILE].
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bioscan_jax.cli import embed, finetune
from bioscan_jax.cli._command import UsageError, from_flags

_RUNS = {"embed": embed.main, "finetune": finetune.main}


def _with_flags_of(plan: Callable[..., object], other: Callable[..., object]) -> list[inspect.Parameter]:
    """The parameters of `plan`, and those that only `other` has, none of them required."""
    own, extra = inspect.signature(plan).parameters, []
    for name, parameter in inspect.signature(other).parameters.items():
        if name not in own:
            if parameter.default is inspect.Parameter.empty:
                parameter = parameter.replace(default=None, annotation=parameter.annotation | None)
            extra.append(parameter)
    return [*own.values(), *extra]


def command(words: Sequence[str]) -> None:
    """Plans the step that --step names, and prints the plan as a table, or with --json as JSON."""
    from bioscan_jax.planning.plan import STEPS, write_json

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--step", default="embed")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    wanted, flags = parser.parse_known_args(words)
    if wanted.step not in STEPS:
        raise UsageError(f"--step {wanted.step!r} is unknown; pass one of {', '.join(STEPS)}")
    step = STEPS[wanted.step]
    own = inspect.signature(step).parameters

    def show(**settings: Any) -> None:
        data = settings["data"]
        absent = settings.get("simulate") is not None and not Path(data.path).exists()
        if absent:
            settings["data"] = dataclasses.replace(data, path="")
        plan = step(**{name: value for name, value in settings.items() if name in own})
        if absent:
            print(f"{data.path} is not simulated yet: planned without its lengths", file=sys.stderr)
        if wanted.json not in (None, "-"):
            write_json(plan, wanted.json)
        print(plan.to_json() if wanted.json == "-" else plan)

    first, _, rest = (step.__doc__ or "").partition("\n")
    show.__doc__ = f"{first} --json prints the plan as JSON, --json FILE writes it there too.\n{rest}"
    show.__signature__ = inspect.Signature(_with_flags_of(step, _RUNS[wanted.step]))
    from_flags(show, "plan")(flags)
