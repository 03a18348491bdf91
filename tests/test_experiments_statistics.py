"""The statistics of a report, where their values are known."""

import numpy as np
import pandas as pd
import pytest
from rliable import metrics
from scipy import stats
from small_suites import made_up_result

from sb3_klip.experiments import statistics
from sb3_klip.experiments.results import POINTS, Result
from sb3_klip.experiments.statistics import (
    Interval,
    bootstrap,
    gain,
    improvement,
    matrices,
    share_to_reach,
    welch,
    with_scores,
)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    """The bootstrap takes the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


def frame_of(finals: dict[tuple[str, str], list[float]], first: float = 0.0) -> pd.DataFrame:
    rows = [
        {"task": task, "method": method, "final_return": final, "first_return": first, "area": final / 2}
        for (task, method), values in finals.items()
        for final in values
    ]
    frame = pd.DataFrame(rows)
    return frame.assign(task=pd.Categorical(frame["task"]), method=pd.Categorical(frame["method"]))


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_welch_is_scipys():
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(0, 1, 3), generator.normal(1, 5, 7)
    interval = welch(ours.mean() - theirs.mean(), [(x.var(ddof=1) / len(x), len(x)) for x in (ours, theirs)])
    expected = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    np.testing.assert_allclose(interval[1:], expected)


def test_without_spread_the_interval_is_a_point():
    assert welch(3.0, [(0.0, 2), (0.0, 5)]) == Interval(3.0, 3.0, 3.0)


def test_an_interval_as_text():
    assert Interval(1.0, -2.0, 3.4).text("{:+.0f}") == "+1 [-2, +3]"


@pytest.mark.parametrize(("true", "column"), [(1.0, "score"), (-0.5, "score"), (1.0, "area_score")])
def test_welchs_interval_holds_the_true_gain_95_times_of_100(true, column):
    """Of three seeds on two tasks, whose spreads are different. What the reference gains is not known, either."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        runs = []
        for task, spread in (("A", 0.1), ("B", 0.25)):
            for method, mean in (("step", 1000.0), ("other", 1000.0 * (1 + true))):
                for final in generator.normal(mean, spread * mean, size=3):
                    returns = {"first_return": 0.0, "final_return": final, "area": final / 2}
                    runs.append({"task": task, "method": method, **returns})
        interval = gain(with_scores(pd.DataFrame(runs), "step"), "other", "step", column)
        held += interval.low <= (true / 2 if column == "area_score" else true) <= interval.high
    assert 0.92 <= held / 300 <= 0.99


def test_the_same_scores_have_the_same_intervals_whatever_is_drawn_before():
    scores = {"step": np.random.default_rng(0).normal(size=(5, 3)), "other": np.random.default_rng(1).normal(size=(4, 3))}
    first = improvement(scores, "step")
    np.random.random(7)
    assert improvement(scores, "step") == first
    assert first["other"].low < first["other"].point < first["other"].high


def test_probability_of_improvement_is_rliables():
    generator = np.random.default_rng(0)
    scores = {"step": generator.integers(0, 5, (3, 4)).astype(float), "other": generator.integers(0, 5, (2, 4)).astype(float)}
    expected = metrics.probability_of_improvement(scores["other"], scores["step"])
    assert improvement(scores, "step")["other"].point == pytest.approx(expected)


# -- scores over tasks -------------------------------------------------------------------------------------------------


def test_scores_are_zero_at_the_start_and_one_where_the_reference_ends():
    finals = {("A", "step"): [90.0, 110.0], ("A", "fixed"): [60.0, 160.0], ("B", "step"): [1000.0, 3000.0]}
    rows = with_scores(frame_of({**finals, ("B", "fixed"): [2000.0, 10.0]}, first=10.0), "step")
    scores = matrices(rows, "score")
    np.testing.assert_allclose(scores["step"], [[80 / 90, 990 / 1990], [100 / 90, 2990 / 1990]])
    np.testing.assert_allclose(scores["fixed"], [[50 / 90, 1.0], [150 / 90, 0.0]])
    # The area is half of the final return here.
    np.testing.assert_allclose(matrices(rows, "area_score")["fixed"], [[20 / 90, 990 / 1990], [70 / 90, -5 / 1990]])
    assert gain(rows, "fixed", "step").point == pytest.approx((10 / 90 - 995 / 1990) / 2)


def test_scores_take_the_seeds_that_a_method_has_on_every_task():
    finals = {("A", "step"): [1.0, 2.0, 3.0], ("A", "fixed"): [1.0, 2.0], ("B", "step"): [1.0, 2.0], ("B", "fixed"): [1.0]}
    scores = matrices(with_scores(frame_of(finals), "step"), "score")
    assert {method: matrix.shape for method, matrix in scores.items()} == {"step": (3, 1), "fixed": (2, 1)}
    # Of the six pairs, one is won (2 > 1), and two are equal, which counts half.
    assert improvement(scores, "step")["fixed"].point == pytest.approx(1 / 3)
    rows = with_scores(frame_of({**finals, ("B", "fixed"): [1.0, 5.0, 6.0]}), "step")
    assert {matrix.shape for matrix in matrices(rows, "score").values()} == {(2, 2)}
    assert len(rows) == 10  # means are of all seeds


def test_no_scores_where_the_reference_learns_nothing():
    finals = {(task, method): [50.0, 60.0] for task in ("A", "B") for method in ("step", "fixed")}
    frame = frame_of(finals, first=10.0)
    frame.loc[frame["task"] == "A", "first_return"] = 100.0
    assert set(with_scores(frame, "step")["task"]) == {"B"}
    frame["first_return"] = np.nan
    assert with_scores(frame, "step").empty


def test_runs_without_a_final_return_are_left_out():
    rows = with_scores(frame_of({("A", "step"): [np.nan, 2.0, 3.0], ("A", "fixed"): [1.0, np.nan, 2.0]}), "step")
    np.testing.assert_allclose(matrices(rows, "score")["fixed"][:, 0], np.array([1.0, 2.0]) / 2.5)


def test_no_scores_of_single_seeds():
    rows = with_scores(frame_of({("A", "step"): [1.0], ("A", "fixed"): [2.0]}), "step")
    assert rows.empty
    assert with_scores(frame_of({("A", "step"): [1.0], ("A", "fixed"): [2.0, 3.0]}), "step").empty
    assert matrices(rows, "score") == improvement({}, "step") == {}


# -- samples to reach a return -----------------------------------------------------------------------------------------


def rising(per_point: float, until: int = POINTS) -> Result:
    """A run whose return rises by so much at each point of its curve, until one of them."""
    run = made_up_result("Hopper-v4", "step", 0, 0.0)
    run.curve["return"] = per_point * np.minimum(np.arange(1, POINTS + 1), until)
    return run


def test_twice_as_fast_is_half_of_the_samples():
    # PPO's last tenth has the mean of 91 to 100, 95.5; twice as fast, points 43.5 to 52.5 have it, so that 53 are enough.
    assert share_to_reach([rising(2.0)], [rising(1.0)]).point == 0.53
    assert share_to_reach([rising(1.0)], [rising(1.0)]).point == 1.0
    assert share_to_reach([rising(1.0, until=90)], [rising(1.0)]).point == np.inf


def test_the_interval_of_samples_is_over_the_seeds_of_both(monkeypatch):
    interval = share_to_reach([rising(2.0)] * 3, [rising(1.0)] * 3)
    assert interval == Interval(0.53, 0.53, 0.53)
    monkeypatch.setattr(statistics, "MIN_SEEDS", 2)
    interval = share_to_reach([rising(2.0), rising(4.0)], [rising(1.0), rising(3.0)])
    # Means: 3 a point against 191; the extremes are 4 against 95.5, and 2 against 286.5.
    assert interval == Interval(0.69, 0.29, np.inf)


def test_two_seeds_are_too_few_for_an_interval():
    assert share_to_reach([rising(2.0)] * 3, [rising(1.0)] * 2).text("{:.2f}") == "0.53"


def test_the_reference_itself_reaches_its_final_return_at_its_end_at_the_latest():
    runs = [rising(1.0), rising(2.0), rising(4.0)]
    interval = share_to_reach(runs, runs)
    assert (interval.point, interval.high) == (1.0, 1.0)


def test_a_reference_without_episodes_at_its_end_does_not_count():
    without = rising(1.0)
    without.curve.loc[POINTS // 2 :, ["episodes", "return"]] = (0, np.nan)
    assert share_to_reach([rising(2.0)], [without, rising(1.0)]).point == 0.53
    scores = {"step": np.ones((3, 2)), "other": np.zeros((2, 2))}
    assert improvement(scores, "step")["other"].text("{:.1f}") == "0.0"
    assert improvement({**scores, "other": np.zeros((3, 2))}, "step")["other"].text("{:.1f}") == "0.0 [0.0, 0.0]"


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "least", "most"), [(2, 0.68, 0.8), (3, 0.8, 0.91), (5, 0.87, 0.97)])
def test_how_often_a_bootstraps_interval_holds_the_true_mean(monkeypatch, seeds, least, most):
    """Why it takes three seeds: of three tasks with returns of a normal distribution."""
    monkeypatch.setattr(statistics, "MIN_SEEDS", 2)
    generator = np.random.default_rng(0)
    runs = {number: generator.normal(size=(seeds, 3)) for number in range(400)}
    held = [interval.low <= 0 <= interval.high for interval in bootstrap(runs, metrics.aggregate_iqm).values()]
    assert least <= np.mean(held) <= most


def test_episodes_count_as_often_as_they_are():
    run = rising(0.0)
    run.curve.loc[90:, "episodes"] = [9] + [0] * 8 + [1]
    run.curve.loc[90:, "return"] = [1.0] + [np.nan] * 8 + [11.0]
    assert statistics.trailing_returns(run)[-1] == 2.0
