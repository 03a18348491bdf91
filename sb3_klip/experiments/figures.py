"""The figures of a report: learning curves, share of clipped samples, β, sweeps and performance profiles."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rliable import library as rly

from sb3_klip.experiments.results import Result
from sb3_klip.experiments.statistics import SEED, mean_interval
from sb3_klip.figures import line_styles, save, style

#: Panels side by side.
COLUMNS = 3
#: More lines than these cannot be told apart in one panel.
LINES = 4


def save_all(
    results: Sequence[Result],
    tasks: Sequence[str],
    methods: Sequence[str],
    reference: str,
    scores: Mapping[str, np.ndarray],
    folder: Path,
    at: str = "",
) -> dict[str, str]:
    """
    Draw all figures that the results allow.

    :param results: the finished cells
    :param tasks: in the order of the panels
    :param methods: in the order of the lines
    :param reference: the one among them that others are compared with
    :param scores: normalised, seeds × tasks, by method
    :param folder: where the files go
    :param at: what the titles end with
    :return: name of the SVG file by title
    """
    sweeps = sorted({method.split("=")[0] for method in methods if "=" in method})
    figures: dict[str, Figure] = {}
    with style() as size:
        if not sweeps:
            if len(methods) <= LINES:
                figures["Learning curves"] = _by_task(results, tasks, partial(_returns, methods=methods), size, "return")
            else:
                figures["Learning curves"] = _by_method(results, tasks, methods, reference, size)
        if paired := [task for task in tasks if _pairs(_of(results, task=task))]:
            figures["PPO and KLipPPO"] = _by_task(results, paired, _ppo_and_step, size, "return")
        if "step" in methods:
            figures["Partition"] = _by_task(results, tasks, _partition, size, "share of samples")
            figures["Beta"] = _by_task(results, tasks, _beta, size, "β")
        for knob in sweeps:
            figures[f"Sweep of {knob}"] = _by_task(results, tasks, partial(_sweep, knob=knob), size, "return", knob)
        if 1 < len(scores) <= LINES:
            figures["Performance profiles"] = _profiles(scores, size)
        titled = {f"{title}{at}": figure for title, figure in figures.items()}
        return {title: save(figure, folder / title.lower().replace(" ", "_"))[0].name for title, figure in titled.items()}


def _by_task(
    results: Sequence[Result],
    tasks: Sequence[str],
    draw: Callable[[Axes, Sequence[Result]], None],
    size: tuple[float, float],
    label: str,
    x_label: str = "million steps",
) -> Figure:
    """One panel per task, and one legend for all lines that are not labelled in the panels."""
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    width, height = size
    figure = Figure(figsize=(width, height * 0.65 * rows + 0.3))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, task in zip(grid.flat, tasks, strict=False):
        axes.margins(x=0)
        draw(axes, _of(results, task=task))
        axes.set_title(task)
        axes.set_xlabel(x_label)
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    _legend(figure, "outside lower center")
    return figure


def _legend(figure: Figure, place: Any) -> None:
    """One legend for what is drawn in any of the panels."""
    entries = {text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc=place, ncols=6)


def _label_ends(axes: Axes, gap: float) -> None:
    """
    The name of each line at its right end, in its colour, instead of in a legend.

    :param gap: between names, at least, in heights of the panel
    """
    low, high = axes.get_ylim()
    ends = {line: np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}
    heights = {line: (values[np.isfinite(values)][-1] - low) / (high - low) for line, values in ends.items()}
    ordered = sorted(heights, key=heights.__getitem__)
    for lower, upper in pairwise(ordered):
        heights[upper] = max(heights[upper], heights[lower] + gap)
    limit = 1.0
    for line in reversed(ordered):
        limit = min(heights[line], limit)
        name = str(line.get_label())
        axes.text(1.02, limit, name, color=line.get_color(), transform=axes.transAxes, va="center", fontsize="small")
        line.set_label("_")
        limit -= gap


def _of(results: Sequence[Result], **about: str) -> list[Result]:
    """The results of a task, or of a method."""
    return [result for result in results if about.items() <= result.about.items()]


def _column(results: Sequence[Result], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Million steps, and the column of each run; gaps, as where no episode ended, are bridged."""
    table = pd.concat(
        [result.curve.set_index("timesteps")[name].interpolate(limit_area="inside") for result in results], axis=1
    )
    return table.index.to_numpy() / 1e6, table.to_numpy()


def _by_method(
    results: Sequence[Result], tasks: Sequence[str], methods: Sequence[str], reference: str, size: tuple[float, float]
) -> Figure:
    """One row of panels per method, with one for each task: the method against the reference."""
    others = [method for method in methods if method != reference]
    width, height = size
    figure = Figure(figsize=(width, height * 0.35 * len(others) + 0.5))
    grid = figure.subplots(len(others), len(tasks), squeeze=False, sharex=True, sharey="col")
    for row, method in zip(grid, others, strict=True):
        for axes, task in zip(row, tasks, strict=True):
            _curve(axes, _of(results, task=task, method=reference), reference, color="0.6", linewidth=2)
            _curve(axes, _of(results, task=task, method=method), method, color="black", linewidth=1)
            axes.margins(x=0)
    for axes in grid[:, -1]:
        _label_ends(axes, gap=0.2)
    for axes, task in zip(grid[0], tasks, strict=True):
        axes.set_title(task)
    figure.supxlabel("million steps", fontsize="medium")
    figure.supylabel("return", fontsize="medium")
    return figure


def _curve(axes: Axes, runs: Sequence[Result], label: str, color: Any, **line: Any) -> None:
    """Mean return over seeds, and a band for its interval."""
    if not runs:
        return
    steps, values = _column(runs, "return")
    mean = values.mean(axis=1)
    if np.isfinite(mean).any():  # where no episode has ended, there is no return
        if values.shape[1] > 1:
            axes.fill_between(steps, *mean_interval(values), color=color, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, label=label, color=color, **line)


def _returns(axes: Axes, results: Sequence[Result], methods: Sequence[str]) -> None:
    """One line for each method."""
    for method, line in zip(methods, line_styles(len(methods)), strict=True):
        _curve(axes, _of(results, method=method), method, **line)
    _label_ends(axes, gap=0.11)


def _ppo_and_step(axes: Axes, results: Sequence[Result]) -> None:
    """PPO as a broad light line, and on it the narrow dark one of ``step``, with the same seeds."""
    for pair in _pairs(results):
        steps, values = _column(pair, "return")
        axes.plot(steps, values[:, 0], color="0.75", linewidth=4, label="PPO")
        axes.plot(steps, values[:, 1], color="black", linewidth=1, label="KLipPPO")


def _pairs(results: Sequence[Result]) -> list[tuple[Result, Result]]:
    """PPO's runs and those of ``step`` with the same seed, on one task."""
    ppo, step = ({result.about["seed"]: result for result in _of(results, method=method)} for method in ("ppo", "step"))
    return [(ppo[seed], step[seed]) for seed in ppo if seed in step]


def _partition(axes: Axes, results: Sequence[Result]) -> None:
    """Kill and pass fractions of ``step``, mean over seeds."""
    runs = _of(results, method="step")
    for name, line in zip(("kill", "pass"), line_styles(2), strict=True):
        if runs:
            steps, values = _column(runs, f"{name}_fraction")
            axes.plot(steps, values.mean(axis=1), label=f"{name} set", **line)


def _beta(axes: Axes, results: Sequence[Result]) -> None:
    """Percentiles of β of ``step``, mean over seeds."""
    runs = _of(results, method="step")
    if not runs:
        return
    colour = line_styles(1)[0]["color"]
    for low, high, alpha in ((1, 99, 0.15), (5, 95, 0.3), (25, 75, 0.6)):
        steps, lower = _column(runs, f"beta_p{low:02}")
        _, upper = _column(runs, f"beta_p{high:02}")
        label = f"{low} to {high} %"
        axes.fill_between(steps, lower.mean(axis=1), upper.mean(axis=1), color=colour, alpha=alpha, linewidth=0, label=label)
    steps, median = _column(runs, "beta_p50")
    axes.plot(steps, median.mean(axis=1), color="black", linewidth=1, label="median")


def _sweep(axes: Axes, results: Sequence[Result], knob: str) -> None:
    """Final return against the value of a knob: mean over seeds, and a bar from the lowest to the highest."""
    finals: dict[float, list[float]] = {}
    for result in results:
        name, _, value = result.about["method"].partition("=")
        if name == knob and result.about["final_return"] is not None:
            finals.setdefault(float(value), []).append(result.about["final_return"])
    values = sorted(finals)
    means = np.array([np.mean(finals[value]) for value in values])
    bars = [means - [min(finals[value]) for value in values], [max(finals[value]) for value in values] - means]
    axes.errorbar(
        values, means, yerr=np.array(bars), marker="o", capsize=3, label="mean, lowest and highest", **line_styles(1)[0]
    )
    axes.set_xscale("log")
    axes.margins(x=0.05)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()


def _profiles(scores: Mapping[str, np.ndarray], size: tuple[float, float]) -> Figure:
    """For each score, the share of runs that reach it."""
    np.random.seed(SEED)  # which rliable draws from
    levels = np.linspace(0, max(1.5, max(matrix.max() for matrix in scores.values())), 101)
    profiles, bounds = rly.create_performance_profile(dict(scores), levels)
    width, height = size
    figure = Figure(figsize=(width * 0.6, height))
    axes = figure.subplots()
    for (method, profile), line in zip(profiles.items(), line_styles(len(profiles)), strict=True):
        axes.plot(levels, profile, label=method, **line)
        axes.fill_between(levels, *bounds[method], color=line["color"], alpha=0.1, linewidth=0)
    axes.set_xlabel("score τ")
    axes.set_ylabel("share of runs with score > τ")
    axes.legend()
    axes.margins(x=0)
    return figure
