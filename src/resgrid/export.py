"""Trained models for other programs: what `resgrid export` does.

What it writes is a whole program: RGB images (N, 3, 32, 32) on the 0–1 scale to probabilities (N, classes),
normalisation included. Weights alone are in the cell's weights file, which safetensors reads.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resgrid.data.dataset import SIDE, load_split
from resgrid.errors import ResgridError
from resgrid.predict import Predictor
from resgrid.project import write_whole
from resgrid.weights import METADATA_KEY, WeightsInfo

TOLERANCE = 1e-4  # of a probability, between two programs that sum in another order
EXAMPLE = (2, 3, 32, 32)  # of one image it would fix the number
ANY_NUMBER = ({0: torch.export.Dim.DYNAMIC},)  # of images


def export(
    model: nn.Module, info: WeightsInfo, form: Literal["onnx", "pt2"], out: Path, images: NDArray[np.uint8]
) -> float:
    """Write `model`, as `load_model` gives it, to `out`, whole or not at all.

    It is run on `images` (N, 32, 32, 3), and compared with the model in PyTorch; returns the largest
    difference of a probability. Raises ResgridError for one of more than TOLERANCE, OSError for a file that
    cannot be written.
    """
    predictor = Predictor(model, info)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # (N, 3, 32, 32)
    if form == "onnx":
        content = _onnx(predictor, info)
        probabilities = _run_onnx(content, scaled)
    else:
        content = _pt2(predictor, info)
        probabilities = torch.export.load(io.BytesIO(content)).module()(scaled)
    difference = float((probabilities - predictor(scaled)).abs().max())
    if not difference <= TOLERANCE:  # nor NaN
        raise ResgridError(
            f"{out}: not written, for what was exported differs from the model by {difference:g} on "
            f"{len(images)} images, where {TOLERANCE:g} is allowed. Please report it, with the versions of "
            "torch and onnx."
        )
    write_whole(out, content)
    return difference


def images_to_compare(processed: Path, number: int = 64) -> tuple[NDArray[np.uint8], str]:
    """The first test images in `processed`, or noise where there are none, and what they are."""
    if (processed / "meta.json").is_file():
        return load_split(processed, "test").images[:number].numpy(), "test images"
    noise = np.random.default_rng(0).integers(0, 256, (number, SIDE, SIDE, 3), np.uint8)
    return noise, "images of noise, since there is no data/processed here,"


def _onnx(predictor: Predictor, info: WeightsInfo) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts
        program = torch.onnx.export(
            predictor,
            (torch.zeros(EXAMPLE),),
            dynamo=True,
            dynamic_shapes=ANY_NUMBER,
            input_names=["images"],
            output_names=["probabilities"],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props[METADATA_KEY] = info.model_dump_json()
    content: bytes = program.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes, images: Tensor) -> Tensor:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read at the import; the function that does it comes too late
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    [probabilities] = session.run(["probabilities"], {"images": images.numpy()})
    return torch.from_numpy(probabilities)


def _pt2(predictor: Predictor, info: WeightsInfo) -> bytes:
    program = torch.export.export(predictor, (torch.zeros(EXAMPLE),), dynamic_shapes=ANY_NUMBER)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": info.model_dump_json()})
    return file.getvalue()
