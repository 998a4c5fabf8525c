"""`bioscan doctor [--config FILE] [flags of embed or finetune]`: what of this machine would stop the run."""

import argparse
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from bioscan_jax.cli._command import UsageError, optional_flags, parse
from bioscan_jax.cli.plan import RUNS


def command(words: Sequence[str]) -> int:
    """Examines the machine for the run that the flags state, prints what it found, and returns 1 if it has a problem."""
    from bioscan_jax.planning.doctor import Run, doctor

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--step")
    parser.add_argument("--topology")
    wanted, flags = parser.parse_known_args(words)
    if wanted.step is not None and wanted.step not in RUNS:
        raise UsageError(f"--step {wanted.step!r} is unknown; pass one of {', '.join(RUNS)}")
    step, settings = _settings(flags, wanted.step)
    names = Run.__dataclass_fields__
    given = {name: value for name, value in settings.items() if value is not None and name in names}
    if not given["model"].checkpoint:  # no flag named one
        del given["model"]
    if step == "embed":
        given.pop("train", None)
    diagnosis = doctor(Run(**given, simulated=settings.get("simulate") is not None, topology=wanted.topology))
    print(diagnosis.to_json() if wanted.json else diagnosis)
    return 0 if diagnosis.ok else 1


def _settings(flags: list[str], step: str | None) -> tuple[str, dict[str, Any]]:
    """Returns the run that the flags are of, and their values: embed if they fit both, else finetune."""
    if step is not None:
        return step, parse(_taking(step), flags, "doctor")
    try:
        return "embed", parse(_taking("embed"), flags, "doctor")
    except UsageError as error:
        try:
            return "finetune", parse(_taking("finetune"), flags, "doctor")
        except UsageError as other:
            raise other if any("train" in word or "tune" in word for word in flags) else error from None


def _taking(step: str) -> Callable[..., None]:
    """Returns a function with the flags of a run, none of them required."""

    def examine(**settings: Any) -> None:
        pass

    lines = (RUNS[step].__doc__ or "").split("\n")
    first = (
        f"Tell what of this machine would stop a run of {' or '.join(RUNS)}, and what to change; --json prints JSON, and "
        "--topology SLICE examines whether the step fits TPUs that are elsewhere."
    )
    examine.__doc__ = "\n".join([first, *lines[1:]])
    examine.__signature__ = inspect.Signature(optional_flags(RUNS[step]))
    return examine
