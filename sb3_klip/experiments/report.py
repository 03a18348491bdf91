"""Tables from the results of a suite, as one Markdown file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rliable import metrics

from sb3_klip.experiments import paper
from sb3_klip.experiments.figures import save_all
from sb3_klip.experiments.folder import read_folder
from sb3_klip.experiments.results import Result
from sb3_klip.experiments.statistics import (
    MIN_SEEDS,
    Interval,
    bootstrap,
    gain,
    improvement,
    matrices,
    share_to_reach,
    welch,
    with_scores,
)
from sb3_klip.files import write_atomically

#: The method that the others are compared with, where the suite has it.
REFERENCE = "step"
#: What stands above :func:`paper_table`.
AGAINST_PAPER = (
    "Mean ± standard deviation over seeds; the paper has five. The difference is ours minus the paper's, with Welch's 95 % "
    "confidence interval. The means differ if this interval does not contain 0; if all true means are equal, that happens by "
    "chance in one row of twenty. A single seed has no interval."
)
#: What stands in a table's brackets.
BRACKETS = f"In brackets, with {MIN_SEEDS} seeds or more, are 95 % confidence intervals of the bootstrap"
#: What such an interval of a single task is worth.
FEW = "With three seeds, such an interval holds the true value in about three of four cases, and with five in nine of ten."
#: What is compared over tasks, and the column of its scores.
SCORES = {"end": "score", "training": "area_score"}
#: Share of training, at its beginning, whose return counts as that of an untrained policy.
FIRST = 0.01


def write_report(folder: Path) -> bool:
    """
    Write ``report.md`` and ``figures/`` into a suite's folder.

    :param folder: the suite's folder
    :return: whether every training by PPO has the same episodes as that by ``step`` with the same seed
    :raises ValueError: if there is nothing to report
    """
    manifest, results = read_folder(folder)
    name, definition = manifest["suite"], manifest["definition"]
    by_rate = _by_rate(results)
    frames = {rate: _frame(definition, of_rate) for rate, of_rate in by_rate.items()}
    whole = pd.concat(frames.values())
    identity = identity_table(whole)
    sections = [f"# Results of the suite `{name}`", _made_by(whole)]
    for rate, frame in frames.items():
        sections += [f"## Return in the last 10 % of training{_at(rate)}", _means(frame, "final_return")]
    if len(identity):
        sections += ["## PPO against `step`, cell by cell", _identity_text(identity), _markdown(identity)]
    if name == "paper":
        sections += ["## Against the paper", AGAINST_PAPER, _markdown(paper_table(whole))]
        if "peak_kill_fraction" in whole:
            sections += [_markdown(kill_table(whole))]
    drawn: dict[str, str] = {}
    for rate, frame in frames.items():
        tasks, methods = list(frame["task"].cat.categories), _compared(frame["method"].cat.categories)
        reference = REFERENCE if REFERENCE in methods else methods[0]
        rows = with_scores(frame[frame["method"].isin(methods)], reference)
        sections += [f"## Mean return over all of training{_at(rate)}", _means(frame, "area")]
        if any("reuse" in settings for settings in definition.values()):
            sections += _samples(by_rate[rate], tasks, methods, reference, _at(rate))
        sections += [f"## Interquartile means, by task{_at(rate)}", _by_task(frame), *_together(rows, reference, _at(rate))]
        scores = matrices(rows, "score")
        drawn |= save_all(by_rate[rate], tasks, methods, reference, scores, folder / "figures", _at(rate))
    if len(frames) > 1:
        sections += _robustness(frames)
    sections += ["## Figures", *(f"![{title}](figures/{name})" for title, name in drawn.items())]
    write_atomically(folder / "report.md", ("\n\n".join(sections) + "\n").encode())
    return bool(identity["identical"].eq("yes").all())


def _by_rate(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by the learning rate that stands after the @ in a method's name, the smallest first; "" where none does."""
    rates: dict[str, list[Result]] = {}
    for result in results:
        method, _, rate = result.about["method"].partition("@")
        rates.setdefault(rate, []).append(result._replace(about={**result.about, "method": method}))
    return dict(sorted(rates.items(), key=lambda item: float(item[0] or 0)))


def _at(rate: str) -> str:
    return f" at learning rate {rate}" if rate else ""


def _frame(cells: Iterable[str], results: Iterable[Result]) -> pd.DataFrame:
    """One row per cell; tasks and methods in the order of the suite's cells."""
    frame = pd.DataFrame([result.about for result in results])
    # Where no episode ends so early, the first that end count.
    start = [
        result.curve["return"].bfill()[result.curve["timesteps"] <= FIRST * result.about["timesteps"]] for result in results
    ]
    frame["first_return"] = [values.mean() for values in start]
    # The area under the curve, as a mean; gaps, as where no episode ended, are bridged.
    frame["area"] = [result.curve["return"].interpolate(limit_area="inside").mean() for result in results]
    for i, column in enumerate(("task", "method")):
        order = dict.fromkeys(cell.partition("@")[0].rpartition("/")[2 * i] for cell in cells)  # a task may be ALE/Pong-v5
        frame[column] = pd.Categorical(frame[column], [name for name in order if name in set(frame[column])])
    return frame.sort_values(["task", "method", "seed"], ignore_index=True)


def _made_by(frame: pd.DataFrame) -> str:
    """How the numbers came to be."""
    versions = pd.DataFrame(list(frame["versions"])).drop(columns="python").apply(lambda column: " and ".join(column.unique()))
    command = frame["command"].iloc[0]
    hours = frame["seconds"].sum() / 3600
    lines = [
        f"{len(frame)} trainings, {hours:.1f} hours of one core. {', '.join(f'{k} {v}' for k, v in versions.items())}; "
        f"{', '.join(sorted(set(frame['processor'])))}.",
        "Each training is one run of RL Zoo. The first line of its file in `results` has its command. For example:",
        f"```bash\n{command}\n```",
        "This file and the figures are made from those files by `python -m sb3_klip.experiments report`.",
    ]
    return "\n\n".join(lines)


def _means(frame: pd.DataFrame, column: str) -> str:
    """Mean ± standard deviation over seeds, and the number of seeds."""
    cells = frame.groupby(["task", "method"], observed=True)[column]
    text = cells.apply(lambda values: f"{_mean_std(values)} ({values.count()})" if values.count() else "–")
    table = text.unstack("method").fillna("–").reset_index()
    return "Mean ± standard deviation over seeds (number of seeds in brackets).\n\n" + _markdown(table)


def _mean_std(values: pd.Series) -> str:
    spread = f" ± {values.std():.0f}" if values.count() > 1 else ""
    return f"{values.mean():.0f}{spread}"


def identity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """
    PPO against ``step``: whether all episodes of training have the same returns and lengths, in the same order.

    :param frame: one row per cell
    :return: one row per task and seed that both have run, on processors of the same name: others round differently
    """
    columns = ["task", "seed", "processor", "episodes", "episodes_sha256"]
    ppo, step = (frame.loc[frame["method"] == method, columns] for method in ("ppo", REFERENCE))
    both = ppo.merge(step, on=["task", "seed", "processor"], suffixes=("", "_step"))
    both["identical"] = np.where(both["episodes_sha256"] == both["episodes_sha256_step"], "yes", "**no**")
    return both[["task", "seed", "episodes", "identical"]]


def _identity_text(identity: pd.DataFrame) -> str:
    equal = int(identity["identical"].eq("yes").sum())
    text = (
        f"In {equal} of {len(identity)} pairs with the same task, seed and processor, the episode logs are identical: every "
        "episode of training has the same return and length, to the last digit."
    )
    if equal == len(identity):
        text += " Where PPO was not run, its numbers are those of `step`."
    return text


def paper_table(frame: pd.DataFrame) -> pd.DataFrame:
    """
    Our returns beside the paper's.

    :param frame: one row per cell
    :return: one row per task and method that both have run
    """
    rows = []
    for (task, method), values in frame.groupby(["task", "method"], observed=True)["final_return"]:
        theirs = paper.RETURNS.get(task, {}).get(method)
        if theirs is not None and values.count():
            mean, std = theirs
            difference, differ = f"{values.mean() - mean:+.0f}", "–"
            if (seeds := values.count()) > 1:
                samples = [(values.var() / seeds, seeds), (std**2 / paper.SEEDS, paper.SEEDS)]
                interval = welch(values.mean() - mean, samples)
                difference, differ = interval.text("{:+.0f}"), "no" if interval.low <= 0 <= interval.high else "yes"
            rows.append((task, method, seeds, _mean_std(values), f"{mean:.0f} ± {std:.0f}", difference, differ))
    return pd.DataFrame(rows, columns=["task", "method", "seeds", "ours", "the paper's", "difference", "differ"])


def kill_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest kill fraction of an update of ``step``, mean over seeds, beside the paper's."""
    ours = frame[frame["method"] == REFERENCE].groupby("task", observed=True)["peak_kill_fraction"].mean()
    table = pd.DataFrame({"peak kill fraction": ours.map("{:.3f}".format)})
    table["the paper's"] = [
        f"{paper.PEAK_KILL_FRACTION[task]:.3f}" if task in paper.PEAK_KILL_FRACTION else "–" for task in ours.index
    ]
    return table.reset_index()


# -- statistics over seeds and tasks -----------------------------------------------------------------------------------


def _compared(methods: Iterable[str]) -> list[str]:
    """Those with numbers of their own: PPO's are those of ``step``."""
    names = list(methods)
    return [method for method in names if method != "ppo" or REFERENCE not in names]


def _together(rows: pd.DataFrame, reference: str, at: str) -> list[str]:
    """What all tasks together say, if there are methods to compare."""
    methods, tasks = (list(dict.fromkeys(rows.sort_values(column)[column])) for column in ("method", "task"))
    if len(methods) < 2:
        return []
    return [
        f"## All tasks together{at}",
        f"Tasks: {', '.join(tasks)}. A method counts with the seeds that it has on every task. The score of a return is 0 at "
        f"the mean of the first {FIRST:.0%} of `{reference}`'s training (or its first return after that, if no episode ended "
        "by then), and 1 at the mean of its last 10 %. *End* is the score of the last 10 % of training. *Training* is that of "
        "the whole training, which is the area under the learning curve. The probability of improvement is the chance that a "
        f"run of the method has a higher score than a run of `{reference}` on the same task. {BRACKETS} within tasks. With "
        "few seeds they are too narrow: where one contradicts Welch's interval below, go by Welch's.",
        _markdown(aggregate_table(rows, reference)),
        f"## Gain over `{reference}`{at}",
        f"The gain of each method over `{reference}`, in % of what `{reference}` gains from beginning to end. All seeds "
        "count. The intervals are Welch's, 95 %: about one in twenty does not contain the true gain. One that does not "
        "contain 0 is in bold. A gain or loss beyond its interval is excluded.",
        _markdown(gain_table(rows, reference)),
        f"## Gain over `{reference}` at the end, by task{at}",
        "The same on each task alone. These intervals are wider, as they have fewer runs.",
        _markdown(gain_by_task(rows, reference)),
    ]


def aggregate_table(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """
    Interquartile mean of the scores, and probability of improvement over the reference, with 95 % confidence intervals.

    :param rows: as from :func:`~sb3_klip.experiments.statistics.with_scores`
    :param reference: the method to compare with
    """
    table: dict[str, list[object]] = {}
    for title, column in SCORES.items():
        scores = matrices(rows, column)
        iqm, better = bootstrap(scores, metrics.aggregate_iqm), improvement(scores, reference)
        table |= {"method": list(scores), "seeds": [len(matrix) for matrix in scores.values()]}
        table[f"interquartile mean: {title}"] = [iqm[method].text("{:.2f}") for method in scores]
        table[f"probability of improvement over {reference}: {title}"] = [
            better[method].text("{:.2f}") if method in better else "–" for method in scores
        ]
    return pd.DataFrame(table)


def gain_table(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """
    The gain of each method over the reference, with 95 % confidence intervals, in bold where these do not contain 0.

    :param rows: as from :func:`~sb3_klip.experiments.statistics.with_scores`
    :param reference: the method to compare with
    """
    methods = _others(rows, reference)
    table = {"method": methods}
    for title, column in SCORES.items():
        table[title] = [_gain_text(gain(rows, method, reference, column)) for method in methods]
    return pd.DataFrame(table)


def gain_by_task(rows: pd.DataFrame, reference: str) -> pd.DataFrame:
    """
    The gains at the end of training on each task alone, as in :func:`gain_table`.

    :param rows: as from :func:`~sb3_klip.experiments.statistics.with_scores`
    :param reference: the method to compare with
    """
    by_task = dict(list(rows.groupby("task", observed=True)))
    table = {"task": list(by_task)}
    for method in _others(rows, reference):
        table[method] = [_gain_text(gain(of_task, method, reference)) for of_task in by_task.values()]
    return pd.DataFrame(table)


def _others(rows: pd.DataFrame, reference: str) -> list[str]:
    """The methods but the reference, in the order of the suite."""
    return [method for method in rows.sort_values("method")["method"].unique() if method != reference]


def _gain_text(gained: Interval) -> str:
    text = Interval(*(100 * value for value in gained)).text("{:+.0f}")
    return text if gained.low <= 0 <= gained.high else f"**{text}**"


def _by_task(frame: pd.DataFrame) -> str:
    """Interquartile means of the cells with more than one seed."""
    frame = frame.dropna(subset=["final_return"])
    cells = {
        key: values.to_numpy()[:, None]
        for key, values in frame.groupby(["task", "method"], observed=True)["final_return"]
        if values.count() > 1
    }
    if not cells:
        return "No cell has more than one seed yet."
    intervals = pd.Series({key: each.text("{:.0f}") for key, each in bootstrap(cells, metrics.aggregate_iqm).items()})
    table = intervals.unstack().reindex(index=frame["task"].cat.categories, columns=frame["method"].cat.categories)
    table = table.dropna(how="all").dropna(how="all", axis=1).fillna("–").rename_axis("task").reset_index()
    return f"Cells with more than one seed. {BRACKETS} over seeds. {FEW}\n\n{_markdown(table)}"


def _samples(results: Sequence[Result], tasks: Sequence[str], methods: Sequence[str], reference: str, at: str) -> list[str]:
    """When the methods reach the final return of the reference."""
    rows = []
    for task in tasks:
        runs = {
            method: [run for run in results if (run.about["task"], run.about["method"]) == (task, method)]
            for method in methods
        }
        rows.append((task, *(_share_text(runs[method], runs[reference]) for method in methods)))
    return [
        f"## Samples to reach the final return of `{reference}`{at}",
        f"The part of training, in %, after which the mean of a method's seeds first reaches the final mean of `{reference}`; "
        "> 100 if it never does. GePPO's authors count samples in this way (arXiv 2111.00072). A return is the mean of the "
        f"episodes in 10 % of training. The first time can be by chance, and `{reference}` itself may be there "
        f"before its end, so compare with its column. {BRACKETS} over the seeds of both. {FEW}",
        _markdown(pd.DataFrame(rows, columns=["task", *methods])),
    ]


def _share_text(runs: Sequence[Result], reference: Sequence[Result]) -> str:
    if not runs or all(run.about["final_return"] is None for run in reference):
        return "–"
    share = share_to_reach(runs, reference)
    point, low, high = ("> 100" if np.isinf(value) else f"{100 * value:.0f}" for value in share)
    return point if np.isnan(share.low) else f"{point} [{low}, {high}]"


def _robustness(frames: Mapping[str, pd.DataFrame]) -> list[str]:
    """What is left of the scores at the largest learning rate, if methods have been run at both."""
    table = robustness_table(frames)
    if table.empty:
        return []
    rates = list(frames)
    return [
        f"## Robustness: {rates[-1]} against {rates[0]}",
        f"The share is the mean score at the learning rate {rates[-1]}, divided by that at {rates[0]}. Both are on the scale "
        f"of `{REFERENCE}` at {rates[0]}, over the tasks on which all have two seeds. {BRACKETS} within tasks. *Published* "
        "are the shares of ANO's authors (arXiv 2605.02320), who have a protocol of their own, for 3e-4 and 1e-3. SPO's "
        "authors (arXiv 2401.16025) train deeper actors for 10 million steps, which is not done here.",
        _markdown(table),
    ]


def robustness_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """
    Share of the mean score that is left at the largest learning rate, beside the published one.

    :param frames: one row per cell, by learning rate, the smallest first
    """
    (low, slow), *_, (high, fast) = frames.items()
    both = pd.concat(
        [slow.assign(method=slow["method"].astype(str) + low), fast.assign(method=fast["method"].astype(str) + high)]
    )
    scores = matrices(with_scores(both, REFERENCE + low), "score")
    pairs = {
        method: (scores[method + low], scores[method + high])
        for method in slow["method"].cat.categories
        if method + low in scores and method + high in scores
    }
    shares = bootstrap(pairs, lambda slow, fast: float(fast.mean() / slow.mean()))
    rows = [
        (method, min(map(len, pairs[method])), shares[method].text("{:.2f}"), paper.ROBUSTNESS.get(method, "–"))
        for method in pairs
    ]
    return pd.DataFrame(rows, columns=["method", "seeds", "share", "published"])


def _markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    rows: Sequence[Sequence[object]] = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
