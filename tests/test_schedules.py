"""Learning rates against hand calculation and against torch's own schedulers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR, StepLR

from resgrid.config import Recipe, load_params
from resgrid.training.schedules import lr_factor

PARAMS = load_params(Path(__file__).parents[1] / "params.yaml")


def recipe(**changes: Any) -> Recipe:
    plain = {"schedule": {"name": "constant"}, "warmup": {"steps": 0, "factor": 1.0}, "time_decay": 0.0}
    return Recipe.model_validate(PARAMS.recipes["resnet20"].model_dump() | plain | changes)


def rates(scheduler_of: Any, steps: int) -> list[float]:
    """The rates that one of torch's schedulers gives an optimizer whose own rate is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler: LRScheduler = scheduler_of(optimizer)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_is_one_from_first_to_last_step():
    assert {lr_factor(recipe(), step, 10, 1000) for step in range(1000)} == {1.0}


def test_drop_is_torchs_step_lr_by_epoch():
    schedule = {"name": "drop", "every_epochs": 3, "factor": 0.5}
    found = [lr_factor(recipe(schedule=schedule), 7 * epoch + 6, 7, 70) for epoch in range(10)]
    assert found == pytest.approx(rates(lambda o: StepLR(o, step_size=3, gamma=0.5), 10))
    assert found == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_drop_comes_with_the_first_step_of_an_epoch():
    drop = recipe(schedule={"name": "drop", "every_epochs": 20, "factor": 0.5})
    assert lr_factor(drop, 20 * 390 - 1, 390, 250 * 390) == 1
    assert lr_factor(drop, 20 * 390, 390, 250 * 390) == 0.5
    assert lr_factor(drop, 250 * 390 - 1, 390, 250 * 390) == 0.5**12


def test_piecewise_is_torchs_multi_step_lr():
    schedule = {"name": "piecewise", "boundaries": (4, 9), "factors": (1.0, 0.1, 0.01)}
    found = [lr_factor(recipe(schedule=schedule), step, 5, 12) for step in range(12)]
    assert found == pytest.approx(rates(lambda o: MultiStepLR(o, milestones=[4, 9], gamma=0.1), 12))


def test_he_et_al_2015_section_4_2():
    # "we start with a learning rate of 0.1, divide it by 10 at 32k and 48k"; for 110 layers "we use 0.01 to
    # warm up the training": the first 500 steps here.
    he = recipe(
        schedule={"name": "piecewise", "boundaries": (32_000, 48_000), "factors": (1.0, 0.1, 0.01)},
        warmup={"steps": 500, "factor": 0.1},
    )
    found = {
        step: 0.1 * lr_factor(he, step, 391, 64_000) for step in (0, 499, 500, 31_999, 32_000, 47_999, 48_000)
    }
    assert found == pytest.approx(
        {0: 0.01, 499: 0.01, 500: 0.1, 31_999: 0.1, 32_000: 0.01, 47_999: 0.01, 48_000: 0.001}
    )


@pytest.mark.parametrize("final", [0.0, 0.05])
def test_cosine_is_torchs_cosine_annealing_by_step(final):
    cosine = recipe(schedule={"name": "cosine", "final_factor": final})
    found = [lr_factor(cosine, step, 10, 50) for step in range(50)]
    assert found == pytest.approx(rates(lambda o: CosineAnnealingLR(o, T_max=50, eta_min=final), 50))
    assert found[0] == 1
    assert found[25] == pytest.approx((1 + final) / 2)
    assert lr_factor(cosine, 50, 10, 50) == pytest.approx(final)


def test_time_decay_is_kerass():
    # Keras: lr * (1 / (1 + decay * iterations)); half the rate after 1 / decay steps.
    decaying = recipe(time_decay=1e-4)
    assert lr_factor(decaying, 0, 10, 20_000) == 1
    assert lr_factor(decaying, 10_000, 10, 20_000) == 0.5
    assert lr_factor(decaying, 2_500, 10, 20_000) == pytest.approx(0.8)


def test_schedule_warmup_and_time_decay_multiply():
    every = recipe(
        schedule={"name": "drop", "every_epochs": 1, "factor": 0.5},
        warmup={"steps": 30, "factor": 0.1},
        time_decay=0.01,
    )
    assert lr_factor(every, 25, 10, 100) == pytest.approx(0.5**2 * 0.1 / 1.25)
    assert lr_factor(every, 30, 10, 100) == pytest.approx(0.5**3 / 1.3)


def test_the_originals_recipe_for_resnet20_over_its_250_epochs():
    original = PARAMS.recipes["resnet20"]
    first, last = (0.1 * lr_factor(original, step, 390, 97_500) for step in (0, 97_499))
    assert first == 0.1
    assert last == pytest.approx(0.1 / 4096 / 1.097499)  # twelve drops by half
    assert math.isclose(lr_factor(PARAMS.recipes["resnet110"], 499, 390, 97_500), 0.1 / 1.000499)
