"""CIFAR-10 and CIFAR-100 as their authors publish them: https://www.cs.toronto.edu/~kriz/cifar.html."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray

from resgrid.data import archives
from resgrid.data.cifar_pickle import load_pickle
from resgrid.data.dataset import SIDE, OnImage, Source, Split
from resgrid.errors import ResgridError


@dataclass(frozen=True)
class _CifarForm:
    """One of the forms in which CIFAR's authors publish it, by the names of its files."""

    train: str  # a regular expression; where several match, in the order of their numbers
    test: str
    meta: str  # with the names of the classes
    labels: str = "labels"  # the key in a pickled batch …
    names: str = "label_names"  # … and in the pickled names
    label_bytes: int = 0  # of an image in a binary batch, the last being the label; 0: a pickled batch


_CIFAR_FORMS = (
    _CifarForm(r"data_batch_\d{1,4}", "test_batch", "batches.meta"),
    _CifarForm("train", "test", "meta", "fine_labels", "fine_label_names"),
    _CifarForm(r"data_batch_\d{1,4}\.bin", "test_batch.bin", "batches.meta.txt", label_bytes=1),
    _CifarForm(r"train\.bin", "test.bin", "fine_label_names.txt", label_bytes=2),
)


def cifar_form(names: Sequence[str]) -> _CifarForm | None:
    """The form whose files are among `names`: two of its three kinds at least."""
    files = {PurePosixPath(name).name for name in names}
    for form in _CIFAR_FORMS:
        trains = any(re.fullmatch(form.train, name) for name in files)
        if trains + (form.test in files) + (form.meta in files) >= 2:
            return form
    return None


class Cifar(Source):
    """CIFAR-10 or, with its fine labels, CIFAR-100, in the Python or the binary version, packed or not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        members = archives.names(path)
        self._form = form = cifar_form(members) or _CIFAR_FORMS[0]
        self.files: dict[str, str] = {}  # data_batch_1 -> cifar-10-batches-py/data_batch_1
        for name in members:
            batch = PurePosixPath(name).name
            if re.fullmatch(form.train, batch) or batch in (form.test, form.meta):
                if batch in self.files:
                    raise ResgridError(f"{path}: {batch} is there twice: {self.files[batch]} and {name}.")
                self.files[batch] = name
        first = form.train.replace(r"\d{1,4}", "1").replace("\\", "")
        wanted = f"{form.meta}, {form.test} and {first}{' and on' * ('1' in first)}"
        for batch in (form.meta, form.test, first):
            if batch not in self.files:
                raise ResgridError(f"{path}: there is no {batch}. This form of CIFAR has {wanted}.")
        ((_, meta),) = archives.contents(path, {self.files[form.meta]})
        names: object
        if form.label_bytes:
            names = meta.decode("utf-8", "replace").split()
        else:
            names = load_pickle(meta, self._origin(form.meta)).get(form.names)
        if not isinstance(names, list) or not all(type(name) is str for name in names) or len(set(names)) < 2:
            raise ResgridError(f"{self._origin(form.meta)}: {form.names} must be two or more names.")
        self.class_names = tuple(names)

    def read(self, split: str, on_image: OnImage | None = None) -> Split:
        batches = [self._form.test]
        if split == "train":
            train = (batch for batch in self.files if re.fullmatch(self._form.train, batch))
            batches = sorted(train, key=lambda batch: [int(number) for number in re.findall(r"\d+", batch)])
        wanted = {self.files[batch]: batch for batch in batches}
        read = {wanted[name]: self._batch(wanted[name], content)
                for name, content in archives.contents(self.path, wanted)}  # fmt: skip
        return Split(
            images=torch.from_numpy(np.concatenate([read[batch][0] for batch in batches])),
            labels=torch.from_numpy(np.concatenate([read[batch][1] for batch in batches])),
        )

    def _batch(self, batch: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images (N, 32, 32, 3) and labels (N,)."""
        origin = self._origin(batch)
        rows, labels = (self._binary if self._form.label_bytes else self._pickled)(origin, content)
        num_classes = len(self.class_names)
        for label in labels:
            if type(label) is not int or not 0 <= label < num_classes:
                given = label if type(label) is int else f"a {type(label).__name__}"
                raise ResgridError(f"{origin}: a label must be 0 to {num_classes - 1}, not {given}.")
        images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # red, green, blue planes -> NHWC
        return np.ascontiguousarray(images), np.array(labels, np.int64)

    def _pickled(self, origin: str, content: bytes) -> tuple[NDArray[np.uint8], list[object]]:
        pickled, key = load_pickle(content, origin), self._form.labels
        rows, labels = pickled.get("data"), pickled.get(key)
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3 * SIDE * SIDE:
            raise ResgridError(f"{origin}: `data` must be an array of uint8 with rows of 3072.")
        if not isinstance(labels, list) or len(labels) != len(rows) or not len(rows):
            raise ResgridError(
                f"{origin}: `{key}` must be a list with a number for each of {len(rows)} images."
            )
        return rows, labels

    def _binary(self, origin: str, content: bytes) -> tuple[NDArray[np.uint8], list[object]]:
        width = self._form.label_bytes + 3 * SIDE * SIDE
        if not content or len(content) % width:
            raise ResgridError(f"{origin}: must have a multiple of {width} bytes, not {len(content):,}.")
        rows = np.frombuffer(content, np.uint8).reshape(-1, width)
        return rows[:, self._form.label_bytes :], rows[:, self._form.label_bytes - 1].tolist()

    def _origin(self, batch: str) -> str:
        return f"{self.path}: {self.files[batch]}"
