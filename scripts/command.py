"""What every script shares: flags from dataclasses, layered --config files, one line for a mistake."""

import dataclasses
import os
import re
import signal
import sys
import typing
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn


def _leave(number: int, frame: object) -> None:
    """Ends the process where it stands: all that it writes outlives a kill at any instant."""
    with suppress(OSError):
        os.write(2, b"\nstopped; what was committed is safe; run the same command again\n")
    os._exit(128 + number)


for _name in ("stdin", "stdout", "stderr"):
    if getattr(sys, _name) is None:  # closed by the caller: a table's file would get its number, and log lines
        setattr(sys, _name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
os.environ.setdefault("LANCE_LOG", "warn")  # it tells how long each index took
for _signal in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_signal, _leave)


def run(function: Callable[..., object]) -> None:
    """Parses the command line for `function` and calls it.

    Exit codes: 0 done, 2 something to mend (one line on stderr), 128 + signal when asked to stop or nobody reads on.
    """
    from bioscan_jax.errors import InputError, Interrupted

    try:
        function(**arguments(function))
        sys.stdout.flush()
    except InputError as error:
        _fail(str(error))
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        print("nobody reads the output any more; what was committed is safe", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # at an orderly end Python would try to write once more


def arguments(function: Callable[..., object]) -> dict[str, Any]:
    """What the command line passes to `function`."""
    import jsonargparse

    from bioscan_jax.errors import InputError

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (function.__doc__ or "").split("\n")[0]
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with these settings; repeat to layer files")
    parser.add_function_arguments(function)
    for action in parser._actions:
        if isinstance(action.default, bool):  # `--explain` alone says yes
            action.nargs, action.const = "?", True
    try:
        given = parser.instantiate(parser.parse_args(_bracketed(sys.argv[1:], _lists(function))))
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        _fail(re.sub('Parser key "([^"]+)":', r"--\1:", str(error)) + "; --help lists the flags")
    given.pop("config", None)
    return vars(given)


def _lists(function: Callable[..., object]) -> set[str]:
    """Flags that take several values."""
    groups = {name: kind for name, kind in typing.get_type_hints(function).items() if dataclasses.is_dataclass(kind)}
    return {
        f"--{name}.{field}"
        for name, group in groups.items()
        for field, kind in typing.get_type_hints(group).items()
        if typing.get_origin(kind) is tuple
    }


def _bracketed(words: list[str], flags: set[str]) -> list[str]:
    """Takes `--lora.targets query,value` for `--lora.targets [query,value]`, as jsonargparse wants it."""
    found: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if found and found[-1] in flags and not word.startswith(("[", "-")):
            word = f"[{word}]"
        elif flag in flags and equals and not value.startswith("["):
            word = f"{flag}=[{value}]"
        found.append(word)
    return found


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
