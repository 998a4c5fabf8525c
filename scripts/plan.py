"""Says what a step needs and costs on TPUs that are not here; takes the config file of the run itself.

python scripts/plan.py [--step embed|finetune] [--json [FILE]] --config FILE --topology v3-8 [more; --help lists it]
"""

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embed
import finetune
from command import run

RUNS = {"embed": embed.main, "finetune": finetune.main}


def with_flags_of(plan: Callable[..., object], other: Callable[..., object]) -> list[inspect.Parameter]:
    """The parameters of `plan`, and those that only `other` has, none of them required."""
    own, extra = inspect.signature(plan).parameters, []
    for name, parameter in inspect.signature(other).parameters.items():
        if name not in own:
            if parameter.default is inspect.Parameter.empty:
                parameter = parameter.replace(default=None, annotation=parameter.annotation | None)
            extra.append(parameter)
    return [*own.values(), *extra]


def main() -> None:
    """Plan the step that --step names, and print the plan as a table, or with --json as JSON."""
    from bioscan_jax.planning.plan import STEPS, write_json

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--step", default="embed")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE")
    wanted, flags = parser.parse_known_args()
    if wanted.step not in STEPS:
        print(f"error: --step {wanted.step!r} is unknown; pass one of {', '.join(STEPS)}", file=sys.stderr)
        sys.exit(2)
    step, sys.argv[1:] = STEPS[wanted.step], flags
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

    parameters = with_flags_of(step, RUNS[wanted.step])
    first, _, rest = (step.__doc__ or "").partition("\n")
    show.__doc__ = f"{first} --json prints the plan as JSON, --json FILE writes it there too.\n{rest}"
    show.__signature__ = inspect.Signature(parameters)
    run(show)


if __name__ == "__main__":
    main()
