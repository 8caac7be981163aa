"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html.

Their pickles are read as data: nothing that a pickle names is imported or called.
"""

from __future__ import annotations

import pickletools
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from resgrid.data import archives
from resgrid.data.dataset import SIDE, Images, OnImage, Source
from resgrid.errors import ResgridError
from resgrid.filetype import reason

ROW = 3 * SIDE * SIDE  # bytes of an image: its red, green and blue plane


@dataclass(frozen=True)
class _CifarForm:
    """One of the forms in which CIFAR's authors publish it, by the names of its files."""

    train: str  # the first one, where its number is 1
    test: str
    meta: str  # with the names of the classes
    labels: str = "labels"  # the key in a pickled batch …
    names: str = "label_names"  # … and in the pickled names
    label_bytes: int = 0  # of an image in a binary batch, the last being the label; 0: a pickled batch

    def split(self, name: str) -> str | None:
        """The split that the file `name` is of."""
        is_train = re.fullmatch(re.escape(self.train).replace("1", r"\d{1,4}"), name)
        return "train" if is_train else "test" if name == self.test else None


_CIFAR_FORMS = (
    _CifarForm("data_batch_1", "test_batch", "batches.meta"),
    _CifarForm("train", "test", "meta", "fine_labels", "fine_label_names"),
    _CifarForm("data_batch_1.bin", "test_batch.bin", "batches.meta.txt", label_bytes=1),
    _CifarForm("train.bin", "test.bin", "fine_label_names.txt", label_bytes=2),
)


def cifar_form(names: Iterable[str]) -> _CifarForm | None:
    """The form whose files are among `names`: two of its three kinds at least."""
    files = {PurePosixPath(name).name for name in names}
    for form in _CIFAR_FORMS:
        if len({form.split(name) for name in files} - {None}) + (form.meta in files) >= 2:
            return form
    return None


class Cifar(Source):
    """CIFAR-10 or, with its fine labels, CIFAR-100, in the Python or the binary version, packed or not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        metas = {form.meta for form in _CIFAR_FORMS}
        members = dict(archives.files(path, lambda name: -1 if PurePosixPath(name).name in metas else 0))
        self._form = form = cifar_form(members) or _CIFAR_FORMS[0]
        self.files: dict[str, str] = {}  # data_batch_1 -> cifar-10-batches-py/data_batch_1
        for name in members:
            batch = PurePosixPath(name).name
            if form.split(batch) or batch == form.meta:
                if batch in self.files:
                    raise ResgridError(f"{path}: {batch} is there twice: {self.files[batch]} and {name}.")
                self.files[batch] = name
        needs = (form.meta, form.test, form.train)
        if missing := [batch for batch in needs if batch not in self.files]:
            raise ResgridError(f"{path}: there is no {missing[0]}. Such a CIFAR has {', '.join(needs)}.")
        meta = members[self.files[form.meta]] or b""
        names: object = meta.decode("utf-8", "replace").split()
        if not form.label_bytes:
            names = load_pickle(meta, self._origin(form.meta)).get(form.names)
        if not isinstance(names, list) or not all(type(name) is str for name in names) or len(set(names)) < 2:
            raise ResgridError(f"{self._origin(form.meta)}: {form.names} must be two or more names.")
        self.class_names = tuple(names)

    def read(self, splits: Sequence[str], on_image: OnImage | None = None) -> Images:
        by_number = sorted(self.files, key=lambda batch: [int(each) for each in re.findall(r"\d+", batch)])
        batches = {each: split for split in splits for each in by_number if self._form.split(each) == split}
        wanted = {self.files[batch]: batch for batch in batches}
        read = {
            wanted[name]: self._batch(wanted[name], content)
            for name, content in archives.contents(self.path, wanted)
        }
        labels = [read[batch][1] for batch in batches]
        of_split = np.repeat(list(batches.values()), [len(each) for each in labels])
        return Images(
            pixels=np.concatenate([read[batch][0] for batch in batches]),
            labels=np.concatenate(labels),
            splits=of_split,
            names=[f"{split} image {i}" for split in splits for i in range(np.sum(of_split == split))],
        )

    def _batch(self, batch: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (N, 32, 32, 3) and labels (N,)."""
        origin, form = self._origin(batch), self._form
        rows: Any
        labels: Any
        if form.label_bytes:
            width = form.label_bytes + ROW
            if not content or len(content) % width:
                raise ResgridError(f"{origin}: must have a multiple of {width} bytes, not {len(content):,}.")
            table = np.frombuffer(content, np.uint8).reshape(-1, width)
            rows, labels = table[:, form.label_bytes :], table[:, form.label_bytes - 1].tolist()
        else:
            pickled = load_pickle(content, origin)
            rows, labels = pickled.get("data"), pickled.get(form.labels)
            if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != ROW:
                raise ResgridError(f"{origin}: `data` must be an array of uint8 with rows of {ROW}.")
        known = range(len(self.class_names))
        if not (
            isinstance(labels, list)
            and len(labels) == len(rows) > 0
            and all(type(label) is int and label in known for label in labels)
        ):
            raise ResgridError(
                f"{origin}: `{form.labels}` must be a list of numbers from 0 to {known[-1]}, one for each of "
                f"{len(rows)} images."
            )
        images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # red, green, blue planes -> NHWC
        return np.ascontiguousarray(images), np.array(labels, np.int64)

    def _origin(self, batch: str) -> str:
        return f"{self.path}: {self.files[batch]}"


# --- pickles ----------------------------------------------------------------------------------------

MAX_OPCODES = 2**20  # CIFAR-100's 50,000 training images take some 200,000
# The values that a batch is made of; `pickletools` gives text of Python 2 as latin-1.
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
           "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_PUT, _GET = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}
# What takes several values off the stack, and how many: None for all above the last mark.
_TAKING = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": None, "SETITEM": 2,
           "SETITEMS": None, "STACK_GLOBAL": 2, "REDUCE": 2, "BUILD": 1}  # fmt: skip
_ARRAY = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # the latter: NumPy 2
_GLOBALS = (*_ARRAY, "numpy.ndarray", "numpy.dtype", "_codecs.encode")


class _Global(str):
    """What a pickle would import, by its name."""


class _Array:
    """A NumPy array of uint8, once its state has come."""

    state: tuple[Any, bool, str] | None = None  # shape, whether in Fortran's order, bytes as latin-1

    def values(self) -> NDArray[np.uint8] | None:
        """A copy of the bytes: only for the one array that a batch needs, as a pickle may name many."""
        if self.state is None:
            return None
        shape, fortran, raw = self.state
        return np.frombuffer(raw.encode("latin-1"), np.uint8).reshape(shape, order="F" if fortran else "C")


_UINT8 = object()  # numpy.dtype("u1")


def load_pickle(content: bytes, origin: str) -> dict[str, Any]:
    """The dictionary that a pickled CIFAR batch holds, its keys as text, of protocol 2 to 4.

    Bytes, and text of Python 2, become latin-1 text. Raises ResgridError, naming `origin`, for all else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, on a damaged name
            value = _interpret(content)
        if type(value) is not dict:
            raise ValueError(f"it holds a {type(value).__name__}, not a dictionary")
        data = value.get("data")
        return value | {"data": data.values()} if isinstance(data, _Array) else value
    except Exception as error:  # a hostile or broken pickle can end in any
        raise ResgridError(
            f"{origin}: this pickle is refused ({reason(error)}). Fetch the original archive: a pickle from "
            "elsewhere may be meant to do harm."
        ) from None


def _interpret(content: bytes) -> Any:
    """What a pickle's opcodes make, without Python's unpickler: it allocates 2 GB for a memo index of 2^27,
    hashes tuples in tuples for ever, and calls what the pickle names.
    """
    stack: list[Any] = []
    marks: list[int] = []  # where on the stack they lie
    memo: dict[int, Any] = {}
    for count, (opcode, given, _) in enumerate(pickletools.genops(content)):
        name, argument = opcode.name, cast(Any, given)
        if count > MAX_OPCODES:
            raise ValueError(f"it has more than {MAX_OPCODES:,} parts")
        if name in _VALUES:
            stack.append(argument.decode("latin-1") if isinstance(argument, bytes) else argument)
        elif name in _PUT:
            memo[len(memo) if argument is None else argument] = stack[-1]
        elif name in _GET:
            stack.append(memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            stack.append(_known(argument.replace(" ", ".")))
        elif name in _TAKING:
            number = _TAKING[name]
            start = marks.pop() if number is None else len(stack) - number
            values = stack[start:]
            del stack[start:]
            _apply(name.rstrip("S123"), stack, values)
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}, which no CIFAR batch needs")
    raise ValueError("it has no end")


def _known(name: str) -> _Global:
    if name not in _GLOBALS:
        raise ValueError(f"it asks for {name[:80]}, which no CIFAR batch needs")
    return _Global(name)


def _apply(operation: str, stack: list[Any], values: list[Any]) -> None:
    """Do what an opcode does with the `values` that it took, and with what lies on the stack below them."""
    match operation, values:
        case "TUPLE", _:
            stack.append(tuple(values))
        case "APPEND", _:
            stack[-1].extend(values)
        case "SETITEM", _:
            for key, value in zip(values[::2], values[1::2], strict=True):
                if type(key) is not str:  # a tuple's hash can take for ever
                    raise ValueError(f"a key is a {type(key).__name__}")
                stack[-1][key] = value
        case "STACK_GLOBAL", [str(module), str(name)]:
            stack.append(_known(f"{module}.{name}"))
        case "REDUCE", ["_codecs.encode", (str(text), "latin1")]:  # bytes of Python 3 in protocol 2
            stack.append(text)
        case "REDUCE", ["numpy.dtype", ("u1" | "|u1", *_)]:
            stack.append(_UINT8)
        case "REDUCE", [_Global() as function, _] if function in _ARRAY:
            stack.append(_Array())
        case "BUILD", [(1, tuple(shape), dtype, bool(fortran), str(raw))] if dtype is _UINT8:
            stack[-1].state = (shape, fortran, raw)
        case "BUILD", _ if stack[-1] is _UINT8:
            pass
        case _:
            raise ValueError(f"it uses {operation} as no CIFAR batch does")
