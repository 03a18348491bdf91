"""The atlas: one panel per registered coefficient, with the multiplier of a sample's gradient against the ratio."""

import inspect
import re
from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch as th
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sb3_klip import figures
from sb3_klip.coefficients import FAMILY, Coefficient, Entry, entries, make
from sb3_klip.trust_region import categorical_ratio_bounds, default_delta

#: The probability of the action under the rollout policy.
PROBABILITY = 0.25
#: The time step within the episode.
POSITION = 1000.0
#: Ratios and multipliers that are shown.
RATIOS, MULTIPLIERS = (0.0, 2.0), (-1.6, 2.4)
#: What each family does past the bound, by its module; a family that is not here goes by the name of its module.
HEADINGS = {
    "clipping": "drop",
    "softening": "soften",
    "pushing_back": "push back",
    "reweighting": "re-weight everywhere",
    "state_kl": "bound the state's KL",
    "penalties": "penalise",
    "position": "over the episode",
}


def multiplier(coefficient: Coefficient, ratio: np.ndarray, advantage: float, clip_range: float = 0.2) -> np.ndarray:
    """
    The multiplier of ``Â ∇log π(a|s)`` in the gradient, in a state in which the other actions keep their proportions.

    Then the ratio w determines all quantities that a coefficient can request. With q = :data:`PROBABILITY` under π_old, the
    action has the probability q w, and the divergence KL(π_old ‖ π) is ``(1 - q) log((1 - q) / (1 - q w)) - q log w``. The
    gradient of this divergence is a multiple of ∇log π(a|s), with the factor ``q (w - 1) / (1 - q w)``. The time step of the
    episode is :data:`POSITION`, and the rollout is the present one.

    :param coefficient: any coefficient
    :param ratio: importance ratio w, between 0 and 1/q; shape (N,)
    :param advantage: advantage Â, not 0
    :param clip_range: half-width ε
    :return: multiplier, shape (N,): w where the gradient is unchanged, 0 where it is removed, negative where it is reversed
    """
    w = th.as_tensor(ratio)
    q = th.full_like(w, PROBABILITY)
    delta = default_delta("categorical", clip_range, 1) if coefficient.delta is None else coefficient.delta
    least, greatest = (bound.to(w) for bound in categorical_ratio_bounds(q, delta))
    removal, weight = coefficient(
        w,
        th.full_like(w, advantage),
        clip_range,
        kl=(1 - q) * ((1 - q) / (1 - q * w)).log() - q * w.log(),
        position=th.full_like(w, POSITION),
        age=th.zeros_like(w),
        old_log_prob=q.log(),
        least_ratio=least,
        greatest_ratio=greatest,
    )
    result = w * (1 - removal)
    if weight is not None:
        # The gradient of each estimate of the divergence, in units of ∇log π(a|s).
        gradients = {"analytic": q * (w - 1) / (1 - q * w), "k1": -th.ones_like(w), "k3": w - 1}
        result = result - weight * gradients[str(coefficient.estimator)] / advantage
    return result.numpy()


class Panel(NamedTuple):
    """
    A coefficient and where it is drawn.

    :param entry: the coefficient
    :param row: row of panels, from the top
    :param column: column, from the left
    :param heading: what its family does, if it is the first of it in its row
    """

    entry: Entry
    row: int
    column: int
    heading: str


def layout(columns: int) -> list[Panel]:
    """
    Places of all registered coefficients: family by family, each in a row that has room for the whole of it, if there is one.

    A program's own coefficients come last.

    :param columns: number of panels in a row
    """
    panels: list[Panel] = []
    row, column = 0, 0
    for heading, members in _families():
        if column and len(members) > columns - column:
            row, column = row + 1, 0
        for i, entry in enumerate(members):
            if column == columns:
                row, column = row + 1, 0
            panels.append(Panel(entry, row, column, heading if i == 0 or column == 0 else ""))
            column += 1
    return panels


def _families() -> Iterator[tuple[str, list[Entry]]]:
    """What the members of each family do, and the members."""
    known = entries()
    for module in FAMILY:
        name = module.__name__.rpartition(".")[2]
        yield HEADINGS.get(name, name), [entry for entry in known if inspect.getmodule(entry.function) is module]
    names = {module.__name__ for module in FAMILY}
    if own := [entry for entry in known if entry.function.__module__ not in names]:
        yield "your own", own


def caption(entry: Entry) -> str:
    """Year and arXiv number of a coefficient, and in a second line its aliases."""
    found = re.search(r"arXiv ((\d\d)\d\d\.\d{4,5})", entry.source)
    return (f"20{found[2]}, {found[1]}" if found else "") + "\n" + (", ".join(entry.aliases) or " ")


def check_clip_range(clip_range: float) -> None:
    """
    Refuse a clip range with which no figure can be drawn.

    :param clip_range: half-width ε
    :raises ValueError: if it is not between 0 and 1
    """
    if not isinstance(clip_range, Real) or not 0 < clip_range < 1:
        raise ValueError(f"clip_range={clip_range!r} must be a number between 0 and 1")


def atlas(clip_range: float = 0.2, size: str = "readme") -> Figure:
    """
    Draw :func:`multiplier` against the ratio for every registered coefficient with its defaults, one panel for each.

    :param clip_range: half-width ε
    :param size: one of :data:`sb3_klip.figures.SIZES`; the height follows from the number of panels
    :return: the figure
    :raises ValueError: if an argument is not valid
    :raises TypeError: if a coefficient of the user's own cannot be made with defaults
    """
    check_clip_range(clip_range)
    with figures.style(size) as shape:
        # Lengths in lines of text, so that titles have room at any size: of a panel, of what is above it, and of margins.
        line = matplotlib.rcParams["font.size"] / 72
        columns = int(shape[0] / (10.2 * line))
        panels = layout(columns)
        rows = panels[-1].row + 1
        width, height = (shape[0] - 4 * line) / columns, 13.2 * line
        figure = Figure(figsize=(shape[0], rows * height + 6 * line))
        figure.set_layout_engine("none")
        total = figure.get_figheight()
        for panel in panels:
            x, y = 3.4 * line + panel.column * width, 3.6 * line + (rows - 1 - panel.row) * height
            axis = figure.add_axes((x / shape[0], y / total, (width - line) / shape[0], (height - 6 * line) / total))
            _draw(axis, panel.entry, clip_range)
            below = [other for other in panels if other.column == panel.column and other.row > panel.row]
            axis.tick_params(labelleft=panel.column == 0, labelbottom=not below)
            figure.text(x / shape[0], (y + height - 2 * line) / total, panel.heading, fontweight="bold")
        figure.text(0.4 * line / shape[0], 1 - 1.5 * line / total, "multiplier of Â ∇log π(a|s)")
        figure.text(0.5, 0.6 * line / total, f"importance ratio w (grey: 1 ± ε, ε = {clip_range:g})", ha="center")
        lines = figure.axes[0].get_lines()[-2:]
        figure.legend(lines, ["Â > 0", "Â < 0"], loc="upper right", ncols=2, handlelength=2.2, borderaxespad=0.2)
        return figure


def _draw(axis: Axes, entry: Entry, clip_range: float) -> None:
    """One panel."""
    coefficient = make(entry.name)
    ratio = np.linspace(*RATIOS, 802, dtype=np.float32)[1:-1]  # as in training: a coefficient may know no other precision
    axis.axvspan(1 - clip_range, 1 + clip_range, color="0.92", linewidth=0)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.plot(RATIOS, RATIOS, color="0.6", linewidth=0.5, linestyle=":")
    for advantage, style in zip((1.0, -1.0), figures.line_styles(2), strict=True):
        axis.plot(ratio, multiplier(coefficient, ratio, advantage, clip_range), **style)
    axis.set(xlim=RATIOS, ylim=MULTIPLIERS, xticks=(0, 1, 2), yticks=(-1, 0, 1, 2))
    axis.grid(False)
    axis.tick_params(labelsize="x-small", length=2)
    size = matplotlib.rcParams["font.size"]
    place: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axis.annotate(entry.name, xytext=(0, 2.1 * size), fontsize=0.78 * size, fontfamily="monospace", **place)
    axis.annotate(caption(entry), xytext=(0, 0.2 * size), fontsize=0.7 * size, color="0.35", linespacing=1.1, **place)
