"""The model registry: the winners among the current cells, under names that stay.

A pipeline has one registered model, called as it is, and one an architecture: `digits`, `digits+resnet20` (no
name of a pipeline has a plus sign).
Each version is a cell that was the best when `sync` looked; the alias `champion` is on the one that still is,
so that `models:/digits@champion` works in whatever reads MLflow's models.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resgrid.config import load_params
from resgrid.grid import find_cell
from resgrid.run_status import WEIGHTS, refuse_diverged, trained_run
from resgrid.tracking.store import Store, fetch, fetched_cell, open_store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION = "champion"

log = logging.getLogger(__name__)


def promote_champions(store: Store, runs: Sequence[Run], data_digest: str | None) -> dict[str, str | None]:
    """Put the alias of every registered model on the best of `runs`, which are those of the current cells.

    Compared are completed cells on the data of `data_digest` or, where that is None since they are not here,
    on those of the latest run: by validation accuracy or, where there is no validation split, by the test
    accuracy of the last epoch; never by the best epoch. Among equals a champion stays, then the lower loss
    wins. Where there is none to compare, the alias goes. Returns, by registered model, the cells to which an
    alias moved, and None where it went.
    """
    candidates: dict[str, list[Run]] = {}
    if data_digest is None and runs:
        data_digest = max(runs, key=lambda run: run.info.start_time).data.tags["data_digest"]
    for run in runs:
        tags = run.data.tags
        if tags.get("status") == "completed" and tags["data_digest"] == data_digest:
            for name in (store.name, f"{store.name}+{run.data.params['architecture']}"):
                candidates.setdefault(name, []).append(run)
    ours = store.client.search_registered_models(f"name LIKE '{store.name}%'", max_results=1000)
    models = {model.name: model for model in ours}
    moved: dict[str, str | None] = {}
    for name, compared in candidates.items():
        if cell := _promote(store, name, models.get(name), compared):
            moved[name] = cell
    for name in models.keys() - candidates.keys():
        if models[name].tags.get("pipeline") == store.name and CHAMPION in models[name].aliases:
            store.client.delete_registered_model_alias(name, CHAMPION)
            moved[name] = None
    return moved


def _promote(store: Store, name: str, model: RegisteredModel | None, runs: list[Run]) -> str | None:
    """The cell that is the champion from now on, if it was not before; `model` is made where it is None."""
    client = store.client
    if model is None:
        what = "the pipeline" if name == store.name else name.removeprefix(f"{store.name}+")
        model = client.create_registered_model(
            name,
            {"pipeline": store.name},
            f"The best current cell of {what} has the alias `{CHAMPION}`: by validation accuracy or, without "
            "a validation split, by the test accuracy of the last epoch. Input: RGB images (N, 3, 32, 32) on "
            f"the 0–1 scale; output: probabilities. `resgrid predict --model models:/{name}@{CHAMPION} "
            "PICTURE` does the rest.",
        )
    # By the run: one of another experiment, as before a rebuild, has its files elsewhere.
    found = client.search_model_versions(f"name = '{name}'", max_results=1000)
    versions = {each.run_id: str(each.version) for each in found}
    weights = {str(each.version): each.tags.get("weights_sha256") for each in found}
    reigning = str(model.aliases.get(CHAMPION))
    split = selection_split(runs)

    def strength(run: Run) -> tuple[float, bool, float, str]:
        metrics, tags = run.data.metrics, run.data.tags
        reigns = weights.get(reigning) == tags["weights_sha256"]  # also if trained again without a change
        return metrics[f"{split}_accuracy"], reigns, -metrics[f"{split}_loss"], tags["cell"]

    best = max(runs, key=strength)
    version = versions.get(best.info.run_id)
    if version == reigning:
        return None
    client.set_registered_model_alias(name, CHAMPION, version or _register(store, name, best, split))
    return str(best.data.tags["cell"])


def selection_split(runs: list[Run]) -> str:
    """The split by which `runs`, all on the same data, are ranked: `validation` or `test`."""
    return "validation" if all("validation_accuracy" in run.data.metrics for run in runs) else "test"


def _register(store: Store, name: str, run: Run, split: str) -> str:
    """Make a version of the model that the run has logged, with the lineage as its tags; its number."""
    tags, metrics = run.data.tags, run.data.metrics
    accuracy, epoch = metrics[f"{split}_accuracy"], run.data.params["epochs"]
    from_tags = ("cell", "data_digest", "git_commit", "git_dirty", "weights_sha256")
    lineage = {key: tags[key] for key in from_tags if key in tags}
    lineage |= {key: run.data.params[key] for key in ("architecture", "optimizer", "seed")}
    lineage |= {"chosen_by": f"{split} accuracy", "accuracy": f"{accuracy:.4f}"}
    assert run.outputs is not None, "a complete run has its model"
    logged = store.client.get_logged_model(run.outputs.model_outputs[0].model_id)
    version = store.client.create_model_version(
        name,
        logged.artifact_location,  # `models:/…` would be looked up in the global store, whichever that is
        run.info.run_id,
        lineage,
        description=f"{tags['cell']}: {split} accuracy {accuracy:.2%} after epoch {epoch}.",
        model_id=logged.model_id,
    )
    return str(version.version)


def find_weights(model: str, runs: Path) -> tuple[Path, str]:
    """The weights file meant by `champion`, a file's path, a `models:/` or `runs:/` URI, or a cell's id; and
    what to call it, which names the cell.

    Of a cell it is the one in the folder `runs`, checked against its record; one that is not the cell's as it
    is now is used all the same, with a warning. Raises ResgridError if there is no such thing.
    """
    if model == CHAMPION:
        name = load_params().name
        open_store(name)  # raises where the name is another pipeline's
        uri = f"models:/{name}@{CHAMPION}"
        path = fetch(uri, f"the champion, {uri},", "`resgrid sync` names one as soon as a cell is trained.")
        return path, f"{model} ({fetched_cell(path)})"
    if model.startswith(("models:/", "runs:/")):
        path = fetch(model, f"--model {model}")
        return path, f"{model} ({fetched_cell(path)})"
    path = Path(model)
    if path.is_file() or path.suffix == ".safetensors":
        return path, model
    run = trained_run(find_cell(load_params(), model), runs.parent)
    refuse_diverged(run)
    if not run.is_current:
        log.warning("%s is %s: %s", model, run.status, run.reason)
    return run.folder / WEIGHTS, model
