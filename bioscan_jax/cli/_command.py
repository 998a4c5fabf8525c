"""What every command shares: flags from dataclasses, layered --config files, one line for a mistake."""

import argparse
import atexit
import dataclasses
import functools
import gc
import inspect
import json
import logging
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

Command = Callable[[Sequence[str]], int | None]
"""Runs with the words that follow its name on the command line; may return an exit code."""


_RELEASE_SECONDS = 3.0
"""How long a process that is asked to end tries to give back its leases in buckets."""


class UsageError(Exception):
    """The command line cannot be parsed; the message says why."""


def own_process() -> None:
    """Sets up a process that does nothing but run one command."""
    # Imports make many objects and no cycles: a sixth of their time goes into looking for some
    gc.set_threshold(50_000)
    _take_lists_for_lists()
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: a file of the table would get its number, and log lines
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w"))
    os.environ.setdefault("LANCE_LOG", "warn")  # at info it logs how long each index took
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("bioscan_jax").setLevel(_log_level())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_at_once)


def leave(code: int) -> NoReturn:
    """Ends a process whose command is done, without the third of a second that freeing its modules one by one takes."""
    if all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class _WithoutPandas:
    """A finder of modules by which there is no pandas."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def _take_lists_for_lists() -> None:
    """Lets pyarrow look for pandas, and not find it, before it is given a list.

    It looks once, to tell lists from pandas' arrays, and importing pandas takes a fifth of a second. Where it is asked
    for pandas' objects later, it imports it all the same.
    """
    import pyarrow as pa

    sys.meta_path.insert(0, _WithoutPandas)
    pa.array([0])
    sys.meta_path.remove(_WithoutPandas)


def _log_level() -> int:
    """Returns the level that BIOSCAN_LOG names; INFO if it names none."""
    return logging.getLevelNamesMapping().get(os.environ.get("BIOSCAN_LOG", "").upper(), logging.INFO)


def _exit_at_once(number: int, frame: object) -> None:
    """Ends the process where it stands: everything that it writes survives a kill at any instant."""
    with suppress(OSError):
        os.write(2, b"\nstopped; what was committed is safe; run the same command again\n")
    if (lease := sys.modules.get("bioscan_jax.table.lease")) is not None:  # or the next run would wait until it lapses
        lease.release_all(_RELEASE_SECONDS)
    os._exit(128 + number)


def exit_code_of(command: Command, words: Sequence[str]) -> int:
    """Runs a command and turns its errors into one line on stderr and an exit code; see `bioscan_jax.cli.invoke`."""
    from bioscan_jax.errors import InputError, Interrupted, printable

    try:
        with _memory_errors():
            code = command(words)
        sys.stdout.flush()
    except (InputError, UsageError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Interrupted as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        print("the reader of the output has gone; what was committed is safe", file=sys.stderr)
        os._exit(128 + signal.SIGPIPE)  # an orderly exit would try to write once more
    return code or 0


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns memory that ran out, where no closer handler says what to change, into one line; imports JAX only then."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        from bioscan_jax.devices.memory import is_out_of_memory, out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "pass fewer rows, or take a machine with more memory; bioscan doctor shows what there is"
        raise out_of_memory("running the command", error, advice) from error


def from_flags(function: Callable[..., object], name: str, unprefixed: Sequence[str] = ()) -> Command:
    """Makes the command that calls `function` with the values of its flags.

    Args:
        function: Its parameters become flags, its docstring the help; dataclasses become groups of flags.
        name: What `--help` calls it, such as "embed".
        unprefixed: Parameters that are dataclasses and whose fields are flags without a prefix: `--k`, not
            `--settings.k`.
    """

    def command(words: Sequence[str]) -> None:
        function(**parse(function, words, name, unprefixed))

    return command


def parse(
    function: Callable[..., object], words: Sequence[str], name: str, unprefixed: Sequence[str] = ()
) -> dict[str, Any]:
    """The arguments for `function` that a command line states; see `from_flags`.

    Raises:
        InputError: A dataclass refused its values.
        UsageError: A flag is unknown, missing or of the wrong type.
    """
    import jsonargparse

    from bioscan_jax.errors import InputError

    # Only the help shows the fields' docstrings, and reading them takes a tenth of a second.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=bool({"-h", "--help"} & {*words}))
    description = (function.__doc__ or "").split("\n")[0]
    parser = jsonargparse.ArgumentParser(
        prog=f"bioscan {name}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with these settings, or the name of a shipped one; may be repeated"
    )
    groups = {group: typing.get_type_hints(function)[group] for group in unprefixed}
    parser.add_function_arguments(function, skip=set(groups))
    for group in groups.values():
        parser.add_class_arguments(group)
    for action in parser._actions:
        if isinstance(action.default, bool):  # `--explain` alone means true
            action.nargs, action.const = "?", True
    try:
        given = parser.instantiate(
            parser.parse_args(_with_config_paths(_with_brackets(words, _lists(function, unprefixed))))
        )
    except (jsonargparse.ArgumentError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, InputError):
            raise cause from None
        raise UsageError(f"{_reason(str(error))}; --help lists the flags") from None
    arguments = vars(given)
    arguments.pop("config", None)
    for group, kind in groups.items():
        arguments[group] = kind(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(kind)})
    return arguments


def _reason(text: str) -> str:
    """Returns a message of jsonargparse with our flags' names, and the types without Python's words for them."""
    flag = ".".join(re.findall('Parser key "([^"]+)":', text))
    if missing := re.search("arguments are required: (.*)", text):
        names = ", ".join(f"--{flag}.{name}" if flag else f"--{name}" for name in missing[1].split(", "))
        return f"{names} required" + (f" where another --{flag} flag is given" if flag else "")
    value, kinds = (
        re.search("G(?:iven|ot) value: (.*)", text),
        re.findall(r"Expected an? (.+?)(?:\. Got .*)?$", text, re.M),
    )
    if value and kinds:
        names = (re.sub(r"<class '(.*)'>", r"\1", kind).replace("typing.Literal", "one of ") for kind in kinds)
        return f"--{flag}: expected {' or '.join(n for n in dict.fromkeys(names) if n != 'NoneType')}, got {value[1]}"
    return re.sub('Parser key "([^"]+)":', r"--\1:", text)


def optional_flags(run: Callable[..., object], required: Sequence[str] = ()) -> list[inspect.Parameter]:
    """Returns the parameters of a run's command for another command that reads the same settings; few are required.

    Args:
        run: The run's command. `data` and `model` become empty ones where they are not given, others None.
        required: Parameters that stay as they are.
    """
    empty, found = {"data": {"path": ""}, "model": {"checkpoint": ""}}, []
    for name, flag in inspect.signature(run).parameters.items():
        if name in empty and name not in required:
            flag = flag.replace(default=flag.annotation(**empty[name]))
        elif name not in required and flag.default is inspect.Parameter.empty:
            flag = flag.replace(default=None, annotation=flag.annotation | None)
        found.append(flag.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    return found


def positional(words: Sequence[str], flag: str) -> list[str]:
    """The words with a first one that is no flag turned into the value of `--flag`."""
    first = [f"--{flag}={words[0]}"] if words and not words[0].startswith("--") else list(words[:1])
    return [*first, *words[1:]]


def path_flags(words: Sequence[str], flag: str) -> list[str]:
    """The words with `--flag FILE` as `--flag.path FILE`."""
    return [f"{flag}.path{word.removeprefix(flag)}" if word.split("=")[0] == flag else word for word in words]


def repeated(words: Sequence[str], **flags: str) -> list[str]:
    """The words with flags that may be repeated turned into flags of lists.

    Args:
        words: The command line.
        flags: The parameter for each flag, such as `beside` for `--with`, which is a keyword in Python.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, parameter in flags.items():
        parser.add_argument(f"--{flag}", action="append", dest=parameter, default=[])
    known, others = parser.parse_known_args(words)
    return [*others, *(f"--{name}={json.dumps(values)}" for name, values in vars(known).items() if values)]


def printed(function: Callable[..., object]) -> Callable[..., None]:
    """The function, with its result printed."""

    @functools.wraps(function)
    def show(**flags: object) -> None:
        print(function(**flags))

    return show


def shipped_configs() -> dict[str, Path]:
    """The config files that come with the package, by the name that `--config` takes; not those for `ray up`."""
    package = Path(__file__).parents[1]
    for directory in (package / "configs", package.parent / "configs"):  # in a wheel, in a checkout
        if found := sorted(directory.glob("*.yaml")):
            return {path.stem: path for path in found if not path.stem.startswith("fleet_")}
    return {}


def _with_config_paths(words: Sequence[str]) -> list[str]:
    """Replaces the name of a shipped config after `--config` by its path."""
    shipped, found = shipped_configs(), []
    for word in words:
        flag, equals, value = word.partition("=")
        if found and found[-1] == "--config" and not Path(word).exists():
            word = str(shipped.get(word, word))
        elif flag == "--config" and equals and not Path(value).exists():
            word = f"--config={shipped.get(value, value)}"
        found.append(word)
    return found


def _lists(function: Callable[..., object], unprefixed: Sequence[str]) -> set[str]:
    """Flags that take several values."""
    several = (tuple, list)
    hints = typing.get_type_hints(function)
    flags = {f"--{name}" for name, kind in hints.items() if _is_any(kind, several)}
    groups = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return flags | {
        f"--{field}" if name in unprefixed else f"--{name}.{field}"
        for name, group in groups.items()
        for field, kind in typing.get_type_hints(group).items()
        if _is_any(kind, several)
    }


def _is_any(kind: object, origins: tuple[type, ...]) -> bool:
    """Returns whether a type, or one type of a union, has one of these origins."""
    return typing.get_origin(kind) in origins or any(typing.get_origin(one) in origins for one in typing.get_args(kind))


def _with_brackets(words: Sequence[str], flags: set[str]) -> list[str]:
    """Rewrites `--lora.targets query,value` to `--lora.targets [query,value]`, the form that jsonargparse reads."""
    found: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if found and found[-1] in flags and not word.startswith(("[", "-")):
            word = f"[{word}]"
        elif flag in flags and equals and not value.startswith("["):
            word = f"{flag}=[{value}]"
        found.append(word)
    return found
