"""Figures of coefficients (without training) and of runs (from their logs): ``python -m sb3_klip.plot --help``."""

import argparse
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch as th
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from sb3_klip.coefficients import Coefficient, available, make
from sb3_klip.diagnostics import PERCENTILES
from sb3_klip.errors import did_you_mean
from sb3_klip.surrogate import per_sample_beta

try:
    from sb3_klip import figures
    from sb3_klip.atlas import atlas, check_clip_range
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    print(f'Figures need {error.name}, which is not installed: pip install "sb3-klip[plots]"', file=sys.stderr)
    sys.exit(2)

__all__ = ["atlas", "beta", "distribution", "gradient", "gradient_multiplier", "landscape", "read_coefficient", "read_log"]

#: Contours of β, each twice the one before; the colours end at twice the last.
LEVELS = (0.5, 1.0, 2.0, 4.0)
#: The most that is shown of a gradient outside the band: ``quadratic`` goes far beyond, and would flatten all others.
MULTIPLIERS = (-1.5, 3.0)
#: Points of a line: of more updates, means are drawn, as the dashes of a line cannot be told apart in noise.
POINTS = 100
#: Files of TensorBoard.
EVENTS = "events.out.tfevents.*"
FRACTIONS = ["train/kill_fraction", "train/pass_fraction"]
WEIGHT = "train/beta_scalar"
BETAS = [f"train/beta_p{level:02}" for level in PERCENTILES]
#: Columns that a log of KLip-PPO has.
NEEDED = ["time/total_timesteps", *FRACTIONS, *BETAS]

# In ASCII: a Windows console may have no Greek letters.
COMMANDS = {
    "landscape": "beta as a function of ratio and advantage, one panel per coefficient",
    "gradient": "the multiplier of a sample's gradient against the ratio",
    "atlas": "the multiplier of a sample's gradient against the ratio, one panel for every coefficient",
    "distribution": "percentiles of beta, kill fraction and pass fraction over a run",
}
DEFAULTS = {
    "landscape": ("step", "linear_ramp:width=0.3", "quadratic"),
    "gradient": ("step", "fixed:value=1,estimator=k3", "linear_ramp:width=0.1", "quadratic"),
}
EPILOG = """\
A coefficient is written as NAME or NAME:parameter=value,parameter=value. NAME is any name that beta= accepts, for example
module:function for your own. Schedules are drawn with their values at the start of training.

examples:
  python -m sb3_klip.plot landscape
  python -m sb3_klip.plot landscape step rollback:slope=1 my_package.my_module:my_function -o figures/mine
  python -m sb3_klip.plot atlas
  python -m sb3_klip.plot gradient step fixed:value=3,estimator=k3 sigmoid:temperature=0.1 --clip-range 0.1 --size column

  After a training with tensorboard_log="my_run" or callback=CSVLogCallback("my_run/progress.csv"):
  python -m sb3_klip.plot distribution my_run
In Python, sb3_klip.plot.gradient("step", "linear_ramp:width=0.2") returns the matplotlib figure.
"""


def read_coefficient(given: str | Coefficient | Callable[..., Any]) -> tuple[str, Coefficient]:
    """
    Read a coefficient from the command line or from Python.

    :param given: ``name`` or ``name:key=value,key=value``, where :func:`sb3_klip.coefficients.make` accepts the name; or a
        coefficient, a function or an object
    :return: label for a figure, and the coefficient
    :raises ValueError: if a name or value is not valid, or the coefficient depends on more than ratio and advantage
    :raises TypeError: if ``given`` is of another type, or a parameter is unknown or of a wrong type
    """
    if isinstance(given, str):
        name, separator, settings = given.rpartition(":")
        pairs = [each.strip().partition("=") for each in settings.split(",")]
        label, parameters = f"{name} ({', '.join(map(''.join, pairs))})", dict[str, Any]()
        if separator and "=" in settings:
            if missing := [key for key, equals, _ in pairs if key and not equals]:
                raise ValueError(f"{given!r}: {missing[0]!r} has no value; write NAME:parameter=value,parameter=value")
            parameters = {key: _number(value) for key, _, value in pairs}
        else:  # a plain name, or the function in module:function
            name = label = given
        coefficient = make(name, **parameters)
    elif callable(given):
        coefficient = make(given)
        name, label = coefficient.name, getattr(given, "__name__", repr(coefficient))
    else:
        raise TypeError(f"{given!r} is no coefficient: give a name, as 'linear_ramp:width=0.2', a Coefficient or a function")
    if coefficient.estimator == "analytic":
        choice = f" Its estimates can be: '{name}:estimator=k3', or k1." if "estimator" in coefficient.parameters else ""
        raise ValueError(
            f"{given!r} penalises the analytic KL divergence, which cannot be drawn over ratio and advantage.{choice}"
        )
    if needs := [key for key in coefficient.requests if key != "progress"]:
        # A program's own are in the atlas of that program alone.
        atlas_has_it = "; the atlas has it" if coefficient.name in available() and ":" not in name else ""
        raise ValueError(
            f"{given!r} cannot be drawn over ratio and advantage: it also depends on {' and '.join(needs)}{atlas_has_it}"
        )
    return label, coefficient


def beta(coefficient: Coefficient, ratio: np.ndarray, advantages: np.ndarray, clip_range: float = 0.2) -> np.ndarray:
    """
    β, the coefficient of log π in the objective ``w Â + β log π``.

    :param coefficient: a function of ratio and advantage only
    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape
    :param clip_range: half-width ε
    :return: β, same shape
    """
    # In the precision of a training, as a coefficient of the user's own may know no other.
    w, a = (th.as_tensor(array, dtype=th.float32) for array in (ratio, advantages))
    return per_sample_beta(w, a, *coefficient(w, a, clip_range), coefficient.estimator).numpy()


def gradient_multiplier(
    coefficient: Coefficient, ratio: np.ndarray, advantages: np.ndarray, clip_range: float = 0.2
) -> np.ndarray:
    """
    The multiplier of ``Â ∇log π(a|s)`` in the gradient: ``(w Â + β) / Â``, which is ``w (1 - g)`` for a removal g.

    :param coefficient: a function of ratio and advantage only
    :param ratio: importance ratio w, any shape
    :param advantages: advantage Â, same shape, not 0
    :param clip_range: half-width ε
    :return: multiplier, same shape: w where the gradient is unchanged, 0 where it is removed, negative where it is reversed
    """
    return ratio + beta(coefficient, ratio, advantages, clip_range) / advantages


def landscape(*coefficients: str | Coefficient | Callable[..., Any], clip_range: float = 0.2, size: str = "readme") -> Figure:
    """
    Draw β as a function of ratio and advantage, one panel per coefficient.

    :param coefficients: coefficients, see :func:`read_coefficient`; by default three different ones
    :param clip_range: half-width ε
    :param size: one of :data:`sb3_klip.figures.SIZES`
    :return: the figure
    :raises ValueError: if an argument is not valid, or a coefficient depends on more than ratio and advantage
    :raises TypeError: if an argument is not a coefficient
    """
    drawn = _read(coefficients or DEFAULTS["landscape"], clip_range)
    with figures.style(size) as shape:
        columns = min(len(drawn), 3)
        rows = -(-len(drawn) // columns)
        figure = Figure(figsize=(shape[0], rows * shape[1]))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        ratio, advantages = np.meshgrid(_centres(0, 2, 400), _centres(-2, 2, 400))
        norm = SymLogNorm(LEVELS[0], vmin=-2 * LEVELS[-1], vmax=2 * LEVELS[-1], base=2)
        levels = [*(-level for level in reversed(LEVELS)), *LEVELS]
        signs = ["-" if level > 0 else "--" for level in levels]
        for axis, (label, coefficient) in zip(axes.flat, drawn, strict=False):
            values = beta(coefficient, ratio, advantages, clip_range)
            image = axis.imshow(values, "vlag", norm, extent=(0, 2, -2, 2), origin="lower", aspect="auto")
            axis.contour(ratio, advantages, values, levels, colors="black", linewidths=0.6, linestyles=signs)
            for bound in (1 - clip_range, 1 + clip_range):
                axis.axvline(bound, color="black", linewidth=0.8, linestyle=":")
            axis.set_title(textwrap.fill(label, _characters(shape[0] / columns)), fontsize="medium")
            axis.set(xticks=(0, 1, 2), yticks=(-2, -1, 0, 1, 2))
            axis.grid(False)
        for axis, above in zip(axes.flat[len(drawn) :], axes.flat[len(drawn) - columns :], strict=False):
            axis.set_axis_off()
            above.tick_params(labelbottom=True)
        figure.supxlabel(f"importance ratio w (dotted: 1 ± ε, ε = {clip_range:g})", fontsize="medium")
        figure.supylabel("advantage Â", fontsize="medium")
        bar = figure.colorbar(image, ax=axes, aspect=20 * rows, extend="both", ticks=[*levels, 0], format="{x:g}")
        bar.set_label("β (solid: > 0, dashed: < 0)")
        bar.minorticks_off()
        return figure


def gradient(*coefficients: str | Coefficient | Callable[..., Any], clip_range: float = 0.2, size: str = "readme") -> Figure:
    """
    Draw the multiplier of a sample's gradient (:func:`gradient_multiplier`) against the ratio, for advantages +1 and -1.

    :param coefficients: coefficients, see :func:`read_coefficient`; by default four different ones
    :param clip_range: half-width ε
    :param size: one of :data:`sb3_klip.figures.SIZES`
    :return: the figure
    :raises ValueError: if an argument is not valid, or a coefficient depends on more than ratio and advantage
    :raises TypeError: if an argument is not a coefficient
    """
    drawn = _read(coefficients or DEFAULTS["gradient"], clip_range)
    with figures.style(size) as shape:
        characters = [len(label) + 7 for label, _ in drawn]
        room = _characters(shape[0])
        columns = len(characters) if sum(characters) <= room else max(1, room // max(characters))
        legend = -(-len(characters) // columns) * 1.6 * matplotlib.rcParams["font.size"] / 72
        figure = Figure(figsize=(shape[0], shape[1] + legend))
        axes = figure.subplots(1, 2, sharey=True)
        ratio = _centres(0, 2, 1000)
        shown = list(MULTIPLIERS)
        for axis, sign in zip(axes, (1, -1), strict=True):
            axis.axvspan(1 - clip_range, 1 + clip_range, color="0.9")
            axis.axhline(0, color="black", linewidth=0.6)
            for (_, coefficient), line in zip(drawn, figures.line_styles(len(drawn)), strict=True):
                multiplier = gradient_multiplier(coefficient, ratio, np.full_like(ratio, sign), clip_range)
                axis.plot(ratio, multiplier, **line)
                shown.extend(multiplier[np.abs(ratio - 1) < clip_range])
            axis.set_title("Â = +1" if sign > 0 else "Â = −1", fontsize="medium")
            axis.set(xlim=(0, 2), xticks=(0, 0.5, 1, 1.5, 2), xticklabels=("0", "0.5", "1", "1.5", "2"))
        low, high = axes[0].get_ylim()
        axes[0].set(ylabel="multiplier of Â ∇log π(a|s)", ylim=(max(low, min(shown)), min(high, max(shown))))
        figure.supxlabel(f"importance ratio w (grey: 1 ± ε, ε = {clip_range:g})", fontsize="medium")
        lines = axes[0].get_lines()[1:]
        figure.legend(lines, [label for label, _ in drawn], loc="outside upper center", ncols=columns, handlelength=3)
        return figure


def distribution(run: str | Path | pd.DataFrame, size: str = "readme") -> Figure:
    """
    Draw percentiles of β, and the kill and pass fractions, over a run.

    A penalty on the analytic KL divergence has no β per sample. In this case, its weight is drawn.

    :param run: path of a log, see :func:`read_log`, or the log itself
    :param size: one of :data:`sb3_klip.figures.SIZES`
    :return: the figure
    :raises ValueError: if there is no log of KLip-PPO, or more than one
    :raises TypeError: if it is neither a path nor a log
    """
    log = _updates(run, "run") if isinstance(run, pd.DataFrame) else read_log(run)
    with figures.style(size) as shape:
        rows, columns = (2, 1) if shape[0] < 5 else (1, 2)
        figure = Figure(figsize=(shape[0], rows * shape[1]))
        left, right = figure.subplots(rows, columns, sharex=True)
        updates = -(-len(log) // POINTS)
        log = log.groupby(np.arange(len(log)) // updates).mean()
        steps = log["time/total_timesteps"]
        if WEIGHT in log and not log[BETAS].any(axis=None):
            left.plot(steps, log[WEIGHT], color="black", label="weight on the KL divergence")
            left.set_ylabel("b")
        else:
            for i, grey in enumerate(("0.85", "0.7", "0.5")):
                label = f"{PERCENTILES[i]}–{PERCENTILES[-1 - i]} %"
                left.fill_between(steps, log[BETAS[i]], log[BETAS[-1 - i]], color=grey, linewidth=0, label=label)
            left.plot(steps, log["train/beta_p50"], color="black", label="median")
            left.set_ylabel("β")
        for key, line in zip(FRACTIONS, figures.line_styles(2), strict=True):
            right.plot(steps, log[key], label=key.removeprefix("train/").replace("_", " "), **line)
        right.set(ylabel="share of samples", ylim=(0, None))
        for axis in (left, right):
            axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, columnspacing=1, handlelength=1.5)
            axis.xaxis.set_major_formatter(EngFormatter())
        figure.supxlabel("environment steps" + f" (means of {updates} updates)" * (updates > 1), fontsize="medium")
        return figure


def read_log(run: str | Path) -> pd.DataFrame:
    """
    Read the log of a run, from its first update on.

    :param run: a ``progress.csv`` of :class:`~sb3_klip.callbacks.CSVLogCallback`, a TensorBoard log, or a folder that contains
        exactly one of them; a CSV file is preferred
    :return: one row per update, with the keys of the logger as columns
    :raises ValueError: if there is no such log, or more than one, or keys are missing in it
    :raises TypeError: if ``run`` is not a path
    """
    if not isinstance(run, str | Path):
        raise TypeError(f"run must be the path of a progress.csv, of a TensorBoard log or of a folder with one, not {run!r}")
    run = Path(run)
    if not run.exists():
        hint = did_you_mean(run.name, (path.name for path in run.parent.glob("*")))
        raise ValueError(
            f"run {str(run)!r} does not exist; it must be a progress.csv, a log for TensorBoard or a folder with one.{hint}"
        )
    logs = sorted(run.rglob("progress.csv")) or sorted({file.parent for file in run.rglob(EVENTS)}) if run.is_dir() else [run]
    if len(logs) != 1:
        found = (
            "".join(f"\n  {log}" for log in logs) or " none; CSVLogCallback writes the first, tensorboard_log=… the second."
        )
        raise ValueError(f"run {str(run)!r} must have exactly one progress.csv or TensorBoard log below it, but has{found}")
    read = _read_events if logs[0].is_dir() or logs[0].match(EVENTS) else _read_csv
    return _updates(read(logs[0], [*NEEDED, WEIGHT]), f"run {str(logs[0])!r}")


def _updates(log: pd.DataFrame, name: str) -> pd.DataFrame:
    """The complete rows of a log, of which there must be one."""
    missing = [key for key in NEEDED if key not in log]
    if missing or (log := log.dropna(subset=NEEDED)).empty:
        lacks = ", ".join(missing) or "complete row"
        raise ValueError(
            f"{name} has no {lacks}: it is no log of KLip-PPO, or has no update yet, which is logged after the next rollout"
        )
    return log


def _read_csv(file: Path, keys: Collection[str]) -> pd.DataFrame:
    try:
        return pd.read_csv(file, usecols=lambda column: column in keys, dtype=dict.fromkeys(keys, float))
    except ValueError as error:  # pandas' own errors are, and so are those of a file that is no text
        raise ValueError(f"run {str(file)!r} is no log in CSV: {error}") from error


def _read_events(log: Path, keys: Collection[str]) -> pd.DataFrame:
    """What SB3 wrote for TensorBoard, in which the steps are not a key of their own."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ModuleNotFoundError as error:
        raise ValueError(f'to read the TensorBoard log {str(log)!r}: pip install "sb3-klip[extra]"') from error
    events = EventAccumulator(str(log), {"scalars": 0}).Reload()  # all of them
    scalars = {key: events.Scalars(key) for key in keys if key in events.Tags()["scalars"]}
    columns = {key: pd.Series({each.step: each.value for each in values}) for key, values in scalars.items()}
    return pd.DataFrame(columns, dtype=float).rename_axis("time/total_timesteps").sort_index().reset_index().astype(float)


def _read(coefficients: Iterable[str | Coefficient | Callable[..., Any]], clip_range: float) -> list[tuple[str, Coefficient]]:
    """Coefficients, each with what it is called in a figure, once the clip range is known to be one."""
    check_clip_range(clip_range)
    return list(map(read_coefficient, coefficients))


def _centres(low: float, high: float, count: int) -> np.ndarray:
    """The centres of equal parts; the bounds at which coefficients jump are not among them."""
    return low + (np.arange(count) + 0.5) * (high - low) / count


def _characters(inches: float) -> int:
    """How many characters fit."""
    return int(inches * 72 / (0.6 * matplotlib.rcParams["font.size"]))


def _number(text: str) -> Any:
    """A number where it is one, else the text."""
    try:
        return float(text)
    except ValueError:
        return text


def _one_of(argument: str, given: str, names: Collection[str]) -> None:
    if given not in names:
        raise ValueError(f"{argument}: {given!r} must be one of {', '.join(names)}.{did_you_mean(given, names)}")


def _parser() -> argparse.ArgumentParser:
    form: dict[str, Any] = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m sb3_klip.plot", description="Draw a figure, as SVG and as PNG.", **form)
    commands = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"Draws {text}.", **form)
        if name in DEFAULTS:
            drawn = f"coefficient (default: {' '.join(DEFAULTS[name])})"
            command.add_argument("given", metavar="BETA", nargs="*", default=DEFAULTS[name], help=drawn)
        if name != "distribution":
            bounds = "half-width of the band around a ratio of 1 (default: %(default)s)"
            command.add_argument("--clip-range", metavar="E", type=float, default=0.2, help=bounds)
        else:
            where = "a progress.csv of CSVLogCallback, a TensorBoard log, or a folder that contains one"
            command.add_argument("given", metavar="RUN", type=Path, help=where)
        where = f"path of the files without .svg and .png, or a folder (default: ./{name})"
        command.add_argument("-o", "--output", metavar="PATH", type=Path, default=Path(), help=where)
        command.add_argument("--size", default="readme", help=f"{' or '.join(figures.SIZES)} (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    The command.

    :param argv: its arguments; None for those of the process
    :return: exit status
    :raises SystemExit: if an argument is not valid; its code is 2
    """
    parser = _parser()
    try:
        _run(parser, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return 130
    return 0


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    try:
        if argv and not argv[0].startswith("-"):
            _one_of("FIGURE", argv[0], COMMANDS)
        args = parser.parse_args(argv)
        _one_of("--size", args.size, figures.SIZES)
        if args.output.suffix[1:] in FigureCanvasBase.filetypes.keys() - {"svg", "png"}:
            raise ValueError(f"--output: {str(args.output)!r} is of another format than .svg and .png, which are written")
        if args.figure == "distribution":
            figure = distribution(args.given, args.size)
        else:
            draws: dict[str, Callable[..., Figure]] = {"landscape": landscape, "gradient": gradient, "atlas": atlas}
            figure = draws[args.figure](*getattr(args, "given", ()), clip_range=args.clip_range, size=args.size)
    except (TypeError, ValueError, OSError) as error:
        parser.error(str(error))
    with figures.style(args.size):
        path = args.output / args.figure if args.output.is_dir() else args.output
        try:
            print(*figures.save(figure, path.with_suffix("") if path.suffix in (".svg", ".png") else path), sep="\n")
        except OSError as error:
            parser.error(f"--output: {str(path)!r} cannot be written: {error}")


if __name__ == "__main__":
    sys.exit(main())
