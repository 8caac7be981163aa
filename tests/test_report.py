"""The report: what is compared with what, its sentences, and the page itself."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file
from scipy import stats
from small import Project

from resgrid import evaluation
from resgrid.config import load_params, parse_params
from resgrid.convert import CIFAR10_CLASSES
from resgrid.data.dataset import EqualImages, Meta, Split, content_digest, load_meta, load_split
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell, compared_factors, expand
from resgrid.report.figures import MAX_CLASSES, charts
from resgrid.report.figures import confusion_matrix as confusion_chart
from resgrid.report.findings import Findings, how_it_was_made
from resgrid.report.leaderboard import headline, read_leaderboard, readable
from resgrid.report.page import costs, markdown, most_confident_mistakes, rates
from resgrid.report.page import page as draw_page
from resgrid.run_status import find_runs

ROOT = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cow", "dog")
NUM_TEST = 40


def test_the_most_confident_mistakes_come_first_and_nothing_right_is_among_them():
    predictions = Predictions(
        classes=np.zeros(5, dtype=np.int64),
        confidence=np.array([0.5, 0.9, 0.7, 0.99, 0.7], dtype=np.float32),
        correct=np.array([False, False, False, True, False]),
    )
    assert most_confident_mistakes(predictions, 3) == [1, 2, 4]


# --- what is compared, and the sentences about it -----------------------------------------------------


def make_split(classes: int = len(NAMES)) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (NUM_TEST, 32, 32, 3), dtype=np.uint8)
    return Split(images=torch.from_numpy(images), labels=torch.arange(NUM_TEST) % classes)


def make_meta(
    source: str = "cifar10", names: tuple[str, ...] = NAMES, num_images: tuple[int, int] = (200, NUM_TEST)
) -> Meta:
    digests = {"train": "sha256:a", "test": "sha256:b"}
    return Meta(
        source=source, resize="stretch", class_names=names,
        num_images=dict(zip(("train", "test"), num_images, strict=True)),
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


def small_grid(
    *optimizers: str, architectures: tuple[str, ...] = ("resnet20",), seeds: int = 1
) -> list[Cell]:
    """The cells of a part of the root's grid, without its studies."""
    grid = {"architectures": architectures, "optimizers": optimizers, "seeds": range(seeds)}
    grid = ROOT["grid"] | {name: list(values) for name, values in grid.items()}
    return expand(parse_params(ROOT | {"grid": grid, "studies": {}}))


def findings_of(results: list[Result], **meta: Any) -> Findings:
    return Findings(results, make_split(), make_meta(**meta), "small", "cpu")


def page(findings: Findings) -> str:
    return draw_page(findings, charts(findings))


def with_wrong(**wrong: list[int]) -> list[Result]:
    """Completed cells of ResNet-20: `sgd=[3, 5]` are the wrong images of its seeds in order."""
    cells = small_grid(*wrong, seeds=max(map(len, wrong.values())))
    return [trained(cell, wrong[cell.optimizer.name][cell.seed]) for cell in cells]


def tried(**validation: dict[float, float]) -> Findings:
    """Two seeds of ResNet-20 at factors of their rate, by validation accuracy (40 images).

    A factor of f gets 10 f of the 40 test images wrong, and the second seed one more.
    """
    grid = {"architectures": ["resnet20"], "optimizers": list(validation), "seeds": [0, 1]}
    factors = [factor for factor in next(iter(validation.values())) if factor != 1]
    changed = {"grid": ROOT["grid"] | grid, "studies": {}, "rates": {"factors": factors}}
    results = []
    for cell in expand(parse_params(ROOT | changed)):
        result = trained(cell, min(int(10 * cell.rate_factor) + cell.seed, NUM_TEST))
        result.metrics["validation_accuracy"] = validation[cell.optimizer.name][cell.rate_factor]
        results.append(result)
    meta = make_meta()
    meta = meta.model_copy(update={"num_images": meta.num_images | {"validation": 40}})
    return Findings(results, make_split(), meta, "small", "cpu")


def test_everything_that_is_compared_is_of_the_rates_chosen_on_validation_images():
    """sgd at 3 times its rate gets 30 and 31 wrong (23.75 %), adam at a tenth 1 and 2 (96.25 %)."""
    findings = tried(sgd={0.1: 0.5, 1: 0.6, 3: 0.9}, adam={0.1: 0.9, 1: 0.6, 3: 0.5})
    assert findings.factors == {"resnet20-sgd": 3, "resnet20-adam": 0.1}
    [comparison] = findings.families["Optimizers"]
    assert comparison.difference.estimate == pytest.approx(-0.725)
    assert [group.accuracy.estimate for group in findings.groups] == pytest.approx([0.2375, 0.9625])
    assert findings.table.loc["resnet20", "adam"].startswith("96.25 ± ")
    assert headline(findings.frame, findings.factors)["best_cell"] == "resnet20-adam-0-x0.1"
    assert findings.question.endswith("each at the best of 3 rates, chosen on 40 validation images.")
    written = json.loads(json.dumps(findings.as_dict()))
    assert compared_factors(written, set(findings.frame["cell"])) == findings.factors

    text, drawn = markdown(findings), page(findings)
    assert "resnet20-sgd: the best factor, 3, is an end of those tried: not bracketed: try 10." in text
    assert "not bracketed: try 0.03." in text
    assert "Accuracy by rate, resnet20" in drawn
    [chart] = charts(findings)["rates"]
    assert len(chart.columns["rate"]) == 2 * 3 * 2
    assert sum(chart.columns["chosen"]) == 4
    row = rates(findings).set_index("architecture, optimizer").loc["resnet20-adam"]
    assert (row["factor"], row["validation %"], row["test %"], row["test % there"]) == (
        "0.1", "90.00", "96.25", "73.75",
    )  # fmt: skip


def test_cells_with_the_same_seeds_are_compared_in_pairs_by_seed_in_a_sentence_and_as_data():
    findings = findings_of(with_wrong(sgd=[2, 6, 4], adam=[12, 15, 15]))
    theirs = stats.ttest_rel(1 - np.array([2, 6, 4]) / 40, 1 - np.array([12, 15, 15]) / 40)
    interval = theirs.confidence_interval(0.95)
    assert findings.comparisons[0].difference == (
        pytest.approx(0.25), pytest.approx(interval.low), pytest.approx(interval.high),
        pytest.approx(theirs.pvalue), "3 seeds, paired",
    )  # fmt: skip
    assert findings.answer == [
        "sgd is ahead of adam by 25.00 points (18.79 to 31.21) over resnet20 "
        f"(3 seeds, paired; 2 epochs; p {theirs.pvalue:.2g})."
    ]
    data = json.loads(json.dumps(findings.as_dict(), allow_nan=False))
    [comparison] = data["comparisons"]
    assert (comparison["first"], comparison["second"], comparison["significant"]) == ("sgd", "adam", True)
    assert comparison["p_holm"] == pytest.approx(theirs.pvalue)
    assert comparison["difference"]["low"] == pytest.approx(interval.low)
    assert [each["accuracy"]["estimate"] for each in data["groups"]] == pytest.approx([0.9, 0.65])
    assert data["answer"] == findings.answer


def test_cells_with_other_seeds_are_compared_unpaired():
    results = with_wrong(sgd=[2, 6, 4], adam=[12, 15, 15])
    results[5] = trained(results[5].cell, 30, "diverged")  # adam with seed 2
    [comparison] = findings_of(results).families["Optimizers"]
    assert comparison.difference.basis == "2 to 3 seeds, unpaired"
    assert comparison.difference.estimate == pytest.approx((13.5 - 4) / 40)


def test_a_mean_over_architectures_has_the_seed_as_its_replicate():
    """By seed: (10 + 8) / 2 and (14 + 4) / 2 images, so both 9: the differences tie, though no cell's do."""
    wrong = {("resnet20", "sgd"): [2, 3], ("resnet20", "adam"): [12, 17],
             ("resnet32", "sgd"): [1, 4], ("resnet32", "adam"): [9, 8]}  # fmt: skip
    cells = small_grid("sgd", "adam", architectures=("resnet20", "resnet32"), seeds=2)
    results = [trained(cell, wrong[cell.architecture, cell.optimizer.name][cell.seed]) for cell in cells]
    [comparison] = findings_of(results).families["Optimizers"]
    assert comparison.over == ["resnet20", "resnet32"]
    assert comparison.difference.estimate == pytest.approx(9 / 40)
    assert (comparison.is_significant, comparison.reason) == (False, ", since the seeds tie")


def test_an_architecture_with_one_seed_is_left_out_where_others_have_more():
    cells = small_grid("sgd", "adam", architectures=("resnet20", "resnet32"), seeds=2)
    results = [
        trained(cell, 4 if cell.optimizer.name == "sgd" else 8 + cell.seed)
        if cell.id != "resnet32-adam-0"
        else trained(cell, 30, "diverged")
        for cell in cells
    ]
    [comparison] = findings_of(results).families["Optimizers"]
    assert (comparison.first, comparison.second) == ("sgd", "adam")
    assert (comparison.over, comparison.num_seeds) == (["resnet20"], 2)


def test_each_depth_is_compared_with_the_next_and_the_deepest_with_the_shallowest():
    cells = small_grid("sgd", architectures=("resnet20", "resnet44", "resnet110", "resnet10", "vgg16"))
    depths = findings_of([trained(cell, 4) for cell in cells]).families["Depths"]
    assert [(c.first, c.second) for c in depths] == [
        ("resnet44", "resnet20"), ("resnet110", "resnet44"), ("resnet110", "resnet20"),
    ]  # fmt: skip
    assert not any(c.is_significant for c in depths)


def test_with_one_seed_nothing_is_concluded_of_optimizers():
    """McNemar's exact test: of 10 images on which the models differ sgd's has all right."""
    findings = findings_of(with_wrong(sgd=[2], adam=[12]))
    assert findings.comparisons[0].difference.p == stats.binomtest(0, 10).pvalue
    [sentence] = findings.answer
    assert sentence.startswith("The models of sgd are ahead of those of adam by 25.00 points")
    assert sentence.endswith("over resnet20 (40 test images, one seed; 2 epochs; p 0.002).")
    assert "differ cannot be concluded: add seeds to grid.seeds" in markdown(findings)


@pytest.mark.parametrize(
    ("sgd", "adam", "reason"), [([2, 2], [12, 12], ", since the seeds tie"), ([2, 3], [12, 2], "")]
)
def test_no_sentence_concludes_from_seeds_that_tie_or_an_interval_with_zero(sgd, adam, reason):
    assert findings_of(with_wrong(sgd=sgd, adam=adam)).answer == [
        f"sgd and adam do not differ significantly{reason} (2 seeds, paired; 2 epochs)."
    ]


def test_a_family_is_tested_by_holms_method_and_without_a_significant_difference_is_one_sentence_and_figure():
    findings = findings_of(with_wrong(sgd=[2], adam=[8], rmsprop=[8]))
    first, second, third = findings.families["Optimizers"]
    assert first.difference.p == pytest.approx(2 / 64)  # 6 of 6 images
    assert [c.p_holm for c in (first, second, third)] == pytest.approx([6 / 64, 6 / 64, 1])
    assert first.difference.excludes_zero
    assert (first.reason, third.reason) == (" after correction for 3 comparisons", "")
    assert findings.answer == [
        "sgd, adam and rmsprop do not differ significantly: none of the 3 differences between optimizers is "
        "significant after correction for 3 comparisons (smallest p 0.094; over 40 test images, one seed)."
    ]
    assert markdown(findings).count("(figures/differences-between-optimizers.png)") == 1
    [chart] = charts(findings)["differences"]
    assert len(chart.columns["row"]) == 3


def test_the_mean_over_seeds_is_of_probabilities_and_a_column_of_the_table(tmp_path):
    """Of two networks each sure of its right images and unsure of its wrong ones, the mean is right of all."""
    cells = small_grid("sgd", seeds=2)
    labels = make_split().labels.numpy()
    for cell in cells:
        wrong = np.arange(NUM_TEST) % 2 == cell.seed
        logits = np.log(np.where(np.eye(4)[labels] == 1, 0.97, 0.01))  # (N, 4)
        unsure = np.log(np.where(np.eye(4)[(labels + 1) % 4] == 1, 0.4, 0.2))
        given = torch.from_numpy(np.where(wrong[:, None], unsure, logits).astype(np.float32))
        save_file({"test": given}, tmp_path / f"{cell.id}.safetensors", {"resgrid": '{"weights_sha256": ""}'})
    results = [trained(cell, 20) for cell in cells]
    findings = Findings(results, make_split(), make_meta(), "small", "cpu", tmp_path)
    assert findings.ensembles == {"resnet20-sgd": 1.0}
    assert costs(findings)["mean of its seeds, %"].tolist() == ["100.00"]
    assert "mean of its seeds" not in markdown(findings_of(results))


def test_the_share_of_the_largest_class_stands_beside_the_table():
    [cell] = small_grid("sgd")
    split = Split(images=make_split().images, labels=torch.tensor([1] * 38 + [0] * 2))
    findings = Findings([trained(cell, 0, classes=2)], split, make_meta(names=("ant", "bee")), "small", "cpu")
    baseline = (
        "Baseline: whoever always answers bee, the largest class of the test split, is right for 95.00 %."
    )
    assert baseline in markdown(findings)
    assert baseline in page(findings)


HE = {
    "epochs": 165, "warmup": {"steps": 500, "factor": 0.1},
    "schedule": {"name": "piecewise", "boundaries": [32_000, 48_000], "factors": [1.0, 0.1, 0.01]},
}  # fmt: skip
CROPPED = {"flip": True, "crop_padding": 4, "rotation_degrees": 0.0, "shift_fraction": 0.0}


@pytest.mark.parametrize(
    ("cell", "recipe", "data", "published"),
    [
        ("vgg16-sgd-0", {}, {}, 0.9315),
        ("resnet10-adam-0", {}, {}, 0.91),
        ("resnet20-sgd-0", HE, {}, 0.9152),
        ("resnet20-sgd-0", {}, {}, None),
        ("vgg16-adam-0", {}, {}, None),
        ("vgg16-sgd-0", {}, {"source": "image-folder"}, None),  # such as JPEG copies
        ("vgg16-sgd-0", {}, {"source": "digits"}, None),
        ("vgg16-sgd-0", {}, {"num_images": (3200, 10_000)}, None),
        ("vgg16-sgd-0", {"augmentation": CROPPED}, {}, None),
        ("vgg16-sgd-0", {"schedule": {"name": "constant"}, "batch_size": 64}, {}, None),
    ],
)
def test_a_published_figure_stands_beside_measured_ones_of_the_same_data_and_recipe_alone(
    cell, recipe, data, published
):
    params = copy.deepcopy(ROOT)
    params["recipes"][cell.split("-")[0]] |= recipe
    [cell] = [each for each in expand(parse_params(params)) if each.id == cell]
    data = {"names": CIFAR10_CLASSES, "num_images": (50_000, 10_000)} | data
    frame = findings_of([trained(cell, 3)], **data).frame
    if published is None:
        assert frame[["published_accuracy", "difference"]].isna().all(axis=None)
    else:
        assert frame["published_accuracy"].tolist() == [published]
        assert frame["difference"].tolist() == [pytest.approx(0.925 - published)]
        assert readable(frame)["published %"].tolist() == [f"{100 * published:.2f}"]


def test_each_study_of_the_root_stands_beside_the_grids_own_cell_with_what_differs():
    findings = findings_of([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    studies = {study.cell: (study.differs, study.base) for study in findings.studies}
    assert studies["dropout-0p3"] == ("dropout 0.3 for 0.1", "resnet10-adam-0")
    assert studies["batch-32"] == ("batch size 32 for 64", "resnet10-adam-0")
    assert studies["frozen-resnet20"] == ("approach frozen base for end to end", "resnet20-sgd-0")
    assert "initial weights imagenet for random" in studies["frozen-vgg16"][0]
    assert len(studies) == len(ROOT["studies"])
    [(cell, remark)] = findings.frame.set_index("cell")["remark"].dropna().items()
    assert cell == "frozen-resnet20"
    assert "random weights: its batch norms keep" in remark
    assert "do not normalise these images" in remark
    alone = next(result for result in findings.results if result.cell.id == "dropout-0p3")
    [only] = findings_of([alone]).studies  # of a cell that the grid has not
    assert (only.cell, only.differs, only.base) == ("dropout-0p3", "", None)


# --- bad input ---------------------------------------------------------------------------------------


def test_a_grid_of_which_nothing_exists_gives_a_report_that_says_so():
    findings = findings_of([Result(cell=cell, status="missing") for cell in expand(parse_params(ROOT))])
    text = page(findings)
    assert "No cell of the grid has completed, so there is nothing to compare yet." in text
    assert "Missing: 46 of 46 cells have no result yet: batch-128, batch-32" in markdown(findings)
    assert "One cell, closely" not in Page(text).sections


def test_a_grid_of_one_cell_gives_a_report_that_says_that_there_is_nothing_to_compare():
    [cell] = small_grid("sgd")
    findings = findings_of([trained(cell, 0)])
    assert findings.answer[0].startswith("There is nothing to compare yet")
    assert findings.groups[0].accuracy[:3] == (1, pytest.approx(0.9124, abs=1e-4), 1)  # Wilson's
    assert Page(page(findings)).sections == SECTIONS


def test_a_grid_of_failures_alone_shows_each_as_what_it_is():
    cells = small_grid("sgd", "adam", "rmsprop")
    results = [
        Result(cell=cells[0], status="failed", cause="out of <memory>"),
        trained(cells[1], 36, "diverged"),
        Result(cell=cells[2], status="missing"),
    ]
    findings = findings_of(results)
    assert findings.table.loc["resnet20"].tolist() == ["failed", "diverged", "missing"]
    text = page(findings)
    assert "resnet20-sgd-0 failed: out of &lt;memory&gt;" in text
    assert Page(text).tables["Test accuracy, %"][1] == ["resnet20", "failed", "diverged", "missing"]
    assert findings.families["Optimizers"] == []


def test_a_class_that_was_never_predicted_is_named():
    [cell] = small_grid("sgd")
    result = trained(cell, 0)
    labels = make_split().labels.numpy()
    never = Predictions(
        classes=np.where(labels == 2, 0, labels),
        confidence=np.full(NUM_TEST, 0.9, dtype=np.float32),
        correct=labels != 2,
    )
    findings = findings_of([dataclasses.replace(result, predictions=never)])
    assert findings.frame["remark"].tolist() == ["never predicts cow"]  # which `compare` prints as well
    assert "| never predicts cow" in markdown(findings)
    assert findings_of([result]).frame["remark"].isna().all()


def test_of_many_classes_the_confusion_matrix_shows_the_worst():
    classes = 100
    labels = np.repeat(np.arange(classes), 2)
    predicted = labels.copy()
    predicted[[2 * 7, 2 * 93]] = 0  # half of the images of the classes 7 and 93
    predictions = Predictions(
        classes=predicted, confidence=np.ones(200, dtype=np.float32), correct=predicted == labels
    )
    chart = confusion_chart(predictions, labels, tuple(f"class {number}" for number in range(classes)))
    drawn = list(dict.fromkeys(chart.columns["predicted"]))
    assert len(drawn) == MAX_CLASSES
    assert drawn == sorted(drawn, key=lambda name: int(name.split()[1]))
    assert drawn == list(dict.fromkeys(chart.columns["true"]))
    assert {"class 7", "class 93"} <= set(drawn)


def test_the_page_of_13_cells_of_250_epochs_is_small():
    """Each is wrong on images of its own, and noise is what PNG packs the least."""
    cells = small_grid("sgd", "adam", "rmsprop", "adagrad", seeds=3)
    epochs = np.arange(1, 251)
    accuracy = np.random.default_rng(0).random(250)
    history = pd.DataFrame({"epoch": epochs, "test_accuracy": accuracy, "train_accuracy": accuracy})
    cells += small_grid("sgd", architectures=("vgg16",))
    results = [dataclasses.replace(trained(cell, 12), history=history) for cell in cells]
    assert len(results) == 13
    assert len(page(findings_of(results)).encode()) < 1.5e6


def test_a_class_name_cannot_become_part_of_the_page():
    names = ("</script><script>alert(1)</script>", "<b>", "&amp;", "d|og")
    [cell] = small_grid("sgd")
    read = Page(page(findings_of([trained(cell, 5)], names=names)))
    assert read.scripts == ["data", "vega", ""]
    assert read.data["mistakes"]["cells"]["resnet20-sgd-0"][0][1].endswith(f"; is {names[0]}")


# --- the page ----------------------------------------------------------------------------------------

SECTIONS = [  # of a grid without studies, and of nothing that was published
    "Test accuracy, %", "Which differences are significant", "Accuracy and its cost", "Learning curves",
    "One cell, closely", "Every cell", "How it was made",
]  # fmt: skip
WITH_STUDIES = [*SECTIONS[:5], "Studies", *SECTIONS[5:]]


class Page:
    """What a page holds: its sections, the last table of each, links and sources, and the data of its charts."""

    def __init__(self, text: str) -> None:
        self.sections: list[str] = re.findall(r"<h2[^>]*>(.*?)</h2>", text)
        self.addresses: list[str] = re.findall(r'(?:src|href)="(.*?)"', text)
        self.scripts: list[str] = re.findall(r'<script(?:[^>]*id="(\w+)")?', text)
        self.data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
        self.tables = {
            section: [
                [unescape(re.sub("<.*?>", "", each)) for each in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
                for row in re.findall("<tr>(.*?)</tr>", part, re.DOTALL)
            ]
            for section, part in zip(self.sections, re.split("<h2", text)[1:], strict=True)
        }


@pytest.fixture(scope="module")
def small_page(small: Project) -> Page:
    """The page of the small pipeline: two seeds of two optimizers, a study that diverged and one that failed."""
    return Page((small.root / "reports/index.html").read_text())


def test_the_predictions_are_those_of_the_scores_to_the_last_image(small):
    test = load_split(small.root / "data/processed", "test")
    runs = [
        run for run in find_runs(expand(load_params(small.root / "params.yaml")), small.root) if run.record
    ]
    assert len(runs) == 5
    for run in runs:
        result = evaluation.evaluate(run, test, CPU)
        predictions = result.predictions
        assert predictions.correct.mean() == result.scores.accuracy == result.metrics["test_accuracy"]
        assert (predictions.confidence >= 0.1 - 1e-6).all()  # the top one of ten
        np.testing.assert_array_equal(predictions.classes == test.labels.numpy(), predictions.correct)


def test_the_page_agrees_with_the_leaderboard_to_the_last_digit(small, small_page):
    frame = read_leaderboard(small.root / "reports")
    assert small_page.tables["Every cell"] == [list(readable(frame)), *readable(frame).to_numpy().tolist()]
    grid = frame[frame["study"].isna()]
    for place, optimizer in enumerate(("sgd", "adam"), start=1):
        accuracy = 100 * grid.loc[grid["optimizer"] == optimizer, "test_accuracy"]
        shown = small_page.tables["Test accuracy, %"][1][place]
        assert shown == f"{accuracy.mean():.2f} ± {accuracy.std():.2f}"
    accuracy = frame.set_index("cell")["test_accuracy"]
    num_test = load_meta(small.root / "data/processed").num_images["test"]
    for cell, of in small_page.data["chosen"]["confusion-matrix"]["cells"].items():
        rows = zip(of["true"], of["predicted"], of["images"], strict=True)
        assert sum(images for true, guess, images in rows if true == guess) / num_test == accuracy[cell]


def test_the_terminal_says_the_baseline_and_the_sentences_while_they_are_of_todays_weights(small, tmp_path):
    project = small.copy(tmp_path / "project")
    path = project.root / "reports/findings.json"
    findings = json.loads(path.read_text())
    printed = project.run("resgrid", "compare").stdout
    for sentence in (findings["baseline"], *findings["answer"]):
        assert f"{sentence}\n" in printed
    findings["weights_sha256"]["resnet20-sgd-0"] = "of an earlier training"
    path.write_text(json.dumps(findings))
    printed = project.run("resgrid", "compare").stdout
    assert "Results have changed since they were compared" in printed
    assert findings["answer"][0] not in printed


def test_the_same_cells_give_the_same_bytes_and_a_cell_whose_weights_are_gone_is_named(small, tmp_path):
    project = small.copy(tmp_path / "project")
    files = [path.relative_to(small.root) for path in small.root.glob("reports/**/*.*") if path.is_file()]
    assert len(files) > 10
    assert "reports/index.html" in project.run("resgrid", "evaluate", "--device", "cpu").stdout
    for file in files:
        assert (project.root / file).read_bytes() == (small.root / file).read_bytes(), file

    (project.root / "runs/resnet20-sgd-1/weights.safetensors").unlink()
    printed = project.run("resgrid", "evaluate", "--device", "cpu").stdout
    assert "runs/resnet20-sgd-1/weights.safetensors is gone: `dvc checkout --force` restores it." in printed
    frame = read_leaderboard(project.root / "reports").set_index("cell")
    assert frame.loc["resnet20-sgd-1", "status"] == "missing"
    assert frame.loc["resnet20-sgd-0", "status"] == "completed"


def test_page_and_markdown_have_the_same_figures_every_section_and_the_cause_of_a_failure(small, small_page):
    assert small_page.sections == WITH_STUDIES
    assert [address for address in small_page.addresses if not re.match(r"#|data:", address)] == []
    text = (small.root / "reports/report.md").read_text()
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    for row in small_page.tables["Every cell"]:
        assert row in rows
    for sentence in json.loads((small.root / "reports/findings.json").read_text())["answer"]:
        assert f"- {sentence}\n" in text
    assert "no-weights failed: studies.no-weights.initial_weights.path: there is no file" in text
    rows = {row[0]: row for row in small_page.tables["Every cell"]}
    assert "failed" in rows["no-weights"]
    assert "diverged" in rows["too-fast"]


def test_pictures_that_were_left_out_or_are_equal_in_both_splits_stand_in_the_report():
    left_out = {"train": [f"train/one/{i}.png" for i in range(25)], "test": ["test/two/x.png"]}
    equal = {"across_splits": EqualImages(num_images=18, first=("test/a/1.png = train/a/2.png",))}
    meta = make_meta().model_copy(update={"left_out": left_out, "duplicates": equal})
    made = how_it_was_made([], meta, "cpu")
    assert made["Left out"].startswith(
        "26 pictures, broken or in two classes: train/one/0.png, train/one/1.png"
    )
    assert made["Left out"].endswith(", …")
    assert made["Equal pictures across splits"] == "18, such as test/a/1.png = train/a/2.png"


def test_the_report_says_how_it_was_made_and_names_the_commits_that_trained(small):
    results = with_wrong(sgd=[5] * 3)
    results[0].timing.update({"commit": "a" * 40, "dirty": False})
    results[1].timing.update(
        {"commit": "b" * 40, "dirty": True}
    )  # the third was trained before there was one
    assert how_it_was_made(results, make_meta(), "cpu")["Commit that trained"] == (
        f"{'a' * 40} (1 cells); {'b' * 40}, with changes (1 cells); unknown (1 cells)"
    )
    made = (small.root / "reports/report.md").read_text().partition("## How it was made")[2]
    timing = json.loads((small.root / "runs/resnet20-sgd-0/timing.json").read_text())
    meta = load_meta(small.root / "data/processed")
    for part in (
        f"{meta.num_images['train']} train", meta.digest, "Commit that trained", timing["device_name"],
        timing["torch"], "Seeds: 0, 1", "Training time: ", "Begun: ",
    ):  # fmt: skip
        assert part in made, part


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the PATH")
@pytest.mark.parametrize("window", ["1300,1000", "800,1000", "390,844"])
@pytest.mark.parametrize("with_rates", [False, True])
def test_a_real_browser_draws_every_chart_cuts_no_table_and_its_console_stays_empty(
    small, tmp_path, window, with_rates
):
    text = (small.root / "reports/index.html").read_text()
    if with_rates:
        tries = {0.1: 0.5, 0.3: 0.6, 1: 0.7, 3: 0.9, 10: 0.3}
        text = page(tried(sgd=tries, adam=tries, rmsprop=tries))
    # Which tables and which pages are wider than their place, and which charts overlap, once all is drawn.
    measure = """<script>addEventListener("load", () => setTimeout(() => {
      const wide = (each) => each.scrollWidth > each.clientWidth;
      document.body.dataset.cut = [...document.querySelectorAll(".wide"), document.documentElement]
        .filter(wide).map((each) => each.textContent.slice(0, 40)).join();
      const places = [...document.querySelectorAll(".chart")].map((each) => each.getBoundingClientRect());
      document.body.dataset.over = places.filter((one, i) => places.some((other, j) => i < j
        && one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom
      )).length;
    }, 5000))</script>"""
    (tmp_path / "page.html").write_text(text + measure)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={tmp_path}/profile", f"--window-size={window}",
         "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count('class="chart vega-embed') == text.count('<div class="chart" data-') >= 7
    assert done.stdout.count("<figure>") >= 1
    measured = re.search(r'<body data-cut="(.*?)" data-over="(\d+)">', done.stdout, re.DOTALL)
    assert measured is not None
    assert measured[2] == "0"
    if window != "390,844":  # on a phone wide tables scroll in their place
        assert measured[1] == ""
