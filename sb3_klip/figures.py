"""Style and files of all figures of this package; needs the extra ``plots``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import seaborn as sns
from matplotlib.figure import Figure

from sb3_klip.errors import did_you_mean

#: Width and height in inches of one panel row: for a README, and for one column of a two-column paper.
SIZES = {"readme": (8.0, 3.2), "column": (3.4, 2.2)}
#: Dash patterns, in points, of the lines of one panel, so that they can be told apart without colour.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 1, 3, 4)))


@contextmanager
def style(size: str = "readme") -> Iterator[tuple[float, float]]:
    """
    The style of all figures, as a context manager; needs no display.

    :param size: one of :data:`SIZES`
    :return: width and height of one row of panels, in inches
    :raises ValueError: if there is no such size
    """
    if size not in SIZES:
        raise ValueError(f"size={size!r} must be one of {', '.join(SIZES)}.{did_you_mean(size, SIZES)}")
    small = size == "column"
    settings: dict[str, Any] = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 7 if small else 9,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "lines.linewidth": 1.2 if small else 1.6,
        "savefig.dpi": 300 if small else 150,
        # The same drawing gives the same file, which version control then leaves alone.
        "svg.hashsalt": "sb3-klip",
    }
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield SIZES[size]


def line_styles(count: int) -> list[dict[str, Any]]:
    """
    Keyword arguments of ``plot`` for each of ``count`` lines.

    The colours differ in lightness from one to the next, so that they can be told apart by the colour-blind and in greyscale;
    the dashes do the same.
    """
    colours = sns.color_palette("viridis", count + 1)[:count]  # the last is too light for a white page
    return [{"color": colour, "linestyle": DASHES[i % len(DASHES)]} for i, colour in enumerate(colours)]


def save(figure: Figure, path: Path) -> list[Path]:
    """
    Write a figure as SVG and as PNG.

    :param path: file to write, without a suffix; its folder is made
    :return: the two files
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    for file in files:
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    return files
