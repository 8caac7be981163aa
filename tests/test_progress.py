"""Times and amounts as a person reads them."""

from __future__ import annotations

import time

import pytest

from resgrid.progress import Progress, amount, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 seconds"), (1, "1 second"), (89, "89 seconds"), (90, "2 minutes"), (25 * 60, "25 minutes"),
        (1.5 * 3600, "1.5 hours"), (2 * 3600, "2 hours"), (17.4 * 3600, "17 hours"),
        (46 * 3600 + 17 * 60 + 26, "2 days"), (9.6 * 86400, "10 days"), (1234 * 86400, "1,234 days"),
    ],
)  # fmt: skip
def test_a_duration_has_one_unit_and_few_digits(seconds, text):
    assert duration(seconds) == text


def test_the_time_left_is_that_of_the_speed_since_this_start(capsys):
    with Progress("cell", 1000, "images") as progress:
        progress.done = 900  # before
        assert progress.remaining() == ""  # nothing is known yet
        progress.update(901)
        assert progress.remaining() == ""  # nor yet: what came before the first step took its time, too
        progress._started = time.monotonic() - 10  # 10 s for 9 images: 100 s for the other 90
        progress.update(910)
        assert progress.remaining() == "about 2 minutes left"
        progress.update(1000)
        assert progress.remaining() == ""


@pytest.mark.parametrize(
    ("number", "text"), [(1234.4, "1,234 cells"), (1.2, "1 cell"), (0.3, "0.3 cells"), (0, "0 cells")]
)
def test_an_amount_has_its_singular_and_is_never_rounded_to_none(number, text):
    assert amount(number, "cells") == text
