"""Pickled CIFAR batches read as data: nothing that a pickle names is imported or called."""

from __future__ import annotations

import pickletools
import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from resgrid.data.archives import reason
from resgrid.errors import ResgridError


class _Global(str):
    """A name that a pickle asks for. It is never looked up, let alone called."""


class _Array:
    """What becomes a NumPy array once its state has come."""

    def __init__(self) -> None:
        self.values: NDArray[np.uint8] | None = None


class _Dtype:
    """numpy.dtype("u1"): there is no other in a CIFAR batch."""


_RECONSTRUCT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # NumPy 1 and 2
_ALLOWED = (*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype", "_codecs.encode")
_LITERALS = (
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
)  # fmt: skip
_MARK = object()


def load_pickle(content: bytes, origin: str) -> dict[str, Any]:
    """The dictionary that a pickled CIFAR batch holds, its keys as text, of protocol 2 to 4.

    This is no unpickler with a list of exceptions but a reader of the few opcodes that a batch is made of
    (dictionaries, lists, tuples, text, bytes, integers, arrays of uint8): there is nothing in it that could
    import or call what the file names. Text of Python 2, and bytes, become latin-1 text.

    Raises ResgridError, naming `origin` and what the pickle asks for, for everything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, on a damaged name
            value = _Reader(origin).read(content)
        if type(value) is dict:
            return {key: _plain(item) for key, item in value.items()}
    except ResgridError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ResgridError(
            f"{origin}: a cut or damaged pickle ({reason(error)}). Fetch the archive again."
        ) from None
    raise ResgridError(f"{origin}: not a CIFAR batch: it holds a {type(value).__name__}, not a dictionary.")


class _Reader:
    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def read(self, content: bytes) -> Any:
        stack, memo = self._stack, self._memo
        argument: Any
        for opcode, argument, _ in pickletools.genops(content):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    stack.append(_MARK)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case name if name in _LITERALS:
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(self._since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(self._pop(int(opcode.name[-1]))))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "APPEND" | "APPENDS":
                    items = self._since_mark() if opcode.name == "APPENDS" else self._pop(1)
                    _as(list, stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = self._since_mark() if opcode.name == "SETITEMS" else self._pop(2)
                    # text alone: the hash of tuples within tuples can take for ever
                    keys = [_text(key) for key in items[::2]]
                    _as(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
                case "GLOBAL":
                    stack.append(self._global(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    stack.append(self._global(*self._pop(2)))
                case "REDUCE":
                    stack.append(self._reduce(*self._pop(2)))
                case "BUILD":
                    (state,) = self._pop(1)
                    self._build(stack[-1], state)
                case other:
                    raise ResgridError(
                        f"{self._origin}: refused: the pickle uses {other}, which no CIFAR batch needs. Use "
                        "the original archive, or write the batches again with pickle protocol 2."
                    )
        raise ValueError("no end")

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _since_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:  # IndexError below the bottom
            position -= 1
        items = self._stack[position + 1 :]
        del self._stack[position:]
        return items

    def _global(self, module: str, name: str) -> _Global:
        asked = f"{_as(str, module)}.{_as(str, name)}"[:80]
        if asked not in _ALLOWED:
            raise ResgridError(
                f"{self._origin}: refused: the pickle asks for {asked}, which no CIFAR batch needs. It may "
                "be meant to do harm: use an archive that you trust."
            )
        return _Global(asked)

    def _reduce(self, function: Any, arguments: Any) -> Any:
        """The three calls of a batch, done here: what they name is not called."""
        match function, arguments:
            case _Global("_codecs.encode"), (str() as text, "latin1"):
                return text.encode("latin-1")
            case _Global("numpy.dtype"), ("u1" | "|u1", *_):
                return _Dtype()
            case _Global(name), (_Global("numpy.ndarray"), (0,), _) if name in _RECONSTRUCT:
                return _Array()
        asked = function if isinstance(function, _Global) else f"a {type(function).__name__}"
        raise ResgridError(
            f"{self._origin}: refused: the pickle calls {asked} as no CIFAR batch does (its arrays are "
            "uint8, its text latin-1)."
        )

    def _build(self, thing: Any, state: Any) -> None:
        match thing, state:
            case _Dtype(), tuple():
                return
            case _Array(), (1, tuple(shape), _Dtype(), bool() as fortran, str() | bytes() as raw):
                data = raw.encode("latin-1") if isinstance(raw, str) else raw
                thing.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
                return
        raise ResgridError(f"{self._origin}: refused: the pickle sets a state that no CIFAR batch has.")


def _as(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {kind.__name__} was expected")
    return value


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else cast(str, _as(str, value))


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, list):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    return _text(value) if isinstance(value, bytes) else value
