"""Rates beside the grid's own: their DVC stages for real, and the choice on leaderboards made by hand."""

from __future__ import annotations

import json
import math
import runpy

import pandas as pd
import pytest
from ruamel.yaml import YAML
from small import ROOT, digits

from resgrid.report.leaderboard import by_optimizer, headline
from resgrid.report.rates import Bracket, NotChosen, choose_rates, sentences


def recorded(project):
    """What dvc.lock says of each stage."""
    stages = YAML(typ="safe").load(project.root / "dvc.lock")["stages"]
    return {name: repr(stage) for name, stage in stages.items()}


def repro(project, *arguments):
    """The stages whose command ran."""
    done = project.run("dvc", "repro", *arguments)
    assert done.returncode == 0, done.stderr
    return {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage '")}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = digits(tmp_path_factory.mktemp("rates") / "a project")
    project.set("grid.optimizers=[sgd]", "preprocess.validation_fraction=0.1")
    return project


def test_another_factor_trains_its_own_cells_and_no_factor_leaves_what_is_recorded(project):
    assert repro(project, "train", "train-rate") == {"download", "preprocess", "train@resnet20-sgd-0"}
    before: dict[str, str] = {}
    for factors, stage in (("0.3", "0.3"), ("0.3, 10", "10")):
        before = recorded(project)
        project.set(f"rates.factors=[{factors}]")
        assert repro(project, "train", "train-rate") == {f"train-rate@resnet20-sgd-0-{stage}"}
        assert before.items() <= recorded(project).items()
    for end, rate in (("", 0.05), ("-x0.3", 0.015), ("-x10", 0.5)):
        run = json.loads((project.root / f"runs/resnet20-sgd-0{end}/run.json").read_text())
        assert (run["learning_rate"], run["cell"]) == (rate, f"resnet20-sgd-0{end}")

    everything = recorded(project)
    project.set("rates.factors=[]")
    assert repro(project, "train", "train-rate") == set()
    assert recorded(project) == everything


def test_the_champion_is_a_cell_at_the_chosen_rate_and_at_the_base_rate_once_that_is_gone(project):
    """Also where a cell at another rate is better: findings that choose each rate in turn."""
    project.set("rates.factors=[0.3, 10]")
    repro(project, "train", "train-rate")
    repro(project, "-s", "evaluate")
    path = project.root / "reports/findings.json"
    findings = json.loads(path.read_text())
    assert {point["factor"] for point in findings["rates"][0]["curve"]} == {0.3, 1, 10}

    def champion():
        assert project.run("resgrid", "sync").returncode == 0
        version = project.mlflow.get_model_version_by_alias("small", "champion")
        return project.mlflow.get_run(version.run_id).data.tags["cell"]

    assert champion() in findings["groups"][0]["cells"]
    for factor, cell in ((0.3, "resnet20-sgd-0-x0.3"), (1, "resnet20-sgd-0"), (10, "resnet20-sgd-0-x10")):
        findings["rates"][0]["factor"], findings["groups"][0]["cells"] = factor, {cell: "completed"}
        path.write_text(json.dumps(findings))
        assert champion() == cell
    project.set("rates.factors=[0.3]")
    assert champion() == "resnet20-sgd-0"
    assert " at 0.05\n" in project.run("resgrid", "compare").stdout
    repro(project, "-s", "evaluate")
    assert champion() in json.loads(path.read_text())["groups"][0]["cells"]


def test_the_figure_at_a_chosen_rate_covers_what_the_documentation_says():
    """To a point, with 4,000 data sets a setting; ten comparisons give a false difference in 5 % at most."""
    frame = runpy.run_path(str(ROOT / "benchmarks/intervals.py"))["at_chosen_rates"](4_000)
    is_worst = (frame["curve"] == "flat") & (frame["luck"] == "shared")
    worst, others = frame[is_worst], frame[~is_worst]
    assert (worst["seeds"].tolist(), len(others)) == ([3, 5], 6)
    assert worst["coverage"].tolist() == pytest.approx([91, 90], abs=1)
    assert worst["optimism"].tolist() == pytest.approx([0.17, 0.13], abs=0.02)
    assert others["coverage"].between(94, 96).all()
    assert (others["optimism"] < 0.04).all()
    assert (frame["false of ten"] < 6).all()


# --- the choice, on leaderboards made by hand: 100 validation images, 1,000 test images, 10 classes ------


def board(**optimizers):
    """A leaderboard of ResNet-20 by optimizer and factor, with a study that belongs to no optimizer's tries.

    Of each seed validation and test accuracy; None: diverged.
    """
    rows = [
        {
            "cell": f"resnet20-{optimizer}-{seed}" + ("" if factor == 1 else f"-x{factor:g}"),
            "architecture": "resnet20",
            "optimizer": optimizer,
            "seed": seed,
            "study": None,
            "rate_factor": factor,
            "learning_rate": 0.1 * factor,
            "status": "completed" if accuracies else "diverged",
            "validation_accuracy": accuracies[0] if accuracies else 0.3,  # of its last epoch before
            "test_accuracy": accuracies[1] if accuracies else 0.3,
        }
        for optimizer, factors in optimizers.items()
        for factor, values in factors.items()
        for seed, accuracies in enumerate(values)
    ]
    study = {"cell": "a-study", "study": "a-study", "rate_factor": 1.0, "validation_accuracy": 0.999}
    return pd.DataFrame([*rows, rows[0] | study])


def choices(frame, num_validation=100):
    chosen = choose_rates(frame, num_validation=num_validation, num_test=1000, num_classes=10)
    return {choice.optimizer: choice for choice in chosen}


def sgd(factors):
    return choices(board(sgd=factors))["sgd"]


def test_the_rate_is_chosen_by_validation_and_reported_on_test():
    choice = sgd(
        {
            0.1: [(0.80, 0.90), (0.82, 0.91)],
            1: [(0.70, 0.95), (0.70, 0.97)],  # the best on test
            3: [(0.85, 0.84), (0.87, 0.86)],  # 172 of 200 validation images
            10: [(0.60, 0.80), (0.60, 0.80)],
        }
    )
    assert (choice.factor, choice.not_chosen, choice.bracket) == (3, None, Bracket.INSIDE)
    assert choice.chosen.learning_rate == pytest.approx(0.3)
    assert choice.chosen.test_accuracy == pytest.approx(0.85)
    assert choice.chosen.validation_accuracy == pytest.approx(0.86)
    assert choice.base.test_accuracy == pytest.approx(0.96)
    assert [point.factor for point in choice.curve] == [0.1, 1, 3, 10]


def test_rates_tie_in_whole_images_and_the_nearest_to_the_base_rate_is_taken():
    """100 of 300 images each, though 0.4 + 0.3 + 0.3 is 1 in floats and 0.7 + 0.1 + 0.2 a bit less."""
    more, less = [(0.4, 0.5), (0.3, 0.5), (0.3, 0.5)], [(0.7, 0.5), (0.1, 0.5), (0.2, 0.5)]
    worse = [(0.1, 0.5)] * 3
    assert sgd({0.3: more, 1: worse, 3: less}).factor == 3  # |log 3| is 1.10, |log 0.3| 1.20
    assert sgd({0.1: less, 1: worse, 10: more}).factor == 0.1  # as near as 10, and the lower
    assert sgd({0.3: more, 1: less, 3: more}).factor == 1


def test_one_surviving_seed_is_not_chosen_and_a_diverged_end_brackets():
    choice = sgd({0.3: [(0.60, 0.60)] * 2, 1: [(0.80, 0.80)] * 2, 3: [(0.99, 0.99), None]})
    assert (choice.factor, choice.bracket, choice.to_try) == (1, Bracket.INSIDE, ())
    assert choice.plateau == (1,)
    assert [point.num_diverged for point in choice.curve] == [0, 0, 1]
    assert choice.curve[-1].validation == (0.99, None)


def test_where_every_factor_has_a_diverged_seed_a_diverged_one_counts_as_a_guess():
    choice = sgd(
        {
            0.3: [(0.90, 0.91), None, None],  # 90 + 10 + 10 = 110
            1: [(0.45, 0.40), (0.45, 0.40), None],  # 45 + 45 + 10 = 100
            3: [(0.65, 0.66), (0.65, 0.66), None],  # 65 + 65 + 10 = 140
        }
    )
    assert (choice.factor, choice.one_seed_cost) == (3, None)


@pytest.mark.parametrize("status", ["stale", "other data", "failed", "missing"])
def test_nothing_is_chosen_for_an_architecture_with_a_cell_that_has_no_current_result(status):
    tried = {0.3: [(0.9, 0.9)], 1: [(0.8, 0.8)], 3: [(0.7, 0.7)]}
    frame = board(sgd=tried, adam=tried)
    frame.loc[frame["cell"] == "resnet20-adam-0-x3", "status"] = status
    for choice in choices(frame).values():
        assert (choice.factor, choice.not_chosen) == (1, NotChosen.INCOMPLETE)
        assert choice.missing == ("resnet20-adam-0-x3",)
        assert (choice.bracket, choice.expected_test_accuracy, choice.plateau) == (None, (), ())
        assert choice.base.test_accuracy == pytest.approx(0.8)


def test_nothing_is_chosen_without_a_validation_split_or_without_factors():
    frame = board(sgd={0.3: [(0.9, 0.9)], 1: [(0.8, 0.8)]}).assign(validation_accuracy=float("nan"))
    assert choices(frame, num_validation=0)["sgd"].not_chosen is NotChosen.NO_VALIDATION
    assert sgd({1: [(0.8, 0.8)]}).not_chosen is NotChosen.NO_FACTORS
    assert sgd({1: [(0.8, 0.8)]}).chosen.test_accuracy == pytest.approx(0.8)


def flat(*validation):
    """Two seeds of 100 images each at 0.1, 0.3, 1, 3, 10; a point is 2 of the 200 images."""
    return {f: [(v, 0.5), (v, 0.5)] for f, v in zip((0.1, 0.3, 1, 3, 10), validation, strict=True)}


@pytest.mark.parametrize(
    ("validation", "factor", "bracket", "to_try", "plateau"),
    [
        # the best rate at an end is not bracketed, and the next factor is named
        ((0.5, 0.6, 0.7, 0.8, 0.9), 10, Bracket.AT_END, (30,), (10,)),
        ((0.9, 0.8, 0.7, 0.6, 0.5), 0.1, Bracket.AT_END, (0.03,), (0.1,)),
        # an end within a point of the best may have the best behind it
        ((0.5, 0.6, 0.7, 0.90, 0.89), 3, Bracket.REACHES_END, (30,), (3, 10)),
        ((0.5, 0.6, 0.7, 0.90, 0.88), 3, Bracket.INSIDE, (), (3,)),
        # the plateau is what lies within a point and is contiguous: 0.1 is as good as 1, but 0.3 lies between
        ((0.5, 0.89, 0.90, 0.89, 0.6), 1, Bracket.INSIDE, (), (0.3, 1, 3)),
        ((0.90, 0.80, 0.90, 0.89, 0.6), 1, Bracket.REACHES_END, (0.03,), (1, 3)),
    ],
)
def test_the_best_rate_is_bracketed_by_worse_ones_or_what_to_try_is_named(
    validation, factor, bracket, to_try, plateau
):
    choice = sgd(flat(*validation))
    assert (choice.factor, choice.bracket, choice.to_try, choice.plateau) == (
        factor,
        bracket,
        to_try,
        plateau,
    )


def test_no_factor_beyond_those_that_params_yaml_allows_is_named():
    for factor in (0.001, 1000):
        choice = sgd({1: [(0.8, 0.8)], factor: [(0.9, 0.9)]})
        assert (choice.factor, choice.bracket, choice.to_try) == (factor, Bracket.AT_END, ())
        assert sentences([choice]) == [
            f"resnet20-sgd: the best factor, {factor:g}, is an end of those tried: not bracketed."
        ]
    assert sgd({1: [(0.9, 0.9)], 900: [(0.89, 0.9)], 0.0005 * 4: [(0.5, 0.5)]}).to_try == (1000,)
    assert sgd({1: [(0.8, 0.8)], 0.002: [(0.9, 0.9)]}).to_try == (0.001,)


def test_tables_and_headline_at_the_base_rate_leave_other_rates_out():
    """At 3 times its rate the cell is more accurate on test; to show it as the result would choose by test."""
    frame = board(sgd={1: [(0.8, 0.80), (0.8, 0.82)], 3: [(0.7, 0.99), (0.7, 0.99)]})
    frame = frame[frame["study"].isna()].sort_values("test_accuracy", ascending=False)
    assert by_optimizer(frame, {}).loc["resnet20", "sgd"] == "81.00 ± 1.41"  # deviation 0.02 / sqrt(2)
    assert (headline(frame, {})["best_cell"], headline(frame, {})["completed"]) == ("resnet20-sgd-1", 4)
    assert by_optimizer(frame, {"resnet20-sgd": 3}).loc["resnet20", "sgd"] == "99.00 ± 0.00 at 0.3"
    assert headline(frame, {"resnet20-sgd": 3})["best_cell_test_accuracy"] == 0.99


def test_expected_accuracy_after_k_tries_is_the_mean_over_all_sets_of_k_factors():
    """One seed. By validation 1 (test 0.70), 10 (0.72), 0.1 (0.50): of the three pairs two have 1, one 10."""
    choice = sgd({0.1: [(0.6, 0.50)], 1: [(0.8, 0.70)], 10: [(0.7, 0.72)]})
    expected = [(0.70 + 0.72 + 0.50) / 3, (2 * 0.70 + 0.72) / 3, 0.70]
    assert [interval.estimate for interval in choice.expected_test_accuracy] == pytest.approx(expected)
    assert all(math.isnan(interval.low) for interval in choice.expected_test_accuracy)
    assert choice.one_seed_cost == pytest.approx(0)


def test_expected_accuracy_ranks_a_diverged_try_last_and_counts_it_as_a_guess():
    """Seed 0 as above. Seed 1: 0.1 (test 0.80), 1 (0.60), and a guess among 10 classes (0.10)."""
    choice = sgd({0.1: [(0.6, 0.50), (0.9, 0.80)], 1: [(0.8, 0.70), (0.7, 0.60)], 10: [(0.7, 0.72), None]})
    seeds = [(0.64, 0.5), ((2 * 0.70 + 0.72) / 3, (2 * 0.80 + 0.60) / 3), (0.70, 0.80)]
    assert [interval.estimate for interval in choice.expected_test_accuracy] == pytest.approx(
        [sum(pair) / 2 for pair in seeds]
    )
    # Of 0.70 and 0.80 the standard error is 0.05; t of one degree of freedom is 12.706.
    assert choice.expected_test_accuracy[-1].low == pytest.approx(0.75 - 12.706 * 0.05, abs=1e-4)
    assert choice.expected_test_accuracy[-1].high == 1  # 0.75 + 12.706 * 0.05 is no accuracy
    # 60 + 90 images at 0.1 tie with 80 + 70 at 1, which is chosen; its test accuracy is 0.65.
    assert (choice.factor, choice.chosen.test_accuracy) == (1, pytest.approx(0.65))
    assert choice.one_seed_cost == pytest.approx(0.65 - 0.75)
