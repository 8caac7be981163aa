"""Ensembles of trained cells: their mean of probabilities.

Members are decided without a look at a test image: the seeds of a cell, the architectures with one optimizer,
and a selection on the validation split (Caruana et al. 2004, Ensemble Selection from Libraries of Models).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn

from resgrid.config import load_params
from resgrid.errors import ResgridError, suggest
from resgrid.evaluation import Result, load_logits
from resgrid.grid import find_cell
from resgrid.predict import Predictor
from resgrid.report.statistics import calibration_error
from resgrid.run_status import WEIGHTS, trained_run
from resgrid.weights import WeightsInfo, load_model

PREFIX = "ensemble-"
FILE = Path("reports/ensembles.json")
MAX_MEMBERS = 50  # of a selection, repetitions counted

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ensemble:
    """Cells whose probabilities are averaged, and what their mean says of the test split."""

    name: str
    over: str  # what its members have in common
    members: dict[str, int]  # cell: how often it counts
    accuracy: float  # 0-1
    num_correct: int
    loss: float  # mean cross-entropy
    calibration_error: float  # 0-1, of the mean's confidence
    member_accuracy: float  # the mean over members
    disagreement: (
        float  # share of images (0-1) of which two members name different classes, the mean over pairs
    )


def mean_probabilities(logits: Sequence[NDArray[np.float32]], counts: Sequence[int]) -> Floats:
    """The weighted mean of softmax(logits), each (N, classes), in float64: (N, classes)."""
    pairs = zip(logits, counts, strict=True)
    total = sum(count * softmax(each.astype(np.float64), axis=1) for each, count in pairs)
    mean: Floats = total / sum(counts)
    return mean


def cross_entropy(true: Floats) -> float:
    """The mean of -log of the true classes' probabilities (N,); as in scikit-learn 0 counts as 2.2e-16."""
    return float(-np.log(np.maximum(true, np.finfo(np.float64).eps)).mean())


def select(logits: Mapping[str, NDArray[np.float32]], labels: NDArray[np.integer[Any]]) -> dict[str, int]:
    """Which cells to average, and how often each, by greedy selection with replacement.

    `logits` are those of the validation split, (N, classes) a cell. Each step adds the cell with which the
    mean of probabilities has the lowest cross-entropy, up to MAX_MEMBERS; the best size of all is returned.
    """
    images = np.arange(len(labels))
    true = {cell: mean_probabilities([each], [1])[images, labels] for cell, each in logits.items()}  # (N,)
    total, path, losses = np.zeros(len(labels)), list[str](), list[float]()
    for size in range(1, MAX_MEMBERS + 1):
        tried = {cell: cross_entropy((total + each) / size) for cell, each in true.items()}
        path.append(min(tried, key=lambda cell: tried[cell]))
        losses.append(tried[path[-1]])
        total = total + true[path[-1]]
    best = next(place for place, loss in enumerate(losses) if loss <= min(losses) + 1e-12)
    return dict(Counter(path[: best + 1]).most_common())


def assemble(
    results: Iterable[Result], predictions: Path, labels: Mapping[str, NDArray[np.integer[Any]]]
) -> tuple[list[Ensemble], list[str]]:
    """The ensembles of the completed cells among `results`, and why there are no others.

    `predictions` is the folder of their logits, `labels` those of the test and, if there is one, the
    validation split.
    """
    completed = [result.cell for result in results if result.status == "completed"]
    grid = [cell for cell in completed if cell.study is None]
    by_seed: dict[tuple[str, str], list[str]] = {}
    by_architecture: dict[tuple[str, int], list[str]] = {}
    for cell in grid:
        by_seed.setdefault((cell.architecture, cell.optimizer.name), []).append(cell.id)
        by_architecture.setdefault((cell.optimizer.name, cell.seed), []).append(cell.id)
    plans: dict[str, tuple[str, dict[str, int]]] = {}
    for (architecture, optimizer), members in by_seed.items():
        if len(members) > 1:
            name = f"{architecture}-{optimizer}"
            plans[PREFIX + name] = (f"{len(members)} seeds of {name}", dict.fromkeys(members, 1))
    why_not = [] if plans else ["None over seeds: no cell has two completed seeds. Add seeds to grid.seeds."]
    over_seeds = len(plans)
    for (optimizer, seed), members in by_architecture.items():
        if len(members) > 1 and PREFIX + optimizer not in plans:
            over = f"{len(members)} architectures with {optimizer}, seed {seed}"
            plans[PREFIX + optimizer] = (over, dict.fromkeys(members, 1))
    if len(plans) == over_seeds:
        why_not.append("None over architectures: no optimizer has two completed ones of one seed.")
    if "validation" not in labels:
        why_not.append(
            "None by selection: there is no validation split (preprocess.validation_fraction), and the test "
            "split, by which an ensemble is judged, must not decide its members."
        )
    elif len(completed) < 2:
        why_not.append("None by selection: there are no two completed cells.")
    else:
        held = {cell.id: load_logits(predictions, cell.id, "validation") for cell in completed}
        plans[f"{PREFIX}selected"] = ("selected on the validation split", select(held, labels["validation"]))
    ensembles = [
        _measured(name, over, members, predictions, labels["test"]) for name, (over, members) in plans.items()
    ]
    return ensembles, why_not


def _measured(
    name: str, over: str, members: dict[str, int], predictions: Path, labels: NDArray[np.integer[Any]]
) -> Ensemble:
    logits = [load_logits(predictions, cell, "test") for cell in members]
    probabilities = mean_probabilities(logits, list(members.values()))
    correct = probabilities.argmax(1) == labels
    classes = [each.argmax(1) for each in logits]
    apart = [float((one != other).mean()) for one, other in combinations(classes, 2)]
    return Ensemble(
        name=name,
        over=over,
        members=members,
        accuracy=float(correct.mean()),
        num_correct=int(correct.sum()),
        loss=cross_entropy(probabilities[np.arange(len(labels)), labels]),
        calibration_error=calibration_error(probabilities.max(1), correct),
        member_accuracy=float(np.mean([(each == labels).mean() for each in classes])),
        disagreement=float(np.mean(apart)) if apart else 0.0,
    )


# --- an ensemble as a model -------------------------------------------------------------------------


def write_ensembles(ensembles: Iterable[Ensemble], results: Iterable[Result], pipeline: Path) -> None:
    """`reports/ensembles.json`: of each its figures, and the digests of its members' weights."""
    weights = {result.cell.id: result.metrics["weights_sha256"] for result in results if result.metrics}
    content = {
        each.name: asdict(each) | {"weights_sha256": {cell: weights[cell] for cell in each.members}}
        for each in ensembles
    }
    (pipeline / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_ensemble(name: str) -> bool:
    """Whether `name` is that of an ensemble, and not of a study that is called so."""
    return name.startswith(PREFIX) and not (Path(name).is_file() or name in load_params().studies)


def load_ensemble(name: str, pipeline: Path = Path()) -> tuple[nn.Module, WeightsInfo]:
    """An ensemble that `evaluate` found, as a model whose images come on the 0–1 scale.

    Raises ResgridError: where there is no such ensemble, or a member has other weights by now.
    """
    try:
        known = json.loads((pipeline / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResgridError(
            f"{pipeline / FILE}: cannot be read ({error}). `dvc repro -s evaluate` makes it."
        ) from None
    if name not in known:
        raise ResgridError(f"there is no ensemble {name!r}{suggest(name, known)} The report lists them.")
    params, members = load_params(pipeline / "params.yaml"), []
    for cell in known[name]["members"]:
        run = trained_run(find_cell(params, cell), pipeline)
        assert run.record is not None
        if run.record["weights_sha256"] != known[name]["weights_sha256"][cell]:
            raise ResgridError(f"{name}: {cell} was trained again since. `dvc repro -s evaluate` renews it.")
        model, info = load_model(run.folder / WEIGHTS, pipeline)
        members.append(Predictor(model, info))
    mean = Mean(members, list(known[name]["members"].values()))
    return mean.eval(), info.model_copy(
        update={"architecture": name, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    )


class Mean(nn.Module):
    """RGB images (N, 3, 32, 32) on the 0–1 scale to logarithms of mean probabilities, (N, classes)."""

    def __init__(self, members: Sequence[Predictor], counts: Sequence[int]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.shares = [count / sum(counts) for count in counts]

    def forward(self, images: Tensor) -> Tensor:
        pairs = zip(self.members, self.shares, strict=True)
        return torch.log(torch.stack([share * member(images) for member, share in pairs]).sum(0))
