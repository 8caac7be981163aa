"""The report: what is compared with what, its sentences, and the page itself."""

from __future__ import annotations

import base64
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

from resgrid import evaluation
from resgrid.cli import main
from resgrid.config import Digits, Preprocess, load_params, parse_params
from resgrid.convert import CIFAR10_CLASSES
from resgrid.data.dataset import (
    EqualImages,
    Meta,
    Split,
    content_digest,
    load_meta,
    load_split,
    save,
    split_digest,
)
from resgrid.data.fetch import download
from resgrid.data.preprocess import preprocess
from resgrid.errors import ResgridError
from resgrid.evaluation import Predictions, Result
from resgrid.grid import Cell, compared_factors, expand
from resgrid.report.figures import MAX_CLASSES, charts
from resgrid.report.figures import confusion_matrix as confusion_chart
from resgrid.report.findings import Findings, how_it_was_made
from resgrid.report.leaderboard import headline, read_leaderboard, readable
from resgrid.report.page import markdown, most_confident_mistakes
from resgrid.report.page import page as draw_page
from resgrid.report.statistics import Interval
from resgrid.report.tables import costs as costs_table
from resgrid.report.tables import published as published_table
from resgrid.report.tables import rates as rates_table
from resgrid.report.tables import studies as studies_table
from resgrid.run_status import find_runs, noted_failure
from resgrid.train_cell import train_cell

ROOT = YAML(typ="safe").load(Path(__file__).parents[1] / "params.yaml")
CPU = torch.device("cpu")
NAMES = ("ant", "bee", "cow", "dog")
NUM_TEST = 40


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


def found(results: list[Result], **meta: Any) -> Findings:
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
        result = trained(cell, int(10 * cell.rate_factor) + cell.seed)
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
    assert compared_factors(json.loads(json.dumps(findings.as_dict()))) == findings.factors

    text, drawn = markdown(findings), page(findings)
    assert "resnet20-sgd: the best factor, 3, is an end of those tried: not bracketed: try 10." in text
    assert "not bracketed: try 0.03." in text
    assert "Accuracy by rate, resnet20" in drawn
    [chart] = charts(findings)["rates"]
    assert len(chart.columns["rate"]) == 2 * 3 * 2
    assert sum(chart.columns["chosen"]) == 4
    row = rates_table(findings).set_index("architecture, optimizer").loc["resnet20-adam"]
    assert (row["factor"], row["validation %"], row["test %"], row["test % there"]) == (
        "0.1", "90.00", "96.25", "73.75",
    )  # fmt: skip


def test_without_factors_the_report_says_nothing_of_rates():
    findings = found(
        with_wrong(small_grid(architectures=["resnet20"], optimizers=["sgd"], seeds=[0]), sgd=[3])
    )
    assert (findings.rates, findings.factors, findings.rate_sentences) == ([], {}, [])
    assert "Learning rates" not in markdown(findings)
    assert findings.table.loc["resnet20", "sgd"] == "92.50"


def test_cells_with_the_same_seeds_are_compared_in_pairs_by_seed():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    [comparison] = found(with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15])).families["Optimizers"]
    theirs = stats.ttest_rel(1 - np.array([2, 6, 4]) / 40, 1 - np.array([12, 15, 15]) / 40)
    interval = theirs.confidence_interval(0.95)
    assert comparison.difference == (
        pytest.approx(0.25), pytest.approx(interval.low), pytest.approx(interval.high),
        pytest.approx(theirs.pvalue), "3 seeds, paired",
    )  # fmt: skip
    assert (comparison.verdict, comparison.epochs) == ("sgd is ahead", "2")


def test_cells_with_other_seeds_are_compared_unpaired():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    results = with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15])
    results[5] = trained(cells[5], 30, "diverged")  # adam with seed 2
    [comparison] = found(results).families["Optimizers"]
    assert comparison.difference is not None
    assert comparison.difference.basis == "2 to 3 seeds, unpaired"
    assert comparison.difference.estimate == pytest.approx((13.5 - 4) / 40)


def test_a_mean_over_architectures_has_the_seed_as_its_replicate():
    """By seed: (10 + 8) / 2 and (14 + 4) / 2 images, so both 9: the differences tie, though no cell's do."""
    wrong = {
        "resnet20-sgd": [2, 3],
        "resnet20-adam": [12, 17],
        "resnet32-sgd": [1, 4],
        "resnet32-adam": [9, 8],
    }
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"], seeds=[0, 1])
    [comparison] = found([trained(c, wrong[c.id.rpartition("-")[0]][c.seed]) for c in cells]).families[
        "Optimizers"
    ]
    assert comparison.over == ["resnet20", "resnet32"]
    assert comparison.difference is not None
    assert comparison.difference.estimate == pytest.approx(9 / 40)
    assert comparison.verdict == "not significant, since the seeds tie"


def test_an_architecture_with_one_seed_is_left_out_where_others_have_more():
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"], seeds=[0, 1])
    results = [
        trained(cell, 4 if cell.optimizer.name == "sgd" else 8 + cell.seed)
        if cell.id != "resnet32-adam-0"
        else trained(cell, 30, "diverged")
        for cell in cells
    ]
    [comparison] = found(results).families["Optimizers"]
    assert (comparison.first, comparison.second) == ("sgd", "adam")
    assert (comparison.over, comparison.num_seeds) == (["resnet20"], 2)


def test_with_one_seed_two_models_are_compared_over_test_images_by_mcnemars_test():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"])
    [comparison] = found(with_wrong(cells, sgd=[2], adam=[12])).families["Optimizers"]
    assert comparison.difference is not None
    assert comparison.difference.basis == "40 test images, one seed"
    assert comparison.difference.p == stats.binomtest(0, 10).pvalue  # 10 images that sgd alone has right


def test_many_comparisons_are_tested_together_by_holms_method():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    first, second, third = found(with_wrong(cells, sgd=[2], adam=[8], rmsprop=[8])).families["Optimizers"]
    assert first.difference is not None
    assert first.difference.p == pytest.approx(2 / 64)  # 6 of 6 images
    assert [c.p for c in (first, second, third)] == pytest.approx([6 / 64, 6 / 64, 1])
    assert first.difference.excludes_zero
    assert first.verdict == "not significant after correction for 3 comparisons"
    assert third.verdict == "not significant"


def test_each_depth_is_compared_with_the_next_and_the_deepest_with_the_shallowest():
    cells = small_grid(
        architectures=["resnet20", "resnet44", "resnet110", "resnet10", "vgg16"], optimizers=["sgd"]
    )
    depths = found([trained(cell, 4) for cell in cells]).families["Depths"]
    assert [(c.first, c.second) for c in depths] == [
        ("resnet44", "resnet20"), ("resnet110", "resnet44"), ("resnet110", "resnet20"),
    ]  # fmt: skip
    assert {c.verdict for c in depths} == {"not significant"}


def test_a_sentence_says_what_was_compared_with_how_many_seeds_and_epochs():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    findings = found(with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15]))
    assert findings.answer == [
        "sgd is ahead of adam by 25.00 points (18.79 to 31.21) over resnet20 (3 seeds, paired; 2 epochs)."
    ]
    assert findings.how_to_read[0].startswith("Intervals over seeds are Student's t")


def test_with_one_seed_nothing_is_concluded_of_optimizers():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"])
    findings = found(with_wrong(cells, sgd=[2], adam=[12]))
    [sentence] = findings.answer
    assert sentence.startswith("The models of sgd are ahead of those of adam by 25.00 points")
    assert sentence.endswith("over resnet20 (40 test images, one seed; 2 epochs).")
    assert "differ cannot be concluded: add seeds to grid.seeds" in findings.how_to_read[0]


@pytest.mark.parametrize(
    ("sgd", "adam", "reason"), [([2, 2], [12, 12], ", since the seeds tie"), ([2, 3], [12, 2], "")]
)
def test_no_sentence_concludes_from_seeds_that_tie_or_an_interval_with_zero(sgd, adam, reason):
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1])
    findings = found(with_wrong(cells, sgd=sgd, adam=adam))
    assert findings.answer == [
        f"sgd and adam do not differ significantly{reason} (2 seeds, paired; 2 epochs)."
    ]


def test_a_family_without_a_significant_difference_is_one_sentence_and_one_figure_and_no_table():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    findings = found(with_wrong(cells, sgd=[2], adam=[8], rmsprop=[8]))
    assert findings.answer == [
        "sgd, adam and rmsprop do not differ significantly: none of the 3 differences between optimizers is "
        "significant after correction for 3 comparisons (smallest p 0.094; over 40 test images, one seed)."
    ]
    text = markdown(findings)
    assert "compared\n" not in text
    assert text.count("(figures/differences-between-optimizers.png)") == 1
    [chart] = charts(findings)["differences"]
    assert len(chart.columns["row"]) == 3


def test_the_findings_as_data_have_each_comparison_with_its_p_and_hold_no_nan():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam"], seeds=[0, 1, 2])
    findings = found(with_wrong(cells, sgd=[2, 6, 4], adam=[12, 15, 15]))
    data = json.loads(json.dumps(findings.as_dict(), allow_nan=False))
    [comparison] = data["comparisons"]
    assert (comparison["first"], comparison["second"], comparison["significant"]) == ("sgd", "adam", True)
    assert comparison["p_holm"] == pytest.approx(
        stats.ttest_rel(np.array([2, 6, 4]), np.array([12, 15, 15])).pvalue
    )
    assert comparison["difference"]["low"] == pytest.approx(0.1879, abs=1e-4)
    assert [each["accuracy"]["estimate"] for each in data["groups"]] == pytest.approx([0.9, 0.65])
    assert data["answer"] == findings.answer


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
    assert costs_table(findings)["mean of its seeds, %"].tolist() == ["100.00"]
    assert "mean of its seeds, %" not in costs_table(found(results))


def test_the_share_of_the_largest_class_stands_beside_the_table():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    split = Split(images=make_split().images, labels=torch.tensor([1] * 38 + [0] * 2))
    findings = Findings([trained(cell, 0, classes=2)], split, make_meta(names=("ant", "bee")), "small", "cpu")
    baseline = (
        "Baseline: whoever always answers bee, the largest class of the test split, is right for 95.00 %."
    )
    assert baseline in markdown(findings)
    assert baseline in page(findings)


def test_what_did_not_complete_is_left_out_and_that_is_said():
    cells = small_grid(architectures=["resnet20", "resnet32"], optimizers=["sgd", "adam"])
    results = [trained(cell, 4) for cell in cells[:3]] + [Result(cell=cells[3], status="missing")]
    assert any(
        sentence.startswith("1 of the grid's 4 cells have no completed run")
        for sentence in found(results).how_to_read
    )


CIFAR10 = {"names": CIFAR10_CLASSES, "num_images": (50_000, 10_000)}


def test_a_published_figure_stands_beside_a_measured_one_of_the_same_data_and_recipe():
    cells = small_grid(architectures=["vgg16", "resnet10"], optimizers=["sgd", "adam"])
    findings = found([trained(cell, 3 if cell.architecture == "vgg16" else 20) for cell in cells], **CIFAR10)
    far, near = findings.published  # of resnet10-adam and vgg16-sgd, with the root's params
    assert (near.name, near.accuracy, near.differences) == ("vgg16-sgd", 0.9315, [])
    assert near.measured.estimate == pytest.approx(0.925)
    assert near.measured.contains(near.accuracy)
    assert not far.measured.contains(far.accuracy)
    assert published_table(findings).iloc[1][["difference, points", "within the interval"]].tolist() == [
        "-0.65",
        "yes",
    ]
    assert near.measured.basis == "40 test images"
    assert Page(page(findings)).sections == [*SECTIONS[:6], "Published and measured", *SECTIONS[6:]]
    row = findings.frame.set_index("cell").loc["vgg16-sgd-0"]
    assert row["difference"] == pytest.approx(0.925 - 0.9315)
    assert found(findings.results, source="digits").published == []


@pytest.mark.parametrize(
    ("recipe", "data", "differences"),
    [
        ({"epochs": 20}, {}, ["epochs 20 of 250"]),
        ({}, {"source": "image-folder"}, ["images of the source image-folder, such as JPEG copies"]),
        ({}, {"num_images": (3200, 10_000)}, ["3,200 of 50,000 train images"]),
        ({"augmentation": {"flip": True, "crop_padding": 4, "rotation_degrees": 0.0, "shift_fraction": 0.0}}, {},
         ["other augmentation"]),
        ({"schedule": {"name": "constant"}, "batch_size": 64}, {}, ["batch size 64 for 128", "other schedule"]),
    ],
)  # fmt: skip
def test_a_published_figure_of_other_circumstances_says_which_and_is_compared_with_nothing(
    recipe, data, differences
):
    params = copy.deepcopy(ROOT) | {"studies": {}}
    params["grid"] = {"architectures": ["vgg16"], "optimizers": ["sgd"], "seeds": [0]}
    params["recipes"]["vgg16"] |= recipe
    [cell] = expand(parse_params(params))
    findings = found([trained(cell, 3)], **(CIFAR10 | data))
    [row] = findings.published
    assert row.differences == differences
    table = published_table(findings)
    assert table["not comparable, for"].tolist() == [", ".join(differences)]
    assert not {"measured % (95 % interval)", "difference, points"} & set(table)
    [cells] = findings.frame.to_dict("records")
    assert pd.isna(cells["published_accuracy"])
    assert pd.isna(cells["difference"])
    assert cells["remark"] == f"not beside its published figure: {', '.join(differences)}"


def test_the_recipe_of_the_published_resnets_can_be_given_in_params():
    params = copy.deepcopy(ROOT) | {"studies": {}}
    params["grid"] = {"architectures": ["resnet20"], "optimizers": ["sgd"], "seeds": [0]}
    [before] = found([trained(expand(parse_params(params))[0], 3)], **CIFAR10).published
    assert before.differences == ["epochs 250 of 165", "other schedule", "other warmup"]
    params["recipes"]["resnet20"] |= {
        "epochs": 165,
        "schedule": {"name": "piecewise", "boundaries": [32_000, 48_000], "factors": [1.0, 0.1, 0.01]},
        "warmup": {"steps": 500, "factor": 0.1},
    }
    [after] = found([trained(expand(parse_params(params))[0], 3)], **CIFAR10).published
    assert after.differences == []


def test_a_frozen_base_with_random_weights_says_so_in_its_rows():
    findings = found([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    remarks = findings.frame.set_index("cell")["remark"].dropna()
    assert list(remarks.index) == ["frozen-resnet20"]
    assert "random weights" in remarks["frozen-resnet20"]
    assert "do not normalise these images" in remarks["frozen-resnet20"]
    rows = studies_table(findings).set_index("cell")["remark"]
    assert list(rows[rows != ""].index) == ["frozen-resnet20"]


def test_the_studies_of_the_root_vary_four_things_beside_the_grids_own_cell():
    findings = found([trained(cell, 4) for cell in expand(parse_params(ROOT))])
    levels: dict[tuple[str, str], list[str]] = {}
    for level in findings.studies:
        levels.setdefault((level.factor, level.series), []).append(level.text)
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
    assert (only.factor, only.text) == ("study", "dropout-0p3")


# --- bad input ---------------------------------------------------------------------------------------


def test_a_grid_of_which_nothing_exists_gives_a_report_that_says_so():
    findings = found([Result(cell=cell, status="missing") for cell in expand(parse_params(ROOT))])
    text = page(findings)
    assert "No cell of the grid has completed, so there is nothing to compare yet." in text
    assert "Missing: 46 of 46 cells have no result yet: batch-128, batch-32" in markdown(findings)
    assert Page(text).sections == WITH_STUDIES


def test_a_grid_of_one_cell_gives_a_report_that_says_that_there_is_nothing_to_compare():
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    findings = found([trained(cell, 0)])
    assert findings.answer[0].startswith("There is nothing to compare yet")
    accuracy = findings.groups[0].accuracy
    assert accuracy is not None
    assert (accuracy.estimate, accuracy.low, accuracy.high) == (
        1,
        pytest.approx(0.9124, abs=1e-4),
        1,
    )  # Wilson's
    assert Page(page(findings)).sections == SECTIONS


def test_a_grid_of_failures_alone_shows_each_as_what_it_is():
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd", "adam", "rmsprop"])
    results = [
        Result(cell=cells[0], status="failed", cause="out of <memory>"),
        trained(cells[1], 36, "diverged"),
        Result(cell=cells[2], status="missing"),
    ]
    findings = found(results)
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
    findings = found([dataclasses.replace(result, predictions=never)])
    assert findings.frame["remark"].tolist() == ["never predicts cow"]  # which `compare` prints as well
    assert "| never predicts cow" in markdown(findings)
    assert "Never predicts cow." in page(findings)
    assert found([result]).frame["remark"].isna().all()


def test_of_many_classes_the_confusion_matrix_shows_the_worst():
    classes = 100
    labels = np.repeat(np.arange(classes), 2)
    predicted = labels.copy()
    predicted[[2 * 7, 2 * 93]] = 0  # half of the images of the classes 7 and 93
    said = Predictions(
        classes=predicted, confidence=np.ones(200, dtype=np.float32), correct=predicted == labels
    )
    chart = confusion_chart(said, labels, tuple(f"class {number}" for number in range(classes)))
    shown = list(dict.fromkeys(chart.columns["predicted"]))
    assert len(shown) == MAX_CLASSES
    assert (
        shown
        == sorted(shown, key=lambda name: int(name.split()[1]))
        == list(dict.fromkeys(chart.columns["true"]))
    )
    assert {"class 7", "class 93"} <= set(shown)


def test_a_class_name_cannot_become_part_of_the_page():
    names = ("</script><script>alert(1)</script>", "<b>", "&amp;", "d|og")
    [cell] = small_grid(architectures=["resnet20"], optimizers=["sgd"])
    read = Page(page(found([trained(cell, 5)], names=names)))
    assert read.scripts == ["data", "vega", ""]
    assert read.data["mistakes"]["cells"]["resnet20-sgd-0"][0]["is"] in names


# --- the page ----------------------------------------------------------------------------------------

SECTIONS = [  # of a grid without studies, and of nothing that was published
    "Test accuracy, %", "Which differences are significant", "Accuracy and its cost", "Learning curves",
    "Generalisation gap and calibration", "One cell, closely", "Every cell", "How it was made",
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
                "sgd": {"lr": 0.05, "nesterov": True},
                "adam": {"lr": 0.001},
                "rmsprop": {"lr": 0.001},
                "adagrad": {"lr": 0.01},
                "adamw": {"lr": 0.001, "weight_decay": 0.05},
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
    for run in find_runs(cells_of(pipeline), pipeline):
        result = evaluation.evaluate(run, test, CPU)
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
    for cell, of in by_cell.items():
        rows = zip(of["true"], of["predicted"], of["images"], strict=True)
        assert sum(images for true, predicted, images in rows if true == predicted) / test == accuracy[cell]


def test_the_page_has_every_section_and_asks_nothing_of_the_network(here, capsys):
    said, read = evaluate(here, capsys)
    assert "reports/index.html" in said
    assert read.sections == WITH_STUDIES
    for address in read.addresses:
        assert re.match(r"#|data:", address), address
    assert (here / "reports/index.html").stat().st_size < 1.5e6


def test_the_terminal_says_the_baseline_and_the_sentences_while_they_are_of_todays_weights(here, capsys):
    evaluate(here, capsys)
    findings = json.loads((here / "reports/findings.json").read_text())
    assert main(["compare"]) == 0
    printed = capsys.readouterr().out
    for sentence in (findings["baseline"], *findings["answer"]):
        assert f"{sentence}\n" in printed
    findings["weights_sha256"]["resnet20-sgd-0"] = "of an earlier training"
    (here / "reports/findings.json").write_text(json.dumps(findings))
    assert main(["compare"]) == 0
    printed = capsys.readouterr().out
    assert "Results have changed since they were compared" in printed
    assert findings["answer"][0] not in printed


def test_the_same_cells_give_the_same_bytes(here, capsys):
    evaluate(here, capsys)
    files = ("leaderboard.csv", "metrics.json", "findings.json", "report.md", "index.html",
             "figures/test-accuracy.png", "figures/differences-between-optimizers.png")  # fmt: skip
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
    for sentence in json.loads((here / "reports/findings.json").read_text())["answer"]:
        assert f"- {sentence}\n" in text
    for title in ("Which differences are significant", "Studies", "How it was made"):
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
    assert row[1:3] == ["", "failed"]
    [row] = [row for row in read.tables["Every cell"] if row[0] == "resnet20-adam-1"]
    assert row[2] == "missing"


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


def test_pictures_that_were_left_out_stand_in_the_report():
    names = [f"train/one/{i}.png" for i in range(25)]
    meta = make_meta().model_copy(update={"left_out": {"train": names, "test": ["test/two/x.png"]}})
    said = how_it_was_made([], meta, "cpu")["Left out"]
    assert said.startswith("26 pictures, broken or in two classes: train/one/0.png, train/one/1.png")
    assert said.endswith(", …")


def test_equal_pictures_in_both_splits_stand_in_the_report():
    equal = EqualImages(num_images=18, first=("test/a/1.png = train/a/2.png",))
    meta = make_meta().model_copy(update={"duplicates": {"across_splits": equal}})
    made = how_it_was_made([], meta, "cpu")
    assert made["Equal pictures across splits"] == "18, such as test/a/1.png = train/a/2.png"


def test_the_report_names_the_commits_that_trained_and_not_the_one_of_the_evaluation():
    results = with_wrong(
        small_grid(architectures=["resnet20"], optimizers=["sgd"], seeds=[0, 1, 2, 3]), sgd=[5] * 4
    )
    origins: list[dict[str, Any]] = [
        {"commit": "a" * 40, "dirty": False},
        {"commit": "a" * 40, "dirty": False},
        {"commit": "b" * 40, "dirty": True},
        {},  # trained before timing.json had a commit
    ]
    for result, origin in zip(results, origins, strict=True):
        assert result.timing is not None
        result.timing.update(origin)
    assert how_it_was_made(results, make_meta(), "cpu")["Commit that trained"] == (
        f"{'a' * 40} (2 cells); {'b' * 40}, with changes (1 cells); unknown (1 cells)"
    )


def test_the_report_tells_how_it_was_made(here, capsys):
    _, read = evaluate(here, capsys)
    made = Path("reports/report.md").read_text().partition("## How it was made")[2]
    meta = load_meta(here / "data/processed")
    timing = json.loads((here / "runs/resnet20-sgd-0/timing.json").read_text())
    for part in (
        "digits: 96 train, 48 test images of 10 classes", meta.digest, "Commit that trained", timing["device_name"],
        timing["torch"], "Seeds: 0, 1", "Training time: ", "Begun: ",
    ):  # fmt: skip
        assert part in made, part
    assert read.sections[-1] == "How it was made"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the PATH")
@pytest.mark.parametrize("window", ["1300,1000", "800,1000", "390,844"])
def test_a_real_browser_draws_every_chart_cuts_no_table_and_its_console_stays_empty(
    here, capsys, tmp_path, window
):
    evaluate(here, capsys)
    page = (here / "reports/index.html").read_text()
    # Which tables and which pages are wider than their place, once all is drawn.
    measure = """<script>addEventListener("load", () => setTimeout(() => {
      const wide = (each) => each.scrollWidth > each.clientWidth;
      document.body.dataset.cut = [...document.querySelectorAll(".wide"), document.documentElement]
        .filter(wide).map((each) => each.textContent.slice(0, 40)).join();
    }, 5000))</script>"""
    (tmp_path / "page.html").write_text(page + measure)
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--no-first-run", f"--user-data-dir={tmp_path}/profile", f"--window-size={window}",
         "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True, env=os.environ | {"HOME": str(tmp_path)},
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    places = page.count('<div class="chart" data-')
    assert done.stdout.count('class="chart vega-embed') == places > 8
    assert done.stdout.count("<figcaption>") >= 1
    assert re.search(r'<th [^>]*tabindex="0"', done.stdout)  # a table is sorted from the keyboard as well
    cut = re.search(r'<body data-cut="(.*?)">', done.stdout, re.DOTALL)
    assert cut is not None
    if window != "390,844":  # on a phone wide tables scroll in their place
        assert cut[1] == ""


def test_points_are_written_with_their_sign():
    assert Interval(0.0041, -0.0012, 0.007, 0.2, "3 seeds").text("+") == "+0.41 (-0.12 to +0.70)"
