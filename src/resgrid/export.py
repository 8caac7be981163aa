"""Trained weights in the formats of other programs: what `resgrid export` does.

`onnx` and `pt2` are whole programs: RGB images (N, 3, 32, 32) on the 0–1 scale to probabilities (N, classes),
normalisation included. `pt` is the plain state dict, as PyTorch projects ship it, and `safetensors` a weights
file; both want the architecture's code, and images that are normalised.
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
from resgrid.weights import METADATA_KEY, WeightsInfo, save_weights

Format = Literal["onnx", "pt2", "pt", "safetensors"]
TOLERANCE = 1e-4  # of a probability, between two programs that sum in another order
EXAMPLE = (2, 3, 32, 32)  # of one image it would fix the number
ANY_NUMBER = ({0: torch.export.Dim.DYNAMIC},)  # of images


def export(
    model: nn.Module, info: WeightsInfo, form: Format, out: Path, images: NDArray[np.uint8]
) -> float | None:
    """Write `model`, as `load_model` gives it, to `out`, whole or not at all.

    A program is run on `images` (N, 32, 32, 3), and compared with the model in PyTorch. Returns
    the largest difference of a probability, or None for the formats that are weights and no program.
    Raises ResgridError for a difference of more than TOLERANCE, OSError for a file that cannot be written.
    """
    predictor = Predictor(model, info)
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # (N, 3, 32, 32)
    difference = None
    if form == "safetensors":
        save_weights(out, model, info)
        return None
    if form == "onnx":
        content = _onnx(predictor, info)
        difference = _difference(_run_onnx(content, scaled), predictor(scaled), out)
    elif form == "pt2":
        content = _pt2(predictor, info)
        difference = _difference(
            torch.export.load(io.BytesIO(content)).module()(scaled), predictor(scaled), out
        )
    else:
        state = io.BytesIO()
        torch.save(model.state_dict(), state)
        content = state.getvalue()
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


def _difference(found: Tensor, expected: Tensor, out: Path) -> float:
    difference = float((found - expected).abs().max())
    if not difference <= TOLERANCE:  # nor NaN
        raise ResgridError(
            f"{out}: not written, for what was exported differs from the model by {difference:g} on "
            f"{len(found)} images, where {TOLERANCE:g} is allowed. Please report it, with the versions of "
            "torch and onnx."
        )
    return difference
