"""Pickled CIFAR batches read as data: nothing that a pickle names is imported or called."""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from resgrid.errors import ResgridError
from resgrid.filetype import reason

MAX_OPCODES = 2**20  # CIFAR-100's 50,000 training images take some 200,000
# What batches are made of: dictionaries, lists, tuples, text, bytes, integers, and the calls for an array.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT",
    "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "GLOBAL",
    "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip


def load_pickle(content: bytes, origin: str) -> dict[str, Any]:
    """The dictionary that a pickled CIFAR batch holds, its keys as text, of protocol 2 to 4.

    Bytes, and text of Python 2, become latin-1 text. Raises ResgridError, naming `origin`, for all else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, on a damaged name
            _inspect(content)
        value = _Unpickler(io.BytesIO(content), encoding="latin-1").load()
        if type(value) is not dict:
            raise ValueError(f"it holds a {type(value).__name__}, not a dictionary")
        if strange := [key for key in value if type(key) not in (str, bytes)]:
            raise ValueError(f"a key is a {type(strange[0]).__name__}")
        return {_native(key): _native(item) for key, item in value.items()}
    except Exception as error:  # a hostile or broken pickle can end in any
        raise ResgridError(
            f"{origin}: this pickle is refused ({reason(error)}). Fetch the original archive: a pickle from "
            "elsewhere may be meant to do harm."
        ) from None


def _inspect(content: bytes) -> None:
    """Raises ValueError for what would cost time or memory to unpickle, without doing it.

    A memo index of 2^27 alone takes 2 GB, and the hash of tuples in tuples can take for ever, or overflow the
    C stack. So the kinds of what lies on the stack are followed: no key may be a tuple.
    """
    stack: list[object] = []
    marks: list[int] = []  # where on the stack they lie
    memo: dict[object, object] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name, taken = opcode.name, len(opcode.stack_before)
        if name not in _OPCODES:
            raise ValueError(f"it uses {name}, which no CIFAR batch needs")
        if count > MAX_OPCODES or ("PUT" in name and cast(int, argument) > MAX_OPCODES):
            raise ValueError(f"it has more than {MAX_OPCODES:,} parts")
        if "PUT" in name or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        elif name == "BUILD":  # what is built stays what it was
            stack.pop()
        else:
            if name == "MARK":
                marks.append(len(stack))
            many = pickletools.stackslice in opcode.stack_before  # all above the last mark
            first = marks.pop() - taken + 2 if many else len(stack) - taken
            if name.startswith("SETITEM") and pickletools.pytuple in stack[first + 1 + many :: 2]:
                raise ValueError("it has a tuple as a key")
            del stack[first:]
            stack += opcode.stack_after


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}"
        if asked not in _STAND_INS:
            raise ValueError(f"it asks for {asked[:80]}, which no CIFAR batch needs")
        return _STAND_INS[asked]


class _Array:
    """What holds a NumPy array of uint8 once its state has come."""

    values: NDArray[np.uint8] | None = None

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        match state:
            case (1, tuple(shape), _Dtype(), bool() as fortran, str() | bytes() as raw):
                data = raw.encode("latin-1") if isinstance(raw, str) else raw
                self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
            case _:
                raise ValueError("it sets the state of an array as no CIFAR batch does")


class _Dtype:
    """numpy.dtype("u1"): there is no other in a CIFAR batch."""

    def __init__(self, name: object, *arguments: object) -> None:
        if name not in ("u1", "|u1"):
            raise ValueError("it has an array of another type than uint8")

    def __setstate__(self, state: object) -> None:
        pass


class _Encode:
    """`_codecs.encode` of protocol 2, where it stands for bytes: their text in latin-1."""

    def __new__(cls, text: object, codec: object) -> Any:
        if type(text) is not str or codec != "latin1":
            raise ValueError("it encodes text as no CIFAR batch does")
        return text

    def __setstate__(self, state: object) -> None:
        pass


_STAND_INS: dict[str, type] = {  # classes alone: BUILD could change what a function does
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,  # NumPy 2
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Encode,
}


def _native(value: Any) -> Any:
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, list):
        return [item.decode("latin-1") if isinstance(item, bytes) else item for item in value]
    return value.decode("latin-1") if isinstance(value, bytes) else value
