"""docs/results: rows of finished runs, and the page and figures that follow from them.

    python docs/results/results.py collect PIPELINE…    # adds or renews the rows of a pipeline's run folders
    python docs/results/results.py write                # README.md and the figures, from runs.csv and h100/;
                                                        # and the answer at the top of the project's README

Every figure and sentence of the page is computed here: means and intervals over seeds by
`resgrid.report.statistics`, never typed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from ruamel.yaml import YAML

from resgrid.report.statistics import Interval, holm, over_seeds, wilson
from resgrid.run_status import METRICS, RUN, read_json

HERE = Path(__file__).parent
RUNS, H100, PAGE = HERE / "runs.csv", HERE / "h100", HERE / "README.md"
FRONT, ANSWER = HERE.parents[1] / "README.md", ("<!-- answer -->", "<!-- /answer -->")
NUM_TEST = 10_000
COLUMNS = [
    "pipeline", "cell", "architecture", "optimizer", "seed", "learning_rate", "epochs", "batch_size", "status",
    "test_accuracy", "test_loss", "train_accuracy", "train_seconds", "device", "precision", "threads", "torch",
    "commit", "code_digest", "data_digest", "cell_digest", "weights_sha256",
]  # fmt: skip
JPEG_POINTS = 3.4  # what JPEG copies cost: 5,000 images, bit-exact and as JPEG, three seeds, 60 epochs


def collect(pipeline: Path) -> int:
    """Put the finished runs of a pipeline's folder into runs.csv; how many there are.

    They are told by what their folders say of themselves, at the commit of that checkout: whether they are of
    today's numbers and code is no question here.
    """
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=pipeline, capture_output=True, text=True, check=True
    ).stdout.strip()
    # Not from metrics.json: the run cache may have restored a cell that another pipeline shares.
    name = YAML(typ="safe").load(pipeline / "params.yaml")["name"]
    rows = []
    for folder in sorted((pipeline / "runs").iterdir()):
        if (folder / METRICS).is_file():
            record, timing = read_json(folder / RUN), read_json(folder / "timing.json")
            row = timing | record | {"pipeline": name, "commit": commit, "device": timing["device_name"]}
            rows.append({column: row[column] for column in COLUMNS})
    known = pd.read_csv(RUNS) if RUNS.exists() else pd.DataFrame(columns=COLUMNS)
    frame = pd.DataFrame([*rows, *known.to_dict(orient="records")], columns=COLUMNS)
    each = ["pipeline", "epochs", "cell"]
    frame = frame.drop_duplicates(each).sort_values(each, kind="stable")
    frame.to_csv(RUNS, index=False, lineterminator="\n")
    return len(rows)


# --- figures and sentences --------------------------------------------------------------------------


def points(interval: Interval) -> str:
    return f"{100 * interval.estimate:+.2f} ({100 * interval.low:+.2f} to {100 * interval.high:+.2f})"


def mean(accuracies: np.ndarray) -> Interval:
    """Of one training over test images, of several over seeds."""
    if len(accuracies) == 1:
        correct = round(float(accuracies[0]) * NUM_TEST)
        return Interval(float(accuracies[0]), *wilson(correct, NUM_TEST), 0.0, "test images")
    low, centre, high, p = (float(b) for b in _over_seeds([accuracies], [1.0]))
    return Interval(centre, low, high, p, f"{len(accuracies)} seeds")


def difference(first: pd.DataFrame, second: pd.DataFrame) -> Interval | None:
    """Paired by seed; None with fewer than two seeds in common."""
    both = first.merge(second, on="seed")
    if len(both) < 2:
        return None
    paired = (both["test_accuracy_x"] - both["test_accuracy_y"]).to_numpy()
    low, centre, high, p = (float(b) for b in _over_seeds([paired], [1.0]))
    return Interval(centre, low, high, p, f"{len(both)} seeds")


def _over_seeds(samples: list[np.ndarray], weights: list[float]) -> tuple[float, float, float, float]:
    bounds = over_seeds(samples, weights, 1 / NUM_TEST)
    return bounds.low, bounds.estimate, bounds.high, bounds.p  # type: ignore[return-value]


def table(groups: dict[str, pd.DataFrame]) -> str:
    lines = ["| | test accuracy, % | 95 % interval | over | each seed | on training images, % |"]
    lines.append("|:--|--:|:--|:--|:--|--:|")
    for name, rows in groups.items():
        rows = rows.sort_values("seed")
        each = ", ".join(f"{100 * value:.2f}" for value in rows["test_accuracy"])
        found = mean(rows["test_accuracy"].to_numpy())
        lines.append(
            f"| {name} | **{100 * found.estimate:.2f}** | {100 * found.low:.2f} to {100 * found.high:.2f} | "
            f"{found.basis} | {each} | {100 * rows['train_accuracy'].mean():.2f} |"
        )
    return "\n".join(lines)


def sentences(groups: dict[str, pd.DataFrame], what: str) -> Iterator[str]:
    """What the pairs allow to conclude, all tested together."""
    pairs = {(a, b): difference(groups[a], groups[b]) for a, b in combinations(groups, 2)}
    known = {pair: interval for pair, interval in pairs.items() if interval is not None}
    if not known:
        yield f"With fewer than two seeds in common, nothing can be said about training by other seeds: no {what} is ranked."
        return
    adjusted = dict(zip(known, holm([interval.p for interval in known.values()]), strict=True))
    told = [pair for pair, interval in known.items() if interval.excludes_zero and adjusted[pair] < 0.05]
    for a, b in told:
        interval = known[a, b]
        ahead, behind = (a, b) if interval.estimate > 0 else (b, a)
        sign = 1 if interval.estimate > 0 else -1
        low, centre, high = sorted(100 * sign * value for value in interval[:3])
        yield f"**{ahead}** is ahead of {behind} by {centre:.2f} points ({low:.2f} to {high:.2f})."
    rest = [f"{a} and {b}" for a, b in known if (a, b) not in told]
    if not told:
        yield f"No difference can be told between any two of {', '.join(groups)}."
    elif rest:
        yield f"No difference can be told between {'; '.join(rest)}."
    seeds = min(int(interval.basis.split()[0]) for interval in known.values())
    yield (
        f"Paired by seed, {seeds} seeds, Student's t; the {len(known)} comparisons are tested together "
        "(Holm), so the chance of any false difference among them is at most 5 %."
    )


def figure(groups: dict[str, pd.DataFrame], path: Path, title: str) -> None:
    """A dot for each training, and the interval of the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    chart, axes = plt.subplots(figsize=(6.4, 0.6 + 0.5 * len(groups)), layout="constrained")
    for place, rows in enumerate(groups.values()):
        values = rows["test_accuracy"].to_numpy()
        found = mean(values)
        axes.plot(
            100 * np.array([found.low, found.high]),
            [place, place],
            color="#888",
            linewidth=6,
            alpha=0.4,
            solid_capstyle="butt",  # or the bar is longer than the interval
        )
        axes.plot(100 * values, [place] * len(values), "o", color="#1f5fa8")
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy, %")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    chart.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(chart)


# --- the page ---------------------------------------------------------------------------------------


def h100() -> pd.DataFrame:
    """The six trainings by the prototype of the CUDA graph; one was cut off and has its history alone."""
    rows = []
    for folder in sorted(H100.iterdir()):
        name, _, of = folder.name.partition("-e")
        architecture, optimizer, seed = name.split("-")
        row = {"architecture": architecture, "optimizer": optimizer, "seed": int(seed), "weights_sha256": ""}
        if (folder / "metrics.json").exists():
            row |= json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            row |= {
                "seconds": json.loads((folder / "timing.json").read_text(encoding="utf-8"))["train_seconds"]
            }
        else:
            last = pd.read_csv(folder / "history-live.csv").iloc[-1]
            row |= {"epochs": int(last["epoch"]), "test_accuracy": last["test_accuracy"]}
            row |= {"train_accuracy": last["train_accuracy"], "seconds": last["seconds_since_start"]}
        planned = {"resnet10": 200}.get(architecture, 250)
        rows.append(row | {"planned": planned, "is_cut": "of" in of})
    return pd.DataFrame(rows)


def h100_table(rows: pd.DataFrame) -> str:
    lines = [
        "| cell | epochs | test accuracy, % | 95 % interval over test images | on training images, % | minutes |"
    ]
    lines.append("|:--|--:|--:|:--|--:|--:|")
    for row in rows.sort_values(["architecture", "test_accuracy"], ascending=[False, False]).itertuples():
        low, high = wilson(round(row.test_accuracy * NUM_TEST), NUM_TEST)
        cut = " (cut off; scored in bf16)" if row.is_cut else ""
        lines.append(
            f"| {row.architecture}-{row.optimizer}-{row.seed} | {row.epochs} of {row.planned}{cut} | "
            f"{100 * row.test_accuracy:.2f} | {100 * low:.2f} to {100 * high:.2f} | "
            f"{100 * row.train_accuracy:.2f} | {row.seconds / 60:.0f} |"
        )
    return "\n".join(lines)


def groups_of(
    runs: pd.DataFrame, pipeline: str, key: str, epochs: int | None = None
) -> dict[str, pd.DataFrame]:
    """Completed rows of so many epochs, or the most, by `key`: of those of the same data and code the largest set."""
    rows = runs[(runs["pipeline"] == pipeline) & (runs["status"] == "completed")]
    if rows.empty:
        return {}
    rows = rows[rows["epochs"] == (rows["epochs"].max() if epochs is None else epochs)]
    same = ["data_digest", "code_digest"]
    most = rows.groupby(same).size().idxmax()
    rows = rows[(rows[same] == list(most)).all(axis=1)]
    order = {"sgd": 0, "adam": 1, "rmsprop": 2, "adagrad": 3}
    names = sorted(rows[key].unique(), key=lambda n: order.get(n, int("0" + "".join(filter(str.isdigit, n)))))
    return {name: rows[rows[key] == name] for name in names}


def page(runs: pd.DataFrame) -> str:
    optimizers, depth = groups_of(runs, "optimizers", "optimizer"), groups_of(runs, "depth", "architecture")
    card = h100()
    parts = [HEAD]
    for groups, title, question, what, name, key in (
        (
            optimizers,
            "Which optimizer?",
            "ResNet-20, each optimizer at a rate of its own",
            "optimizer",
            "optimizers",
            "optimizer",
        ),
        (
            depth,
            "Does depth pay?",
            "SGD at rate 0.1, one recipe for all depths",
            "depth",
            "depth",
            "architecture",
        ),
    ):
        parts.append(f"## {title}")
        if not groups:
            parts.append("Not trained yet.")
            continue
        parts += [setting(question, groups), table(groups), f"![Test accuracy by {what}]({name}.png)"]
        parts.append("\n".join(f"- {sentence}" for sentence in sentences(groups, what)))
        for epochs in sorted(set(runs[runs["pipeline"] == name]["epochs"]) - {_epochs(groups)}, reverse=True):
            fewer = groups_of(runs, name, key, epochs)
            parts += [f"### In {epochs} epochs", setting("As above", fewer), table(fewer)]
            parts.append("\n".join(f"- {sentence}" for sentence in sentences(fewer, what)))
    parts.append(CARD + "\n\n" + h100_table(card))
    parts.append("## What the originals claim\n\n" + claims(optimizers, depth, card))
    parts.append(tail(runs))
    return "\n\n".join(parts) + "\n"


def setting(question: str, groups: dict[str, pd.DataFrame]) -> str:
    """The recipe and the machine that all rows of a table have in common."""
    row = next(iter(groups.values())).iloc[0]
    return (
        f"{question}, {row['epochs']} epochs, batch {row['batch_size']}, cosine to zero; "
        f"on {row['device']}, torch {row['torch'].partition('+')[0]}."
    )


def answer(runs: pd.DataFrame) -> str:
    """The project's first table and picture: the optimizers' means, what can be told from them, and of depth."""
    optimizers, depth = groups_of(runs, "optimizers", "optimizer"), groups_of(runs, "depth", "architecture")
    lines = ["| | test accuracy, % | 95 % interval | seeds |", "|:--|--:|:--|--:|"]
    for name, rows in optimizers.items():
        found = mean(rows["test_accuracy"].to_numpy())
        interval = f"{100 * found.low:.1f} to {100 * found.high:.1f}"
        lines.append(f"| {name} | **{100 * found.estimate:.1f}** | {interval} | {len(rows)} |")
    best = max(optimizers, key=lambda name: optimizers[name]["test_accuracy"].mean())
    kept = (f"**{best}**", "With fewer", "No difference")  # the best one against the others
    told = [each for each in sentences(optimizers, "optimizer") if each.startswith(kept)]
    means = ", ".join(f"{name} {100 * rows['test_accuracy'].mean():.1f} %" for name, rows in depth.items())
    of_depth = " ".join(list(sentences(depth, "depth"))[:-1])
    return f"""\
ResNet-20 trained for {_epochs(optimizers)} epochs on all 50,000 CIFAR-10 images, each optimizer at one learning rate, which was not tuned. (The images are copies in JPEG, which costs about {JPEG_POINTS} points.)

{chr(10).join(lines)}

![Test accuracy by optimizer](docs/results/optimizers.png)

{" ".join(told)} Depth, in {_epochs(depth)} epochs: {means}. {of_depth} [All results](docs/results/README.md)"""


def _epochs(groups: dict[str, pd.DataFrame]) -> int:
    return int(next(iter(groups.values()))["epochs"].iloc[0])


def claims(optimizers: dict[str, pd.DataFrame], depth: dict[str, pd.DataFrame], card: pd.DataFrame) -> str:
    """Each claim, and whether it holds here."""
    lines = ["| claim | here |", "|:--|:--|"]
    ours = card[card["architecture"] == "resnet10"].set_index("optimizer")["test_accuracy"]
    against = []
    for other in ("sgd", "rmsprop", "adagrad"):
        # One seed, and no record of the single images: a difference of two independent models, on the safe side.
        gap = ours["adam"] - ours[other]
        error = np.sqrt(sum(value * (1 - value) for value in (ours["adam"], ours[other])) / NUM_TEST)
        against.append(f"{other} {100 * gap:+.1f} ± {196 * error:.1f}")
    lines.append(
        "| Adam is the best of four optimizers (ResNet-10, 200 epochs; PyTorch original) | cannot be told: at 60 "
        f"epochs and one seed Adam is first; ahead, in points with 95 % over test images, of {'; '.join(against)} |"
    )
    if "adam" in optimizers and len(optimizers) > 1:
        other = max(set(optimizers) - {"adam"}, key=lambda name: optimizers[name]["test_accuracy"].mean())
        lines.append(f"| the same, on ResNet-20 | {verdict(optimizers, 'adam', other)} |")
    if len(depth) > 1:
        names = list(depth)
        lines.append(
            "| deeper is better (91.5 % to 93.9 % from ResNet-20 to 110 in 165 epochs; Keras original) | "
            f"{verdict(depth, names[-1], names[0])} |"
        )
    whole = card[(card["architecture"] == "resnet20") & ~card["is_cut"]].iloc[0]
    lines.append(
        f"| ResNet-20 reaches 91.5 % (Keras original, its later recipe) | {100 * whole['test_accuracy']:.1f} % with its first "
        f"recipe and {whole['epochs']} epochs on JPEG copies, which cost about {JPEG_POINTS} points: not comparable to the last point |"
    )
    return "\n".join(lines)


def verdict(groups: dict[str, pd.DataFrame], better: str, other: str) -> str:
    """Whether a claim that `better` is ahead of `other` holds."""
    gap = difference(groups[better], groups[other])
    if gap is None:
        return "cannot be told"
    said = "cannot be told" if not gap.excludes_zero else "holds" if gap.estimate > 0 else "does not hold"
    return f"{said} in {_epochs(groups)} epochs: {better} against {other} {points(gap)} points"


HEAD = """\
# Results

<!-- Written by docs/results/results.py from runs.csv and h100/. Edit that, not this. -->

Trained on all 50,000 CIFAR-10 training images and scored on all 10,000 test images, after the last epoch, in fp32. **The images are JPEG copies** (quality 75) of CIFAR-10's: on 5,000 images and three seeds they cost 3.4 points (2.3 to 4.4), so no figure here may be set beside a published one without that."""
CARD = """\
## The originals' own recipes, on a GPU

One H100, torch 2.11, bf16, one seed; by the prototype of the training loop as a CUDA graph, six trainings at once. With one seed these are figures of single trainings: what another seed would give is not known. Histories and timings: [h100/](h100)."""


def tail(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    hours = runs.groupby(["pipeline", "device", "torch"])["train_seconds"].sum() / 3600
    took = "; ".join(
        f"{name} {value:.1f} h on {device} (torch {torch})" for (name, device, torch), value in hours.items()
    )
    commits = ", ".join(
        f"{'/'.join(sorted({commit[:10] for commit in rows['commit']}))} ({epochs} epochs)"
        for epochs, rows in runs.groupby("epochs")
    )
    most = runs["epochs"].max()
    return f"""\
## What can and cannot be concluded

- **A recipe is not an optimizer.** Each optimizer was run at one rate; another rate may change the order. No rate was chosen on test images.
- **Few epochs are not many.** What leads after {most} epochs need not lead after 200.
- Rows are compared only among equal data, code and epochs.

## How to repeat it

With an archive of the images as `train/<class>/*` and `test/<class>/*`, at commit {commits}:

```
cd examples/optimizers
resgrid set 'recipes.*.epochs={most}'                                               # on a GPU
RESGRID_ARCHIVE=/path/to/cifar10-images.tar.xz RESGRID_THREADS=1 dvc repro -k       # one thread a cell
cd ../.. && python docs/results/results.py collect examples/optimizers && python docs/results/results.py write
```

On a CPU the same cell at the same commit, torch and number of threads gives the same weights, bit for bit; on a GPU it is the same training, but not the same bits. [runs.csv](runs.csv) has the digests of each. The cells' times, summed: {took}. Up to eight cells shared the card, which makes each of them slower and all together faster."""


def write() -> None:
    runs = pd.read_csv(RUNS) if RUNS.exists() else pd.DataFrame(columns=COLUMNS)
    PAGE.write_text(page(runs), encoding="utf-8")
    before, start, rest = FRONT.read_text(encoding="utf-8").partition(ANSWER[0])
    _, end, after = rest.partition(ANSWER[1])
    FRONT.write_text(f"{before}{start}\n{answer(runs)}\n{end}{after}", encoding="utf-8")
    for name, key in (("optimizers", "optimizer"), ("depth", "architecture")):
        if groups := groups_of(runs, name, key):
            title = "A dot for each training; the bar is the 95 % interval of the mean"
            figure(groups, HERE / f"{name}.png", title)


def main(arguments: list[str]) -> int:
    match arguments:
        case ["collect", *pipelines] if pipelines:
            for pipeline in pipelines:
                print(f"{pipeline}: {collect(Path(pipeline))} rows")
        case ["write"]:
            write()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
