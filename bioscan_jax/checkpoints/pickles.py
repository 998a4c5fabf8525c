"""Lists the tensors in a torch pickle without executing it.

A pickle is a program. `pickle.Unpickler` with a restricted `find_class` still lets that program set attributes
of the functions it may name (BUILD), reach the extension registry without `find_class` (EXT1) and allocate
gigabytes of memo (LONG_BINPUT). Here `pickletools.genops` decodes the instructions without executing them, and the
few that occur in a saved state dict are interpreted on plain data: no name in the file becomes a Python object. They
are those of torch's own `torch/_weights_only_unpickler.py`, without what a state dict never contains.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bioscan_jax.errors import InputError, shown

_STORAGE_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
_ORDERED_DICT = "collections.OrderedDict"
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True)
class Storage:
    """A block of elements of one dtype, stored as the archive entry data/KEY."""

    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor as saved by torch: a strided view of a storage, in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Global:
    name: str


def read_views(data: bytes, source: str) -> dict[str, View]:
    """Decodes the pickle of a state dict.

    Args:
        data: The pickle, as stored in the archive's data.pkl.
        source: Its file, for error messages.

    Returns:
        The tensors by name, in the order they were saved. Sizes are not checked against the storages.

    Raises:
        InputError: The pickle contains anything but tensors, is damaged, or is not a flat state dict.
    """
    try:
        top = _interpret(data, source)
    except InputError:
        raise
    except Exception as error:  # damaged bytes can raise any exception in the decoder
        raise InputError(
            f"{source}: its pickle is damaged ({type(error).__name__}); download the file again"
        ) from error
    if not isinstance(top, dict):
        raise InputError(f"{source} holds a {_kind(top)}, not a dict of tensors; save model.state_dict()")
    if not top:
        raise InputError(f"{source} holds no tensors; save model.state_dict() of a whole model")
    for name, value in top.items():
        if not isinstance(name, str):
            raise InputError(f"{source}: {shown(name)} is a number, not the name of a tensor; save model.state_dict()")
        if not isinstance(value, View):
            raise InputError(
                f"{source}: {shown(name)} holds a {_kind(value)}, not a tensor; save the state dict alone, "
                "not a training checkpoint around it"
            )
    return top


def _interpret(data: bytes, source: str) -> object:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, object] = {}
    for opcode, arg, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[opcode.name])
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(_pop_from(stack, marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(_pop_from(stack, len(stack) - int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                items = _pop_from(stack, marks.pop() if opcode.name == "APPENDS" else len(stack) - 1)
                if not isinstance(stack[-1], list):
                    raise _refusal(source, opcode.name)
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = _pop_from(stack, marks.pop() if opcode.name == "SETITEMS" else len(stack) - 2)
                _set_items(stack[-1], items, source)
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_named(str(arg).replace(" ", "."), source))
            case "STACK_GLOBAL":
                stack.append(_named(".".join(_pop_from(stack, len(stack) - 2)), source))
            case "INST":
                _named(str(arg).replace(" ", "."), source)
                raise _refusal(source, "INST")
            case "REDUCE":
                args, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, args, source))
            case "BUILD":
                # The _metadata (module versions) of a state dict, which is ignored.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _refusal(source, "BUILD")
            case "BINPERSID":
                stack.append(_storage(stack.pop(), source))
            case _:
                raise _refusal(source, opcode.name)
    raise EOFError


def _refusal(source: str, what: str) -> InputError:
    return InputError(
        f"{source}: its pickle uses {what} as no saved state dict does; none of it was executed; "
        "use the model's safetensors file"
    )


def _kind(value: object) -> str:
    return "tensor" if isinstance(value, View) else type(value).__name__


def _pop_from(stack: list[Any], start: int) -> list[Any]:
    if not 0 <= start <= len(stack):
        raise IndexError("stack underflow")
    items = stack[start:]
    del stack[start:]
    return items


def _set_items(target: object, items: list[Any], source: str) -> None:
    if not isinstance(target, dict):
        raise _refusal(source, "SETITEMS")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise _refusal(source, f"a key of type {_kind(key)}")
        if key in target:
            raise InputError(f"{source}: {shown(key)} is in its pickle twice; use the model's safetensors file")
        target[key] = value


def _named(name: str, source: str) -> np.dtype | _Global:
    if name in _STORAGE_DTYPES:
        return _STORAGE_DTYPES[name]
    if name in (_ORDERED_DICT, _TENSOR, _PARAMETER):
        return _Global(name)
    raise InputError(
        f"{source}: its pickle imports {shown(name)}, which plain tensors do not need; none of it was executed; "
        "use the model's safetensors file"
    )


def _storage(pid: object, source: str) -> Storage:
    match pid:
        case ("storage", np.dtype() as dtype, str(key), str(), int(numel)) if _are_counts((numel,)):
            return Storage(dtype, key, numel)
    raise _refusal(source, "a persistent id")


def _rebuild(function: object, args: object, source: str) -> object:
    if not isinstance(function, _Global):
        raise _refusal(source, f"REDUCE of a {_kind(function)}")
    match function.name, args:
        case (name, ()) if name == _ORDERED_DICT:
            return {}
        case (name, (View() as view, _, _)) if name == _PARAMETER:
            return view
        case (name, (Storage() as storage, start, tuple(shape), tuple(strides), _, _, *metadata)) if name == _TENSOR:
            # Metadata marks a conjugated or negated view, whose stored bytes are not its values.
            if not any(metadata) and _are_counts((start, *shape, *strides)) and len(shape) == len(strides):
                return View(storage, start, shape, strides)
    raise _refusal(source, f"REDUCE of {function.name}")


def _are_counts(numbers: tuple[Any, ...]) -> bool:
    return all(type(number) is int and number >= 0 for number in numbers)
