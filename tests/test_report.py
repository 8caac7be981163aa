"""The report: what is compared with what, its sentences, and the page itself."""

from __future__ import annotations

import copy
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
from safetensors.torch import save_file
from scipy import stats
from small import Project

from resgrid import evaluation
from resgrid.config import load_params, parse_params
from resgrid.convert import CIFAR10_CLASSES
from resgrid.data.dataset import EqualImages, Meta, Split, content_digest, load_meta, load_split
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell, compared_factors, expand
from resgrid.report import tables
from resgrid.report.figures import MAX_CLASSES, charts
from resgrid.report.figures import confusion_matrix as confusion_chart
from resgrid.report.findings import Findings, how_it_was_made
from resgrid.report.leaderboard import headline, read_leaderboard, readable
from resgrid.report.page import markdown, most_confident_mistakes
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


def small_grid(**grid: list[Any]) -> list[Cell]:
    """The cells of a part of the root's grid, without its studies."""
    return expand(parse_params(ROOT | {"grid": ROOT["grid"] | grid, "studies": {}}))


def findings_of(results: list[Result], **meta: Any) -> Findings:
    return Findings(results, make_split(), make_meta(**meta), "small", "cpu")


def page(findings: Findings) -> str:
    return draw_page(findings, charts(findings))


def with_wrong(cells: list[Cell], **wrong: list[int]) -> list[Result]:
    """Completed `cells` of one architecture: `sgd=[3, 5]` are the wrong images of its seeds in order."""
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
    assert (
        compared_factors(json.loads(json.dumps(findings.as_dict())), set(findings.frame["cell"]))
        == findings.factors
    )

    text, drawn = markdown(findings), page(findings)
    assert "resnet20-sgd: the best factor, 3, is an end of those tried: not bracketed: try 10." in text
    assert "not bracketed: try 0.03." in text
    assert "Accuracy by rate, resnet20" in drawn
    [chart] = charts(findings)["rates"]
    assert len(chart.columns["rate"]) == 2 * 3 * 2
    assert sum(chart.columns["chosen"]) == 4
    row = tables.rates(findings).set_index("architecture, optimizer").loc["resnet20-adam"]
    assert (row["factor"], row["validation %"], row["test %"], row["test % there"]) == (
        "0.1", "90.00", "96.25", "73.75",
    )  # fmt: skip


def test_cells_with_the_same_seeds_are_compared_in_pairs_by_seed_in_a_sentence_and_as_data():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    findings = findings_of(with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15]))
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
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    results = with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15])
    results[5] = trained(cells[5], 30, "diverged")  # adam with seed 2
    [comparison] = findings_of(results).families["Optimizers"]
    assert comparison.difference.basis == "2 to 3 seeds, unpaired"
    assert comparison.difference.estimate == pytest.approx((13.5 - 4) / 40)


def test_a_mean_over_architectures_has_the_seed_as_its_replicate():
    """By seed: (10 + 8) / 2 and (14 + 4) / 2 images, so both 9: the differences tie, though no cell's do."""
    wrong = {("resnet20", "sgd"): [2, 3], ("resnet20", "adam"): [12, 17],
             ("resnet32", "sgd"): [1, 4], ("resnet32", "adam"): [9, 8]}  # fmt: skip
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"], seeds=[0, 1])
    results = [trained(cell, wrong[cell.architecture, cell.optimizer.name][cell.seed]) for cell in cells]
    [comparison] = findings_of(results).families["Optimizers"]
    assert comparison.over == ["resnet20", "resnet32"]
    assert comparison.difference.estimate == pytest.approx(9 / 40)
    assert (comparison.is_significant, comparison.reason) == (False, ", since the seeds tie")


def test_an_architecture_with_one_seed_is_left_out_where_others_have_more():
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"], seeds=[0, 1])
    results = [
        trained(cell, 4 if cell.optimizer.name == "sgd" else 8 + cell.seed)
        if cell.id != "resnet32-adam-0"
        else trained(cell, 30, "diverged")
        for cell in cells
    ]
    [comparison] = findings_of(results).families["Optimizers"]
    assert (comparison.first, comparison.second) == ("sgd", "adam")
    assert (comparison.over, comparison.num_seeds) == (["resnet20"], 2)


def test_many_comparisons_are_tested_together_by_holms_method():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    first, second, third = findings_of(with_wrong(cells, sgd=[2], adam=[8], rmsprop=[8])).families[
        "Optimizers"
    ]
    assert first.difference.p == pytest.approx(2 / 64)  # 6 of 6 images
    assert [c.p_holm for c in (first, second, third)] == pytest.approx([6 / 64, 6 / 64, 1])
    assert first.difference.excludes_zero
    assert (first.reason, third.reason) == (" after correction for 3 comparisons", "")


def test_each_depth_is_compared_with_the_next_and_the_deepest_with_the_shallowest():
    cells = small_grid(
        architectures=["resnet20", "resnet44", "resnet110", "resnet10", "vgg16"], optimizers=["sgd"]
    )
    depths = findings_of([trained(cell, 4) for cell in cells]).families["Depths"]
    assert [(c.first, c.second) for c in depths] == [
        ("resnet44", "resnet20"), ("resnet110", "resnet44"), ("resnet110", "resnet20"),
    ]  # fmt: skip
    assert not any(c.is_significant for c in depths)


def test_with_one_seed_nothing_is_concluded_of_optimizers():
    """McNemar's exact test: of 10 images on which the models differ sgd's has all right."""
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"])
    findings = findings_of(with_wrong(cells, sgd=[2], adam=[12]))
    assert findings.comparisons[0].difference.p == stats.binomtest(0, 10).pvalue
    [sentence] = findings.answer
    assert sentence.startswith("The models of sgd are ahead of those of adam by 25.00 points")
    assert sentence.endswith("over resnet20 (40 test images, one seed; 2 epochs; p 0.002).")
    assert "differ cannot be concluded: add seeds to grid.seeds" in markdown(findings)


@pytest.mark.parametrize(
    ("sgd", "adam", "reason"), [([2, 2], [12, 12], ", since the seeds tie"), ([2, 3], [12, 2], "")]
)
def test_no_sentence_concludes_from_seeds_that_tie_or_an_interval_with_zero(sgd, adam, reason):
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1])
    assert findings_of(with_wrong(cells, sgd=sgd, adam=adam)).answer == [
        f"sgd and adam do not differ significantly{reason} (2 seeds, paired; 2 epochs)."
    ]


def test_a_family_without_a_significant_difference_is_one_sentence_and_one_figure():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    findings = findings_of(with_wrong(cells, sgd=[2], adam=[8], rmsprop=[8]))
    assert findings.answer == [
        "sgd, adam and rmsprop do not differ significantly: none of the 3 differences between optimizers is "
        "significant after correction for 3 comparisons (smallest p 0.094; over 40 test images, one seed)."
    ]
    assert markdown(findings).count("(figures/differences-between-optimizers.png)") == 1
    [chart] = charts(findings)["differences"]
    assert len(chart.columns["row"]) == 3


def test_the_mean_over_seeds_is_of_probabilities_and_a_column_of_the_table(tmp_path):
    """Of two networks each sure of its right images and unsure of its wrong ones, the mean is right of all."""
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd"], seeds=[0, 1])
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
    assert tables.costs(findings)["mean of its seeds, %"].tolist() == ["100.00"]
    assert "mean of its seeds" not in markdown(findings_of(results))


def test_the_share_of_the_largest_class_stands_beside_the_table():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    split = Split(images=make_split().images, labels=torch.tensor([1] * 38 + [0] * 2))
    findings = Findings([trained(cell, 0, classes=2)], split, make_meta(names=("ant", "bee")), "small", "cpu")
    baseline = (
        "Baseline: whoever always answers bee, the largest class of the test split, is right for 95.00 %."
    )
    assert baseline in markdown(findings)
    assert baseline in page(findings)


CIFAR10 = {"names": CIFAR10_CLASSES, "num_images": (50_000, 10_000)}


def test_a_published_figure_stands_beside_a_measured_one_of_the_same_data_and_recipe():
    cells = small_grid(architectures=["vgg16", "resnet10"], optimizers=["sgd", "adam"])
    results = [trained(cell, 3 if cell.architecture == "vgg16" else 20) for cell in cells]
    frame = findings_of(results, **CIFAR10).frame.set_index("cell")
    assert frame["published_accuracy"].dropna().to_dict() == {"vgg16-sgd-0": 0.9315, "resnet10-adam-0": 0.91}
    assert frame.loc["vgg16-sgd-0", "difference"] == pytest.approx(0.925 - 0.9315)
    assert readable(frame.reset_index()).set_index("cell").loc["vgg16-sgd-0", "published %"] == "93.15"
    assert findings_of(results, source="digits").frame["published_accuracy"].isna().all()


@pytest.mark.parametrize(
    ("recipe", "data"),
    [
        ({"epochs": 20}, {}),
        ({}, {"source": "image-folder"}),  # such as JPEG copies
        ({}, {"num_images": (3200, 10_000)}),
        ({"augmentation": {"flip": True, "crop_padding": 4, "rotation_degrees": 0.0, "shift_fraction": 0.0}}, {}),
        ({"schedule": {"name": "constant"}, "batch_size": 64}, {}),
    ],
)  # fmt: skip
def test_a_published_figure_of_other_circumstances_is_compared_with_nothing(recipe, data):
    params = copy.deepcopy(ROOT) | {"studies": {}}
    params["grid"] = {"architectures": ["vgg16"], "optimizers": ["sgd"], "seeds": [0]}
    params["recipes"]["vgg16"] |= recipe
    [cell] = expand(parse_params(params))
    frame = findings_of([trained(cell, 3)], **(CIFAR10 | data)).frame
    assert frame[["published_accuracy", "difference"]].isna().all(axis=None)


def test_the_recipe_of_the_published_resnets_can_be_given_in_params():
    params = copy.deepcopy(ROOT) | {"studies": {}}
    params["grid"] = {"architectures": ["resnet20"], "optimizers": ["sgd"], "seeds": [0]}
    before = findings_of([trained(expand(parse_params(params))[0], 3)], **CIFAR10).frame
    assert before["published_accuracy"].isna().all()
    params["recipes"]["resnet20"] |= {
        "epochs": 165,
        "schedule": {"name": "piecewise", "boundaries": [32_000, 48_000], "factors": [1.0, 0.1, 0.01]},
        "warmup": {"steps": 500, "factor": 0.1},
    }
    after = findings_of([trained(expand(parse_params(params))[0], 3)], **CIFAR10).frame
    assert after["published_accuracy"].tolist() == [0.9152]


def test_a_frozen_base_with_random_weights_says_so_in_its_rows():
    findings = findings_of([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    remarks = findings.frame.set_index("cell")["remark"].dropna()
    assert list(remarks.index) == ["frozen-resnet20"]
    assert "random weights" in remarks["frozen-resnet20"]
    assert "do not normalise these images" in remarks["frozen-resnet20"]


def test_each_study_of_the_root_stands_beside_the_grids_own_cell_with_what_differs():
    findings = findings_of([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    studies = {study.cell: (study.differs, study.base) for study in findings.studies}
    assert studies["dropout-0p3"] == ("dropout 0.3 for 0.1", "resnet10-adam-0")
    assert studies["batch-32"] == ("batch size 32 for 64", "resnet10-adam-0")
    assert studies["frozen-resnet20"] == ("approach frozen base for end to end", "resnet20-sgd-0")
    assert "initial weights imagenet for random" in studies["frozen-vgg16"][0]
    assert len(studies) == len(ROOT["studies"])


def test_a_study_of_a_cell_that_the_grid_has_not_stands_alone():
    study = next(cell for cell in expand(parse_params(ROOT)) if cell.id == "dropout-0p3")
    [only] = findings_of([trained(study, 4)]).studies
    assert (only.cell, only.differs, only.base) == ("dropout-0p3", "", None)


# --- bad input ---------------------------------------------------------------------------------------


def test_a_grid_of_which_nothing_exists_gives_a_report_that_says_so():
    findings = findings_of([Result(cell=cell, status="missing") for cell in expand(parse_params(ROOT))])
    text = page(findings)
    assert "No cell of the grid has completed, so there is nothing to compare yet." in text
    assert "Missing: 46 of 46 cells have no result yet: batch-128, batch-32" in markdown(findings)
    assert "One cell, closely" not in Page(text).sections


def test_a_grid_of_one_cell_gives_a_report_that_says_that_there_is_nothing_to_compare():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    findings = findings_of([trained(cell, 0)])
    assert findings.answer[0].startswith("There is nothing to compare yet")
    assert findings.groups[0].accuracy[:3] == (1, pytest.approx(0.9124, abs=1e-4), 1)  # Wilson's
    assert Page(page(findings)).sections == SECTIONS


def test_a_grid_of_failures_alone_shows_each_as_what_it_is():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
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
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
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
    shown = list(dict.fromkeys(chart.columns["predicted"]))
    assert len(shown) == MAX_CLASSES
    assert (
        shown
        == sorted(shown, key=lambda name: int(name.split()[1]))
        == list(dict.fromkeys(chart.columns["true"]))
    )
    assert {"class 7", "class 93"} <= set(shown)


def test_the_page_of_13_cells_of_250_epochs_is_small():
    """Each is wrong on images of its own, and noise is what PNG packs the least."""
    optimizers, seeds = ["sgd", "adam", "rmsprop", "adagrad"], [0, 1, 2]
    cells = small_grid(architectures=["resnet20"], optimizers=optimizers, seeds=seeds)
    epochs = np.arange(1, 251)
    accuracy = np.random.default_rng(0).random(250)
    history = pd.DataFrame({"epoch": epochs, "test_accuracy": accuracy, "train_accuracy": accuracy})
    cells += small_grid(architectures=["vgg16"], optimizers=["sgd"], seeds=[0])
    results = [dataclasses.replace(trained(cell, 12), history=history) for cell in cells]
    assert len(results) == 13
    assert len(page(findings_of(results)).encode()) < 1.5e6


def test_a_class_name_cannot_become_part_of_the_page():
    names = ("</script><script>alert(1)</script>", "<b>", "&amp;", "d|og")
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    read = Page(page(findings_of([trained(cell, 5)], names=names)))
    assert read.scripts == ["data", "vega", ""]
    assert read.data["mistakes"]["cells"]["resnet20-sgd-0"][0]["is"] in names


# --- the page ----------------------------------------------------------------------------------------

SECTIONS = [  # of a grid without studies, and of nothing that was published
    "Test accuracy, %", "Which differences are significant", "Accuracy and its cost", "Learning curves",
    "Calibration", "One cell, closely", "Every cell", "How it was made",
]  # fmt: skip
WITH_STUDIES = [*SECTIONS[:6], "Studies", *SECTIONS[6:]]


class Page(HTMLParser):
    """What a page holds: its sections, tables by section, links and sources, and the data of its charts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sections: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self._in: list[str] = []
        self._data = ""
        self.feed(text)
        self.data = json.loads(self._data)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value for key, value in attributes if key in ("src", "href") and value]
        if tag not in ("meta", "link", "input", "br", "img"):
            self._in.append(tag)
        if tag == "script":
            self.scripts.append(dict(attributes).get("id") or "")
        elif tag == "tr":
            self.tables.setdefault(self.sections[-1], []).append([])
        elif tag in ("td", "th"):
            self.tables[self.sections[-1]][-1].append("")

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
        assert (
            sum(images for true, predicted, images in rows if true == predicted) / num_test == accuracy[cell]
        )


def test_the_page_has_every_section_and_asks_nothing_of_the_network(small_page):
    assert small_page.sections == WITH_STUDIES
    for address in small_page.addresses:
        assert re.match(r"#|data:", address), address


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


def test_the_markdown_has_the_same_figures_as_the_page(small, small_page):
    text = (small.root / "reports/report.md").read_text()
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if "|" in line
    ]
    for row in small_page.tables["Every cell"]:
        assert row in rows
    for sentence in json.loads((small.root / "reports/findings.json").read_text())["answer"]:
        assert f"- {sentence}\n" in text


def test_a_cell_whose_training_failed_is_shown_as_failed_and_why(small, small_page):
    report = (small.root / "reports/report.md").read_text()
    assert "no-weights failed: studies.no-weights.initial_weights.path: there is no file" in report
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


def test_the_report_names_the_commits_that_trained_and_not_the_one_of_the_evaluation():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd"], seeds=[0, 1, 2])
    results = with_wrong(cells, sgd=[5] * 3)
    results[0].timing.update({"commit": "a" * 40, "dirty": False})
    results[1].timing.update(
        {"commit": "b" * 40, "dirty": True}
    )  # the third was trained before there was one
    assert how_it_was_made(results, make_meta(), "cpu")["Commit that trained"] == (
        f"{'a' * 40} (1 cells); {'b' * 40}, with changes (1 cells); unknown (1 cells)"
    )


def test_the_report_says_how_it_was_made(small):
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
    assert done.stdout.count('class="chart vega-embed') == text.count('<div class="chart" data-') > 7
    assert done.stdout.count("<figcaption>") >= 1
    measured = re.search(r'<body data-cut="(.*?)" data-over="(\d+)">', done.stdout, re.DOTALL)
    assert measured is not None
    assert measured[2] == "0"
    if window != "390,844":  # on a phone wide tables scroll in their place
        assert measured[1] == ""
