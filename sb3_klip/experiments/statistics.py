"""Statistics for few seeds: intervals of differences of means, scores over tasks (rliable), and samples to reach a return."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rliable import library as rly
from scipy import stats

from sb3_klip.experiments.results import LAST, POINTS, Result

#: Resamples of the bootstrap, and the seed of the generator that draws them.
RESAMPLES, SEED = 5000, 0
#: Confidence level of all intervals.
CONFIDENCE = 0.95
#: Quantiles of the bootstrap's distribution that bound such an interval.
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
#: Seeds that it takes to show a bootstrap's interval. With three, that of a mean on one task holds the true value in three of
#: four cases instead of 95 %, and that of an interquartile mean over three tasks in more than four of five.
MIN_SEEDS = 3
NO_BOUNDS = (float("nan"), float("nan"))


class Interval(NamedTuple):
    """An estimate and its confidence interval, whose bounds are NaN where the seeds are too few for one."""

    point: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """As in a table, each number in this form."""
        return (form if np.isnan(self.low) else f"{form} [{form}, {form}]").format(*self)


def welch(difference: float, means: Iterable[tuple[float, int]]) -> Interval:
    """
    The interval of a difference of means, or of a sum of such differences, by Welch: no two variances need be equal.

    :param difference: the estimate
    :param means: of each mean in it, the square of its standard error, and the size of its sample, 2 or more
    """
    errors, sizes = map(np.array, zip(*means, strict=True))
    if errors.sum() == 0:
        return Interval(difference, difference, difference)
    freedom = errors.sum() ** 2 / (errors**2 / (sizes - 1)).sum()
    low, high = stats.t.interval(CONFIDENCE, freedom, difference, np.sqrt(errors.sum()))
    return Interval(difference, float(low), float(high))


def bootstrap(scores: Mapping[Any, Any], statistic: Callable[..., float]) -> dict[Any, Interval]:
    """
    rliable's estimates and its intervals of a bootstrap within tasks; the same scores give the same intervals.

    :param scores: by name, a matrix of seeds × tasks, or a tuple of them, which are resampled one by one
    :param statistic: of the matrix or matrices
    :return: the interval of each name; its bounds are NaN if a matrix has fewer than :data:`MIN_SEEDS` seeds
    """
    if not scores:
        return {}
    # rliable draws from NumPy's own generator, whatever it is given.
    np.random.seed(SEED)
    points, bounds = rly.get_interval_estimates(
        dict(scores), lambda *args: np.array([statistic(*args)]), reps=RESAMPLES, confidence_interval_size=CONFIDENCE
    )
    return {
        key: Interval(float(points[key][0]), *(map(float, bounds[key][:, 0]) if _enough(of) else NO_BOUNDS))
        for key, of in scores.items()
    }


def _enough(samples: Any) -> bool:
    """Whether a sample, or each of a tuple of them, has the seeds that a bootstrap's interval takes."""
    return min(map(len, samples if isinstance(samples, tuple) else (samples,))) >= MIN_SEEDS


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean over seeds, by the bootstrap: of up to three seeds, the lowest and the highest.

    :param values: points × seeds
    """
    seeds = values.shape[1]
    chosen = np.random.default_rng(SEED).integers(seeds, size=(RESAMPLES, seeds))
    low, high = np.quantile(values[:, chosen].mean(axis=2), TAILS, axis=1)
    return low, high


# -- scores over tasks -------------------------------------------------------------------------------------------------


def with_scores(frame: pd.DataFrame, reference: str) -> pd.DataFrame:
    """
    The runs that can be compared over tasks, with columns ``score`` and ``area_score``.

    A score is 0 for the return with which the reference begins and 1 for the mean of those it ends with, so that tasks can be
    taken together; the area's is that of the mean return over all of training. A method is left out if it has fewer than two
    seeds on every task. Then a task is left out if one of the remaining methods has fewer than two seeds on it, or if the
    reference does not end above its first return.

    :param frame: one row per run: ``task``, ``method``, ``first_return``, ``final_return``, ``area``
    :param reference: the method to compare with
    :return: the rows that are left; none if the reference is left out
    """
    frame = frame.dropna(subset=["final_return"])
    counts = frame.pivot_table("final_return", "task", "method", "count", fill_value=0, observed=True)
    methods = [method for method in counts.columns if counts[method].max() >= 2]
    ends = frame[frame["method"] == reference].groupby("task", observed=True)[["first_return", "final_return"]].mean()
    rising = ends.index[ends["first_return"] < ends["final_return"]]
    tasks = [task for task in counts.index if task in rising and counts.loc[task, methods].min() >= 2]
    if reference not in methods:
        tasks = []
    rows = frame[frame["task"].isin(tasks) & frame["method"].isin(methods)].copy()
    low, high = (rows["task"].map(ends[name]).astype(float) for name in ("first_return", "final_return"))
    return rows.assign(score=(rows["final_return"] - low) / (high - low), area_score=(rows["area"] - low) / (high - low))


def matrices(rows: pd.DataFrame, column: str) -> dict[str, np.ndarray]:
    """What rliable works on: for each method a matrix of seeds × tasks, with as many seeds as it has on every task."""
    found = {}
    for method, of_method in rows.groupby("method", observed=True):
        by_task = [values.to_numpy() for _, values in of_method.groupby("task", observed=True)[column]]
        seeds = min(map(len, by_task))
        found[method] = np.stack([values[:seeds] for values in by_task], axis=1)
    return found


def gain(rows: pd.DataFrame, method: str, reference: str, column: str = "score") -> Interval:
    """
    How much higher the method scores than the reference: difference of mean scores, mean over tasks, with Welch's interval.

    The mean end of the reference has a score of 1 by definition, and is itself uncertain: a gain is a quotient, whose variance
    is that of its linear part (the delta method).

    :param rows: as from :func:`with_scores`
    :param method: the method
    :param reference: the one whose mean end has the score 1
    :param column: the score of the end of training, or ``area_score``
    :return: the gain, with its interval
    """
    ours, theirs = (rows[rows["method"] == name] for name in (method, reference))
    gains = ours.groupby("task", observed=True)[column].mean() - theirs.groupby("task", observed=True)[column].mean()
    linear = theirs[column] + theirs["task"].map(gains).astype(float) * theirs["score"]
    both = pd.concat([ours.assign(value=ours[column]), theirs.assign(value=linear)])
    cells = both.groupby(["method", "task"], observed=True)["value"].agg(["var", "count"])
    return welch(float(gains.mean()), zip(cells["var"] / cells["count"] / len(gains) ** 2, cells["count"], strict=True))


def improvement(scores: Mapping[str, np.ndarray], reference: str) -> dict[str, Interval]:
    """The probability that a run of a method scores higher than one of the reference on the same task; a tie counts half."""
    pairs = {method: (matrix, scores[reference]) for method, matrix in scores.items() if method != reference}

    # rliable's own gives the same number in three hundred times the time, which a bootstrap takes thousands of times.
    def wins(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)).mean())

    return bootstrap(pairs, wins)


# -- samples to reach a return -----------------------------------------------------------------------------------------


def trailing_returns(result: Result) -> np.ndarray:
    """For each point of the curve the mean return of the episodes in the last 10 % of training, counted back from there."""
    window = round(LAST * POINTS)
    episodes = result.curve["episodes"].rolling(window, min_periods=1).sum()
    total = (result.curve["return"].fillna(0) * result.curve["episodes"]).rolling(window, min_periods=1).sum()
    return (total / episodes).to_numpy()


def share_to_reach(runs: Sequence[Result], reference: Sequence[Result]) -> Interval:
    """
    The share of training after which the mean over seeds reaches the final return of the reference; infinite if it never does.

    :param runs: of the method, on one task
    :param reference: runs that have ended at the return to reach, of which at least one has episodes at its end
    :return: the share, with the interval of a bootstrap over the seeds of both; its bounds are NaN if one of them has fewer
        than :data:`MIN_SEEDS`
    """
    curves = np.stack([trailing_returns(run) for run in runs])
    finals = np.array([trailing_returns(run)[-1] for run in reference])
    finals = finals[np.isfinite(finals)]
    generator = np.random.default_rng(SEED)
    chosen, targets = (generator.integers(len(of), size=(RESAMPLES, len(of))) for of in (curves, finals))

    def share(mean_curves: np.ndarray, targets: np.ndarray) -> np.ndarray:
        # Before the first episode ends there is no return, and NaN reaches nothing.
        reached = mean_curves >= targets[:, None]
        return np.where(reached.any(axis=1), (reached.argmax(axis=1) + 1) / POINTS, np.inf)

    (point,) = share(curves.mean(axis=0)[None], finals.mean()[None])
    if not _enough((curves, finals)):
        return Interval(float(point), *NO_BOUNDS)
    means = curves[chosen].mean(axis=1)
    # The reference's own mean ends at its own final return, whichever of its seeds are drawn.
    resampled = share(means, means[:, -1] if runs is reference else finals[targets].mean(axis=1))
    low, high = np.quantile(resampled, TAILS, method="inverted_cdf")  # nothing lies between a number and infinity
    return Interval(float(point), float(low), float(high))
