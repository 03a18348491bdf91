"""Parameters of coefficients: schedules and bounds."""

import math

import pytest
import torch as th

from sb3_klip.coefficients import make
from sb3_klip.coefficients.parameters import NonNegative


def test_schedules_are_followed_and_held_at_their_bounds():
    coefficient = make("linear_ramp", width="lin_0.1")
    widths = []
    for progress_remaining in (1.0, 0.5, 0.0, -0.1):
        coefficient.set_progress(progress_remaining)
        widths.append(coefficient.values["width"])
    assert widths == [0.1, 0.05, 0.0, 0.0]
    assert repr(coefficient) == "linear_ramp(width='lin_0.1')"
    sharp = make("sigmoid", temperature=lambda progress_remaining: 0.1 * progress_remaining)
    sharp.set_progress(0.0)
    assert 0 < sharp.values["temperature"] <= 1e-6
    with pytest.raises(ValueError, match="NaN"):
        make("sigmoid", temperature=lambda progress_remaining: math.nan if progress_remaining < 1 else 1.0)
    broken = make("sigmoid", temperature=lambda progress_remaining: math.nan if progress_remaining == 0.5 else 1.0)
    with pytest.raises(ValueError, match="NaN"):
        broken.set_progress(0.5)


def test_schedules_that_fail_at_their_end_are_refused_at_the_start():
    """kappa_minus must stay above -kappa_plus, to which no single parameter can be held."""
    with pytest.raises(ValueError, match=r"kappa_minus=-1.5 of 'redescending' must be greater than -kappa_plus"):
        make("redescending", kappa_plus="lin_10")


def test_a_number_is_taken_as_it_is():
    """Also one that is nearer to an excluded end than schedules come."""
    assert make("bounded_ratio", temperature=1e-7).values == {"temperature": 1e-7}


def test_annotations_may_be_text():
    """As in every module that has `from __future__ import annotations`."""

    def narrow(ratio, advantages, clip_range, *, width: "NonNegative" = 0.5):
        return th.zeros_like(ratio)

    with pytest.raises(ValueError, match=r"width=-1 .* is out of range: 0 <= value"):
        make(narrow, width=-1)

    def untyped(ratio: "Unknown", advantages, clip_range, *, width: "Unknown" = 0.5):  # noqa: F821
        return th.zeros_like(ratio)

    assert make(untyped, width="lin_1.0").values == {"width": 1.0}
