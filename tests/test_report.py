"""The report: its statistics by hand and against SciPy and scikit-learn, its sentences, and the page itself."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from scipy import stats
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from resgrid.cli import main
from resgrid.config import Digits, Preprocess, load_params, parse_params
from resgrid.data.dataset import Meta, Split, content_digest, load_meta, load_split, save, split_digest
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.evaluation import Predictions, Result, evaluate_all
from resgrid.grid import Cell, expand
from resgrid.report.figures import MAX_CLASSES
from resgrid.report.figures import confusion_matrix as confusion_chart
from resgrid.report.findings import Findings, conclusions, find, points
from resgrid.report.leaderboard import by_optimizer, read_leaderboard, readable
from resgrid.report.markdown import markdown
from resgrid.report.page import most_confident_mistakes, page
from resgrid.report.statistics import (
    Bootstrap,
    Interval,
    calibration_error,
    confusion,
    pareto_front,
    reliability,
)
from resgrid.report.tables import studies as studies_table
from resgrid.runs import noted_failure
from resgrid.train import train_cell

ROOT = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cow", "dog")
NUM_TEST = 40


# --- statistics --------------------------------------------------------------------------------------


def test_the_calibration_error_is_that_of_a_hand_calculation():
    confidence = np.array([0.95, 0.95, 0.65, 0.65], dtype=np.float32)
    correct = np.array([True, False, True, True])
    # (0.9, 1.0]: 0.95 sure, 0.5 right; (0.6, 0.7]: 0.65 sure, 1.0 right; two images each
    assert calibration_error(confidence, correct, 10) == pytest.approx((2 * 0.45 + 2 * 0.35) / 4, abs=1e-6)


def test_a_model_that_is_always_sure_and_right_is_calibrated_and_one_that_is_always_wrong_is_not():
    sure = np.ones(5, dtype=np.float32)
    assert calibration_error(sure, np.ones(5, dtype=bool)) == 0
    assert calibration_error(sure, np.zeros(5, dtype=bool)) == 1


def test_the_reliability_diagram_is_scikit_learns():
    random = np.random.default_rng(0)
    confidence = random.random(3000)
    correct = random.random(3000) < confidence**2
    ours = reliability(confidence, correct, 15)
    accuracy, sureness = calibration_curve(correct, confidence, n_bins=15, strategy="uniform")
    np.testing.assert_allclose(ours.accuracy, accuracy)
    np.testing.assert_allclose(ours.confidence, sureness)
    assert ours.num_images.sum() == 3000


def test_the_confusion_matrix_is_scikit_learns_also_with_a_class_that_is_never_predicted():
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 5, 400), random.integers(0, 4, 400)
    found = confusion(labels, predicted, 5)
    np.testing.assert_array_equal(found, confusion_matrix(labels, predicted, labels=range(5)))
    assert found[:, 4].sum() == 0


def test_the_pareto_front_holds_what_nothing_beats_and_equals_together():
    cost = [3.0, 1.0, 2.0, 2.0, 4.0, 1.0, 2.0]
    value = [0.8, 0.5, 0.7, 0.6, 0.8, 0.4, 0.7]
    assert pareto_front(cost, value) == [1, 2, 6, 0]
    assert pareto_front([], []) == []


def test_with_one_seed_the_interval_is_scipys_bootstrap_over_images():
    random = np.random.default_rng(1)
    one, other = random.random(400) < 0.9, random.random(400) < 0.8
    ours = Bootstrap({"one": one, "other": other}, 5000).difference([[("one", "other")]])
    theirs = stats.bootstrap(
        (one.astype(float) - other,), np.mean, n_resamples=5000, method="percentile", rng=2
    ).confidence_interval
    assert ours.estimate == pytest.approx(one.mean() - other.mean(), abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs), abs=0.004)


def test_cells_that_are_right_on_the_same_images_differ_by_nothing():
    correct = np.random.default_rng(0).random(100) < 0.7
    found = Bootstrap({"one": correct, "other": correct.copy()}).difference([[("one", "other")]])
    assert found == Interval(0, 0, 0)


def test_two_seeds_that_disagree_wholly_leave_everything_open():
    """All right with one seed, all wrong with the other: of n - 1 = 1 drawn seed the mean is 0 or 1."""
    always, never = np.ones(50, dtype=bool), np.zeros(50, dtype=bool)
    assert Bootstrap({"s0": always, "s1": never}).mean(["s0", "s1"]) == Interval(0.5, 0, 1)


def test_of_n_seeds_n_minus_1_are_drawn():
    """Of 4 seeds one is all right. 3 draws are all of it with probability 1/64 (less than 2.5 %), and two or
    three of them with 10/64: the interval ends at 2/3."""
    always, never = np.ones(9, dtype=bool), np.zeros(9, dtype=bool)
    bootstrap = Bootstrap({"a": always, "b": never, "c": never, "d": never}, 20_000)
    assert bootstrap.mean(["a", "b", "c", "d"]) == (0.25, 0, pytest.approx(2 / 3))


def test_each_architecture_weighs_the_same_however_many_seeds_it_has():
    always, never = np.ones(8, dtype=bool), np.zeros(8, dtype=bool)
    bootstrap = Bootstrap({"always": always, "never": never})
    difference = bootstrap.difference([[("always", "never")], [("never", "never")] * 3])
    assert difference == Interval(0.5, 0.5, 0.5)


def test_the_most_confident_mistakes_come_first_and_nothing_right_is_among_them():
    said = Predictions(
        classes=np.zeros(5, dtype=np.int64),
        confidence=np.array([0.5, 0.9, 0.7, 0.99, 0.7], dtype=np.float32),
        correct=np.array([False, False, False, True, False]),
    )
    assert most_confident_mistakes(said, 3) == [1, 2, 4]


# --- what is compared, and what is said of it ---------------------------------------------------------


def make_split(classes: int = len(NAMES)) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (NUM_TEST, 32, 32, 3), dtype=np.uint8)
    return Split(images=torch.from_numpy(images), labels=torch.arange(NUM_TEST) % classes)


def make_meta(source: str = "cifar10", names: tuple[str, ...] = NAMES) -> Meta:
    digests = {"train": "sha256:a", "test": "sha256:b"}
    return Meta(
        source=source, resize="stretch", class_names=names, num_images={"train": 200, "test": NUM_TEST},
        scalar_mean=0.5, scalar_std=0.2, channel_mean=(0.5,) * 3, channel_std=(0.2,) * 3,
        split_digests=digests, digest=content_digest(names, digests),
    )  # fmt: skip


def trained(cell: Cell, num_wrong: int, status: Any = "completed", classes: int = len(NAMES)) -> Result:
    """What `evaluate_cell` gives for weights that get the first `num_wrong` test images wrong."""
    from resgrid.training.engine import Scores

    labels = np.arange(NUM_TEST) % classes
    wrong = np.arange(NUM_TEST) < num_wrong
    accuracy = (NUM_TEST - num_wrong) / NUM_TEST
    return Result(
        cell=cell, status=status, cause="the training loss was not finite" if status == "diverged" else None,
        scores=Scores(loss=0.5, accuracy=accuracy, num_images=NUM_TEST),
        predictions=Predictions(
            classes=np.where(wrong, (labels + 1) % classes, labels),
            confidence=np.linspace(0.4, 0.9, NUM_TEST, dtype=np.float32), correct=~wrong,
        ),
        metrics={
            "status": status, "test_accuracy": accuracy, "train_accuracy": 0.95, "num_parameters": 1000 * cell.depth,
            "data_digest": make_meta().digest, "epochs": 2,
        },
        timing={
            "train_seconds": 2.0 * cell.depth, "device_name": "a machine", "precision": "fp32", "threads": 2,
            "torch": "2.15.0", "python": "3.11.7", "platform": "Linux", "resgrid": "0.1.0",
            "started": "2026-01-01T00:00:00+00:00",
        },
        history=pd.DataFrame({"epoch": [1, 2], "test_accuracy": [0.5, accuracy], "train_accuracy": [0.6, 0.95]}),
    )  # fmt: skip


def small_grid(**grid: list[Any]) -> list[Cell]:
    """The cells of a part of the root's grid, without its studies."""
    return expand(parse_params(ROOT | {"grid": ROOT["grid"] | grid, "studies": {}}))


def found(results: list[Result], **meta: Any) -> Findings:
    return find(results, make_split(), make_meta(**meta), "small", "cpu")


def test_optimizers_are_compared_where_both_completed_with_the_same_seed():
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"], seeds=[0, 1])
    results = [
        trained(cell, 4 if cell.optimizer.name == "sgd" else 8)
        if cell.id != "resnet32-adam-0"
        else trained(cell, 30, "diverged")
        for cell in cells
    ]
    [comparison] = found(results).optimizers
    assert (comparison.first, comparison.second) == ("sgd", "adam")
    assert (comparison.over, comparison.num_seeds) == (["resnet20", "resnet32"], 1)
    assert comparison.difference is not None
    assert comparison.difference.estimate == pytest.approx(0.1)  # 4 of 40 images
    assert comparison.verdict == "sgd is ahead"


def test_each_depth_is_compared_with_the_next_and_the_deepest_with_the_shallowest():
    cells = small_grid(
        architectures=["resnet20", "resnet44", "resnet110", "resnet10", "vgg16"], optimizers=["sgd"]
    )
    depths = found([trained(cell, 4) for cell in cells]).depths
    assert [(c.first, c.second) for c in depths] == [
        ("resnet44", "resnet20"), ("resnet110", "resnet44"), ("resnet110", "resnet20"),
    ]  # fmt: skip
    assert {c.verdict for c in depths} == {"no difference can be told"}


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        ([0], "With one seed the intervals say how the figures would move with other test images, and not how "
              "with another seed."),
        ([0, 1, 2], "With 3 seeds the intervals cover other test images and other seeds, but a spread over so few "
                    "seeds is itself known roughly"),
        ([0, 1, 2, 3, 4], "With 5 seeds the intervals cover other test images and other seeds: a difference whose "
                          "interval leaves out zero is one between the optimizers or depths."),
    ],
)  # fmt: skip
def test_what_can_be_concluded_depends_on_the_number_of_seeds(seeds, sentence):
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=seeds)
    said = conclusions(found([trained(cell, 2 if cell.optimizer.name == "sgd" else 12) for cell in cells]))
    assert said[0].startswith(sentence)
    assert said[1] == "Of the optimizers, on the mean over cells: sgd is ahead of adam by 25.00 points."


def test_what_did_not_complete_is_left_out_and_that_is_said():
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"])
    results = [trained(cell, 4) for cell in cells[:3]] + [Result(cell=cells[3], status="missing")]
    assert any(
        sentence.startswith("1 of the grid's 4 cells did not complete and are left out")
        for sentence in conclusions(found(results))
    )


def test_a_published_figure_is_within_the_uncertainty_of_a_measured_one_or_not():
    cells = small_grid(architectures=["resnet20", "vgg16"], optimizers=["sgd", "adam"])
    findings = found([trained(cell, 3 if cell.architecture == "resnet20" else 20) for cell in cells])
    near, far = findings.published  # of resnet20-sgd and vgg16-sgd; adam has none
    assert (near.group.name, near.accuracy, near.measured.estimate) == ("resnet20-sgd", 0.9152, 0.925)
    assert near.difference == pytest.approx(0.0098)
    assert (near.within, far.within) == (True, False)
    assert found(findings.results, source="digits").published == []


def test_the_studies_of_the_root_vary_four_things_beside_the_grids_own_cell():
    findings = found([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    levels = {
        (study.factor, series.name): [level.text for level in series.levels]
        for study in findings.studies
        for series in study.series
    }
    assert levels == {
        ("learning rate", "resnet10-adam-0"): ["0.01", "0.1", "0.5"],
        ("dropout", "resnet10-adam-0"): ["0.1", "0.2", "0.3", "0.4", "0.5"],
        ("batch size", "resnet10-adam-0"): ["32", "64", "128"],
        ("approach", "resnet20-sgd-0"): ["end to end", "frozen base"],
        ("approach", "vgg16-sgd-0"): ["end to end", "frozen base"],
    }
    table = studies_table(findings).set_index("cell")["differs also in"]
    assert table["frozen-resnet20"] == ""
    assert table["frozen-vgg16"] == (
        "normalization fixed; initial_weights imagenet; normalization.mean 0.485, 0.456, 0.406; "
        "normalization.std 0.229, 0.224, 0.225"
    )


def test_a_study_of_a_cell_that_the_grid_has_not_is_shown_by_its_name():
    study = next(cell for cell in expand(parse_params(ROOT)) if cell.id == "dropout-0p3")
    [only] = found([trained(study, 4)]).studies
    assert (only.factor, [level.text for level in only.series[0].levels]) == ("study", ["dropout-0p3"])


# --- bad input ---------------------------------------------------------------------------------------


def test_a_grid_of_which_nothing_exists_gives_a_report_that_says_so():
    findings = found([Result(cell=cell, status="missing") for cell in expand(parse_params(ROOT))])
    text = page(findings)
    assert "No cell of the grid has completed, so there is nothing to compare yet." in text
    assert "Missing: 46 of 46 cells have no result yet: batch-128, batch-32" in markdown(findings)
    assert Page(text).sections == SECTIONS


def test_a_grid_of_one_cell_gives_a_report_that_says_that_there_is_nothing_to_compare():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    findings = found([trained(cell, 0)])
    assert conclusions(findings)[0].startswith("There is nothing to compare yet")
    assert findings.groups[0].accuracy == Interval(1, 1, 1)
    assert Page(page(findings)).sections == SECTIONS


def test_a_grid_of_failures_alone_shows_each_as_what_it_is():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    results = [
        Result(cell=cells[0], status="missing", cause="out of <memory>", failed=True),
        trained(cells[1], 36, "diverged"),
        Result(cell=cells[2], status="missing"),
    ]
    findings = found(results)
    assert by_optimizer(findings.frame).loc["resnet20"].tolist() == ["failed", "diverged", "missing"]
    text = page(findings)
    assert "resnet20-sgd-0 failed: out of &lt;memory&gt;" in text
    assert Page(text).tables["Test accuracy, %"][1] == ["resnet20", "failed", "diverged", "missing"]
    assert findings.optimizers[0].verdict == "no cells in common"


def test_a_class_that_was_never_predicted_is_named():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    result = trained(cell, 0)
    labels = make_split().labels.numpy()
    never = Predictions(
        classes=np.where(labels == 2, 0, labels),
        confidence=np.full(NUM_TEST, 0.9, dtype=np.float32),
        correct=labels != 2,
    )
    text = page(found([dataclasses.replace(result, predictions=never)]))
    assert "Never predicted: cow." in text


def test_of_many_classes_the_confusion_matrix_shows_the_worst():
    classes = 100
    labels = np.repeat(np.arange(classes), 2)
    predicted = labels.copy()
    predicted[[2 * 7, 2 * 93]] = 0  # half of the images of the classes 7 and 93
    said = Predictions(
        classes=predicted, confidence=np.ones(200, dtype=np.float32), correct=predicted == labels
    )
    chart = confusion_chart(said, labels, tuple(f"class {number}" for number in range(classes)))
    shown = list(chart.data[0].x)
    assert len(shown) == MAX_CLASSES
    assert {"class 7", "class 93"} <= set(shown)


def test_a_class_name_cannot_become_part_of_the_page():
    names = ("</script><script>alert(1)</script>", "<b>", "&amp;", "d|og")
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    read = Page(page(found([trained(cell, 5)], names=names)))
    assert read.scripts == ["data", "plotly", ""]
    assert read.data["mistakes"]["cells"]["resnet20-sgd-0"][0]["is"] in names


# --- the page ----------------------------------------------------------------------------------------

SECTIONS = [
    "Test accuracy, %", "What can be concluded", "Accuracy and its cost", "Learning curves", "Generalisation gap",
    "Calibration", "One cell, closely", "Studies", "Published and measured", "Every cell", "How it was made",
]  # fmt: skip


class Page(HTMLParser):
    """What a page holds: its sections, tables by section, links and sources, and the data of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.csv = b""
        self._in: list[str] = []
        self._data = ""
        self.feed(text)
        self.data = json.loads(self._data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self._in.append(tag)
        self.addresses += [value for key, value in attributes if key in ("src", "href") and value]
        if tag in ("meta", "link", "input", "br", "img"):
            self._in.pop()
        elif tag == "script":
            self.scripts.append(values.get("id") or "")
        elif tag == "tr":
            self.tables.setdefault(self.sections[-1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.sections[-1]][-1].append("")
        elif tag == "a" and "download" in values:
            self.csv = base64.b64decode((values["href"] or "").partition(",")[2])

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "h2" in self._in:
            self.sections.append(data.strip())
        elif "script" in self._in and self.scripts[-1] == "data":
            self._data += data
        elif "td" in self._in or "th" in self._in:
            self.tables[self.sections[-1]][-1][-1] += data.strip()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grid of two trained seeds and a diverged study, a cell that failed and one not trained."""
    root = tmp_path_factory.mktemp("pipeline")
    recipe = {
        "epochs": 1, "batch_size": 16, "schedule": {"name": "constant"}, "warmup": {"steps": 0, "factor": 1.0}, "time_decay": 0.0,
        "weight_decay": 0.0, "decay_norm_and_bias": False, "dropout": 0.0,
        "augmentation": {"flip": False, "crop_padding": 0, "rotation_degrees": 0.0, "shift_fraction": 0.0},
        "normalization": {"name": "scalar"}, "approach": "end_to_end", "initial_weights": {"name": "random"},
    }  # fmt: skip
    absent = {"name": "file", "path": "absent.safetensors", "checksum": "md5:" + 32 * "0"}
    study = {"architecture": "resnet20", "optimizer": "sgd", "seed": 0}
    params = ROOT | {
        "name": "small digits",
        "data": {"source": "digits", "test_fraction": 0.2, "split_seed": 0},
        "grid": {"architectures": ["resnet20"], "optimizers": ["sgd", "adam"], "seeds": [0, 1]},
        "recipes": {"resnet20": recipe},
        "tuning": {
            "resnet20": {
                "sgd": {"lr": 0.05},
                "adam": {"lr": 0.001},
                "rmsprop": {"lr": 0.001},
                "adagrad": {"lr": 0.01},
            }
        },
        "studies": {
            "too-fast": study | {"lr": 1e30},
            "no-weights": study | {"initial_weights": absent},
        },
        "engine": {"precision": "fp32", "compile": "never", "scored_epochs": "all"},
    }
    (root / "params.yaml").write_text(json.dumps(params))  # which is YAML as well
    data = Digits(source="digits", test_fraction=0.2, split_seed=0)
    download(data, root / "raw")
    settings = Preprocess(resize="stretch", validation_fraction=0.0, training_fraction=1.0, seed=0)
    meta = preprocess(data, settings, root / "raw", root / "all")
    splits = {}
    for name, count in (("train", 96), ("test", 48)):
        split = load_split(root / "all", name)
        splits[name] = Split(images=split.images[:count], labels=split.labels[:count])
    digests = {name: split_digest(split) for name, split in splits.items()}
    update = {
        "num_images": {"train": 96, "test": 48},
        "split_digests": digests,
        "digest": content_digest(meta.class_names, digests),
    }
    save(root / "data/processed", meta.model_copy(update=update), splits)
    for cell in cells_of(root):
        if cell.id in ("resnet20-sgd-0", "resnet20-sgd-1", "resnet20-adam-0", "too-fast"):
            for _ in train_cell(cell, root / "data/processed", root / "runs" / cell.id, CPU):
                pass
    return root


def cells_of(root: Path) -> list[Cell]:
    return expand(load_params(root / "params.yaml"))


@pytest.fixture
def here(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pipeline's folder as the current one, with no failure noted yet."""
    monkeypatch.chdir(pipeline)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{pipeline}/mlflow.db")
    shutil.rmtree(pipeline / "runs/no-weights", ignore_errors=True)
    return pipeline


def evaluate(here: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, Page]:
    assert main(["evaluate", "--device", "cpu"]) == 0
    return capsys.readouterr().out, Page((here / "reports/index.html").read_text())


def test_the_predictions_are_those_of_the_scores_to_the_last_image(pipeline):
    test = load_split(pipeline / "data/processed", "test")
    for result in evaluate_all(cells_of(pipeline), pipeline / "runs", test, CPU):
        if result.metrics is None:
            continue
        assert result.scores is not None
        assert result.predictions is not None
        assert result.predictions.correct.mean() == result.scores.accuracy == result.metrics["test_accuracy"]
        assert result.predictions.confidence.shape == (48,)
        assert (result.predictions.confidence >= 0.1 - 1e-6).all()  # the top one of ten
        np.testing.assert_array_equal(
            result.predictions.classes == test.labels.numpy(), result.predictions.correct
        )


def test_the_page_agrees_with_the_leaderboard_to_the_last_digit(here, capsys):
    _, read = evaluate(here, capsys)
    written = (here / "reports/leaderboard.csv").read_bytes()
    assert read.csv == written
    frame = read_leaderboard(here / "reports")
    assert read.tables["Every cell"] == [list(readable(frame)), *readable(frame).to_numpy().tolist()]
    shown = [text.partition("%")[0] for text in read.tables["Test accuracy, %"][1]]
    mean = {
        name: 100 * group["test_accuracy"].dropna()
        for name, group in frame[frame["study"].isna()].groupby("optimizer")
    }
    assert shown[1].startswith(f"{mean['sgd'].mean():.2f} ± {mean['sgd'].std():.2f}")
    assert shown[2].startswith(f"{mean['adam'].mean():.2f} (1 missing)")
    accuracy = {row.cell: row.test_accuracy for row in frame.itertuples()}
    by_cell = read.data["chosen"]["confusion"]["cells"]
    test = load_meta(here / "data/processed").num_images["test"]
    for cell, [heat] in by_cell.items():
        right = sum(int(row[place] or 0) for place, row in enumerate(heat["text"]))
        assert right / test == accuracy[cell]


def test_the_page_has_every_section_and_asks_nothing_of_the_network(here, capsys):
    said, read = evaluate(here, capsys)
    assert "reports/index.html" in said
    assert read.sections == SECTIONS
    for address in read.addresses:
        assert re.match(r"#|data:|runs\.html#resnet20-(sgd|adam)-\d$", address), address
    assert {f"runs.html#resnet20-sgd-{seed}" for seed in (0, 1)} <= set(read.addresses)
    assert (here / "reports/index.html").stat().st_size < 6e6


def test_the_same_cells_give_the_same_bytes(here, capsys):
    evaluate(here, capsys)
    files = ("leaderboard.csv", "metrics.json", "report.md", "index.html")
    first = {name: (here / "reports" / name).read_bytes() for name in files}
    evaluate(here, capsys)
    assert {name: (here / "reports" / name).read_bytes() for name in files} == first


def test_the_markdown_has_the_same_figures_as_the_page(here, capsys):
    _, read = evaluate(here, capsys)
    text = (here / "reports/report.md").read_text()
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    for row in read.tables["Every cell"]:
        assert row in rows
    for row in read.tables["What can be concluded"]:
        assert row in rows
    for title in ("Optimizers, paired", "Studies", "How it was made"):
        assert f"## {title}" in text


def test_a_cell_whose_training_failed_is_shown_as_failed_and_why(here, capsys):
    assert main(["train", "no-weights", "--device", "cuda:99"]) == 1  # before there is anything to log
    assert "cuda:99: this machine has no such device" in (here / "runs/no-weights/failure.txt").read_text()
    assert main(["train", "no-weights", "--device", "cpu"]) == 1
    capsys.readouterr()
    assert "absent.safetensors" in (here / "runs/no-weights/failure.txt").read_text()
    said, read = evaluate(here, capsys)
    assert "Missing: 2 of 6 cells have no result yet: no-weights, resnet20-adam-1" in said
    assert "no-weights failed: studies.no-weights.initial_weights.path: there is no file" in said
    [row] = [row for row in read.tables["Every cell"] if row[0] == "no-weights"]
    assert row[1] == "failed"
    [row] = [row for row in read.tables["Every cell"] if row[0] == "resnet20-adam-1"]
    assert row[1] == "missing"


def test_a_training_that_succeeds_takes_the_note_of_an_earlier_failure_away(tmp_path):
    with pytest.raises(ResgridError), noted_failure(tmp_path / "cell"):
        raise ResgridError("no such file")
    assert (tmp_path / "cell/failure.txt").read_text() == "no such file\n"
    with noted_failure(tmp_path / "cell"):
        pass
    assert list((tmp_path / "cell").iterdir()) == []


def test_a_weights_file_that_is_gone_is_named_and_the_other_cells_are_compared(here, capsys):
    weights = here / "runs/resnet20-sgd-1/weights.safetensors"
    aside = weights.rename(here / "aside")
    try:
        said, read = evaluate(here, capsys)
    finally:
        aside.rename(weights)
    assert "runs/resnet20-sgd-1/weights.safetensors is gone: `dvc checkout --force` restores it." in said
    frame = read_leaderboard(here / "reports").set_index("cell")
    assert frame.loc["resnet20-sgd-1", "status"] == "missing"
    assert frame.loc["resnet20-sgd-0", "status"] == "completed"
    assert set(read.data["chosen"]["reliability"]["cells"]) == {
        "resnet20-sgd-0",
        "resnet20-adam-0",
        "too-fast",
    }


def test_the_report_tells_how_it_was_made(here, capsys):
    _, read = evaluate(here, capsys)
    made = Path("reports/report.md").read_text().partition("## How it was made")[2]
    meta = load_meta(here / "data/processed")
    timing = json.loads((here / "runs/resnet20-sgd-0/timing.json").read_text())
    for part in (
        "digits: 96 train, 48 test images of 10 classes", meta.digest, "Commit", timing["device_name"],
        timing["torch"], "Seeds: 0, 1", "Training time: ", "Begun: ",
    ):  # fmt: skip
        assert part in made, part
    assert read.sections[-1] == "How it was made"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the PATH")
@pytest.mark.parametrize("window", ["1280,1000", "390,844"])
def test_a_real_browser_draws_every_chart_and_its_console_stays_empty(here, capsys, tmp_path, window):
    evaluate(here, capsys)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={tmp_path}/profile", f"--window-size={window}",
         "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
         (here / "reports/index.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    places = (here / "reports/index.html").read_text().count('<div class="chart" data-')
    assert done.stdout.count('class="chart js-plotly-plot"') == places > 8
    assert done.stdout.count("<figcaption>") >= 1


def test_points_are_written_with_their_sign():
    assert points(Interval(0.0041, -0.0012, 0.007)) == "+0.41 (-0.12 to +0.70)"
