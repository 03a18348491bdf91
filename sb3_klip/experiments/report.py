"""Tables from the results of a suite, as one Markdown file, and the statistics in them by rliable."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rliable import library as rly
from rliable import metrics

from sb3_klip.experiments import paper
from sb3_klip.experiments.figures import save_all
from sb3_klip.experiments.folder import read_folder
from sb3_klip.experiments.results import Result
from sb3_klip.files import write_atomically

#: Resamples of the bootstrap, and the seed of the generator that draws them.
RESAMPLES, SEED = 5000, 0
#: The method that the others are compared with, where the suite has it.
REFERENCE = "step"
#: What stands above :func:`paper_table`.
AGAINST_PAPER = (
    "Mean ± standard deviation; the paper's are over five seeds. They overlap if the intervals of one standard deviation do; "
    "with one seed of ours, if it lies in theirs."
)
#: Share of training, at its beginning, whose return counts as that of an untrained policy.
FIRST = 0.01


def write_report(folder: Path) -> bool:
    """
    Write ``report.md`` and ``figures/`` into a suite's folder.

    :param folder: the suite's folder
    :return: whether every training by PPO has the same episodes as that by ``step`` with the same seed
    :raises ValueError: if there is nothing to report
    """
    # rliable draws from NumPy's own generator, whatever it is given; so the same results give the same report.
    np.random.seed(SEED)
    manifest, results = read_folder(folder)
    frame = _frame(manifest["definition"], results)
    identity = identity_table(frame)
    name = manifest["suite"]
    sections = [f"# Results of the suite `{name}`", _made_by(frame), "## Return in the last 10 % of training", _means(frame)]
    if len(identity):
        sections += ["## PPO against `step`, cell by cell", _identity_text(identity), _markdown(identity)]
    if name == "paper":
        sections += ["## Against the paper", AGAINST_PAPER, _markdown(paper_table(frame))]
        if "peak_kill_fraction" in frame:
            sections += [_markdown(kill_table(frame))]
    scored, scores = score_matrices(frame)
    sections += ["## Interquartile means, by task", _by_task(frame), *_together(scored, scores)]
    tasks, methods = (list(frame[column].cat.categories) for column in ("task", "method"))
    drawn = save_all(results, tasks, methods, _reference(methods), scores, folder / "figures")
    sections += ["## Figures", *(f"![{title}](figures/{name})" for title, name in drawn.items())]
    write_atomically(folder / "report.md", ("\n\n".join(sections) + "\n").encode())
    return bool(identity["identical"].eq("yes").all())


def _frame(cells: Iterable[str], results: Iterable[Result]) -> pd.DataFrame:
    """One row per cell; tasks and methods in the order of the suite's cells."""
    frame = pd.DataFrame([result.about for result in results])
    start = [result.curve.loc[result.curve["timesteps"] <= FIRST * result.about["timesteps"], "return"] for result in results]
    frame["first_return"] = [values.mean() for values in start]
    for i, column in enumerate(("task", "method")):
        order = dict.fromkeys(cell.rpartition("/")[2 * i] for cell in cells)  # a task may be ALE/Pong-v5
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
        "Each is one run of RL Zoo, whose command is in the first line of its file below `results`. The first one's:",
        f"```bash\n{command}\n```",
        "This file and the figures are made from those files by `python -m sb3_klip.experiments report`.",
    ]
    return "\n\n".join(lines)


def _means(frame: pd.DataFrame) -> str:
    """Mean ± standard deviation over seeds, and the number of seeds."""
    cells = frame.groupby(["task", "method"], observed=True)["final_return"]
    text = cells.apply(lambda values: f"{_mean_std(values)} ({values.count()})")
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
        if theirs is not None:
            mean, std = theirs
            spread = values.std() if values.count() > 1 else 0.0
            overlap = "yes" if abs(values.mean() - mean) <= spread + std else "no"
            rows.append((task, method, values.count(), _mean_std(values), f"{mean:.0f} ± {std:.0f}", overlap))
    return pd.DataFrame(rows, columns=["task", "method", "seeds", "ours", "the paper's", "overlap"])


def kill_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The largest kill fraction of an update of ``step``, mean over seeds, beside the paper's."""
    ours = frame[frame["method"] == REFERENCE].groupby("task", observed=True)["peak_kill_fraction"].mean()
    table = pd.DataFrame({"peak kill fraction": ours.map("{:.3f}".format)})
    table["the paper's"] = [
        f"{paper.PEAK_KILL_FRACTION[task]:.3f}" if task in paper.PEAK_KILL_FRACTION else "–" for task in ours.index
    ]
    return table.reset_index()


# -- statistics over seeds and tasks -----------------------------------------------------------------------------------


def score_matrices(frame: pd.DataFrame) -> tuple[list[str], dict[str, np.ndarray]]:
    """
    What rliable works on: for each method a matrix of seeds × tasks, with as many seeds as it has on every task.

    A score is 0 for the return with which the reference begins and 1 for the mean of those it ends with, so that tasks can be
    taken together. Tasks on which a method has fewer than two seeds, or the reference does not end above where it began, are
    left out.

    :param frame: one row per cell
    :return: the tasks, and a matrix for each method; empty if no task has two seeds of each
    """
    frame = frame.dropna(subset=["final_return"])
    counts = frame.pivot_table("final_return", "task", "method", "count", fill_value=0, observed=True)
    methods = [method for method in counts.columns if counts[method].max() >= 2]
    if not methods:
        return [], {}
    ends = (
        frame[frame["method"] == _reference(methods)].groupby("task", observed=True)[["first_return", "final_return"]].mean()
    )
    rising = set(ends.index[ends["first_return"] < ends["final_return"]])
    tasks = [task for task in counts.index if task in rising and counts.loc[task, methods].min() >= 2]
    if not tasks:
        return [], {}
    matrices = {}
    for method in methods:
        columns = []
        seeds = int(counts.loc[tasks, method].min())
        for task in tasks:
            low, high = ends.loc[task]
            returns = frame.loc[(frame["task"] == task) & (frame["method"] == method), "final_return"].to_numpy()[:seeds]
            columns.append((returns - low) / (high - low))
        matrices[method] = np.stack(columns, axis=1)
    return tasks, matrices


def _together(tasks: Sequence[str], scores: dict[str, np.ndarray]) -> list[str]:
    """What rliable makes of all tasks, if there are methods to compare."""
    if len(scores) < 2:
        return []
    reference = _reference(scores)
    return [
        "## All tasks together",
        f"On {', '.join(tasks)}, with the seeds that a method has on each of them. A score is 0 for the return of the first "
        f"{FIRST:.0%} of `{reference}`'s training and 1 for the mean of its last 10 %. In brackets, 95 % confidence intervals "
        "of a bootstrap within tasks; with few seeds they are too narrow. The probability of improvement is that of a run of "
        f"the method ending higher than one of `{reference}` on the same task.",
        _markdown(aggregate_table(scores, reference)),
    ]


def _reference(methods: Iterable[str]) -> str:
    """The method that others are compared with."""
    names = list(methods)
    return REFERENCE if REFERENCE in names else names[0]


def aggregate_table(scores: dict[str, np.ndarray], reference: str) -> pd.DataFrame:
    """
    Interquartile mean of the scores, and probability of improvement over the reference, with 95 % confidence intervals.

    :param scores: matrix of seeds × tasks by method
    :param reference: the method to compare with
    """
    iqm = _intervals(scores, metrics.aggregate_iqm)
    pairs = {method: (matrix, scores[reference]) for method, matrix in scores.items() if method != reference}
    improvement = _intervals(pairs, metrics.probability_of_improvement)
    rows = [(method, len(scores[method]), iqm[method], improvement.get(method, "–")) for method in scores]
    columns = ["method", "seeds", "interquartile mean", f"probability of improvement over {reference}"]
    return pd.DataFrame(rows, columns=columns)


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
    intervals = pd.Series({key: _intervals({"": cell}, metrics.aggregate_iqm, "{:.0f}")[""] for key, cell in cells.items()})
    table = intervals.unstack().reindex(index=frame["task"].cat.categories, columns=frame["method"].cat.categories)
    table = table.dropna(how="all").dropna(how="all", axis=1).fillna("–").rename_axis("task").reset_index()
    return "With 95 % confidence intervals of the bootstrap over seeds, of the cells with more than one.\n\n" + _markdown(
        table
    )


def _intervals(scores: dict, statistic: Callable, form: str = "{:.2f}") -> dict[str, str]:
    """rliable's point and interval estimates, as text."""
    if not scores:
        return {}
    points, bounds = rly.get_interval_estimates(scores, lambda *args: np.array([statistic(*args)]), reps=RESAMPLES)
    show = form.format
    return {key: f"{show(points[key][0])} [{show(bounds[key][0, 0])}, {show(bounds[key][1, 0])}]" for key in scores}


def _markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    rows: Sequence[Sequence[object]] = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
