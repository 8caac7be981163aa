"""Which kind of source stands at a path, by its content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resgrid.config import Resize
from resgrid.data import archives
from resgrid.data.cifar import Cifar, cifar_form
from resgrid.data.dataset import Split, load_meta, load_split
from resgrid.data.sources import ImageFolder, OnImage, Source, raw_path


def open_source(path: Path, resize: Resize, needs: Sequence[str] = ()) -> Source:
    """What stands at `path`, by its content: CIFAR batches or an image folder, in a folder or an archive, the
    folder that `download` made of one, or the processed form.

    Raises ResgridError if it is none of them, or an image folder without a split of `needs`.
    """
    if (path / "meta.json").is_file():
        return Processed(path)
    path = raw_path(path)
    if cifar_form(archives.names(path)):
        return Cifar(path)
    return ImageFolder(path, resize, needs=needs)


class Processed(Source):
    """What `preprocess` made."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.class_names = load_meta(path).class_names

    def load(self, split: str, on_image: OnImage | None = None) -> Split:
        return load_split(self.path, split)
