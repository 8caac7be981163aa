"""Ensembles: means of probabilities, and the selection, by hand; the pipeline's own are in test_extending.py."""

from __future__ import annotations

import numpy as np
import pytest
from test_report import make_split, small_grid, trained

from resgrid.report.ensembles import MAX_MEMBERS, assemble, cross_entropy, mean_probabilities, select


def certain(*probabilities: float) -> np.ndarray:
    """Logits (N, 2) with these probabilities of class 0."""
    p = np.array(probabilities)
    return np.log(np.stack([p, 1 - p], axis=1)).astype(np.float32)


def test_the_mean_is_of_probabilities_and_not_of_logits():
    mean = mean_probabilities([certain(0.9), certain(0.1)], [2, 1])
    np.testing.assert_allclose(mean, [[1.9 / 3, 1.1 / 3]], rtol=1e-6)


def test_cross_entropy_of_a_probability_of_zero_is_finite():
    assert cross_entropy(np.array([0.0])) == pytest.approx(-np.log(np.finfo(float).eps))
    assert cross_entropy(np.array([0.5, 0.25])) == pytest.approx(1.5 * np.log(2))


def test_the_selection_weighs_by_repetition():
    """a gives the two images 0.9 and 0.2, b 0.2 and 0.9, c 0.5 and 0.5: a and b together give 0.55 twice, best
    of all means; c alone, at 0.5 twice, is better than a or b alone, so it is taken first and then outweighed."""
    given = {"a": certain(0.9, 0.2), "b": certain(0.2, 0.9), "c": certain(0.5, 0.5)}
    chosen = select(given, np.array([0, 0]))
    assert chosen["a"] == chosen["b"] > chosen.get("c", 0)
    assert sum(chosen.values()) <= MAX_MEMBERS


def test_one_that_nothing_improves_stays_alone():
    assert select({"good": certain(0.99, 0.99), "bad": certain(0.3, 0.3)}, np.array([0, 0])) == {"good": 1}


def test_with_one_seed_and_no_validation_split_it_says_why_there_is_no_more(tmp_path):
    cells = small_grid(architectures=["resnet20"], optimizers=["sgd"], seeds=[0])
    ensembles, why_not = assemble([trained(cells[0], 1)], tmp_path, {"test": make_split().labels.numpy()})
    assert ensembles == []
    assert [each.partition(":")[0] for each in why_not] == [
        "None over seeds",
        "None over architectures",
        "None by selection",
    ]
    assert "must not decide its members" in why_not[2]
