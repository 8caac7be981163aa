"""Times and amounts as a person reads them."""

from __future__ import annotations

import time

import pytest

from resgrid.progress import Progress, amount, duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 seconds"), (1, "1 second"), (89, "89 seconds"), (90, "2 minutes"), (25 * 60, "25 minutes"),
        (1.5 * 3600, "1.5 hours"), (2 * 3600, "2 hours"), (17.4 * 3600, "17 hours"),
        (46 * 3600 + 17 * 60 + 26, "2 days"), (9.6 * 86400, "10 days"), (1234 * 86400, "1,234 days"),
    ],
)  # fmt: skip
def test_a_duration_is_said_in_one_unit_as_a_person_would(seconds, said):
    assert duration(seconds) == said


def test_the_time_left_is_that_of_the_speed_since_this_start(capsys):
    with Progress("cell", 1000, "images") as progress:
        progress.begin(900)  # before
        assert progress.remaining() == ""  # nothing is known yet
        progress.update(901)
        assert progress.remaining() == ""  # nor yet: what came before the first step took its time, too
        progress._started = time.monotonic() - 10  # 10 s for 9 images: 100 s for the other 90
        progress.update(910)
        assert progress.remaining() == "about 2 minutes left"
        progress.update(1000)
        assert progress.remaining() == ""


@pytest.mark.parametrize(
    ("number", "said"), [(1234.4, "1,234 cells"), (1.2, "1 cell"), (0.3, "0.3 cells"), (0, "0 cells")]
)
def test_an_amount_is_said_in_the_singular_and_never_as_none_of_what_there_is(number, said):
    assert amount(number, "cells") == said
