"""A pipeline's results in Python, for a notebook or a script: `resgrid.load("examples/digits").results`.

Reads the files in the pipeline's folder: no server, no DVC, no MLflow. What belongs to which cell, and
whether it is current, is `resgrid.run_status`'s answer, as everywhere; `resgrid compare --json` prints
`results`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resgrid.config import Params, load_params
from resgrid.errors import ResgridError
from resgrid.grid import expand, find_cell, flat
from resgrid.run_status import WEIGHTS, Run, find_runs, read_history, trained_run

if TYPE_CHECKING:  # each takes a second or more to import, which only some of the methods need
    import pandas as pd

    from resgrid.predict import Predictor


@dataclass(frozen=True)
class Pipeline:
    """A pipeline's folder, as `resgrid.load` gives it; every call reads the files anew."""

    folder: Path
    params: Params

    @property
    def results(self) -> pd.DataFrame:
        """A row a cell, best first, also of cells that have no result yet.

        `cell`, `architecture`, `optimizer`, `seed`; `status` (completed, diverged, stale, other data, failed
        or missing) and its `cause`; accuracies (0-1) and losses of the last epoch's weights,
        `best_test_accuracy` of any epoch; `train_seconds`, `images_per_second`; `calibration_error` (0-1)
        once `evaluate` has scored the cell; then every number that it was trained with, or would be, such as
        `momentum` or `schedule.factor`; `data_digest`, `code_digest`, `weights_sha256`, and `folder`, where
        its files lie.

        Raises ResgridError: for files that cannot be read.
        """
        import pandas as pd

        from resgrid.report.leaderboard import as_of_now, read_leaderboard

        runs = find_runs(expand(self.params), self.folder)
        try:
            compared = read_leaderboard(self.folder / "reports")
        except ResgridError:  # `evaluate` has not run yet
            compared = pd.DataFrame({"cell": []})
        frame = as_of_now(compared, runs)
        numbers = pd.DataFrame([{"cell": run.cell.id} | _numbers(run) for run in runs])
        own = ["cell", *(name for name in numbers if name not in frame)]
        return frame.merge(numbers[own], on="cell", how="left")

    def history(self, cell: str) -> pd.DataFrame:
        """A row an epoch of a cell's training: `epoch`, `step`, `learning_rate`, losses, accuracies (0-1).

        Raises ResgridError: for a cell that there is not, or that has no result.
        """
        return read_history(self._run(cell).folder / "history.csv")

    def model(self, cell: str) -> Predictor:
        """A cell's trained network with its preprocessing, on the CPU, in eval mode.

        A torch module from RGB images (N, 3, 32, 32) on the 0–1 scale to probabilities (N, classes).
        Raises ResgridError: as `history` does, and for weights that are not those of the cell's record.
        """
        from resgrid.predict import Predictor
        from resgrid.weights import load_model

        return Predictor(*load_model(self._run(cell).folder / WEIGHTS, self.folder))

    def predictions(self, cell: str, split: str = "test") -> pd.DataFrame:
        """A row an image of a split, in the split's order: as a cell classified it when `evaluate` ran.

        `label`, `predicted` (class names), `confidence` (the probability of the latter) and
        `probability.<class>` for each class. `split` is test or validation.
        Raises ResgridError: as `history` does, and where `evaluate` has not scored these weights.
        """
        import pandas as pd
        from scipy.special import softmax

        from resgrid.data.dataset import load_meta, load_split
        from resgrid.evaluation import load_logits

        run = self._run(cell)
        assert run.record is not None
        processed = self.folder / "data/processed"
        logits = load_logits(self.folder / "reports/predictions", cell, split, run.record["weights_sha256"])
        names = pd.Index(load_meta(processed).class_names)
        probabilities = softmax(logits.astype("float64"), axis=1)
        return pd.DataFrame(
            {
                "label": names[load_split(processed, split).labels.numpy()],
                "predicted": names[probabilities.argmax(1)],
                "confidence": probabilities.max(1),
            }
            | {f"probability.{name}": probabilities[:, place] for place, name in enumerate(names)}
        )

    def _run(self, cell: str) -> Run:
        return trained_run(find_cell(self.params, cell), self.folder)


def load(path: str | Path = ".") -> Pipeline:
    """The results of the pipeline in the folder `path`, which has a params.yaml.

    Raises ResgridError: where there is none, and for mistakes in it.
    """
    folder = Path(path).expanduser()
    return Pipeline(folder, load_params(folder / "params.yaml"))


def _numbers(run: Run) -> dict[str, object]:
    record = run.record or {}
    return flat(record.get("numbers", run.cell.numbers)) | {
        "data_digest": record.get("data_digest"),
        "code_digest": record.get("code_digest"),
        "folder": str(run.folder),
    }
