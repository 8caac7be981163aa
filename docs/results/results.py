"""From the runs of the small-budget pipelines to every table and figure of docs/results.md.

    python docs/results/results.py collect    # examples/budget*/runs → runs.csv
    python docs/results/results.py            # runs.csv → the tables in docs/results.md, and the figures

Intervals are of 95 %: of one accuracy over test images by the binomial's normal form, of a mean of paired
differences by Student's t.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from scipy.stats import t as student
from tabulate import tabulate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs/results.md"
NUM_TEST = 10_000
THIN = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
WIDE = ["resnet10", "resnet18", "resnet26"]
OPTIMIZERS = ["sgd", "adam", "rmsprop", "adagrad"]
COLOURS = dict(zip(OPTIMIZERS, ("#4477aa", "#ee6677", "#228833", "#aa3377"), strict=True))
COLUMNS = [
    "pipeline", "cell", "study", "architecture", "optimizer", "learning_rate", "dropout", "seed",
    "batch_size",
    "epochs", "steps", "status", "train_loss", "train_accuracy", "validation_accuracy", "test_loss",
    "test_accuracy", "num_parameters", "train_seconds", "images_per_second", "threads", "device_name",
    "precision", "torch", "python", "collected_at", "data_digest", "cell_digest", "weights_sha256",
]  # fmt: skip


def collect() -> None:
    """A row of runs.csv for each finished cell of the pipelines, as it lies in their folders."""
    from resgrid.commit import git_commit
    from resgrid.config import load_params
    from resgrid.grid import expand

    rows = []
    for folder in sorted((ROOT / "examples").glob("budget*")):
        for cell in expand(load_params(folder / "params.yaml")):
            run = folder / "runs" / cell.id
            if not (run / "metrics.json").is_file():
                print(f"{folder.name}: {cell.id} has no result yet", file=sys.stderr)
                continue
            row = json.loads((run / "metrics.json").read_text()) | json.loads(
                (run / "timing.json").read_text()
            )
            if row["cell_digest"] != cell.digest:
                print(f"{folder.name}: {cell.id} was trained with other params", file=sys.stderr)
                continue
            dropout = (
                cell.recipe.dropout if isinstance(cell.recipe.dropout, float) else cell.recipe.dropout[0]
            )
            rows.append(row | {"pipeline": folder.name, "dropout": dropout, "collected_at": git_commit()[0]})
    pd.DataFrame(rows)[COLUMNS].to_csv(HERE / "runs.csv", index=False, lineterminator="\n")
    print(f"{len(rows)} runs in {HERE / 'runs.csv'}")


# --- tables -----------------------------------------------------------------------------------------


def percent(accuracy: float) -> str:
    """`48.31 ± 0.98`: with the interval over test images."""
    return f"{100 * accuracy:.2f} ± {196 * np.sqrt(accuracy * (1 - accuracy) / NUM_TEST):.2f}"


def paired(differences: pd.Series[float]) -> str:
    """`+1.20 (+0.40 to +2.00)` in points: the mean, and Student's interval of it."""
    mean, n = 100 * differences.mean(), len(differences)
    half = 100 * differences.std() / np.sqrt(n) * student.ppf(0.975, n - 1)
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def markdown(frame: pd.DataFrame) -> str:
    rows = frame.to_numpy().tolist()
    align = ["left"] + ["right"] * (len(frame.columns) - 1)
    return tabulate(rows, list(frame.columns), "pipe", colalign=align, disable_numparse=True)


def table_grid(runs: pd.DataFrame) -> str:
    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    cells = grid.set_index(["architecture", "optimizer"])["test_accuracy"]
    rows = []
    for architecture in [*THIN, *WIDE, "vgg16"]:
        texts = []
        best = cells.get(architecture, pd.Series(dtype=float)).max()
        for optimizer in OPTIMIZERS:
            accuracy = cells.get((architecture, optimizer))
            text = "" if accuracy is None else percent(accuracy)
            texts.append(f"**{text}**" if accuracy == best else text)
        rows.append([architecture, *texts])
    return markdown(pd.DataFrame(rows, columns=["architecture", *OPTIMIZERS]))


def table_seeds(runs: pd.DataFrame) -> str:
    replicates = runs[runs["pipeline"] == "budget-seeds"]
    rows = []
    for optimizer in OPTIMIZERS:
        of_seed = replicates[replicates["optimizer"] == optimizer].sort_values("seed")["test_accuracy"] * 100
        spread = f"{of_seed.mean():.2f} ± {of_seed.std():.2f}"
        rows.append([optimizer, spread, *(f"{value:.2f}" for value in of_seed)])
    return markdown(
        pd.DataFrame(rows, columns=["optimizer", "mean ± deviation", "seed 0", "seed 1", "seed 2"])
    )


def table_optimizers(runs: pd.DataFrame) -> str:
    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    wide = grid.pivot(index="architecture", columns="optimizer", values="test_accuracy")
    rows = []
    for i, first in enumerate(OPTIMIZERS):
        for second in OPTIMIZERS[i + 1 :]:
            difference = (wide[first] - wide[second]).dropna()
            ahead = f"{int((difference > 0).sum())} of {len(difference)}"
            rows.append([f"{first} − {second}", paired(difference), ahead])
    return markdown(pd.DataFrame(rows, columns=["", "points, mean over architectures", "first is ahead in"]))


def table_depths(runs: pd.DataFrame) -> str:
    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    wide = grid.pivot(index="optimizer", columns="architecture", values="test_accuracy")
    pairs = [*zip(THIN[1:], THIN, strict=False), *zip(WIDE[1:], WIDE, strict=False)]
    rows = [
        [f"{deep} − {shallow}", paired(wide[deep] - wide[shallow])]
        + [f"{100 * (wide[deep] - wide[shallow])[optimizer]:+.2f}" for optimizer in OPTIMIZERS]
        for deep, shallow in pairs
    ]
    return markdown(pd.DataFrame(rows, columns=["", "points, mean over optimizers", *OPTIMIZERS]))


def table_rates(runs: pd.DataFrame) -> str:
    tried = runs[runs["pipeline"] == "budget-rates"]
    rows = []
    for architecture in ("resnet20", "resnet10", "vgg16"):
        for optimizer in OPTIMIZERS:
            some = tried[(tried["architecture"] == architecture) & (tried["optimizer"] == optimizer)]
            some = some.sort_values("learning_rate")
            best = some["validation_accuracy"].max()
            texts = [
                f"**{rate:g}: {100 * accuracy:.2f}**"
                if accuracy == best
                else f"{rate:g}: {100 * accuracy:.2f}"
                for rate, accuracy in zip(some["learning_rate"], some["validation_accuracy"], strict=True)
            ]
            rows.append([f"{architecture}, {optimizer}", ", ".join(texts)])
    return markdown(pd.DataFrame(rows, columns=["", "learning rate: validation accuracy in %"]))


def table_rates_of_the_originals(runs: pd.DataFrame) -> str:
    own = runs[runs["pipeline"] == "budget"]
    own = own[(own["architecture"] == "resnet10") & (own["dropout"] == 0)]
    rows = []
    for optimizer in OPTIMIZERS:
        some = own[own["optimizer"] == optimizer].sort_values("learning_rate")
        for rate, accuracy, study in zip(
            some["learning_rate"], some["test_accuracy"], some["study"], strict=True
        ):
            rows.append([optimizer, f"{rate:g}", percent(accuracy), "chosen here" if pd.isna(study) else ""])
    return markdown(pd.DataFrame(rows, columns=["optimizer", "learning rate", "test accuracy, %", ""]))


def table_dropout(runs: pd.DataFrame) -> str:
    own = runs[(runs["pipeline"] == "budget") & (runs["architecture"] == "resnet10")]
    own = own[(own["optimizer"] == "adam") & (own["learning_rate"] == 0.001)].sort_values("dropout")
    rows = [
        [f"{rate:g}", percent(test), f"{100 * train:.2f}"]
        for rate, test, train in zip(own["dropout"], own["test_accuracy"], own["train_accuracy"], strict=True)
    ]
    return markdown(pd.DataFrame(rows, columns=["dropout", "test accuracy, %", "training accuracy, %"]))


def table_cost(runs: pd.DataFrame) -> str:
    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    rows = []
    for architecture in [*THIN, *WIDE, "vgg16"]:
        cells = grid[grid["architecture"] == architecture]
        best = cells.loc[cells["test_accuracy"].idxmax()]
        rows.append(
            [
                architecture,
                f"{best['num_parameters']:,}",
                f"{cells['train_seconds'].median():.0f}",
                f"{100 * best['test_accuracy']:.2f} ({best['optimizer']})",
            ]
        )
    names = ["architecture", "parameters", "training, s by the clock (median of 4)", "best test accuracy, %"]
    return markdown(pd.DataFrame(rows, columns=names))


TABLES = {
    name.removeprefix("table_").replace("_", "-"): made
    for name, made in list(globals().items())
    if name.startswith("table_")
}


# --- figures ----------------------------------------------------------------------------------------


def figures(runs: pd.DataFrame, folder: Path) -> None:
    """`by-depth.svg` and `by-time.svg`, the same bytes for the same runs."""
    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "resgrid", "svg.fonttype": "none", "font.size": 11}
    from matplotlib import pyplot as plt

    grid = runs[(runs["pipeline"] == "budget") & runs["study"].isna()]
    accuracy = 100 * grid.set_index(["architecture", "optimizer"])["test_accuracy"]
    half = 196 * np.sqrt(grid["test_accuracy"].mean() * (1 - grid["test_accuracy"].mean()) / NUM_TEST)

    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for ax, names, title in zip(axes, (THIN, WIDE), ("16 to 64 channels", "64 to 512 channels"), strict=True):
        for optimizer in OPTIMIZERS:
            values = [accuracy[name, optimizer] for name in names]
            ax.errorbar(
                range(len(names)),
                values,
                half,
                label=optimizer,
                color=COLOURS[optimizer],
                marker="o",
                capsize=3,
            )
        ax.set_xticks(range(len(names)), [name.removeprefix("resnet") for name in names])
        ax.set(title=title, xlabel="layers of the ResNet")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend()
    _save(figure, folder / "by-depth.svg")

    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for optimizer in OPTIMIZERS:
        some = grid[grid["optimizer"] == optimizer]
        ax.scatter(
            some["train_seconds"], 100 * some["test_accuracy"], color=COLOURS[optimizer], label=optimizer
        )
    for architecture, cells in grid.groupby("architecture"):
        top = cells.loc[cells["test_accuracy"].idxmax()]
        ax.annotate(
            str(architecture), (top["train_seconds"], 100 * top["test_accuracy"]), (4, 4),
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    ax.set(
        xscale="log", xlabel="training, seconds by the clock (not an idle machine)", ylabel="test accuracy, %"
    )
    ax.grid(alpha=0.3)
    ax.legend()
    _save(figure, folder / "by-time.svg")


def _save(figure: mpl.figure.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def written(page: str, runs: pd.DataFrame) -> str:
    """The page with each table between `<!-- NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{TABLES[match[1]](runs)}\n\n<!-- end -->"

    return re.sub(r"<!-- ([a-z-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    if sys.argv[1:] == ["collect"]:
        collect()
        return
    runs = pd.read_csv(HERE / "runs.csv")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), runs), encoding="utf-8")
    figures(runs, HERE)


if __name__ == "__main__":
    main()
